"""How good a rule about a neuron is, beyond its metrics: intervals, chance, and the gain over the obvious rule."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import numpy as np

from lib.rule_metrics import RuleScores, benjamini_hochberg, fisher_p_values, rule_scores

INTERVAL_METRICS = {
    "MCC": "mcc",
    "P(target=1|fire)": "precision",
    "R(fire|target=1)": "recall",
    "F1(target=1|fire)": "f1",
    "BalancedAcc": "balanced_accuracy",
    "dataset_coverage": "coverage",
}
"""Metrics that get an interval: name in rule files (`<name>_low95`, `<name>_high95`) and in `RuleScores`."""


class BaselineRule(Enum):
    """The rules that know nothing but whether the behaviour holds before ablation."""

    NEVER = "FALSE"
    POSITIVE = "baseline positive"
    NEGATIVE = "baseline negative"

    def fires(self, baseline: np.ndarray) -> np.ndarray:
        """Rows [row] on which it predicts a flip."""
        if self is BaselineRule.NEVER:
            return np.zeros(len(baseline), dtype=bool)
        return baseline if self is BaselineRule.POSITIVE else ~baseline


def bootstrap_intervals(
    scores: RuleScores, random: np.random.Generator, n_resamples: int, level: float = 0.95
) -> dict[str, tuple[float, float]]:
    """Percentile interval of each metric when rows are drawn anew, all metrics from the same draws.

    Drawing n rows with replacement draws the four counts from a multinomial distribution, so no row is touched.
    Draws in which a metric is undefined are left out; (nan, nan) if all are.
    """
    counts = np.array(scores, dtype=float)
    draws = RuleScores(*random.multinomial(int(counts.sum()), counts / counts.sum(), size=n_resamples).T)
    intervals = {}
    for name, attribute in INTERVAL_METRICS.items():
        values = np.asarray(getattr(draws, attribute), dtype=float)
        values = values[np.isfinite(values)]
        low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2]) if values.size else (np.nan, np.nan)
        intervals[name] = (float(low), float(high))
    return intervals


def q_values(p_values: np.ndarray) -> np.ndarray:
    """Benjamini-Hochberg over the tests that were made; NaN (not tested) stays NaN and does not count."""
    p_values = np.asarray(p_values, dtype=float)
    result = np.full(p_values.shape, np.nan)
    tested = ~np.isnan(p_values)
    result[tested] = benjamini_hochberg(p_values[tested])
    return result


@dataclass(frozen=True)
class QualityCut:
    """When a rule counts as high quality, and when it earns the stricter badge."""

    metric: str = "MCC"
    threshold: float = 0.70
    threshold_all_fit: float = 0.70
    min_coverage: float = 0.005
    badge_lower_bound: float = 0.5
    badge_q: float = 0.05

    def threshold_of(self, scope: str) -> float:
        """Threshold of a scope."""
        return self.threshold_all_fit if scope == "all_fit" else self.threshold


def mcc_of(fires: np.ndarray, flipped: np.ndarray) -> float:
    """Matthews correlation of predictions [row] and flips [row]; 0 when either is constant."""
    return float(rule_scores(fires, flipped).mcc)


def choose_baseline_rule(flipped: np.ndarray, baseline: np.ndarray) -> BaselineRule:
    """The best rule that only knows the baseline label, on the rows that choose rules (the simplest among equals)."""
    return max(BaselineRule, key=lambda rule: round(mcc_of(rule.fires(baseline), flipped), 12))


def honest_scores(
    fires: np.ndarray,
    flipped: np.ndarray,
    baseline: np.ndarray,
    baseline_rule: BaselineRule,
    random: np.random.Generator,
    n_resamples: int,
    *,
    held_out: bool,
) -> dict[str, object]:
    """What is reported beside a rule's published metrics: intervals, gain over the baseline rule, chance.

    fires, flipped, baseline: bool [row], the rows that score the rule. `p_value` is that of a permutation of the flips
    among these rows, in the limit of infinitely many: with both margins fixed MCC grows with the number of hits, which
    is hypergeometric. On rows that chose the rule it would mean nothing, so it is given for `held_out` rows only.
    """
    scores = rule_scores(fires, flipped)
    result: dict[str, object] = {}
    for name, (low, high) in bootstrap_intervals(scores, random, n_resamples).items():
        result[f"{name}_low95"], result[f"{name}_high95"] = low, high
    result["baseline_rule"] = baseline_rule.value
    result["baseline_rule_MCC"] = mcc_of(baseline_rule.fires(baseline), flipped)
    result["MCC_gain"] = float(scores.mcc) - float(result["baseline_rule_MCC"])
    result["p_value"] = float(fisher_p_values(scores)) if held_out else np.nan
    return result
