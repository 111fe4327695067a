"""How good a rule is: counts, the metrics made of them, their uncertainty. Scalars and arrays of rules alike."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from lib.confidence_bounds import flip_rate_interval

Numbers = np.ndarray | float
_SHARES = {"precision": ("tp", "n_fire"), "recall": ("tp", "n_positive"), "coverage": ("n_fire", "n")}
METRICS = ("mcc", "precision", "recall", "f1", "lift", "coverage", "accuracy", "tpr", "tnr", "balanced_accuracy")


class RuleScores(NamedTuple):
    """The confusion counts of one rule (scalars) or of many (arrays, [rule]) against a binary target.

    Undefined shares (a rule that never fires has no precision) are NaN, as in the published tables; MCC is then 0.
    """

    tp: Numbers  # fires, target true
    fp: Numbers  # fires, target false
    fn: Numbers  # silent, target true
    tn: Numbers  # silent, target false

    @property
    def n(self) -> Numbers:
        """Rows."""
        return self.tp + self.fp + self.fn + self.tn

    @property
    def n_positive(self) -> Numbers:
        """Rows where the target is true."""
        return self.tp + self.fn

    @property
    def n_fire(self) -> Numbers:
        """Rows where the rule fires."""
        return self.tp + self.fp

    @property
    def prevalence(self) -> Numbers:
        """Share of rows where the target is true."""
        return _share(self.n_positive, self.n)

    @property
    def coverage(self) -> Numbers:
        """Share of rows where the rule fires."""
        return _share(self.n_fire, self.n)

    @property
    def precision(self) -> Numbers:
        """Share of true targets where the rule fires."""
        return _share(self.tp, self.n_fire)

    @property
    def recall(self) -> Numbers:
        """Share of true targets that the rule finds."""
        return _share(self.tp, self.n_positive)

    @property
    def tpr(self) -> Numbers:
        """The recall, by its other name."""
        return self.recall

    @property
    def tnr(self) -> Numbers:
        """Share of false targets where the rule is silent."""
        return _share(self.tn, self.fp + self.tn)

    @property
    def f1(self) -> Numbers:
        """Harmonic mean of precision and recall; NaN where either is undefined or both are 0."""
        undefined = (np.asarray(self.tp) == 0) | (np.asarray(self.n_fire) == 0) | (np.asarray(self.n_positive) == 0)
        value = np.where(undefined, np.nan, _share(2 * self.tp, 2 * self.tp + self.fp + self.fn))
        return value[()]

    @property
    def lift(self) -> Numbers:
        """Precision over prevalence."""
        return _share(self.tp * self.n, self.n_fire * self.n_positive)

    @property
    def accuracy(self) -> Numbers:
        """Share of rows where rule and target agree."""
        return _share(self.tp + self.tn, self.n)

    @property
    def balanced_accuracy(self) -> Numbers:
        """Mean of the true-positive and the true-negative rate."""
        return (self.tpr + self.tnr) / 2

    @property
    def mean_difference(self) -> Numbers:
        """Target's mean where the rule fires minus where it is silent; 0 if one side is empty."""
        return np.nan_to_num(self.precision - _share(self.fn, self.fn + self.tn))

    @property
    def mcc(self) -> Numbers:
        """Matthews correlation of rule and target; 0 where one of them is constant."""
        return mcc(self.tp, self.fp, self.fn, self.tn)

    def at(self, rules: int | np.ndarray) -> RuleScores:
        """The counts of one rule out of many, or of several in the order given."""
        return RuleScores(*(np.asarray(field)[rules] for field in self))


def mcc(tp: Numbers, fp: Numbers, fn: Numbers, tn: Numbers) -> Numbers:
    """Matthews correlation coefficient from counts, elementwise; 0 where it is undefined."""
    tp, fp, fn, tn = (np.asarray(count, dtype=float) for count in (tp, fp, fn, tn))
    root = np.sqrt((tp + fp) * (fn + tn)) * np.sqrt((tp + fn) * (fp + tn))
    return (np.divide(tp * tn - fp * fn, root, out=np.zeros_like(root), where=root > 0))[()]


