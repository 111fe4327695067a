"""Activations by their usual names (`ln_final.hook_normalized`, `blocks.3.hook_resid_post`), on the plain model."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn

from lib.cli import UserError

if TYPE_CHECKING:
    from lib.modeling_and_ablation import LanguageModel

_BLOCK_NAME = re.compile(r"blocks\.(\d+)\.(.+)\Z")
_MLP_LAST_LINEAR = ("down_proj", "c_proj", "fc_out")
_MLP_FIRST_LINEAR = ("gate_proj", "c_fc", "fc_in")


@dataclass(frozen=True)
class HookSite:
    """Where an activation is read: a module's input or output, and what is done to it."""

    module: nn.Module
    is_input: bool = False
    transform: Callable[[torch.Tensor], torch.Tensor] = torch.Tensor.detach

    def watch(self, keep: Callable[[torch.Tensor], None]) -> torch.utils.hooks.RemovableHandle:
        """Call `keep(activation [row, position, width])` at each forward pass, until the handle is removed."""

        def take(
            _: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor | tuple[torch.Tensor, ...]
        ) -> None:
            value = inputs[0] if self.is_input else output
            keep(self.transform(value[0] if isinstance(value, tuple) else value))

        return self.module.register_forward_hook(take)


def find_hook_site(language_model: LanguageModel, name: str) -> HookSite:
    """The site of a hook name.

    Raises:
        UserError: the model has no such activation; the message lists the names it has.
    """
    match = _BLOCK_NAME.match(name)
    sites = _block_sites(language_model, int(match[1])) if match and int(match[1]) < language_model.n_layers else None
    site = (sites or {}).get(match[2]) if match else _outer_sites(language_model).get(name)
    if site is None:
        raise UserError(
            f"--rep_hook_name {name!r} is not an activation of {language_model.name}; it has "
            f"{', '.join(_outer_sites(language_model))} and, for layers l = 0..{language_model.n_layers - 1}, "
            + ", ".join(f"blocks.l.{known}" for known in _block_sites(language_model, 0))
        )
    return site


def _outer_sites(language_model: LanguageModel) -> dict[str, HookSite]:
    norm = language_model.final_norm
    return {
        "hook_embed": HookSite(language_model.model.get_input_embeddings()),
        "ln_final.hook_normalized": HookSite(norm, is_input=True, transform=partial(normalise, norm)),
        "ln_final.hook_out": HookSite(norm),
    }


def _block_sites(language_model: LanguageModel, layer: int) -> dict[str, HookSite]:
    block, mlp = language_model.blocks[layer], language_model.mlp(layer)
    norm = language_model.attention_norm(layer)
    sites = {
        "hook_resid_pre": HookSite(block, is_input=True),
        "hook_resid_post": HookSite(block),
        "hook_attn_out": HookSite(language_model.attention_output(layer)),
        "hook_mlp_out": HookSite(mlp),
        "attn.hook_z": HookSite(language_model.attention_output(layer), is_input=True),
        "ln1.hook_normalized": HookSite(norm, is_input=True, transform=partial(normalise, norm)),
        **_projection_sites(language_model.attention(layer), language_model.d_model),
    }
    if not language_model.is_parallel:
        mid_norm = getattr(block, language_model.family.mid_norm)
        sites["hook_resid_mid"] = HookSite(mid_norm, is_input=True)
        sites["ln2.hook_normalized"] = HookSite(mid_norm, is_input=True, transform=partial(normalise, mid_norm))
    for name in _MLP_FIRST_LINEAR:
        if hasattr(mlp, name):
            sites["mlp.hook_pre"] = HookSite(getattr(mlp, name))
    for name in _MLP_LAST_LINEAR:
        if hasattr(mlp, name):
            sites["mlp.hook_post"] = HookSite(getattr(mlp, name), is_input=True)
    return sites


def _projection_sites(attention: nn.Module, d_model: int) -> dict[str, HookSite]:
    """Queries, keys and values of all heads side by side, before any rotation by position."""
    sites = {}
    for place, reader in enumerate("qkv"):
        if hasattr(attention, "c_attn"):
            columns = slice(place * d_model, (place + 1) * d_model)
            module, transform = attention.c_attn, partial(_columns, columns)
        else:
            module, transform = getattr(attention, f"{reader}_proj"), torch.Tensor.detach
        sites[f"attn.hook_{reader}"] = HookSite(module, transform=transform)
    return sites


def _columns(columns: slice, x: torch.Tensor) -> torch.Tensor:
    return x.detach()[..., columns]


def normalise(norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """`x` [..., d_model] scaled by a norm module's own rule, before its gain and bias."""
    x = x.detach().float()
    if isinstance(norm, nn.LayerNorm):
        return nn.functional.layer_norm(x, (x.shape[-1],), eps=norm.eps)
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)
