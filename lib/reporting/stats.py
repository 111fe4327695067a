"""Statistics of comparisons: pure functions on arrays. Missing values are NaN and never count as an observation."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from enum import Enum
from typing import NamedTuple

import numpy as np
from scipy import stats

TOLERANCE = 1e-9
"""Differences below it are zero: an area of counts may miss its exact value by rounding."""
MAX_EXACT_PAIRS = 22
N_MONTE_CARLO = 200_000


class Alternative(Enum):
    """The hypothesis about a difference A - B."""

    TWO_SIDED = "two-sided"
    """A and B differ."""

    GREATER = "greater"
    """A is larger."""

    LESS = "less"
    """A is smaller."""


def holm(p_values: Sequence[float] | np.ndarray) -> np.ndarray:
    """Holm-adjusted p-values, [comparison]; NaN stays NaN and is not counted as a comparison."""
    p = np.asarray(p_values, dtype=float)
    adjusted = np.full(p.shape, np.nan)
    known = np.flatnonzero(np.isfinite(p))
    order = known[np.argsort(p[known], kind="stable")]
    scaled = (len(order) - np.arange(len(order))) * p[order]
    adjusted[order] = np.minimum(np.maximum.accumulate(scaled), 1.0)
    return adjusted


def stars(p: float) -> str:
    """`***`, `**`, `*` below 0.001, 0.01, 0.05; else `ns`; "" for an unknown p."""
    if not math.isfinite(p):
        return ""
    return next((text for limit, text in ((0.001, "***"), (0.01, "**"), (0.05, "*")) if p < limit), "ns")


# ---------------------------------------------------------------- paired differences


class PairedSummary(NamedTuple):
    """Differences of paired units in short; NaN statistics without pairs."""

    n_pairs: int
    n_nonzero: int
    n_pos: int
    n_neg: int
    mean_diff: float
    median_diff: float
    min_diff: float
    max_diff: float


def _clean(differences: Sequence[float] | np.ndarray) -> np.ndarray:
    """Finite differences [pair], those within the tolerance set to zero."""
    values = np.asarray(differences, dtype=float)
    values = values[np.isfinite(values)]
    return np.where(np.abs(values) <= TOLERANCE, 0.0, values)


def paired_summary(differences: Sequence[float] | np.ndarray) -> PairedSummary:
    """Counts and location of paired differences A - B."""
    d = _clean(differences)
    if not len(d):
        return PairedSummary(0, 0, 0, 0, *[math.nan] * 4)
    return PairedSummary(
        len(d),
        int((d != 0).sum()),
        int((d > 0).sum()),
        int((d < 0).sum()),
        float(d.mean()),
        float(np.median(d)),
        float(d.min()),
        float(d.max()),
    )


def sign_test(differences: Sequence[float] | np.ndarray, alternative: Alternative) -> float:
    """Exact binomial test on the signs of the non-zero differences; NaN if all are zero."""
    d = _clean(differences)
    n_nonzero = int((d != 0).sum())
    if not n_nonzero:
        return math.nan
    return float(stats.binomtest(int((d > 0).sum()), n_nonzero, 0.5, alternative=alternative.value).pvalue)


class SignFlip(NamedTuple):
    """A sign-flip test's p-value and how it was computed (`exact`, `monte_carlo`, or "" without differences)."""

    p: float
    mode: str


def sign_flip_test(
    differences: Sequence[float] | np.ndarray, alternative: Alternative, random: np.random.Generator
) -> SignFlip:
    """Permutation of signs of the non-zero differences, statistic: their sum.

    Exact over all 2^n patterns up to 22 differences; beyond, 200000 random patterns and the observed one.
    """
    d = _clean(differences)
    d = d[d != 0]
    if not len(d):
        return SignFlip(math.nan, "")
    exact = len(d) <= MAX_EXACT_PAIRS
    null = _all_signed_sums(d) if exact else _random_signed_sums(d, random)
    # Sums of many terms in another order differ by rounding; a tie must count as one.
    slack = TOLERANCE * max(1.0, float(np.abs(d).sum()))
    observed = d.sum()
    if alternative is Alternative.GREATER:
        extreme = null >= observed - slack
    elif alternative is Alternative.LESS:
        extreme = null <= observed + slack
    else:
        extreme = np.abs(null) >= abs(observed) - slack
    hits, total = int(extreme.sum()), len(null)
    return SignFlip(hits / total, "exact") if exact else SignFlip((hits + 1) / (total + 1), "monte_carlo")


def _all_signed_sums(d: np.ndarray) -> np.ndarray:
    """Sums under every pattern of signs, [2^n]."""
    sums = np.zeros(1)
    for value in d:
        sums = np.concatenate([sums - value, sums + value])
    return sums