def _share(part: Numbers, whole: Numbers) -> Numbers:
    part, whole = np.asarray(part, dtype=float), np.asarray(whole, dtype=float)
    return np.divide(part, whole, out=np.full(np.broadcast(part, whole).shape, np.nan), where=whole > 0)[()]


def rule_scores(fires: np.ndarray, y: np.ndarray) -> RuleScores:
    """Counts of rules against a binary target.

    fires: bool [row], or [rule, row] for many rules at once. y: [row], true where >= 0.5.
    """
    fires, truth = np.asarray(fires, dtype=bool), np.asarray(y, dtype=float) >= 0.5
    n_fire = np.count_nonzero(fires, axis=-1)
    tp = np.count_nonzero(fires & truth, axis=-1)
    n_positive = int(np.count_nonzero(truth))
    return RuleScores(tp, n_fire - tp, n_positive - tp, truth.size - n_positive - n_fire + tp)


def bootstrap_interval(
    fires: np.ndarray, y: np.ndarray, metric: str, rng: np.random.Generator, *, n: int = 1000, level: float = 0.95
) -> tuple[float, float]:
    """Percentile interval of a metric (a name of `METRICS`) over resampled rows.

    The metrics depend on four counts only, so whole resamples are drawn as multinomial counts: the same distribution,
    at no cost in rows. Resamples where the metric is undefined are left out; (nan, nan) if all are.
    """
    scores = rule_scores(fires, y)
    if scores.n == 0:
        return (float("nan"), float("nan"))
    counts = rng.multinomial(int(scores.n), np.array(scores) / scores.n, size=n)
    values = np.asarray(getattr(RuleScores(*counts.T), metric))
    values = values[np.isfinite(values)]
    if values.size == 0:
        return (float("nan"), float("nan"))
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return (float(low), float(high))


def metric_interval(fires: np.ndarray, y: np.ndarray, metric: str, rng: np.random.Generator) -> tuple[float, float]:
    """95 % interval of a metric: exact (Clopper and Pearson) for shares of rows, else bootstrap; NaN if undefined.

    Resampling 14 hits in 14 rows can only give 14 hits in 14; the exact interval says that 77 % is possible too.
    """
    if metric not in _SHARES:
        return bootstrap_interval(fires, y, metric, rng)
    part, whole = (int(getattr(rule_scores(fires, y), count)) for count in _SHARES[metric])
    interval = flip_rate_interval(part, whole)
    return (float("nan"), float("nan")) if interval is None else (interval.low, interval.high)


def fisher_p_values(scores: RuleScores) -> np.ndarray:
    """One-sided exact p-value of each rule: so many hits or more if it fired regardless of the target, [rule]."""
    from scipy.stats import hypergeom

    return np.asarray(hypergeom.sf(np.asarray(scores.tp) - 1, scores.n, scores.n_positive, scores.n_fire))


def benjamini_hochberg(p_values: np.ndarray) -> np.ndarray:
    """Adjusted p-values that control the false discovery rate (Benjamini and Hochberg, 1995), [test]."""
    p_values = np.asarray(p_values, dtype=float)
    if p_values.size == 0:
        return p_values
    order = np.argsort(p_values, kind="stable")
    scaled = p_values[order] * p_values.size / np.arange(1, p_values.size + 1)
    adjusted = np.empty_like(p_values)
    adjusted[order] = np.minimum(np.minimum.accumulate(scaled[::-1])[::-1], 1.0)
    return adjusted


def permutation_p_value(observed: Numbers, null: np.ndarray) -> Numbers:
    """(1 + null draws at least as large) / (1 + draws): never 0 (Phipson and Smyth, 2010). null: [draw, ...]."""
    null = np.asarray(null, dtype=float)
    return (1 + np.sum(null >= np.asarray(observed), axis=0)) / (1 + len(null))
