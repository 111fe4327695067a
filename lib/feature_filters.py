"""Which features are kept, judged on TRAIN rows only; every dropped one has a reason.

Values are the ones of `scores.csv`: where a feature does not apply it is `MISSING_VALUE`, here as everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum

import numpy as np

from lib.cli import UserError
from lib.feature_moments import Moments, moments


class Filter(Enum):
    """The filters, in the order in which they are applied."""

    CONSTANT = "constant"
    """One value on all TRAIN rows; always applied."""

    HIGH_VARIANCE = "high variance"
    """Log variance far above that of the other features, as a robust z-score."""

    LOW_POWER = "low predictive power"
    """Tells the classes apart by none of the active measures."""

    NEAR_DUPLICATE = "near duplicate"
    """Correlated with a feature that comes earlier in the catalogue and is kept."""


@dataclass(frozen=True)
class FilterOptions:
    """What `--drop_...` and its thresholds ask for; a threshold of 0 (-1 for `min_ap_above_base`) is inactive."""

    drop_high_variance: bool = False
    z_threshold: float = 10.0
    drop_low_power: bool = False
    min_auc: float = 0.0
    min_delta: float = 0.2
    min_ap_above_base: float = -1.0
    drop_near_duplicates: bool = False
    correlation_threshold: float = 0.9999

    def __post_init__(self) -> None:
        if not 0 < self.correlation_threshold <= 1:
            raise UserError(f"--near_duplicate_features_threshold {self.correlation_threshold}: must be in (0, 1]")


@dataclass(frozen=True)
class FeatureMetrics:
    """How each feature relates to the primary target on TRAIN; arrays [feature]."""

    auc: np.ndarray
    """Chance that a positive row ranks above a negative one, ties counted half."""
    average_precision: np.ndarray
    """Of the ranking in the better direction (`auc` of at least 0.5)."""
    ap_above_base: np.ndarray
    """Average precision minus the share of positive rows."""
    mean_positive: np.ndarray
    mean_negative: np.ndarray
    delta_std: np.ndarray
    """Difference of the class means over the standard deviation, without sign."""
    n_distinct: np.ndarray

    @property
    def best_auc(self) -> np.ndarray:
        """AUC in the better direction."""
        return np.maximum(self.auc, 1 - self.auc)


@dataclass
class FilterResult:
    """Which features are kept, and the filter and reason of each dropped one."""

    keep: np.ndarray
    reasons: dict[int, tuple[Filter, str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def drop(self, index: int, by: Filter, reason: str) -> None:
        """Drop one feature."""
        self.keep[index] = False
        self.reasons[index] = (by, reason)


def feature_metrics(values: np.ndarray, labels: np.ndarray) -> FeatureMetrics:
    """Metrics of each column of `values` [row, feature] for boolean `labels` [row]; NaN if a class is absent."""
    n_features = values.shape[1]
    rows = {name: np.full(n_features, np.nan) for name in ("auc", "ap", "positive", "negative")}
    n_distinct = np.zeros(n_features, dtype=int)
    n_positive = int(labels.sum())
    n_negative = len(labels) - n_positive
    for index in range(n_features):
        levels, positive, negative = class_counts(values[:, index], labels)
        n_distinct[index] = len(levels)
        if n_positive:
            rows["positive"][index] = levels @ positive / n_positive
        if n_negative:
            rows["negative"][index] = levels @ negative / n_negative
        if n_positive and n_negative:
            rows["auc"][index] = rank_auc(positive, negative)
            order = slice(None, None, -1) if rows["auc"][index] >= 0.5 else slice(None)
            rows["ap"][index] = average_precision(positive[order], negative[order])
    spread = np.sqrt(moments(values).variance)
    delta = np.abs(rows["positive"] - rows["negative"]) / (spread + 1e-8)
    base = n_positive / max(len(labels), 1)
    return FeatureMetrics(rows["auc"], rows["ap"], rows["ap"] - base, rows["positive"], rows["negative"], delta,
                          n_distinct)


def class_counts(column: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distinct values in ascending order (float64) and how many positive and negative rows have each."""
    levels, place = np.unique(column, return_inverse=True)
    total = np.bincount(place, minlength=len(levels))
    positive = np.bincount(place[labels], minlength=len(levels))
    return levels.astype(np.float64), positive, total - positive


