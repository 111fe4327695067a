"""How good a rule about a neuron is, beyond its metrics: intervals, chance, and the gain over the obvious rule."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import numpy as np

from lib.rule_metrics import RuleScores, benjamini_hochberg, fisher_p_values, permutation_p_value, rule_scores

N_BLOCK_PERMUTATIONS = 2000
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


def group_counts(fires: np.ndarray, flipped: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Hits, false alarms, misses and right silences of each group of rows, int [group, 4]. All arguments are [row]."""
    _, number = np.unique(groups, return_inverse=True)
    outcome = np.select([fires & flipped, fires & ~flipped, ~fires & flipped], [0, 1, 2], 3)
    counts = np.zeros((number.max(initial=-1) + 1, 4), dtype=int)
    np.add.at(counts, (number, outcome), 1)
    return counts


def bootstrap_intervals(
    counts: np.ndarray, random: np.random.Generator, n_resamples: int, level: float = 0.95
) -> dict[str, tuple[float, float]]:
    """Percentile interval of each metric when groups of rows are drawn anew, all metrics from the same draws.

    counts: [group, 4] as from `group_counts`; variants of one prompt are no independent evidence, so they are drawn
    together (Field and Welsh, 2007: the randomised cluster bootstrap). If every row stands for itself, drawing n rows
    draws the four counts from a multinomial distribution, and no row is touched.
    Draws in which a metric is undefined are left out; (nan, nan) if all are.
    """
    n_groups, total = len(counts), counts.sum(axis=0)
    if total.sum() == n_groups:
        drawn = random.multinomial(n_groups, total / n_groups, size=n_resamples)
    else:
        drawn = random.multinomial(n_groups, np.full(n_groups, 1 / n_groups), size=n_resamples) @ counts
    draws = RuleScores(*drawn.T)
    intervals = {}
    for name, attribute in INTERVAL_METRICS.items():
        values = np.asarray(getattr(draws, attribute), dtype=float)
        values = values[np.isfinite(values)]
        low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2]) if values.size else (np.nan, np.nan)
        intervals[name] = (float(low), float(high))
    return intervals


def block_p_value(
    fires: np.ndarray, flipped: np.ndarray, groups: np.ndarray, random: np.random.Generator, n_draws: int
) -> float:
    """Chance of as many hits if whole groups of rows changed places; all arrays are [row].

    Groups are laid end to end, in one random order for the rule and in another for the flips: what hangs together
    inside a group stays together, what ties the rule to the flips is lost.
    """
    _, number = np.unique(groups, return_inverse=True)
    n_groups = number.max(initial=-1) + 1

    def shuffled(values: np.ndarray) -> np.ndarray:
        return values[np.argsort(random.permutation(n_groups)[number], kind="stable")]

    null = [np.count_nonzero(shuffled(fires) & shuffled(flipped)) for _ in range(n_draws)]
    return float(permutation_p_value(int(np.count_nonzero(fires & flipped)), np.array(null)))


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
    groups: np.ndarray | None = None,
) -> dict[str, object]:
    """What is reported beside a rule's published metrics: intervals, gain over the baseline rule, chance.

    fires, flipped, baseline: bool [row], the rows that score the rule. groups: [row] numbers that variants of one
    prompt share, or None. `p_value` is that of a permutation of the flips among these rows, in the limit of infinitely
    many: with both margins fixed MCC grows with the number of hits, which is hypergeometric. With groups of several
    rows it is at least that of a permutation of whole groups. On rows that chose the rule it would mean nothing, so it
    is given for `held_out` rows only.
    """
    scores = rule_scores(fires, flipped)
    groups = np.arange(len(flipped)) if groups is None else groups
    result: dict[str, object] = {}
    for name, (low, high) in bootstrap_intervals(group_counts(fires, flipped, groups), random, n_resamples).items():
        result[f"{name}_low95"], result[f"{name}_high95"] = low, high
    result["baseline_rule"] = baseline_rule.value
    baseline_mcc = mcc_of(baseline_rule.fires(baseline), flipped)
    result["baseline_rule_MCC"], result["MCC_gain"] = baseline_mcc, float(scores.mcc) - baseline_mcc
    p_value = float(fisher_p_values(scores)) if held_out else np.nan
    if held_out and len(np.unique(groups)) < len(groups):
        p_value = max(p_value, block_p_value(fires, flipped, groups, random, N_BLOCK_PERMUTATIONS))
    return result | {"p_value": p_value}
