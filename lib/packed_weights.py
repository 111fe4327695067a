"""Weights in the order in which the processor's matrix products read them.

A product with ordinary weights brings them into that order on every call. For the few rows of a decoding step this
takes longer than multiplying, and even for hundreds of rows oneDNN's products on weights ordered once are a tenth to a
quarter faster than those on ordinary ones. The price is a second copy of the weights.
"""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Callable, Iterator

import torch
from torch import nn

_MOST_PRODUCTS = "64"
"""oneDNN keeps code for as many kinds of products, half a megabyte each; its own default is 1,024. A kind is a shape of
weights and a number of rows, and a pass through the blocks uses a few kinds for all layers."""


def pack_weights(model: nn.Module, blocks: nn.ModuleList, most_bytes: int) -> int:
    """Order the weights of all projections in a model's blocks, once; they are used within `packed_products`.

    Nothing happens where it does not pay (only float32 on an x86 processor is known to), or where the copy would take
    more than `most_bytes`. Returns the size of the copy in bytes, 0 if there is none.
    """
    projections = [module for module in blocks.modules() if _is_projection(module)]
    weights = [module.weight for module in projections]
    n_bytes = sum(weight.nbytes for weight in weights)
    if model not in _packed:
        if not _is_supported(weights) or n_bytes > most_bytes:
            return 0
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", _MOST_PRODUCTS)
        _packed[model] = [(module, _packed_forward(module)) for module in projections]
    return n_bytes


@contextlib.contextmanager
def packed_products(model: nn.Module) -> Iterator[None]:
    """While active, a model whose weights are ordered multiplies with them; without gradients. Hooks work as ever."""
    projections = _packed.get(model, [])
    for module, forward in projections:
        module.forward = forward
    try:
        yield
    finally:
        for module, _ in projections:
            del module.forward


_packed: weakref.WeakKeyDictionary[nn.Module, list[tuple[nn.Module, Callable[[torch.Tensor], torch.Tensor]]]]
_packed = weakref.WeakKeyDictionary()


def _is_projection(module: nn.Module) -> bool:
    """True for a linear layer, also in GPT-2's form with the weight turned round."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _is_supported(weights: list[torch.Tensor]) -> bool:
    """True if there is a product for weights ordered in advance, and these are of the right kind."""
    has_product = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    is_x86 = torch.backends.cpu.get_cpu_capability().startswith("AVX")
    is_plain = all(weight.dtype == torch.float32 and weight.device.type == "cpu" for weight in weights)
    return has_product and is_x86 and is_plain


def _packed_forward(module: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """What a projection's `forward` computes, with its weight ordered."""
    weight = module.weight.detach() if isinstance(module, nn.Linear) else module.weight.detach().T.contiguous()
    packed = torch.ops.mkldnn._reorder_linear_weight(weight)
    bias = None if module.bias is None else module.bias.detach()

    def forward(values: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(values, packed, bias, "none", [], "")

    return forward
