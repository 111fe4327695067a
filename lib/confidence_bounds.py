"""Exact binomial bounds of flip rates, and sequential looks that share one error budget.

Needs numpy and, when a bound is computed, scipy; no model, no files.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

NEVER = -1
"""A boundary of `NEVER` flips cannot be met."""
# A group is given up at a look if, going by what was seen so far, it would end up pruned less often than this. Pruning
# saves the tests of its parts, looking on costs datapoints; `benchmarks/RESULTS.md` has what values cost where.
_FUTILITY = 0.1
# Error spent up to a look at share t of the datapoints: alpha * t ** _SPENDING_POWER. At 0.5 looks at 8, 16, 32 and 64
# keep the boundary of the single look at 64 and prune a group without flips at half the cost.
_SPENDING_POWER = 0.5
# A group with just enough flips among all datapoints to be kept, in random order, is pruned before with at most this
# probability: brute force would keep it, and recall is judged by that. The bound on alpha alone lets 13 to 15 % go.
_REVERSAL = 0.05


class Interval(NamedTuple):
    """A rate with its confidence limits."""

    rate: float
    low: float
    high: float


def upper_flip_rate(n_flips: np.ndarray | int, n_evaluated: np.ndarray | int, alpha: float) -> np.ndarray:
    """Exact one-sided upper bound of a flip rate, in the shape of the counts.

    Clopper and Pearson (1934): the largest rate under which seeing this few flips has probability alpha. No evaluated
    datapoint gives 1, so nothing is ever pruned on no evidence.
    """
    from scipy.special import betaincinv

    flips, evaluated = np.broadcast_arrays(np.asarray(n_flips, dtype=float), np.asarray(n_evaluated, dtype=float))
    certain = flips >= evaluated
    left = np.where(certain, 1.0, evaluated - flips)
    return np.where(certain, 1.0, betaincinv(flips + 1.0, left, 1.0 - alpha))


def lower_flip_rate(n_flips: np.ndarray | int, n_evaluated: np.ndarray | int, alpha: float) -> np.ndarray:
    """Exact one-sided lower bound of a flip rate, in the shape of the counts; 0 where nothing flipped."""
    flips, evaluated = np.broadcast_arrays(np.asarray(n_flips, dtype=float), np.asarray(n_evaluated, dtype=float))
    return np.where(flips <= 0, 0.0, 1.0 - upper_flip_rate(evaluated - flips, evaluated, alpha))


def flip_rate_interval(n_flips: int, n_evaluated: int, confidence: float = 0.95) -> Interval | None:
    """Observed rate with its exact two-sided interval; None without any datapoint."""
    if n_evaluated == 0:
        return None
    alpha = (1.0 - confidence) / 2.0
    low, high = lower_flip_rate(n_flips, n_evaluated, alpha), upper_flip_rate(n_flips, n_evaluated, alpha)
    return Interval(n_flips / n_evaluated, float(low), float(high))


def rate_difference_interval(
    first: tuple[int, int], second: tuple[int, int], confidence: float = 0.95
) -> Interval | None:
    """Difference of two independent rates, each given as (flips, evaluated): Newcombe's (1998) score interval."""
    (k1, n1), (k2, n2) = first, second
    if n1 == 0 or n2 == 0:
        return None
    low1, high1 = _wilson(k1, n1, confidence)
    low2, high2 = _wilson(k2, n2, confidence)
    p1, p2 = k1 / n1, k2 / n2
    below = math.hypot(p1 - low1, high2 - p2)
    above = math.hypot(high1 - p1, p2 - low2)
    return Interval(p1 - p2, max(-1.0, p1 - p2 - below), min(1.0, p1 - p2 + above))


def _wilson(n_flips: int, n_evaluated: int, confidence: float) -> tuple[float, float]:
    from statistics import NormalDist

    z = NormalDist().inv_cdf(0.5 + confidence / 2.0)
    rate = n_flips / n_evaluated
    centre = rate + z * z / (2 * n_evaluated)
    half = z * math.sqrt(rate * (1 - rate) / n_evaluated + z * z / (4 * n_evaluated**2))
    scale = 1 + z * z / n_evaluated
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


