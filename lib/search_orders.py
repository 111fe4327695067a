"""In which order candidates stand, and which trees are searched over them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial

import numpy as np


class SearchOrder(Enum):
    """How candidates are arranged for the search."""

    BISECT = "bisect"
    """Published: one tree per layer over its candidates in random order, the root split by score sign if wanted."""

    ATTRIBUTION = "attribution"
    """One forest over all layers, strongest attribution first within each tree: strong candidates share subtrees. A
    tree holds one sign and a third of the layers."""


@dataclass(frozen=True)
class Forest:
    """Candidates in a row, and the trees over them: a node is a span of the row.

    order: candidate index at each place, [place]. starts, ends: span of each root, [root]. cuts: place where a root is
    split, or NO_CUT for the middle, [root]. cut_names: why it is split there, [root]. shown: the order in which a root
    lists its members where that differs from `order`.
    """

    order: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    cuts: np.ndarray
    cut_names: tuple[str, ...]
    shown: Mapping[int, np.ndarray]

    @property
    def n_candidates(self) -> int:
        """Number of candidates."""
        return len(self.order)


NO_CUT = -1
_N_BANDS = 3
"""Bands of layers that have trees of their own."""
_STRETCH = (256, 16)
"""Longest and shortest stretch of candidates that are sorted by layer."""
PLAIN_CUT = "bisect"


def bisect_forest(
    layers: Sequence[np.ndarray],
    scores: np.ndarray,
    has_scores: np.ndarray,
    generators: Sequence[np.random.Generator],
    *,
    sign_split: bool,
) -> Forest:
    """One tree per layer over its candidates in random order.

    layers: candidate indices of each layer. scores: signed attribution, 0 where missing, [candidate]. has_scores: the
    layer has any score, [layer]. generators: one random stream per layer. sign_split: the root's halves are the
    candidates with scores >= 0 and those below; each keeps the random order.
    """
    rows, cuts, names, shown = [], [], [], {}
    start = 0
    for number, (members, generator) in enumerate(zip(layers, generators, strict=True)):
        shuffled = generator.permutation(members)
        cut, name = NO_CUT, PLAIN_CUT
        if sign_split and has_scores[number]:
            negative = scores[shuffled] < 0
            n_first = int((~negative).sum())
            name = "bisect_fallback"
            if 0 < n_first < len(shuffled):
                shown[number] = shuffled
                shuffled = np.concatenate([shuffled[~negative], shuffled[negative]])
                cut, name = start + n_first, "score_sign"
        rows.append(shuffled)
        cuts.append(cut)
        names.append(name)
        start += len(shuffled)
    sizes = np.array([len(row) for row in rows], dtype=np.int64)
    ends = np.cumsum(sizes)
    order = np.concatenate(rows) if rows else np.zeros(0, dtype=np.int64)
    return Forest(order, ends - sizes, ends, np.array(cuts, dtype=np.int64), tuple(names), shown)


def layer_bands(layers: np.ndarray) -> np.ndarray:
    """Which third of the layers each candidate is in, 0 the earliest, [candidate]; layers without candidates apart."""
    present, place = np.unique(layers, return_inverse=True)
    return place * min(_N_BANDS, len(present)) // max(1, len(present))


def attribution_forest(
    strengths: np.ndarray,
    layers: np.ndarray | None = None,
    *,
    signs: np.ndarray | None = None,
    max_group_size: int | None = None,
) -> Forest:
    """One row of all candidates, strongest first; ties keep their order. One tree per band of layers and sign.

    An ablation costs less the later its first layer. So a tree holds the candidates of a third of the layers, and
    inside short stretches of like strength they stand by layer, so that small groups lie in few layers. Stretches are
    spans of the trees, shorter among the strongest.

    strengths: strength that attribution promises, whatever its sign, [candidate]. layers: layer number [candidate];
    None if all are alike. signs: signed attribution [candidate], which splits the row in two (>= 0, and below); None to
    split it not. max_group_size: begin with groups of at most this size, the trees' first spans that are small enough.
    """
    by_strength = np.argsort(-np.abs(strengths), kind="stable")
    bands = np.zeros(len(strengths), dtype=np.int64) if layers is None else layer_bands(layers)
    parts = [by_strength[bands[by_strength] == band] for band in np.unique(bands)]
    if signs is not None:
        parts = [part[kept] for part in parts for kept in (~(signs[part] < 0), signs[part] < 0)]
    parts = [part for part in parts if len(part)]
    starts, ends, rows, begin = [], [], [], 0
    for part in parts:
        if layers is not None:
            part = _by_layer(part, layers)
        for start, end in _spans(len(part), partial(_fits, max_group_size or len(part))):
            starts.append(begin + start)
            ends.append(begin + end)
        rows.append(part)
        begin += len(part)
    order = np.concatenate(rows) if rows else np.zeros(0, dtype=np.int64)
    n_roots = len(starts)
    return Forest(
        order,
        np.array(starts, dtype=np.int64),
        np.array(ends, dtype=np.int64),
        np.full(n_roots, NO_CUT),
        (PLAIN_CUT,) * n_roots,
        {},
    )


def _fits(limit: int, start: int, size: int) -> bool:
    """Whether a span, wherever it starts, is small enough to begin with."""
    return size <= limit


def _by_layer(part: np.ndarray, layers: np.ndarray) -> np.ndarray:
    """The candidates of one tree, strongest first, with each stretch sorted by layer."""
    longest, shortest = _STRETCH
    spans = _spans(len(part), lambda start, size: size <= min(longest, max(shortest, start // 2)))
    return np.concatenate([part[a:b][np.argsort(layers[part[a:b]], kind="stable")] for a, b in spans])


def _spans(size: int, is_small: Callable[[int, int], bool]) -> list[tuple[int, int]]:
    """Spans of a row, in order, got by halving as the search does until `is_small(start, size)`."""
    spans, pending = [], [(0, size)]
    while pending:
        start, end = pending.pop()
        if end - start <= 1 or is_small(start, end - start):
            spans.append((start, end))
        else:
            middle = start + (end - start) // 2
            pending += [(middle, end), (start, middle)]
    return spans
