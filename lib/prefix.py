"""Tokens that several sequences begin with are run through the model once: their keys and values are shared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from transformers import DynamicCache

if TYPE_CHECKING:
    from lib.modeling_and_ablation import LanguageModel

KeysAndValues = list[tuple[torch.Tensor, torch.Tensor]]
"""Per layer (keys, values), each [row, key head, position, d_head]."""


def common_prefix_length(sequences: Sequence[Sequence[int]]) -> int:
    """Number of leading tokens that all sequences share."""
    if not sequences:
        return 0
    # The lexicographically smallest and largest differ first where any two of them do.
    low, high = min(sequences, key=tuple), max(sequences, key=tuple)
    for position, (left, right) in enumerate(zip(low, high, strict=False)):
        if left != right:
            return position
    return min(len(low), len(high))


def keys_and_values(cache: DynamicCache, n_positions: int | None = None) -> KeysAndValues:
    """Keys and values of the first positions of a cache that a forward pass filled."""
    return [(layer.keys[:, :, :n_positions], layer.values[:, :, :n_positions]) for layer in cache.layers]


def shared_cache(prefix: KeysAndValues, n_rows: int) -> DynamicCache:
    """A cache that holds `prefix` for each of `n_rows` rows; a prefix of fewer rows is repeated row by row.

    Extending the cache makes new tensors: the prefix itself is never written to.
    """
    cache = DynamicCache()
    for layer, (keys, values) in enumerate(prefix):
        repeats = n_rows // len(keys)
        cache.update(keys.repeat_interleave(repeats, 0), values.repeat_interleave(repeats, 0), layer)
    return cache


def prefix_keys_and_values(language_model: LanguageModel, prefix: Sequence[int]) -> KeysAndValues:
    """Keys and values [1 row] of a non-empty run of tokens at the start of a sequence."""
    with torch.no_grad():
        tokens = torch.tensor([list(prefix)], device=language_model.device)
        output = language_model.base(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=True)
    return keys_and_values(output.past_key_values)
