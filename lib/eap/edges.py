"""Edge attribution: how much one component's write matters through one reader of the stream.

The reader's input is the residual stream before its norm (for the logits: before the final norm), so that replacing
what all components write into all readers is exactly the corrupted run.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from lib.cli import UserError
from lib.eap.attribution import check_settings, clean_yardstick
from lib.eap.changes import Changes, prepare
from lib.eap.circuits import Layout
from lib.eap.metrics import Yardstick
from lib.eap.pairs import Pair, PairBatch, for_each_batch
from lib.eap.runs import Edits, Frame, Observation, Watch, adding, answer_logits, edit_of, run
from lib.eap.scores import AttributionIntervention, AttributionSettings, GradientSite, Method
from lib.eap.split_inputs import READERS, split_inputs, ungrouped
from lib.interventions import ReplacementTable
from lib.modeling_and_ablation import LanguageModel

_EXACT_ROWS = 64


@dataclass
class EdgeScores:
    """Scores [component row, reader column], summed over pairs, float64; zero where there is no edge."""

    signed: np.ndarray
    magnitude: np.ndarray

    @classmethod
    def empty(cls, layout: Layout) -> EdgeScores:
        """No pairs yet."""
        return cls(np.zeros((layout.n_rows, layout.n_columns)), np.zeros((layout.n_rows, layout.n_columns)))

    def add(self, values: torch.Tensor, rows: slice = slice(None), columns: slice = slice(None)) -> None:
        """Add scores of some pairs, [pair, row, column]."""
        values = values.double().cpu().numpy()
        self.signed[rows, columns] += values.sum(axis=0)
        self.magnitude[rows, columns] += np.abs(values).sum(axis=0)

    def arrays(self) -> dict[str, np.ndarray]:
        """As stored on disk."""
        return {"edges": self.signed, "edges_magnitude": self.magnitude}


def attribute_edges(
    language_model: LanguageModel,
    pairs: Sequence[Pair],
    settings: AttributionSettings,
    layout: Layout,
    *,
    batch_size: int,
    table: ReplacementTable | None = None,
    progress: Iterable[int] = (),
) -> EdgeScores:
    """Scores of all edges, summed over the pairs. Without heads: edges among the input, MLPs and logits only."""
    check_settings(settings)
    if settings.gradient_site is GradientSite.MLP_IN:
        raise UserError("--mlp_grad_site mlp_in is about neurons and nodes; an edge's gradient is taken where it ends")
    scores = EdgeScores.empty(layout)

    def work(batch: PairBatch) -> None:
        own = EdgeScores.empty(layout)
        EdgeBatch(language_model, batch, settings, layout, table).score(own)
        scores.signed += own.signed
        scores.magnitude += own.magnitude

    for_each_batch(pairs, batch_size, language_model, work, progress)
    exists = layout.edges()
    scores.signed[~exists] = 0.0
    scores.magnitude[~exists] = 0.0
    return scores


class EdgeBatch:
    """Edge scores of one batch."""

    def __init__(
        self,
        language_model: LanguageModel,
        batch: PairBatch,
        settings: AttributionSettings,
        layout: Layout,
        table: ReplacementTable | None,
    ) -> None:
        if settings.method is Method.INFORMATION_FLOW_ROUTES:
            # Nothing is replaced; this makes all positions of the clean side run, shared ones too.
            settings = replace(settings, intervention=AttributionIntervention.ZERO)
        self.language_model, self.batch, self.settings, self.layout = language_model, batch, settings, layout
        watch = Watch(attention=settings.with_heads)
        self.observation: Observation
        self.changes: Changes
        self.observation, self.changes = prepare(language_model, batch, settings, table, watch)
        frame = self.observation.frame
        self.frame = replace(frame, prefix=ungrouped(frame.prefix, language_model.n_heads))
        self.yardstick = clean_yardstick(language_model, batch, settings, self.observation)

    def score(self, scores: EdgeScores) -> None:
        """Add this batch's scores."""
        method = self.settings.method
        if method is Method.EXACT:
            self._exact(scores)
        elif method is Method.INFORMATION_FLOW_ROUTES:
            self._routes(scores)
        elif method is Method.EAP_IG_ACTIVATIONS:
            self._own_paths(scores)
        else:
            self._input_path(scores)

    # ------------------------------------------------------------ gradients

    def source_changes(self) -> Iterator[tuple[slice, str, int, torch.Tensor]]:
        """(rows, kind, layer, change) of each group of sources, change [pair, row, column, d_model]."""
        yield slice(0, 1), "embedding", 0, self.changes.embedding[:, None]
        for layer in sorted(self.changes.mlp):
            if layer in self.changes.mixes:
                heads = range(self.language_model.n_heads)
                writes = [self.changes.head(self.language_model, layer, head) for head in heads]
                rows = slice(self.layout.head_row(layer, 0), self.layout.mlp_row(layer))
                yield rows, "attention", layer, torch.stack(writes, dim=1)
            row = self.layout.mlp_row(layer)
            yield slice(row, row + 1), "mlp", layer, self.changes.mlp[layer][:, None]

    def _gradients(
        self, embeddings: torch.Tensor, n_points: int, edits: Edits
    ) -> Iterator[tuple[slice, torch.Tensor]]:
        """(columns, gradient [pair, reader, column, d_model] averaged over the points) of each group of readers."""
        with torch.enable_grad(), split_inputs(self.language_model) as kept:
            frame = self.frame.repeated(n_points)
            activations, _ = run(self.language_model, embeddings, frame, Watch(mlp=False), **edits)
            loss = self._loss(activations.final, frame, self.yardstick.repeated(n_points)).sum()
            gradients = list(kept.reader_gradients(loss, self.settings.with_heads))
        for kind, layer, gradient in gradients:
            if kind not in READERS:
                gradient = gradient[:, None]
            yield self.layout.reader_columns(kind, layer), gradient.unflatten(0, (-1, n_points)).mean(dim=1)

    def _loss(self, final: torch.Tensor, frame: Frame, yardstick: Yardstick) -> torch.Tensor:
        logits = answer_logits(self.language_model, final, yardstick.is_scored, frame.first, self.batch.border)
        return yardstick.measure(logits)

    def _input_path(self, scores: EdgeScores) -> None:
        alphas = torch.tensor(self.settings.alphas, device=self.language_model.device)
        clean = self.observation.clean.embeddings
        step = self.changes.embedding.to(clean.dtype)[:, None] * alphas[None, :, None, None].to(clean.dtype)
        points = (clean[:, None] + step).flatten(0, 1).requires_grad_()
        sources = list(self.source_changes())
        for columns, gradient in self._gradients(points, len(alphas), {}):
            for rows, _, _, change in sources:
                scores.add(torch.einsum("pucd,pvcd->puv", change, gradient), rows, columns)

    def _own_paths(self, scores: EdgeScores) -> None:
        alphas = torch.tensor(self.settings.alphas, device=self.language_model.device)
        clean = self.observation.clean.embeddings.repeat_interleave(len(alphas), 0)
        for rows, kind, layer, change in self.source_changes():
            together = change.sum(dim=1)
            step = (together[:, None] * alphas[None, :, None, None]).flatten(0, 1).to(clean.dtype).requires_grad_()
            if kind == "embedding":
                found = self._gradients(clean + step, len(alphas), {})
            else:
                found = self._gradients(clean.requires_grad_(), len(alphas), edit_of(kind, layer, adding(step)))
            for columns, gradient in found:
                scores.add(torch.einsum("pucd,pvcd->puv", change, gradient), rows, columns)

    # ------------------------------------------------------------ without gradients

    def _exact(self, scores: EdgeScores) -> None:
        """Really add each source's change to each reader's input, one edge per row of a batch."""
        clean_value = self._loss(self.observation.clean.final, self.frame, self.yardstick)
        exists = self.layout.edges()
        for rows, _, _, changes in self.source_changes():
            for row, change in zip(range(rows.start, rows.stop), changes.unbind(1), strict=True):
                for kind, layer in self._reader_groups():
                    columns = self.layout.reader_columns(kind, layer)
                    if not exists[row, columns].any():
                        continue
                    effects = self._reader_effects(kind, layer, change) - clean_value[:, None]
                    scores.add(effects[:, None], slice(row, row + 1), columns)

    def _reader_groups(self) -> list[tuple[str, int]]:
        kinds = (*READERS, "m") if self.settings.with_heads else ("m",)
        return [(kind, layer) for layer in range(self.layout.n_layers) for kind in kinds] + [("logits", -1)]

    def _reader_effects(self, kind: str, layer: int, change: torch.Tensor) -> torch.Tensor:
        """Metric when `change` [pair, column, d_model] enters each reader of a group by itself, [pair, reader]."""
        n_readers = self.layout.n_heads if kind in READERS else 1
        n_pairs = len(change)
        found = []
        n_at_once = max(1, _EXACT_ROWS // n_pairs)
        for start in range(0, n_readers, n_at_once):
            heads = torch.arange(start, min(start + n_at_once, n_readers), device=change.device)
            repeated = change.repeat_interleave(len(heads), 0)
            if kind in READERS:
                own = torch.nn.functional.one_hot(heads, self.layout.n_heads).repeat(n_pairs, 1)
                repeated = repeated[:, None] * own[:, :, None, None]
            embeddings = self.observation.clean.embeddings.repeat_interleave(len(heads), 0)
            frame = self.frame.repeated(len(heads))

            def shift(at: str, where: int, repeated: torch.Tensor = repeated) -> torch.Tensor | None:
                return repeated if (at, where) == (kind, layer) else None

            with torch.no_grad(), split_inputs(self.language_model, shift):
                activations, _ = run(self.language_model, embeddings, frame, Watch(mlp=False))
                value = self._loss(activations.final, frame, self.yardstick.repeated(len(heads)))
            found.append(value.unflatten(0, (n_pairs, len(heads))))
        return torch.cat(found, dim=1)

    def _routes(self, scores: EdgeScores) -> None:
        """Information flow routes: how much nearer a write brings a reader's input to zero when taken away (L1 norm).

        Shares of each reader's sources, averaged over the clean side's positions (Ferrando and Voita, 2024, without
        their split of heads by source position).
        """
        language_model, frame = self.language_model, self.frame
        watch = Watch(attention=self.settings.with_heads)
        with torch.no_grad(), split_inputs(language_model) as kept:
            activations, _ = run(language_model, self.observation.clean.embeddings, frame, watch)
        writes = torch.zeros(*activations.embeddings.shape[:2], self.layout.n_rows, self.layout.d_model)
        writes[:, :, 0] = language_model.write(kept.attention_residuals[0]).cpu()
        for layer, output in activations.mlp_outputs.items():
            writes[:, :, self.layout.mlp_row(layer)] = language_model.write(output).cpu()
        for layer, mix in activations.mixes.items():
            by_head = mix.unflatten(-1, (language_model.n_heads, language_model.d_head))
            rows = slice(self.layout.head_row(layer, 0), self.layout.mlp_row(layer))
            weight = language_model.head_output_weight(layer)
            writes[:, :, rows] = language_model.write(torch.einsum("rchk,hkd->rchd", by_head, weight)).cpu()
        is_real = (self.batch.scored if self.settings.decode_only else self.batch.is_real[0])[:, frame.first :].cpu()
        exists = torch.from_numpy(self.layout.edges())
        for kind, layer in self._reader_groups():
            columns = self.layout.reader_columns(kind, layer)
            residual = {"m": kept.mlp_residuals, "logits": {-1: kept.final_residual}}.get(
                kind, kept.attention_residuals
            )
            target = language_model.write(residual[layer]).float().cpu()[:, :, None]
            nearness = (target.abs().sum(-1) - (target - writes).abs().sum(-1)).clamp(min=0)
            nearness = nearness * exists[:, columns.start]
            shares = nearness / nearness.sum(-1, keepdim=True).clamp(min=1e-12)
            mean = torch.where(is_real[..., None], shares, 0).sum(1) / is_real.sum(1).clamp(min=1)[:, None]
            scores.add(mean[..., None].expand(-1, -1, columns.stop - columns.start), columns=columns)
