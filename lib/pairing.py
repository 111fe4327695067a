"""Pairing prompts with similar prompts of equal length, as an assignment problem solved exactly.

Order of importance: as many pairs of equal length as possible, then as little re-use of a target as possible, then
the smallest total distance.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from lib.cli import UserError
from lib.spectral_options import BOOLEAN_METRICS, METRICS

if TYPE_CHECKING:
    from lib.representations import RowView

PASS_LABELS = ("length-matched + unique", "length-matched", "unique", "any")
_CHUNK_VALUES = 4_000_000
_Candidates = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Positions, distances and whether matched, each [source, target]."""


class Pairing(NamedTuple):
    """Result of `pair_by_similarity`; everything is per source."""

    targets: np.ndarray
    """[source] position of its target."""
    distances: np.ndarray
    """[source]"""
    is_length_matched: np.ndarray
    """[source]"""


@dataclass(frozen=True)
class Lengths:
    """Token counts of sequences."""

    prompt: np.ndarray
    answer: np.ndarray

    @property
    def total(self) -> np.ndarray:
        """Length of prompt and answer together, [sequence]."""
        return self.prompt + self.answer

    def take(self, rows: np.ndarray) -> Lengths:
        """Lengths of some sequences."""
        return Lengths(self.prompt[rows], self.answer[rows])

    def gap(self, source: int, other: Lengths) -> np.ndarray:
        """Tokens by which each sequence of `other` differs from one of ours, prompt and answer counted apart."""
        return np.abs(other.prompt - self.prompt[source]) + np.abs(other.answer - self.answer[source])


def distance_function(metric: str, sample: np.ndarray) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """A function (sources [s, width], targets [t, width]) -> distances [s, t] float64, undefined ones infinite.

    `sample` [n, width] supplies the variances of `seuclidean` and `mahalanobis`.

    Raises:
        UserError: an unknown metric.
    """
    from scipy.spatial.distance import cdist

    if metric not in METRICS:
        raise UserError(f"unknown similarity metric {metric!r}; choose from {', '.join(METRICS)}")
    options: dict[str, np.ndarray] = {}
    if metric == "seuclidean":
        variance = sample.var(axis=0, dtype=np.float64)
        options["V"] = np.where(variance > 0, variance, 1.0)
    elif metric == "mahalanobis":
        options["VI"] = np.linalg.pinv(np.atleast_2d(np.cov(sample, rowvar=False, dtype=np.float64)))

    def distances(sources: np.ndarray, targets: np.ndarray) -> np.ndarray:
        if metric in ("euclidean", "sqeuclidean", "cosine"):
            result = _by_products(sources, targets, metric)
        elif metric in BOOLEAN_METRICS:
            result = _boolean_distances(sources != 0, targets != 0, metric)
        elif metric == "jensenshannon":
            # A distance of distributions: negative coordinates carry no mass.
            result = cdist(np.maximum(sources, 0), np.maximum(targets, 0), metric)
        else:
            result = cdist(sources, targets, metric, **options)
        return np.where(np.isfinite(result), result, np.inf)

    return distances


def _by_products(sources: np.ndarray, targets: np.ndarray, metric: str) -> np.ndarray:
    """Euclidean and cosine distances through one matrix product."""
    sources, targets = np.asarray(sources, dtype=np.float32), np.asarray(targets, dtype=np.float32)
    if metric == "cosine":
        norms = np.linalg.norm(sources, axis=1)[:, None] * np.linalg.norm(targets, axis=1)[None, :]
        with np.errstate(divide="ignore", invalid="ignore"):
            return 1.0 - np.clip((sources @ targets.T).astype(np.float64) / norms, -1.0, 1.0)
    # Centred first: representations share a large common part that would cancel badly in float32.
    centre = sources.mean(axis=0)
    sources, targets = sources - centre, targets - centre
    squares = (
        np.einsum("sd,sd->s", sources, sources)[:, None]
        + np.einsum("td,td->t", targets, targets)[None, :]
        - 2 * (sources @ targets.T)
    ).astype(np.float64)
    squares = np.maximum(squares, 0.0)
    return squares if metric == "sqeuclidean" else np.sqrt(squares)


def _boolean_distances(sources: np.ndarray, targets: np.ndarray, metric: str) -> np.ndarray:
    """Distances of binary vectors; the two that SciPy dropped are written out."""
    from scipy.spatial.distance import cdist

    if metric == "sokalmichener":
        metric = "rogerstanimoto"
    if metric != "kulczynski1":
        return cdist(sources, targets, metric)
    left, right = sources.astype(float), targets.astype(float)
    both = left @ right.T
    with np.errstate(divide="ignore", invalid="ignore"):
        return both / (left.sum(1)[:, None] + right.sum(1)[None, :] - 2 * both)


