"""Every reader of the residual stream with its own input: query, key, value of each head, each MLP, the logits.

A context manager on the plain model. Inside it, grouped keys and values are computed once per query head (the same
numbers, more of them), so that an edge into one head can be told from an edge into its neighbour. Each reader's input
can be shifted by itself, and the gradient at each reader's own input can be worked out after a backward pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import nn

from lib.eap.runs import mlp_norm
from lib.modeling_and_ablation import LanguageModel
from lib.prefix import KeysAndValues

READERS = ("q", "k", "v")
Shift = Callable[[str, int], torch.Tensor | None]
"""(reader kind, layer) -> what is added to its input. q, k, v: [row, head, column, d_model]; m and logits (layer -1):
[row, column, d_model]; None leaves it alone. Called while the pass is at that reader."""


class Projection(NamedTuple):
    """Where one of query, key, value of a layer is computed."""

    module: nn.Module
    columns: slice
    """Its part of the module's output."""
    weight: torch.Tensor
    """[query head, d_head, d_model]: shared key heads are repeated."""
    group: int
    """Query heads per head of the module's output."""


def projections(language_model: LanguageModel, layer: int) -> dict[str, Projection]:
    """Query, key and value projections of a layer, by "q", "k", "v"."""
    attention, d_head = language_model.attention(layer), language_model.d_head
    found = {}
    for place, reader in enumerate(READERS):
        if hasattr(attention, "c_attn"):
            module = attention.c_attn
            columns = slice(place * language_model.d_model, (place + 1) * language_model.d_model)
            weight = module.weight.T[columns]
        else:
            module = getattr(attention, f"{reader}_proj")
            columns, weight = slice(None), module.weight
        by_head = weight.reshape(-1, d_head, language_model.d_model)
        group = language_model.n_heads // len(by_head)
        found[reader] = Projection(module, columns, by_head.repeat_interleave(group, 0), group)
    return found


def norm_gradient(norm: nn.Module, x: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """Gradient at a norm's input `x` [..., d_model] from that at its output (leading axes may broadcast)."""
    x, scaled = x.float(), gradient.float() * norm.weight.float()
    if isinstance(norm, nn.LayerNorm):
        centred = x - x.mean(-1, keepdim=True)
        inverse = torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + norm.eps)
        unit = centred * inverse
        return inverse * (scaled - scaled.mean(-1, keepdim=True) - unit * (scaled * unit).mean(-1, keepdim=True))
    inverse = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)
    return inverse * scaled - x * inverse.pow(3) * (scaled * x).mean(-1, keepdim=True)


@dataclass
class SplitInputs:
    """What one pass kept: inputs of the norms, projections per query head, inputs of the MLPs."""

    language_model: LanguageModel
    attention_residuals: dict[int, torch.Tensor] = field(default_factory=dict)
    mlp_residuals: dict[int, torch.Tensor] = field(default_factory=dict)
    final_residual: torch.Tensor | None = None
    projected: dict[tuple[str, int], torch.Tensor] = field(default_factory=dict)
    """(reader, layer) -> [row, column, n_heads * d_head]"""
    mlp_inputs: dict[int, torch.Tensor] = field(default_factory=dict)

    def reader_gradients(self, loss: torch.Tensor, with_heads: bool) -> Iterator[tuple[str, int, torch.Tensor]]:
        """Gradient of the loss at each reader's own input, as (kind, layer, gradient).

        q, k, v: [row, head, column, d_model]; m and logits: [row, column, d_model].
        """
        language_model = self.language_model
        sites = {("logits", -1): self.final_residual}
        sites |= {("m", layer): tensor for layer, tensor in self.mlp_inputs.items()}
        if with_heads:
            sites |= self.projected
        gradients = dict(zip(sites, torch.autograd.grad(loss, list(sites.values())), strict=True))
        for layer in range(language_model.n_layers):
            for reader, projection in projections(language_model, layer).items() if with_heads else ():
                by_head = gradients[reader, layer].unflatten(-1, (language_model.n_heads, language_model.d_head))
                normed = torch.einsum("rche,hed->rhcd", by_head.float(), projection.weight.float())
                residual = self.attention_residuals[layer].detach()[:, None]
                yield reader, layer, norm_gradient(language_model.attention_norm(layer), residual, normed)
            residual = self.mlp_residuals[layer].detach()
            yield "m", layer, norm_gradient(mlp_norm(language_model, layer), residual, gradients["m", layer])
        yield "logits", -1, gradients["logits", -1].float()


