"""Stage 6's access to the analysed model: loaded once, with replacement values per regime and an engine per rule."""

from __future__ import annotations

from argparse import Namespace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lib.ablation_engine import AblationEngine
from lib.agonist_diagnostics import LayerValues
from lib.agonist_sites import measure_sites
from lib.artifacts import file_digest
from lib.cli import Report
from lib.flip_oracle import FlipOracle
from lib.interventions import DecodeScope, Intervention, ReplacementTable, build_table
from lib.modeling_and_ablation import LanguageModel, load_language_model
from lib.neurons import Neuron
from lib.stages.agonist_prepare import Inputs, MakeAnswers, reference_rows

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lib.stages.agonist_oracle import FlipAnswers


class AgonistModel:
    """Makes the flip oracles that the flags ask for."""

    def __init__(self, args: Namespace, inputs: Inputs, report: Report) -> None:
        self.args, self.inputs, self.report = args, inputs, report
        self.intervention = Intervention(args.intervention)
        self._tables: dict[str, ReplacementTable] = {}

    @cached_property
    def language_model(self) -> LanguageModel:
        """The model, loaded on first need."""
        args = self.args
        return load_language_model(
            self.inputs.info.ai_model, device=args.device, dtype=args.dtype, cache_dir=args.ai_model_cache_dir
        )

    def identity(self, regime: str) -> dict[str, Any]:
        """What decides the outcome of a group test on a datapoint of a regime."""
        args, table = self.args, self.inputs.table
        return {
            "version": 1,
            "model": self.language_model.digest,
            "intervention": args.intervention,
            "references": reference_rows(table, regime, args.points_to_use_for_mean_ablation, args.seed).tolist(),
            "decode_only": args.decode_only,
            "decode_scope": args.decode_scope,
            "regime": regime,
            "task": self.inputs.task.settings.to_json(),
            "task_module": args.task_module,
            "scores": file_digest(table.path),
            "seed": args.seed,
        }

    def answers_for(self, regime: str) -> MakeAnswers:
        """Makes the oracle of any datapoints of a regime."""
        return lambda rows: self._oracle(regime, rows)

    def measure(
        self, answers: FlipAnswers, datapoints: np.ndarray, neurons: Sequence[Neuron]
    ) -> tuple[np.ndarray, list[LayerValues]]:
        """What neurons and their layers do where an ablation begins: (positions in `datapoints`, values per neuron).

        Datapoints without an answer token within the intervention's reach are left out. An attention unit's layer is
        that of all heads.
        """
        engine, lm = answers.engine, self.language_model
        sites = engine.sites(datapoints.tolist())
        layers = {neuron.layer_label: _components(neuron, lm.n_heads) for neuron in neurons}
        found = measure_sites(lm, engine.table, sites, sorted({name for names in layers.values() for name in names}))
        values = []
        for neuron in neurons:
            names = layers[neuron.layer_label]
            activations, gradients = (
                np.concatenate([table[name].numpy() for name in names], axis=1)
                for table in (found.activations, found.gradients)
            )
            place = names.index(neuron.layer_label) * lm.d_model + neuron.index
            replacement = found.replacements[neuron.layer_label][:, neuron.index].numpy()
            values.append(LayerValues(place, activations, gradients, replacement, found.margins.numpy()))
        kept = np.isin(datapoints, [site.datapoint for site in sites])
        return np.flatnonzero(kept), values

    def _oracle(self, regime: str, rows: np.ndarray) -> FlipOracle:
        args, task, table = self.args, self.inputs.task, self.inputs.table
        prompts = table.frame[table.prompt_col].iloc[rows].tolist()
        engine = AblationEngine(
            self.language_model,
            prompts,
            self._table(regime, prompts),
            max_new_tokens=task.MAX_NEW_TOKENS,
            decode_only=args.decode_only,
            decode_scope=DecodeScope(args.decode_scope),
            is_complete=task.answer_is_complete,
            memory_mb=args.memory_mb,
            batch_size=args.batch_size,
            report=self.report,
        )
        return FlipOracle(engine, task.is_answer_positive, table.records(rows), task.label_is_settled)

    def _table(self, regime: str, prompts: Sequence[str]) -> ReplacementTable:
        """Replacement values of a regime; RESAMPLE draws a donor per datapoint, so its table is made anew."""
        args = self.args
        if regime not in self._tables or self.intervention is Intervention.RESAMPLE:
            rows = reference_rows(self.inputs.table, regime, args.points_to_use_for_mean_ablation, args.seed)
            references = self.inputs.table.frame[self.inputs.table.prompt_col].iloc[rows].tolist()
            self._tables[regime] = build_table(
                self.language_model,
                self.intervention,
                references,
                max_new_tokens=self.inputs.task.MAX_NEW_TOKENS,
                prompts=prompts,
                seed=args.seed,
                cache_dir=Path(args.cache_dir) if args.cache_dir else None,
                batch_size=args.batch_size,
            )
        return self._tables[regime]


def _components(neuron: Neuron, n_heads: int) -> list[str]:
    """The components that make up a neuron's layer."""
    if neuron.head is None:
        return [neuron.layer_label]
    return [f"a{neuron.layer}.h{head}" for head in range(n_heads)]
