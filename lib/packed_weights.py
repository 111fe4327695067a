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

_KERNELS_KEPT = "64"
"""oneDNN keeps code for as many shapes of products, half a megabyte each; its own default of 1,024 is no faster here.
Of effect if nothing in the process has used oneDNN before."""


def pack_weights(model: nn.Module, blocks: nn.ModuleList, most_bytes: int) -> int:
    """Order the weights of all projections in a model's blocks, once; they are used within `packed_products`.

    Nothing happens where it does not pay (only float32 on an x86 processor is known to), or where the weights take more
    than `most_bytes`. The weights must not change afterwards. Returns their size in bytes, 0 if there is no copy.
    """
    projections = [module for module in blocks.modules() if _is_projection(module)]
    weights = [module.weight for module in projections]
    n_bytes = sum(weight.nbytes for weight in weights)
    if model not in _packed:
        if not _is_supported(weights) or n_bytes > most_bytes:
            return 0
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", _KERNELS_KEPT)
        _packed[model] = [(module, _packed_forward(module)) for module in projections]
    return n_bytes


def unpack_weights(model: nn.Module) -> None:
    """Drop the copy of a model's weights, if there is one."""
    _packed.pop(model, None)


@contextlib.contextmanager
def packed_products(model: nn.Module) -> Iterator[None]:
    """While active, a model whose weights are ordered multiplies with them; hooks work as ever.

    Only for passes without gradients, and not within itself.
    """
    projections = _packed.get(model, [])
    try:
        for module, forward in projections:
            module.forward = forward
        yield
    finally:
        for module, _ in projections:
            vars(module).pop("forward", None)


_packed: weakref.WeakKeyDictionary[nn.Module, list[tuple[nn.Module, Callable[[torch.Tensor], torch.Tensor]]]]
_packed = weakref.WeakKeyDictionary()


def _is_projection(module: nn.Module) -> bool:
    """True for a linear layer, also in GPT-2's form with the weight turned round."""
    return type(module) is nn.Linear or type(module).__name__ == "Conv1D"


def _is_supported(weights: list[torch.Tensor]) -> bool:
    """True if there is a product for weights ordered in advance, and these are of the right kind."""
    needed = ("_linear_pointwise", "_reorder_linear_weight")
    has_product = torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, name) for name in needed)
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