def pair_by_similarity(
    sources: np.ndarray | RowView,
    targets: np.ndarray | RowView,
    source_lengths: Lengths,
    target_lengths: Lengths,
    *,
    metric: str,
    length_tolerance: int,
    max_target_uses: int,
) -> Pairing:
    """Assign a target to every source.

    sources: [source, width], targets: [target, width] vectors. Prompt and answer lengths together may differ by
    `length_tolerance` tokens to count as matched; a target serves at most `max_target_uses` sources (raised when
    there are too few targets for that).
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import min_weight_full_bipartite_matching

    n_sources, n_targets = len(sources), len(targets)
    if not n_sources or not n_targets:
        raise UserError("pairing needs at least one datapoint on each side of the rule")
    n_copies = max(min(max_target_uses, n_sources), -(-n_sources // n_targets))
    candidates, distances, matched = _cheapest_targets(
        sources, targets, source_lengths, target_lengths, metric, length_tolerance
    )
    largest = distances[np.isfinite(distances)].max(initial=0.0)
    distances = np.where(np.isfinite(distances), distances, 2 * largest + 1)
    # Lexicographic order through magnitudes: one length mismatch outweighs all re-use, one re-use all distances.
    scaled = distances / ((2 * largest + 1) * (n_sources + 1))
    rows, columns, costs = [], [], []
    for copy in range(n_copies):
        rows.append(np.repeat(np.arange(n_sources), candidates.shape[1]))
        columns.append((candidates + copy * n_targets).ravel())
        mismatch = np.where(matched, 0.0, float(n_sources * n_copies))
        costs.append((1.0 + mismatch + copy + scaled).ravel())
    graph = coo_array(
        (np.concatenate(costs), (np.concatenate(rows), np.concatenate(columns))),
        shape=(n_sources, n_targets * n_copies),
    ).tocsr()
    order, chosen = min_weight_full_bipartite_matching(graph)
    assigned = np.empty(n_sources, dtype=np.int64)
    assigned[order] = chosen % n_targets
    place = (candidates == assigned[:, None]).argmax(axis=1)
    own = np.arange(n_sources)
    return Pairing(assigned, distances[own, place], matched[own, place])


def _cheapest_targets(
    sources: np.ndarray | RowView,
    targets: np.ndarray | RowView,
    source_lengths: Lengths,
    target_lengths: Lengths,
    metric: str,
    tolerance: int,
) -> _Candidates:
    """Per source as many cheapest targets as there are sources.

    More are never needed: of a source's n cheapest targets, the n - 1 other sources leave one free.
    """
    n_sources, n_targets = len(sources), len(targets)
    n_candidates = min(n_sources, n_targets)
    sources = np.asarray(sources)
    sample = np.concatenate([sources, np.asarray(targets[:10_000])])
    distance = distance_function(metric, sample)
    block = max(1, _CHUNK_VALUES // max(n_sources, targets.shape[1]))
    kept: _Candidates | None = None
    for start in range(0, n_targets, block):
        stop = min(start + block, n_targets)
        found = distance(sources, np.asarray(targets[start:stop]))
        block_lengths = target_lengths.take(np.arange(start, stop))
        matched = np.stack([source_lengths.gap(source, block_lengths) <= tolerance for source in range(n_sources)])
        positions = np.broadcast_to(np.arange(start, stop), found.shape)
        pieces = (positions, found, matched)
        kept = pieces if kept is None else _side_by_side(kept, pieces)
        if kept[0].shape[1] > n_candidates:
            kept = _smallest(kept, n_candidates)
    return kept


def _side_by_side(left: _Candidates, right: _Candidates) -> _Candidates:
    positions, distances, matched = (np.concatenate(both, axis=1) for both in zip(left, right, strict=True))
    return positions, distances, matched


def _smallest(kept: _Candidates, n: int) -> _Candidates:
    """The `n` best columns of each row: matched ones first, then by distance; in order of position."""
    positions, distances, matched = kept
    largest = distances[np.isfinite(distances)].max(initial=0.0)
    finite = np.where(np.isfinite(distances), distances, 2 * largest + 1)
    # Unmatched distances are shifted behind all matched ones; the shift costs digits only among the unmatched.
    keys = np.where(matched, finite, finite + (finite.max() + 1))
    best = np.sort(np.argpartition(keys, n - 1, axis=1)[:, :n], axis=1)
    positions, distances, matched = (np.take_along_axis(array, best, axis=1) for array in kept)
    return positions, distances, matched


def pairing_report(
    pairing: Pairing,
    source_rows: np.ndarray,
    target_rows: np.ndarray,
    source_lengths: Lengths,
    target_lengths: Lengths,
    *,
    metric: str,
    length_tolerance: int,
    max_target_uses: int,
    n_targets: int,
) -> dict[str, object]:
    """The `pairing_meta` block of a sampling plan. `*_rows` and lengths are those of each pair's two ends, [pair]."""
    uses = np.bincount(pairing.targets)
    counts = dict.fromkeys(PASS_LABELS, 0)
    seen: set[int] = set()
    pairs = []
    for pair, target in enumerate(pairing.targets.tolist()):
        is_matched = bool(pairing.is_length_matched[pair])
        number = (0 if is_matched else 2) + (1 if target in seen else 0)
        seen.add(target)
        counts[PASS_LABELS[number]] += 1
        source_len, target_len = int(source_lengths.total[pair]), int(target_lengths.total[pair])
        pairs.append(
            {
                "source_idx": source_rows[pair],
                "target_idx": target_rows[pair],
                "source_len": source_len,
                "target_len": target_len,
                "len_diff": abs(source_len - target_len),
                "prompt_len_diff": abs(int(source_lengths.prompt[pair]) - int(target_lengths.prompt[pair])),
                "distance": pairing.distances[pair],
                "assignment_pass": number + 1,
                "len_matched": is_matched,
                "reuse_count": uses[target],
                "is_unique_target": uses[target] == 1,
                "assignment_label": PASS_LABELS[number],
            }
        )
    return {
        "n_source": len(pairs),
        "n_target": n_targets,
        "k": len(pairs),
        "len_tolerance": length_tolerance,
        "metric": metric,
        "method": "minimum_cost_assignment",
        "max_target_uses": max_target_uses,
        "unique_target_used": len(seen),
        "target_reused_count": len(pairs) - len(seen),
        "len_matched_count": int(pairing.is_length_matched.sum()),
        "assignment_pass_counts": counts,
        "pair_meta": pairs,
    }
