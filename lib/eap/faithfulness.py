"""Does a circuit by itself give the clean run's answers? Everything else is ablated, the way stage 6 ablates."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from lib.eap.changes import first_column, prepare_table, replaced_columns, table_values
from lib.eap.circuits import Layout
from lib.eap.metrics import Metric, TokenAggregation, Yardstick
from lib.eap.pairs import Pair, PairBatch, for_each_batch
from lib.eap.runs import AttentionEdit, Edit, Observation, Watch, answer_logits, observe, run
from lib.eap.scores import AttributionIntervention, AttributionSettings
from lib.interventions import ReplacementTable
from lib.modeling_and_ablation import LanguageModel

_SMALLEST_GAP = 1e-6


class RunQuality(NamedTuple):
    """How close runs are to the clean one, per pair."""

    answer_probability: np.ndarray
    """Geometric mean of the recorded answer tokens' probabilities, [pair]."""
    divergence: np.ndarray
    """Mean divergence of the next-token distributions from the clean ones, [pair]."""
    agrees: np.ndarray
    """1 where every answer position has the clean run's most probable token, [pair]."""


class Faithfulness(NamedTuple):
    """Quality of the unablated run, of the run with every candidate ablated, and of the circuit alone."""

    full: RunQuality
    empty: RunQuality
    circuit: RunQuality

    def blocks(self) -> dict[str, Any]:
        """The blocks of `eval.json`."""
        full, empty, circuit = (quality.answer_probability for quality in self)
        gap = full - empty
        shares = [
            float(np.clip((c - e) / g, 0, 1)) if abs(g) > _SMALLEST_GAP else None
            for c, e, g in zip(circuit, empty, gap, strict=True)
        ]
        mean_gap = float(gap.mean())
        ratio = float((circuit - empty).mean() / mean_gap) if abs(mean_gap) > _SMALLEST_GAP else None
        return {
            "NL_full": _block(full),
            "NL_empty": _block(empty),
            "NL_c": _block(circuit),
            "faithfulness": {**_block([s for s in shares if s is not None]), "data": shares, "ratio_of_means": ratio},
            "kl_from_clean": {"empty": _block(self.empty.divergence), "circuit": _block(self.circuit.divergence)},
            "answer_agreement": {
                "empty": float(self.empty.agrees.mean()),
                "circuit": float(self.circuit.agrees.mean()),
            },
            "measure": "NL: geometric mean of the recorded answer tokens' probabilities, one value per pair; "
            "faithfulness: (NL_c - NL_empty) / (NL_full - NL_empty)",
        }


def _block(values: Sequence[float] | np.ndarray) -> dict[str, Any]:
    values = np.asarray(values, dtype=float)
    mean, std = (float(values.mean()), float(values.std())) if len(values) else (None, None)
    return {"mean": mean, "std": std, "data": values.tolist()}


class Keep(NamedTuple):
    """What stays as the model computes it."""

    mask: torch.Tensor
    """[component row, d_model] bool, or [component row, reader column] for edges; rows and columns as in `Layout`."""
    with_heads: bool
    """False: attention is not ablated at all, whatever the mask says."""
    embedding: bool
    """True: the token embeddings stay."""


def evaluate_circuit(
    language_model: LanguageModel,
    pairs: Sequence[Pair],
    layout: Layout,
    keep: Keep,
    intervention: AttributionIntervention,
    *,
    decode_only: bool,
    batch_size: int,
    table: ReplacementTable | None,
    of_edges: bool = False,
    progress: Iterable[int] = (),
) -> Faithfulness:
    """Run every pair's clean side three times: untouched, with all candidates ablated, with all but the circuit.

    of_edges: `keep.mask` is about edges, and a write is replaced only as the readers outside the circuit see it.
    """
    from lib.eap.edge_faithfulness import EdgeEvaluation

    settings = AttributionSettings(intervention=intervention, decode_only=decode_only)
    nothing = keep._replace(mask=torch.zeros_like(keep.mask), embedding=keep.embedding and not keep.with_heads)
    collected: list[list[RunQuality]] = [[], [], []]
    numbers: list[int] = []
    kind = EdgeEvaluation if of_edges else BatchEvaluation

    def work(batch: PairBatch) -> None:
        evaluation = kind(language_model, batch, layout, settings, table, keep.with_heads)
        qualities = [evaluation.quality(kept) for kept in (None, nothing, keep)]
        for runs, quality in zip(collected, qualities, strict=True):
            runs.append(quality)
        numbers.extend(batch.numbers)

    for_each_batch(pairs, batch_size, language_model, work, progress)
    order = np.argsort(numbers)
    joined = (RunQuality(*(np.concatenate(parts)[order] for parts in zip(*runs, strict=True))) for runs in collected)
    return Faithfulness(*joined)


