"""Running the sequences of a batch on the plain model, with its components' activations in hand.

Columns before the first one of interest are run once, without gradients: their keys and values serve all later runs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypedDict

import torch
from torch import nn

from lib.prefix import KeysAndValues, keys_and_values, shared_cache

if TYPE_CHECKING:
    from lib.eap.pairs import PairBatch
    from lib.modeling_and_ablation import LanguageModel

Edit = Callable[[torch.Tensor], torch.Tensor]
"""Changes an MLP's output, [row, column, d_model] -> the same shape."""
AttentionEdit = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Changes attention's output [row, column, d_model], given its heads' mixes [row, column, heads * d_head] too."""


class Edits(TypedDict, total=False):
    """Those arguments of `run` that replace writes, by layer."""

    mlp_edits: dict[int, Edit]
    attention_edits: dict[int, AttentionEdit]


def edit_of(kind: str, layer: int, edit: Edit) -> Edits:
    """One edit, of the write of a layer's "mlp" or "attention"."""
    if kind == "mlp":
        return {"mlp_edits": {layer: edit}}
    return {"attention_edits": {layer: lambda output, _: edit(output)}}


def adding(steps: torch.Tensor) -> Edit:
    """The edit that moves a write by `steps` [row, column, d_model]."""
    return lambda output: output + steps.to(output.dtype)


@dataclass
class Activations:
    """What one pass computed, per layer [row, column, width], as raw module values (uncentred, any autograd graph)."""

    embeddings: torch.Tensor
    mlp_outputs: dict[int, torch.Tensor] = field(default_factory=dict)
    mlp_inputs: dict[int, torch.Tensor] = field(default_factory=dict)
    mlp_norm_inputs: dict[int, torch.Tensor] = field(default_factory=dict)
    attention_outputs: dict[int, torch.Tensor] = field(default_factory=dict)
    mixes: dict[int, torch.Tensor] = field(default_factory=dict)
    final: torch.Tensor | None = None
    """Output of the final norm."""


@dataclass(frozen=True)
class Watch:
    """Which activations a pass keeps."""

    mlp: bool = True
    mlp_inputs: bool = False
    """MLP inputs, cut off from everything else that reads the same tensor."""
    attention: bool = False


@dataclass(frozen=True)
class Frame:
    """The columns that a run covers, on top of columns whose keys and values are known.

    first: first column run. is_real, positions: of all columns, [row, column]. prefix: keys and values of the columns
    before `first`, one entry per pair or a single one.
    """

    first: int
    is_real: torch.Tensor
    positions: torch.Tensor
    prefix: KeysAndValues | None

    def repeated(self, times: int) -> Frame:
        """For runs with `times` rows per row here."""
        if times == 1:
            return self
        is_real, positions = (tensor.repeat_interleave(times, 0) for tensor in (self.is_real, self.positions))
        return replace(self, is_real=is_real, positions=positions)


def mlp_norm(language_model: LanguageModel, layer: int) -> nn.Module:
    """The norm whose output a layer's MLP reads; parallel blocks share it with attention."""
    block = language_model.blocks[layer]
    return block.ln_1 if language_model.is_parallel else getattr(block, language_model.family.mid_norm)