def _random_signed_sums(d: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Sums under random patterns, [N_MONTE_CARLO], in blocks that fit any memory."""
    blocks = [random.integers(0, 2, size=(20_000, len(d)), dtype=np.int8) for _ in range(N_MONTE_CARLO // 20_000)]
    return np.concatenate([(2.0 * block - 1.0) @ d for block in blocks])


def area_under_thresholds(thresholds: Sequence[float], values: Sequence[float]) -> float:
    """AUTC: trapezoid area over the thresholds per unit of threshold; NaN if a value is missing.

    One threshold has no area; its value stands for the mean height.
    """
    x, y = np.asarray(thresholds, dtype=float), np.asarray(values, dtype=float)
    if not len(x) or len(x) != len(y) or not np.isfinite(y).all():
        return math.nan
    order = np.argsort(x)
    x, y = x[order], y[order]
    if len(x) == 1:
        return float(y[0])
    return float(((y[1:] + y[:-1]) / 2 * np.diff(x)).sum() / (x[-1] - x[0]))


class Interval(NamedTuple):
    """A bootstrap estimate and its 95 % interval."""

    mean: float
    low: float
    high: float


def bootstrap_paired_difference(
    units: Sequence[tuple[np.ndarray, np.ndarray]],
    statistic: Callable[[np.ndarray], np.ndarray],
    *,
    sample_size: int,
    n_boot: int,
    random: np.random.Generator,
) -> Interval:
    """Mean over units of statistic(A) - statistic(B), resampling units and, within each, neurons of A and B.

    units: per unit the scores of A and of B. statistic: [draw, neuron] -> [draw]. sample_size: neurons drawn of each
    method, 0 for the smaller of the two. Units where A or B has no neuron cannot be drawn from and are left out.
    """
    usable = [(a, b) for a, b in units if len(a) and len(b)]
    if not usable or n_boot < 1:
        return Interval(math.nan, math.nan, math.nan)
    picks = random.integers(0, len(usable), size=(n_boot, len(usable)))
    totals = np.zeros(n_boot)
    for number, (a, b) in enumerate(usable):
        size = sample_size or min(len(a), len(b))
        draws = np.nonzero(picks == number)[0]
        # In blocks: thousands of neurons times ten thousand draws would fill the memory.
        for block in np.array_split(draws, -(-len(draws) * size // 2_000_000) or 1):
            left = statistic(random.choice(a, size=(len(block), size)))
            right = statistic(random.choice(b, size=(len(block), size)))
            np.add.at(totals, block, left - right)
    means = totals / len(usable)
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(float(means.mean()), float(low), float(high))


def bootstrap_mean(values: Sequence[float] | np.ndarray, *, n_boot: int, random: np.random.Generator) -> Interval:
    """Mean of values with a percentile interval; NaN bounds below two values."""
    x = np.asarray(values, dtype=float)
    x = x[np.isfinite(x)]
    if len(x) < 2:
        return Interval(float(x.mean()) if len(x) else math.nan, math.nan, math.nan)
    means = x[random.integers(0, len(x), size=(n_boot, len(x)))].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(float(x.mean()), float(low), float(high))


# ---------------------------------------------------------------- independent samples


class RankTest(NamedTuple):
    """Mann-Whitney U and its p-value; NaN if a sample is empty."""

    statistic: float
    p: float


def mann_whitney(
    a: Sequence[float] | np.ndarray, b: Sequence[float] | np.ndarray, alternative: Alternative = Alternative.TWO_SIDED
) -> RankTest:
    """Mann-Whitney U of two samples (scipy); equal constants give p = 1."""
    x, y = finite(a), finite(b)
    if not len(x) or not len(y):
        return RankTest(math.nan, math.nan)
    if len(np.unique(np.concatenate([x, y]))) == 1:
        return RankTest(len(x) * len(y) / 2, 1.0)
    result = stats.mannwhitneyu(x, y, alternative=alternative.value)
    return RankTest(float(result.statistic), float(result.pvalue))


def fisher_combined(p_values: Sequence[float]) -> float:
    """Fisher's combination of independent p-values; NaN without any."""
    p = finite(p_values)
    # scipy takes the logarithm: an underflowed p of zero is the smallest number instead.
    return (
        float(stats.combine_pvalues(np.maximum(p, np.finfo(float).tiny), method="fisher").pvalue)
        if len(p)
        else (math.nan)
    )


def finite(values: Sequence[float] | np.ndarray) -> np.ndarray:
    """The finite values as floats."""
    x = np.asarray(values, dtype=float)
    return x[np.isfinite(x)]


def summary(
    values: Sequence[float] | np.ndarray, quantiles: Sequence[float] = (0.1, 0.5, 0.9, 0.95)
) -> dict[str, float]:
    """`n`, `mean`, `median`, and `q<percent>` of the finite values; NaN where there is none."""
    x = finite(values)
    found = {
        "n": float(len(x)),
        "mean": float(x.mean()) if len(x) else math.nan,
        "median": float(np.median(x)) if len(x) else math.nan,
    }
    levels = np.quantile(x, quantiles) if len(x) else [math.nan] * len(quantiles)
    return found | {f"q{100 * q:.0f}": float(level) for q, level in zip(quantiles, levels, strict=True)}


def tail_mean(values: Sequence[float] | np.ndarray, threshold: float) -> float:
    """Mean of the values at or above the threshold; NaN if none is."""
    x = finite(values)
    x = x[x >= threshold]
    return float(x.mean()) if len(x) else math.nan


def sd(values: Sequence[float] | np.ndarray) -> float:
    """Standard deviation (n - 1); NaN below two values."""
    x = finite(values)
    return float(x.std(ddof=1)) if len(x) > 1 else math.nan


def threshold_grid(low: float, high: float, step: float) -> np.ndarray:
    """Thresholds from low to high, rounded to ten digits: 0.70 to 0.99 by 0.01 has thirty."""
    if step <= 0 or high < low:
        raise ValueError(f"no thresholds from {low} to {high} by {step}")
    return np.round(low + step * np.arange(round((high - low) / step) + 1), 10)
