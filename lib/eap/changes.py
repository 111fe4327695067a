"""What is attributed: replacement minus clean value of every write."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lib.eap.pairs import PairBatch
from lib.eap.runs import Observation, Watch, observe
from lib.eap.scores import AttributionIntervention, AttributionSettings
from lib.interventions import ReplacementTable
from lib.modeling_and_ablation import LanguageModel


@dataclass(frozen=True)
class Changes:
    """Replacement minus clean value of every write, in the columns run, zero where nothing is replaced.

    embedding: towards the corrupted tokens, whatever the writes are replaced by, [pair, column, d_model]. mlp: layer ->
    the same shape. mixes: layer -> change of the heads' mixes before the
    output projection, [pair, column, heads * d_head]. With a mean table, a head's change is the table's value (where
    `replaced`, [pair, column, 1]) on top of the removal of its own mix.
    """

    embedding: torch.Tensor
    mlp: dict[int, torch.Tensor]
    mixes: dict[int, torch.Tensor]
    replaced: torch.Tensor
    positions: torch.Tensor
    table: ReplacementTable | None

    @property
    def head_layers(self) -> list[int]:
        """Layers whose heads are attributed."""
        return sorted(self.mixes)

    def head(self, language_model: LanguageModel, layer: int, head: int) -> torch.Tensor:
        """Change of one head's write, [pair, column, d_model]."""
        width = language_model.d_head
        own = self.mixes[layer][..., head * width : (head + 1) * width]
        change = language_model.write(own @ language_model.head_output_weight(layer)[head].float())
        return change + self._replacement(layer, head) if self.table else change

    def attention(self, language_model: LanguageModel, layer: int) -> torch.Tensor:
        """Change of all head writes of a layer together, [pair, column, d_model]."""
        weight = language_model.head_output_weight(layer).float().flatten(0, 1)
        change = language_model.write(self.mixes[layer] @ weight)
        if self.table:
            change = change + sum(self._replacement(layer, head) for head in range(language_model.n_heads))
        return change

    def head_scores(self, language_model: LanguageModel, layer: int, gradient: torch.Tensor) -> torch.Tensor:
        """Change times gradient of one layer's head writes, summed over columns, [pair, head, d_model].

        gradient: at the attention's output, [pair, column, d_model]. The write is linear in the mix, so the sum over
        positions is taken before the output projection and no head's write is ever formed.
        """
        weight = language_model.head_output_weight(layer).float()
        if language_model.centred_writes:
            weight = weight - weight.mean(dim=-1, keepdim=True)
        moments = self.mixes[layer].transpose(1, 2) @ gradient
        scores = (moments.unflatten(1, weight.shape[:2]) * weight).sum(dim=2)
        if self.table:
            for head in range(language_model.n_heads):
                scores[:, head] += (self._replacement(layer, head) * gradient).sum(dim=1)
        return scores

    def _replacement(self, layer: int, head: int) -> torch.Tensor:
        return torch.where(self.replaced, table_values(self.table, f"a{layer}.h{head}", self.positions), 0.0)


def table_values(table: ReplacementTable, label: str, positions: torch.Tensor) -> torch.Tensor:
    """Replacement write of a component at token positions [pair, column], [pair, column, d_model]."""
    return table.values(label, positions, torch.arange(len(positions), device=positions.device))


def prepare_table(language_model: LanguageModel, table: ReplacementTable | None, with_heads: bool) -> None:
    """Compute all values that will be asked for in one pass over the references, before any hook is in place."""
    if table is None:
        return
    heads = range(language_model.n_heads if with_heads else 0)
    layers = range(language_model.n_layers)
    table.prepare([f"m{layer}" for layer in layers] + [f"a{layer}.h{head}" for layer in layers for head in heads])


def first_column(batch: PairBatch, settings: AttributionSettings) -> int:
    """First column in which a replacement changes anything: earlier ones are the clean run's, whatever happens."""
    if settings.decode_only:
        return batch.border - 1
    if settings.intervention is AttributionIntervention.PATCHING:
        return min(batch.n_identical_columns(), batch.border - 1)
    return 0


def replaced_columns(batch: PairBatch, settings: AttributionSettings) -> torch.Tensor:
    """Columns whose activations are replaced, [pair, column] bool, all columns."""
    patching = settings.intervention is AttributionIntervention.PATCHING
    columns = batch.has_counterpart if patching else batch.is_real[0]
    return columns & batch.scored if settings.decode_only else columns


def prepare(
    language_model: LanguageModel,
    batch: PairBatch,
    settings: AttributionSettings,
    table: ReplacementTable | None,
    watch: Watch,
) -> tuple[Observation, Changes]:
    """Run both sides of a batch and work out the changes that are attributed.

    table: replacement values of the mean interventions; None for patching and zero.
    """
    prepare_table(language_model, table, settings.with_heads)
    first = first_column(batch, settings)
    patching = settings.intervention is AttributionIntervention.PATCHING
    observation = observe(language_model, batch, first, watch, with_corrupted=patching)
    replaced = replaced_columns(batch, settings)[:, first:, None]
    positions = batch.positions[0][:, first:]
    clean, corrupted = observation.clean, observation.corrupted

    def change(new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
        return torch.where(replaced, new.float() - old.float(), 0.0)

    def new_mlp(layer: int, old: torch.Tensor) -> torch.Tensor:
        if patching:
            return language_model.write(corrupted.mlp_outputs[layer])
        return table_values(table, f"m{layer}", positions) if table else torch.zeros_like(old)

    mlp = {}
    for layer, output in clean.mlp_outputs.items():
        old = language_model.write(output)
        mlp[layer] = change(new_mlp(layer, old), old)
    mixes = {
        layer: change(corrupted.mixes[layer] if patching else torch.zeros_like(mix), mix)
        for layer, mix in clean.mixes.items()
    }
    moved = (replaced_columns(batch, settings) & batch.has_counterpart)[:, first:, None]
    corrupted_embeddings = language_model.model.get_input_embeddings()(batch.ids[1][:, first:])
    embedding = torch.where(moved, corrupted_embeddings.float() - clean.embeddings.float(), 0.0)
    return observation, Changes(embedding, mlp, mixes, replaced, positions, None if patching else table)
