"""Keys and values of prompts' beginnings for the ablation engine; what several prompts begin with is run once."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch

from lib.architectures import embed, run_block
from lib.engine_forward import MINUS_INFINITY, Prefix, WindowCache, causal_bias, engine_pass, shared_attention
from lib.modeling_and_ablation import LanguageModel
from lib.prefix import common_prefix_length

_TRIP = 64
"""Tokens whose arithmetic costs about as much as reading the weights once more."""


def prefill(lm: LanguageModel, prefixes: Sequence[Sequence[int]]) -> Prefix:
    """Keys and values of the prefixes, right-padded.

    Beginnings that all or some of them share are run once: a few that stand for many, then longer ones behind them.
    """
    begun, start = _nothing(lm), 0
    known: list[tuple[int, ...]] = [()]
    for length in (*_levels(prefixes), None):
        wanted = [tuple(prefix[:length]) for prefix in prefixes]
        if length is not None:
            wanted = sorted(set(wanted))
        place = {beginning: number for number, beginning in enumerate(known)}
        owners = torch.tensor([place[prefix[:start]] for prefix in wanted], device=lm.device)
        rests = [prefix[start:] for prefix in wanted]
        if any(rests):
            # Behind a single datapoint all are its groups: one matrix product serves them all.
            begun = _extend(lm, begun if len(known) == 1 else begun.select(owners), rests, start)
        else:
            begun = begun.select(owners)
        known, start = wanted, length or 0
    return begun


def _levels(prefixes: Sequence[Sequence[int]]) -> list[int]:
    """Lengths, ascending, up to which different beginnings are run before what follows them: the fewest tokens.

    A trip through the network is counted as `_TRIP` tokens.
    """
    ordered = sorted(map(tuple, prefixes))
    shared = np.array([common_prefix_length(pair) for pair in pairwise(ordered)], dtype=int)
    # Longer beginnings become more only behind a length that neighbours share.
    shortest = min(map(len, ordered))
    lengths = [0, *sorted({int(n) for n in shared if 0 < n <= shortest})]
    best: dict[int, tuple[int, list[int]]] = {0: (0, [])}
    for end in lengths[1:]:
        n_different = 1 + int((shared < end).sum())
        costs = [(best[start][0] + n_different * (end - start) + _TRIP, start) for start in lengths if start < end]
        cost, start = min(costs)
        best[end] = cost, [*best[start][1], end]
    return min((cost - len(ordered) * end, levels) for end, (cost, levels) in best.items())[1]


def _extend(lm: LanguageModel, before: Prefix, sequences: Sequence[Sequence[int]], start: int) -> Prefix:
    """The prefix of each sequence put behind `before`: `start` tokens of one datapoint, or of one for each sequence."""
    lengths = torch.tensor([len(sequence) for sequence in sequences], device=lm.device)
    width = int(lengths.max())
    shape = (len(sequences), lm.n_kv_heads, width, lm.d_head)
    keys, values = (
        [torch.zeros(shape, device=lm.device, dtype=lm.dtype) for _ in range(lm.n_layers)] for _ in range(2)
    )
    for members in _parts(lengths.tolist()):
        rows = torch.tensor(members, device=lm.device)
        of_rows = before if len(before.bias) == 1 else before.select(rows)
        cache = _run_behind(lm, of_rows, [sequences[row] for row in members], start)
        for kept, new in zip((*keys, *values), (*cache.keys, *cache.values), strict=True):
            kept[rows, :, : new.shape[2]] = new

    def joined(shared: list[torch.Tensor], own: list[torch.Tensor]) -> list[torch.Tensor]:
        pairs = zip(shared, own, strict=True)
        return [torch.cat([first.expand(len(sequences), -1, -1, -1), second], dim=2) for first, second in pairs]

    is_padding = torch.arange(width, device=lm.device)[None] >= lengths[:, None]
    bias = torch.zeros(is_padding.shape, device=lm.device).masked_fill(is_padding, MINUS_INFINITY)
    bias = torch.cat([bias.new_zeros(len(sequences), start), bias], dim=1)
    return Prefix(joined(before.keys, keys), joined(before.values, values), bias)


def _parts(lengths: Sequence[int]) -> list[list[int]]:
    """Rows that are run together, shorter ones first: parted where the padding that it saves is worth a trip.

    Rows without tokens are in no part.
    """
    parts: list[list[int]] = []
    for row in sorted((row for row, length in enumerate(lengths) if length), key=lengths.__getitem__):
        if not parts or len(parts[-1]) * (lengths[row] - lengths[parts[-1][-1]]) >= _TRIP:
            parts.append([])
        parts[-1].append(row)
    return parts


def _run_behind(lm: LanguageModel, before: Prefix, sequences: Sequence[Sequence[int]], start: int) -> WindowCache:
    """Keys and values of tokens behind `before`, as in `_extend`, right-padded."""
    width = max(map(len, sequences))
    tokens = torch.full((len(sequences), width), lm.pad_token_id)
    for row, sequence in enumerate(sequences):
        tokens[row, : len(sequence)] = torch.tensor(list(sequence), dtype=torch.long)
    tokens = tokens.to(lm.device)
    cache = WindowCache.empty(lm.n_layers)
    positions = (start + torch.arange(width, device=lm.device)).expand(len(sequences), -1)
    # Sequences behind a single datapoint are its groups; padding is at the end, so causality hides it.
    attend = shared_attention(before, causal_bias(width, lm.device))
    with engine_pass(lm, attend):
        hidden = embed(lm.model, lm.family, tokens, positions)
        for layer in range(lm.n_layers):
            hidden = run_block(lm.model, lm.family, layer, hidden, positions, cache)
    return cache


def _nothing(lm: LanguageModel) -> Prefix:
    """A prefix without tokens, of one datapoint."""
    empty = [torch.zeros(1, lm.n_kv_heads, 0, lm.d_head, device=lm.device, dtype=lm.dtype)] * lm.n_layers
    return Prefix(empty, empty, torch.zeros(1, 0, device=lm.device))