@functools.lru_cache(maxsize=4096)
def min_flips_to_keep(n_evaluated: int, epsilon: float, alpha: float) -> int:
    """k*: the fewest flips whose upper bound reaches epsilon; fewer prune a group, k* or more keep it."""
    if n_evaluated == 0:
        return 0
    bounds = upper_flip_rate(np.arange(n_evaluated + 1), n_evaluated, alpha)
    return int(np.argmax(bounds >= epsilon)) if epsilon <= 1.0 else n_evaluated + 1


def min_datapoints_to_prune(epsilon: float, alpha: float) -> int:
    """Fewest datapoints without any flip that bound the rate below epsilon."""
    if not 0.0 < epsilon < 1.0:
        return 1
    n = max(1, math.ceil(math.log(alpha) / math.log1p(-epsilon)))
    while min_flips_to_keep(n, epsilon, alpha) == 0:
        n += 1
    return n


# ---------------------------------------------------------------- sequential looks


@dataclass(frozen=True)
class LookPlan:
    """When a group may be pruned or given up on one slice.

    n_seen: datapoints seen after each look, ascending. prune_at_most: at this many flips or fewer the rate is below
    epsilon; `NEVER` where no count proves it. split_from: at this many flips or more, looking on is not worth it.

    Under any rate of epsilon or more, the probability of meeting a prune boundary at some look is at most alpha: the
    boundaries are the most permissive ones whose exact crossing probability, summed over looks, stays within the part
    of alpha spent so far, and which seldom reverse what all datapoints would say (`reversal_probability`). Giving up
    never loses a neuron (the group is split), so its rule is a matter of cost alone.
    """

    n_seen: tuple[int, ...]
    prune_at_most: tuple[int, ...]
    split_from: tuple[int, ...]

    @property
    def n_looks(self) -> int:
        """Number of looks."""
        return len(self.n_seen)

    def prune_probability(self, rate: float) -> float:
        """Exact probability that a group with this flip rate meets a prune boundary (nothing is given up early)."""
        return float(sum(_crossings(self.n_seen, self.prune_at_most, rate)))

    def reversal_probability(self, n_flips: int) -> float:
        """Exact probability that a group with so many flips among all datapoints, in random order, is pruned early.

        That is at a look before the last: what a sequential test says and one on all datapoints would not.
        """
        order, seen, pruned = _all_at(n_flips), 0, 0.0
        for n, limit in zip(self.n_seen[:-1], self.prune_at_most, strict=False):
            order = _drawn(order, self.n_seen[-1] - seen, n - seen)
            pruned += float(order[: limit + 1].sum())
            order[: limit + 1] = 0.0
            seen = n
        return pruned

    def expected_datapoints(self, rate: float) -> float:
        """Expected number of datapoints spent on a group with this flip rate on one slice."""
        state, seen, expected = np.ones(1), 0, 0.0
        for n, low, high in zip(self.n_seen, self.prune_at_most, self.split_from, strict=True):
            expected += (n - seen) * state.sum()
            state = np.convolve(state, _binomial(n - seen, rate))
            state[: low + 1] = 0.0
            state[high:] = 0.0
            seen = n
        return float(expected)