@contextlib.contextmanager
def split_inputs(language_model: LanguageModel, shift: Shift | None = None) -> Iterator[SplitInputs]:
    """While active, passes keep (and with `shift` change) each reader's input. Undone on exit."""
    kept = SplitInputs(language_model)
    handles: list[torch.utils.hooks.RemovableHandle] = []
    groups = {}
    try:
        for layer in range(language_model.n_layers):
            attention = language_model.attention(layer)
            if hasattr(attention, "num_key_value_groups"):
                groups[layer] = attention.num_key_value_groups
                attention.num_key_value_groups = 1
            handles += _layer_hooks(kept, layer, shift)
        handles.append(language_model.final_norm.register_forward_pre_hook(_final_hook(kept, shift)))
        yield kept
    finally:
        for handle in handles:
            handle.remove()
        for layer, group in groups.items():
            language_model.attention(layer).num_key_value_groups = group


def ungrouped(prefix: KeysAndValues | None, n_heads: int) -> KeysAndValues | None:
    """A prefix with keys and values repeated for each query head, as passes inside `split_inputs` want it."""
    if prefix is None:
        return None
    return [tuple(t.repeat_interleave(n_heads // t.shape[1], 1) for t in pair) for pair in prefix]


def _layer_hooks(kept: SplitInputs, layer: int, shift: Shift | None) -> list[torch.utils.hooks.RemovableHandle]:
    language_model = kept.language_model

    def keep_residual(store: dict[int, torch.Tensor]) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple) -> None:
            store[layer] = inputs[0]

        return hook

    def mlp_input(_: nn.Module, inputs: tuple) -> tuple:
        value = inputs[0].clone()
        change = shift("m", layer) if shift else None
        if change is not None:
            norm, residual = mlp_norm(language_model, layer), kept.mlp_residuals[layer]
            value = value + _norm(norm, residual + change.to(residual.dtype)) - _norm(norm, residual)
        kept.mlp_inputs[layer] = value
        return (value, *inputs[1:])

    norm = language_model.attention_norm(layer)
    handles = [norm.register_forward_pre_hook(keep_residual(kept.attention_residuals))]
    handles.append(mlp_norm(language_model, layer).register_forward_pre_hook(keep_residual(kept.mlp_residuals)))
    handles.append(language_model.mlp(layer).register_forward_pre_hook(mlp_input))
    by_module: dict[nn.Module, dict[str, Projection]] = {}
    for reader, projection in projections(language_model, layer).items():
        by_module.setdefault(projection.module, {})[reader] = projection
    for module, readers in by_module.items():
        handles.append(module.register_forward_hook(_projection_hook(kept, layer, norm, readers, shift)))
    return handles


def _projection_hook(
    kept: SplitInputs, layer: int, norm: nn.Module, readers: dict[str, Projection], shift: Shift | None
) -> Callable[..., torch.Tensor]:
    language_model = kept.language_model

    def hook(_: nn.Module, __: tuple, output: torch.Tensor) -> torch.Tensor:
        parts = []
        for reader, projection in readers.items():
            own = output[..., projection.columns].unflatten(-1, (-1, language_model.d_head))
            own = own.repeat_interleave(projection.group, dim=-2)
            change = shift(reader, layer) if shift else None
            if change is not None:
                residual = kept.attention_residuals[layer][:, None]
                moved = _norm(norm, residual + change.to(residual.dtype)) - _norm(norm, residual)
                own = own + torch.einsum("rhcd,hed->rche", moved, projection.weight)
            kept.projected[reader, layer] = own.flatten(-2)
            parts.append(kept.projected[reader, layer])
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    return hook


def _norm(norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """A norm's output without triggering its hooks."""
    return norm.forward(x)


def _final_hook(kept: SplitInputs, shift: Shift | None) -> Callable[..., tuple]:
    def hook(_: nn.Module, inputs: tuple) -> tuple:
        change = shift("logits", -1) if shift else None
        kept.final_residual = inputs[0] if change is None else inputs[0] + change.to(inputs[0].dtype)
        return (kept.final_residual, *inputs[1:])

    return hook