def rank_auc(positive: np.ndarray, negative: np.ndarray) -> float:
    """AUC from class counts per value, ascending: Mann and Whitney's U over the number of pairs."""
    below = np.cumsum(negative) - negative
    return float((positive * (below + negative / 2)).sum() / (positive.sum() * negative.sum()))


def average_precision(positive: np.ndarray, negative: np.ndarray) -> float:
    """Mean precision at each recall step, from class counts per value, best value first."""
    hits = np.cumsum(positive)
    precision = hits / np.cumsum(positive + negative)
    return float((precision * positive).sum() / hits[-1])


def filter_features(values: np.ndarray, metrics: FeatureMetrics, options: FilterOptions) -> FilterResult:
    """Apply the filters in order to `values` [row, feature], columns in catalogue order.

    metrics: of these rows, or of the labelled ones among them.

    A filter that would leave nothing is not applied, and a note says so.
    """
    result = FilterResult(np.ones(values.shape[1], dtype=bool))
    summary = moments(values)
    steps = ((Filter.CONSTANT, _constant(values)), (Filter.HIGH_VARIANCE, _high_variance(summary, options)),
             (Filter.LOW_POWER, _low_power(metrics, options)))
    for filter_, found in steps:
        dropped = [(index, reason) for index, reason in found if result.keep[index]]
        if dropped and len(dropped) == result.keep.sum():
            result.notes.append(f"the filter '{filter_.value}' would drop every feature; it was not applied")
            continue
        for index, reason in dropped:
            result.drop(index, filter_, reason)
    if options.drop_near_duplicates:
        _drop_near_duplicates(summary.correlation, options.correlation_threshold, result)
    return result


def _constant(values: np.ndarray) -> Iterator[tuple[int, str]]:
    for index in np.flatnonzero(values.min(axis=0) == values.max(axis=0)):
        yield int(index), "has the same value on every TRAIN row"


def variance_z(variance: np.ndarray) -> np.ndarray:
    """Robust z-score of each log variance among those of varying features; 0 where these are mostly equal."""
    varied = variance > 0
    logs = np.log1p(variance)
    if not varied.any():
        return np.zeros_like(logs)
    centre = np.median(logs[varied])
    spread = np.median(np.abs(logs[varied] - centre))
    return np.where(varied, (logs - centre) / (1.4826 * spread), 0.0) if spread > 0 else np.zeros_like(logs)


def _high_variance(summary: Moments, options: FilterOptions) -> Iterator[tuple[int, str]]:
    if options.drop_high_variance:
        scores = variance_z(summary.variance)
        for index in np.flatnonzero(scores > options.z_threshold):
            yield int(index), f"robust z-score of its log variance {scores[index]:.3g} > {options.z_threshold:g}"


def _low_power(metrics: FeatureMetrics, options: FilterOptions) -> Iterator[tuple[int, str]]:
    """Features that pass none of the active tests."""
    if not options.drop_low_power:
        return
    tests = [(name, values, threshold) for name, values, threshold, inactive in (
        ("AUC", metrics.best_auc, options.min_auc, 0.0),
        ("difference of class means in standard deviations", metrics.delta_std, options.min_delta, 0.0),
        ("average precision above base rate", metrics.ap_above_base, options.min_ap_above_base, -1.0))
        if threshold > inactive]
    for index in range(len(metrics.auc)):
        if tests and not any(values[index] >= threshold for _, values, threshold in tests):
            yield index, "; ".join(f"{name} {values[index]:.3g} < {threshold:g}" for name, values, threshold in tests)


def _drop_near_duplicates(correlation: np.ndarray, threshold: float, result: FilterResult) -> None:
    """Keep a feature only if no kept earlier one is as correlated as the threshold."""
    kept: list[int] = []
    for index in np.flatnonzero(result.keep):
        size = np.abs(correlation[index, kept])
        if kept and size.max() >= threshold:
            twin = kept[int(size.argmax())]
            result.drop(int(index), Filter.NEAR_DUPLICATE, f"correlation {correlation[index, twin]:.6f} with #{twin}")
        else:
            kept.append(int(index))
