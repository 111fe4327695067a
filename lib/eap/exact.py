"""Exact effects: the metric's change when one unit really is replaced. One run per unit: small models, few units."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lib.eap.attribution import clean_yardstick
from lib.eap.changes import Changes, prepare
from lib.eap.metrics import Yardstick
from lib.eap.pairs import PairBatch
from lib.eap.runs import Edits, Observation, Watch, adding, answer_logits, edit_of, run
from lib.eap.scores import AttributionSettings, WriteScores
from lib.interventions import ReplacementTable
from lib.modeling_and_ablation import LanguageModel

_ROWS_PER_RUN = 256


class ExactRuns:
    """Metric changes of one batch under replacements, many units per run."""

    def __init__(
        self,
        language_model: LanguageModel,
        batch: PairBatch,
        settings: AttributionSettings,
        table: ReplacementTable | None,
    ) -> None:
        self.language_model = language_model
        self.border = batch.border
        watch = Watch(attention=settings.with_heads)
        self.observation: Observation
        self.changes: Changes
        self.observation, self.changes = prepare(language_model, batch, settings, table, watch)
        self.yardstick: Yardstick = clean_yardstick(language_model, batch, settings, self.observation)
        self.n_pairs = batch.n_pairs
        self.clean_value = self._measure(1, self.observation.clean.embeddings, {})

    def _measure(self, n_units: int, embeddings: torch.Tensor, edits: Edits) -> torch.Tensor:
        """Metric of each pair under each unit's replacement, [pair, unit]."""
        frame = self.observation.frame.repeated(n_units)
        with torch.no_grad():
            kept, _ = run(self.language_model, embeddings, frame, Watch(mlp=False), **edits)
            yardstick = self.yardstick.repeated(n_units)
            logits = answer_logits(self.language_model, kept.final, yardstick.is_scored, frame.first, self.border)
            return yardstick.measure(logits).unflatten(0, (self.n_pairs, n_units))

    def unit_effects(self, kind: str, layer: int, change: torch.Tensor, whole_write: bool) -> torch.Tensor:
        """Effects of all coordinates of a component, [pair, d_model], or of its whole write, [pair, 1]."""
        if whole_write:
            return self.effect(kind, layer, change).T
        return self.coordinate_effects(kind, layer, change, range(self.language_model.d_model)).T

    def coordinate_effects(self, kind: str, layer: int, change: torch.Tensor, units: Sequence[int]) -> torch.Tensor:
        """Metric change when single coordinates of one component are replaced, [unit, pair].

        kind: "mlp", "attention" or "embedding". change: [pair, column, d_model].
        """
        effects = []
        n_at_once = max(1, _ROWS_PER_RUN // self.n_pairs)
        for start in range(0, len(units), n_at_once):
            chosen = torch.tensor(units[start : start + n_at_once], device=change.device)
            mask = torch.nn.functional.one_hot(chosen, self.language_model.d_model)
            steps = (change[:, None] * mask[None, :, None, :]).flatten(0, 1)
            effects.append(self.effect(kind, layer, steps, len(chosen)))
        return torch.cat(effects)

    def effect(self, kind: str, layer: int, steps: torch.Tensor, n_units: int = 1) -> torch.Tensor:
        """Metric change when `steps` [pair * unit, column, d_model] is added to a write, [unit, pair] float64."""
        embeddings = self.observation.clean.embeddings.repeat_interleave(n_units, 0)
        edits: Edits = {}
        if kind == "embedding":
            embeddings = embeddings + steps.to(embeddings.dtype)
        else:
            edits = edit_of(kind, layer, adding(steps))
        return (self._measure(n_units, embeddings, edits) - self.clean_value).double().T


def exact_scores(
    language_model: LanguageModel,
    batch: PairBatch,
    settings: AttributionSettings,
    table: ReplacementTable | None,
    scores: WriteScores,
) -> None:
    """Adds the exact effect of every unit of one batch to `scores`: each coordinate, or each whole write, by itself."""
    runs = ExactRuns(language_model, batch, settings, table)
    for layer, change in runs.changes.mlp.items():
        scores.add_mlp(layer, runs.unit_effects("mlp", layer, change, scores.whole_writes))
    for layer in runs.changes.head_layers:
        for head in range(language_model.n_heads):
            change = runs.changes.head(language_model, layer, head)
            scores.add_heads(layer, runs.unit_effects("attention", layer, change, scores.whole_writes), head)
    scores.add_embedding(runs.unit_effects("embedding", 0, runs.changes.embedding, scores.whole_writes))
