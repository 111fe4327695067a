"""How the supported model families are put together: where the blocks, writes and norms are, and how a block is run.

One table instead of one wrapper per family: the analysed model stays the plain Hugging Face model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lib.cli import UserError

AttentionFunction = Callable[[nn.Module, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(attention module, query, key, value, each [row, head, position, d_head]) -> [row, position, head, d_head]."""

_ATTENTION_NAME = "mecharule"


@dataclass(frozen=True)
class Architecture:
    """Attribute names of one model family, and the order in which its blocks add things up."""

    base: str
    blocks: str
    embedding: str
    attention: str
    attention_output: str
    final_norm: str
    mid_norm: str | None
    """Norm before the MLP; None where attention and MLP read the same norm (parallel block)."""
    has_rotary_module: bool = False
    position_embedding: str | None = None

    @property
    def is_parallel(self) -> bool:
        """True if the MLP does not read what this block's attention wrote."""
        return self.mid_norm is None


_LLAMA = Architecture(
    "model", "layers", "embed_tokens", "self_attn", "o_proj", "norm", "post_attention_layernorm", has_rotary_module=True
)
ARCHITECTURES = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "gpt2": Architecture("transformer", "h", "wte", "attn", "c_proj", "ln_f", "ln_2", position_embedding="wpe"),
    "gptj": Architecture("transformer", "h", "wte", "attn", "out_proj", "ln_f", None),
}


def find_architecture(model: nn.Module) -> Architecture:
    """The family of a Hugging Face causal language model.

    Raises:
        UserError: the family is not supported.
    """
    kind = getattr(model.config, "model_type", type(model).__name__)
    if kind not in ARCHITECTURES:
        raise UserError(
            f"models of type {kind!r} are not supported; supported types: {', '.join(sorted(ARCHITECTURES))}"
        )
    if kind == "gpt2" and model.config.add_cross_attention:
        raise UserError("gpt2 with cross-attention is not a plain language model; choose a decoder-only checkpoint")
    return ARCHITECTURES[kind]


def embed(model: nn.Module, family: Architecture, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Residual stream entering the first block, [row, position, d_model], for token ids at given positions."""
    base = getattr(model, family.base)
    hidden = getattr(base, family.embedding)(ids)
    if family.position_embedding:
        hidden = hidden + getattr(base, family.position_embedding)(positions)
    return hidden


def run_block(
    model: nn.Module, family: Architecture, layer: int, hidden: torch.Tensor, positions: torch.Tensor, cache: Any
) -> torch.Tensor:
    """One block on [row, position, d_model]; keys and values pass through `cache.update(keys, values, layer)`.

    The attention itself is whatever `attention_replaced` has put in place.
    """
    base = getattr(model, family.base)
    block = getattr(base, family.blocks)[layer]
    if family.has_rotary_module:
        # Rotary tables depend on the positions only; they are the same for all layers of one pass.
        rotary = cache.rotary(base.rotary_emb, hidden, positions)
        return block(
            hidden,
            attention_mask=None,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            position_embeddings=rotary,
        )
    if family.is_parallel:
        return block(hidden, layer_past=cache, attention_mask=None, position_ids=positions, use_cache=True)[0]
    return block(hidden, past_key_values=cache, attention_mask=None, use_cache=True)


def combine(
    family: Architecture, mid: torch.Tensor, attention_write: torch.Tensor | None, mlp_write: torch.Tensor
) -> torch.Tensor:
    """The block's output from its parts, added in the model's own order so that no bit differs.

    mid: residual after attention (sequential blocks) or the block's input (parallel blocks, with `attention_write`).
    """
    if family.is_parallel:
        return attention_write + mlp_write + mid
    return mid + mlp_write


def attention_scale(module: nn.Module) -> float:
    """Factor on query-key products of an attention module."""
    return module.scaling if hasattr(module, "scaling") else 1.0 / float(module.scale_attn)


@contextlib.contextmanager
def attention_replaced(model: nn.Module, family: Architecture, attend: AttentionFunction) -> Iterator[None]:
    """While active, every attention module computes its softmax part with `attend`; undone on exit."""
    base = getattr(model, family.base)
    attentions = [getattr(block, family.attention) for block in getattr(base, family.blocks)]
    if family.is_parallel:
        for module in attentions:
            module._attn = _bound(attend, module)
        try:
            yield
        finally:
            for module in attentions:
                del module._attn
        return

    def interface(
        module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, None]:
        return attend(module, query, key, value), None

    previous = model.config._attn_implementation
    ALL_ATTENTION_FUNCTIONS.register(_ATTENTION_NAME, interface)
    model.config._attn_implementation = _ATTENTION_NAME
    try:
        yield
    finally:
        model.config._attn_implementation = previous


def _bound(attend: AttentionFunction, module: nn.Module) -> Callable[..., tuple[torch.Tensor, None]]:
    """`attend` in the form of a parallel block's own method, whose result has heads before positions."""

    def call(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any = None
    ) -> tuple[torch.Tensor, None]:
        return attend(module, query.float(), key.float(), value).transpose(1, 2), None

    return call
