"""What rules are held against: random targets, a permutation null, and resampled rows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from lib.cli import derived_seed, rng
from lib.data_model_for_shap import fit_trees, tree_matrix
from lib.rule_atoms import RuleSet
from lib.rule_induction import InductionSettings, Sample, explain, induce, stratified_rows
from lib.rule_masks import TargetRows
from lib.rule_metrics import permutation_p_value
from lib.text_and_rules import Rule

# Controls refit many times; on this many rows a refit takes about a second.
CONTROL_ROWS = 5000
SAME_ROWS = 0.9


@dataclass(frozen=True)
class FakeTarget:
    """A target that has nothing to do with the features, but looks like the real one.

    y: bool [row]; correlation: Pearson's with the real target; tries: draws made; is_within_bound: whether the
    correlation asked for was reached.
    """

    y: np.ndarray
    correlation: float
    tries: int
    is_within_bound: bool


def fake_target(
    y: np.ndarray, is_test: np.ndarray, random: np.random.Generator, *, max_abs_corr: float, max_tries: int
) -> FakeTarget:
    """Shuffle a target within TRAIN and within TEST until it hardly correlates with itself; else the best draw.

    Shuffling keeps the number of positives of each part exactly.
    """
    best: FakeTarget | None = None
    for tries in range(1, max_tries + 1):
        fake = y.copy()
        for part in (~is_test, is_test):
            fake[part] = random.permutation(y[part])
        correlation = 0.0 if y.all() or not y.any() else float(np.corrcoef(y, fake)[0, 1])
        within = abs(correlation) <= max_abs_corr
        if best is None or abs(correlation) < abs(best.correlation):
            best = FakeTarget(fake, correlation, tries, within)
        if within:
            break
    return FakeTarget(best.y, best.correlation, tries, best.is_within_bound)


@dataclass(frozen=True)
class PermutationNull:
    """What the same procedure finds when the target is shuffled.

    scores: best TRAIN MCC of the chosen size, [draw]; importances: SHAP importance, [draw, feature]. observed_*: the
    same for the real target on the same rows. n_rows: rows used.
    """

    observed_score: float
    scores: np.ndarray
    observed_importance: np.ndarray
    importances: np.ndarray
    n_rows: int

    @property
    def score_p_value(self) -> float:
        """Share of shuffles that reach the observed score (counting the real target as one)."""
        return float(permutation_p_value(self.observed_score, self.scores))

    @property
    def importance_p_values(self) -> np.ndarray:
        """The same for each feature's importance, [feature]."""
        return np.asarray(permutation_p_value(self.observed_importance, self.importances))


def permutation_null(
    sample: Sample, settings: InductionSettings, cost: int, draws: Iterable[int], seed: int
) -> PermutationNull:
    """Refit on shuffled targets. cost: size of the rules compared (0: the largest allowed)."""
    sample = control_sample(sample, seed)
    cost = cost or settings.limits.max_cost

    def fit(target: np.ndarray) -> tuple[float, np.ndarray]:
        shuffled = Sample(sample.table, target.astype(float), TargetRows(target))
        found = induce(shuffled, settings, derived_seed(seed, "null fit"))
        if found.shap is not None:
            return found.path.monotone()[cost][0], found.shap.upper_importance_bound
        booster = fit_trees(
            tree_matrix(shuffled.table, shuffled.y), settings.trees, derived_seed(seed, "null trees")
        )
        return found.path.monotone()[cost][0], explain(booster, shuffled, settings, seed).upper_importance_bound

    real = sample.target.positive
    score, importance = fit(real)
    null = [fit(rng(seed, "null", draw).permutation(real)) for draw in draws]
    scores = np.array([entry[0] for entry in null])
    importances = np.array([entry[1] for entry in null]).reshape(len(null), len(importance))
    return PermutationNull(score, scores, importance, importances, sample.table.n_rows)


def control_sample(sample: Sample, seed: int) -> Sample:
    """At most `CONTROL_ROWS` rows, each class in proportion."""
    return sample.rows(stratified_rows(sample.target.positive, CONTROL_ROWS, derived_seed(seed, "controls")))


@dataclass(frozen=True)
class Stability:
    """Share of resamples whose rule covers nearly the same rows, for the whole rule and for each literal."""

    rule: float
    literals: tuple[float, ...]
    n_resamples: int


def stability(sample: Sample, settings: InductionSettings, rule: Rule, draws: Iterable[int], seed: int) -> Stability:
    """Refit rules of the same size on rows drawn with replacement.

    A rule or literal counts as found again if one of the refit covers the same rows: at least `SAME_ROWS` of the rows
    that either covers.
    """
    sample = control_sample(sample, seed)
    columns = {
        name: values[ranks]
        for name, values, ranks in zip(sample.table.names, sample.table.values, sample.table.ranks, strict=True)
    }
    whole, parts = rule.covers(columns), [literal.covers(columns) for literal in rule.literals]
    cost = sum(len(literal.conditions) + literal.negated for literal in rule.literals)
    found_whole, found_parts, n_draws = 0, np.zeros(len(parts)), 0
    for draw in draws:
        rows = rng(seed, "resample", draw).integers(0, sample.table.n_rows, sample.table.n_rows)
        refit = _refit(sample.rows(rows), settings, cost, derived_seed(seed, "resample", draw))
        masks = [sample.table.rule_mask((literal,)) for literal in refit]
        found_whole += _same_rows(whole, sample.table.rule_mask(refit))
        found_parts += [any(_same_rows(part, mask) for mask in masks) for part in parts]
        n_draws += 1
    share = 1 / max(1, n_draws)
    return Stability(float(found_whole * share), tuple(float(count) * share for count in found_parts), n_draws)


def _refit(sample: Sample, settings: InductionSettings, cost: int, seed: int) -> RuleSet:
    return induce(sample, settings, seed).path.monotone()[cost][1]


def _same_rows(first: np.ndarray, second: np.ndarray) -> bool:
    either = np.count_nonzero(first | second)
    return bool(either > 0 and np.count_nonzero(first & second) >= SAME_ROWS * either)