class BatchEvaluation:
    """Ablated runs of one batch's clean side."""

    def __init__(
        self,
        language_model: LanguageModel,
        batch: PairBatch,
        layout: Layout,
        settings: AttributionSettings,
        table: ReplacementTable | None,
        with_heads: bool,
    ) -> None:
        self.language_model, self.batch, self.layout, self.table = language_model, batch, layout, table
        prepare_table(language_model, table, with_heads)
        self.patching = settings.intervention is AttributionIntervention.PATCHING
        first = first_column(batch, settings)
        watch = Watch(attention=with_heads)
        self.observation: Observation = observe(language_model, batch, first, watch, with_corrupted=self.patching)
        self.replaced = replaced_columns(batch, settings)[:, first:, None]
        self.positions = batch.positions[0][:, first:]
        self.yardstick = Yardstick.of_batch(batch, Metric.LOG_PROB, TokenAggregation.MEAN)
        self.clean_logits = self._logits(self.observation.clean.final).float()

    def _logits(self, final: torch.Tensor) -> torch.Tensor:
        first, border = self.observation.frame.first, self.batch.border
        with torch.no_grad():
            return answer_logits(self.language_model, final, self.yardstick.is_scored, first, border)

    def quality(self, keep: Keep | None) -> RunQuality:
        """Quality of a run in which everything outside `keep` is ablated; None ablates nothing."""
        logits = self.clean_logits if keep is None else self.ablated_logits(keep)
        scored = self.yardstick.is_scored
        distance = self.yardstick.measure(logits)
        clean, current = self.clean_logits.log_softmax(-1), logits.log_softmax(-1)
        divergence = torch.zeros(scored.shape, device=logits.device)
        divergence = divergence.masked_scatter(scored, (clean.exp() * (clean - current)).sum(-1))
        same = torch.ones(scored.shape, dtype=torch.bool, device=logits.device)
        same = same.masked_scatter(scored, clean.argmax(-1) == current.argmax(-1))
        mean_divergence = TokenAggregation.MEAN.apply(divergence, scored).clamp(min=0)
        return RunQuality(
            (-distance).exp().cpu().numpy().astype(float),
            mean_divergence.cpu().numpy().astype(float),
            same.all(dim=1).cpu().numpy().astype(float),
        )

    def ablated_logits(self, keep: Keep) -> torch.Tensor:
        """Logits at the scored tokens when everything outside `keep` is ablated."""
        layers = range(self.language_model.n_layers)
        embeddings = self.observation.clean.embeddings
        if self.patching and not keep.embedding:
            embeddings = torch.where(self.replaced, self.observation.corrupted.embeddings, embeddings)
        mlp_edits = {layer: self._mlp_edit(layer, keep.mask[self.layout.mlp_row(layer)]) for layer in layers}
        attention_edits = {}
        if keep.with_heads:
            for layer in layers:
                rows = slice(self.layout.head_row(layer, 0), self.layout.mlp_row(layer))
                attention_edits[layer] = self._attention_edit(layer, keep.mask[rows])
        frame = self.observation.frame
        with torch.no_grad():
            kept, _ = run(
                self.language_model,
                embeddings,
                frame,
                Watch(mlp=False),
                mlp_edits=mlp_edits,
                attention_edits=attention_edits,
            )
        return self._logits(kept.final).float()

    def _mlp_edit(self, layer: int, kept: torch.Tensor) -> Edit:
        language_model = self.language_model

        def edit(output: torch.Tensor) -> torch.Tensor:
            write = language_model.write(output)
            if self.patching:
                new = language_model.write(self.observation.corrupted.mlp_outputs[layer])
            else:
                new = self._table_values(f"m{layer}", write)
            return output + torch.where(self.replaced & ~kept, new - write, 0.0).to(output.dtype)

        return edit

    def _attention_edit(self, layer: int, kept: torch.Tensor) -> AttentionEdit:
        """kept: [head, d_model]."""
        language_model = self.language_model
        weight = language_model.head_output_weight(layer)

        def head_writes(mix: torch.Tensor) -> torch.Tensor:
            by_head = mix.unflatten(-1, (language_model.n_heads, language_model.d_head))
            return language_model.write(torch.einsum("rchk,hkd->rchd", by_head, weight))

        def edit(output: torch.Tensor, mix: torch.Tensor) -> torch.Tensor:
            writes = head_writes(mix)
            if self.patching:
                new = head_writes(self.observation.corrupted.mixes[layer])
            else:
                heads = range(language_model.n_heads)
                new = torch.stack([self._table_values(f"a{layer}.h{head}", output) for head in heads], dim=2)
            change = torch.where(self.replaced[..., None, :] & ~kept, new - writes, 0.0)
            return output + change.sum(dim=2).to(output.dtype)

        return edit

    def _table_values(self, label: str, like: torch.Tensor) -> torch.Tensor:
        if self.table is None:
            return torch.zeros_like(like)
        return table_values(self.table, label, self.positions).to(like.dtype)