@functools.lru_cache(maxsize=1024)
def plan_looks(
    n_datapoints: int, looks: tuple[int, ...], epsilon: float, alpha: float, ease: tuple[float, ...] | None = None
) -> LookPlan:
    """Boundaries for looks at the given numbers of datapoints and at all of them.

    looks: empty for the single published look, where the boundaries are k* - 1 and k*. ease: how easily each datapoint
    flips, up to a common factor; positive. It only decides when to give up: where the first datapoints flip under
    anything, many early flips promise few later ones.
    """
    n_seen = (*sorted({n for n in looks if 0 < n < n_datapoints}), n_datapoints)
    if epsilon <= 0.0:
        return LookPlan(n_seen[:1], (NEVER,), (0,))
    keep = min_flips_to_keep(n_datapoints, epsilon, alpha)
    if len(n_seen) == 1:
        return LookPlan(n_seen, (keep - 1,), (keep,))
    boundaries: list[int] = []
    state, seen, spent = np.ones(1), 0, 0.0
    order, reversed_ = _all_at(keep), 0.0
    for n in n_seen:
        state = np.convolve(state, _binomial(n - seen, epsilon))
        order = _drawn(order, n_datapoints - seen, n - seen)
        allowed = alpha * (n / n_datapoints) ** _SPENDING_POWER - spent
        boundary = int(np.searchsorted(np.cumsum(state), allowed, side="right")) - 1
        while boundary > NEVER and reversed_ + order[: boundary + 1].sum() > _REVERSAL:
            boundary -= 1
        spent += float(state[: boundary + 1].sum())
        reversed_ += float(order[: boundary + 1].sum())
        state[: boundary + 1] = 0.0
        order[: boundary + 1] = 0.0
        boundaries.append(boundary)
        seen = n
    total_ease = np.concatenate([[0.0], np.cumsum(np.ones(n_datapoints) if ease is None else ease)])
    return LookPlan(n_seen, tuple(boundaries), _give_up_from(n_seen, boundaries, total_ease))


def _give_up_from(n_seen: tuple[int, ...], prune_at_most: list[int], total_ease: np.ndarray) -> tuple[int, ...]:
    """Per look the fewest flips after which a group would rarely be pruned later.

    total_ease: ease of the first n datapoints, [n]; flips so far are extrapolated in proportion to it.
    """
    thresholds = []
    for look, n in enumerate(n_seen[:-1]):
        n_left, ease_left = n_seen[-1] - n, total_ease[-1] - total_ease[n]
        rest = tuple(later - n for later in n_seen[look + 1 :])
        flips = prune_at_most[look] + 1
        while flips <= n:
            rate = min(1.0, flips * ease_left / total_ease[n] / n_left)
            limits = tuple(max(limit - flips, NEVER) for limit in prune_at_most[look + 1 :])
            if sum(_crossings(rest, limits, rate)) < _FUTILITY:
                break
            flips += 1
        thresholds.append(flips)
    return (*thresholds, prune_at_most[-1] + 1)


def _crossings(n_seen: Sequence[int], prune_at_most: Sequence[int], rate: float) -> list[float]:
    """Probability of first meeting the boundary at each look."""
    state, seen, crossed = np.ones(1), 0, []
    for n, limit in zip(n_seen, prune_at_most, strict=True):
        state = np.convolve(state, _binomial(n - seen, rate))
        crossed.append(float(state[: limit + 1].sum()))
        state[: limit + 1] = 0.0
        seen = n
    return crossed


def _all_at(n_flips: int) -> np.ndarray:
    """The distribution of flips seen before any datapoint is, of a group that has `n_flips` in all."""
    return np.concatenate([[1.0], np.zeros(n_flips)])


def _drawn(seen_flips: np.ndarray, n_left: int, n: int) -> np.ndarray:
    """Distribution of flips seen after `n` more of `n_left` datapoints; its length says how many there are in all."""
    from scipy.stats import hypergeom

    found = np.zeros_like(seen_flips)
    most = len(seen_flips) - 1
    for flips in np.flatnonzero(seen_flips):
        more = np.arange(most - flips + 1)
        found[flips:] += seen_flips[flips] * hypergeom.pmf(more, n_left, most - flips, n)
    return found


def _binomial(n: int, rate: float) -> np.ndarray:
    """Probabilities of 0..n successes."""
    from scipy.stats import binom

    return binom.pmf(np.arange(n + 1), n, rate)