@contextlib.contextmanager
def _watching(
    language_model: LanguageModel,
    kept: Activations,
    watch: Watch,
    mlp_edits: dict[int, Edit],
    attention_edits: dict[int, AttentionEdit],
) -> Iterator[None]:
    handles = []

    def keep_output(store: dict[int, torch.Tensor], layer: int, edit: Edit | None = None) -> Callable[..., object]:
        def hook(_: nn.Module, __: tuple, output: torch.Tensor) -> torch.Tensor | None:
            store[layer] = output if edit is None else edit(output)
            return None if edit is None else store[layer]

        return hook

    def keep_input(store: dict[int, torch.Tensor], layer: int, edit: Edit | None = None) -> Callable[..., object]:
        def hook(_: nn.Module, inputs: tuple) -> tuple | None:
            store[layer] = inputs[0] if edit is None else edit(inputs[0])
            return None if edit is None else (store[layer], *inputs[1:])

        return hook

    try:
        for layer in range(language_model.n_layers):
            mlp, attention = language_model.mlp(layer), language_model.attention_output(layer)
            if watch.mlp or layer in mlp_edits:
                handles.append(mlp.register_forward_hook(keep_output(kept.mlp_outputs, layer, mlp_edits.get(layer))))
            if watch.mlp_inputs:
                handles.append(mlp.register_forward_pre_hook(keep_input(kept.mlp_inputs, layer, torch.clone)))
                norm = mlp_norm(language_model, layer)
                handles.append(norm.register_forward_pre_hook(keep_input(kept.mlp_norm_inputs, layer)))
            if watch.attention or layer in attention_edits:
                edit = _with_mix(attention_edits.get(layer), kept, layer)
                handles.append(attention.register_forward_pre_hook(keep_input(kept.mixes, layer)))
                handles.append(attention.register_forward_hook(keep_output(kept.attention_outputs, layer, edit)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _with_mix(edit: AttentionEdit | None, kept: Activations, layer: int) -> Edit | None:
    """An attention edit that finds the mixes in what this pass has kept."""
    return None if edit is None else lambda output: edit(output, kept.mixes[layer])


def run(
    language_model: LanguageModel,
    embeddings: torch.Tensor,
    frame: Frame,
    watch: Watch,
    *,
    mlp_edits: dict[int, Edit] | None = None,
    attention_edits: dict[int, AttentionEdit] | None = None,
    keep_cache: bool = False,
    kept: Activations | None = None,
) -> tuple[Activations, KeysAndValues | None]:
    """One forward pass over token embeddings [row, column from frame.first, d_model].

    Edits replace a layer's MLP or attention output. Returns the activations and, if asked for, keys and
    values of all columns. `kept`, if given, is filled as the pass goes along, for edits that look at earlier layers.
    """
    kept = kept or Activations(embeddings)
    cache = shared_cache(frame.prefix, len(embeddings)) if frame.prefix else None
    with _watching(language_model, kept, watch, mlp_edits or {}, attention_edits or {}):
        output = language_model.base(
            inputs_embeds=embeddings,
            attention_mask=frame.is_real.long(),
            position_ids=frame.positions[:, frame.first :],
            past_key_values=cache,
            use_cache=keep_cache or cache is not None,
        )
    kept.final = output.last_hidden_state
    return kept, keys_and_values(output.past_key_values) if keep_cache else None


def answer_logits(
    language_model: LanguageModel, final: torch.Tensor, is_scored: torch.Tensor, first: int, border: int
) -> torch.Tensor:
    """Logits at the scored tokens only, [scored token in row-major order, vocabulary].

    final: [row, column from `first`, d_model]. is_scored: [row, answer token]; token t is predicted in column
    border - 1 + t.
    """
    start = border - 1 - first
    return language_model.lm_head(final[:, start : start + is_scored.shape[1]][is_scored])


@dataclass(frozen=True)
class Observation:
    """Both sides of a batch, run without gradients, from the first column of interest on."""

    frame: Frame
    """Clean rows, on top of the clean prefix."""
    clean: Activations
    corrupted: Activations


def observe(
    language_model: LanguageModel, batch: PairBatch, first: int, watch: Watch, *, with_corrupted: bool = True
) -> Observation:
    """Run clean and corrupted sequences in one pass; columns that all rows share are run once.

    first: first column whose activations are wanted; at most border - 1.
    """
    n_sides = 2 if with_corrupted else 1
    ids = batch.ids[:n_sides].flatten(0, 1)
    is_real, positions = batch.is_real[:n_sides].flatten(0, 1), batch.positions[:n_sides].flatten(0, 1)
    same = (ids == ids[:1]) & is_real
    n_shared = min(int(same.all(dim=0).long().cumprod(dim=0).sum()), first)
    embed = language_model.model.get_input_embeddings()
    with torch.no_grad():
        prefix = None
        if n_shared:
            head = Frame(0, is_real[:1, :n_shared], positions[:1, :n_shared], None)
            _, prefix = run(language_model, embed(ids[:1, :n_shared]), head, Watch(mlp=False), keep_cache=True)
        frame = Frame(n_shared, is_real, positions, prefix)
        kept, cache = run(language_model, embed(ids[:, n_shared:]), frame, watch, keep_cache=first > 0)
    clean_prefix = [(k[: batch.n_pairs, :, :first], v[: batch.n_pairs, :, :first]) for k, v in cache] if first else None
    clean_frame = Frame(first, batch.is_real[0], batch.positions[0], clean_prefix)
    sides = [_slice(kept, side * batch.n_pairs, batch.n_pairs, first - n_shared) for side in range(n_sides)]
    return Observation(clean_frame, sides[0], sides[-1])


def _slice(kept: Activations, first_row: int, n_rows: int, first_column: int) -> Activations:
    rows = slice(first_row, first_row + n_rows)

    def cut(table: dict[int, torch.Tensor]) -> dict[int, torch.Tensor]:
        return {layer: tensor[rows, first_column:] for layer, tensor in table.items()}

    return Activations(
        kept.embeddings[rows, first_column:],
        cut(kept.mlp_outputs),
        cut(kept.mlp_inputs),
        cut(kept.mlp_norm_inputs),
        cut(kept.attention_outputs),
        cut(kept.mixes),
        kept.final[rows, first_column:],
    )
