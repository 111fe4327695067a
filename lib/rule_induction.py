"""From a ranked table and a target to the best rule of every size: trees, SHAP, candidates, screening, search."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from lib.cli import derived_seed, rng
from lib.data_model_for_shap import Explanation, TreeSettings, fit_trees, shap_values, tree_matrix, tree_nodes
from lib.rule_atoms import Literal, RankedTable, RuleSet
from lib.rule_candidates import CandidateTable, l1_coefficients, pair_conjunctions, scored_candidates
from lib.rule_conjunctions import path_conjunctions
from lib.rule_masks import TargetRows
from lib.rule_search import RulePath, RuleSearch, SearchLimits
from lib.rule_selection import SizeChoice, choose_size, out_of_fold, stratified_folds

MAX_FOLD_ROWS = 60_000


@dataclass(frozen=True)
class InductionSettings:
    """Everything that shapes an induction but the data and the seed."""

    limits: SearchLimits = field(default_factory=SearchLimits)
    trees: TreeSettings = field(default_factory=TreeSettings)
    use_shap_in_xgb: bool = True
    use_shap_in_lasso: bool = True
    unique_rows_in_shap: bool = False
    fast_shap: bool = False
    explain: bool = False
    shap_rows: int = 2000
    fold_shap_rows: int = 500
    min_coverage: float = 0.002
    n_candidates: int = 1000
    n_screened: int = 250
    n_pool: int = 320
    screen_rows: int = 5000

    @property
    def needs_shap(self) -> bool:
        """Whether SHAP values are used or asked for."""
        return self.use_shap_in_xgb or self.use_shap_in_lasso or self.explain


@dataclass(frozen=True)
class Induction:
    """What was found: the best rule per cost, all candidates, and SHAP values if they were needed."""

    path: RulePath
    candidates: CandidateTable
    shap: Explanation | None


@dataclass(frozen=True)
class Sample:
    """Rows to learn from. y: what the trees fit, [row]; target: the yes/no event that rules are scored on."""

    table: RankedTable
    y: np.ndarray
    target: TargetRows
    logistic: bool = True

    @classmethod
    def of(
        cls,
        features: np.ndarray,
        event: np.ndarray,
        names: Sequence[str],
        *,
        y: np.ndarray | None = None,
        weight: np.ndarray | None = None,
        logistic: bool = True,
    ) -> Sample:
        """A sample from a matrix [row, feature] and an event [row]; rows of weight 0 are left out."""
        kept = np.arange(len(event)) if weight is None else np.flatnonzero(weight > 0)
        kept_weight = None if weight is None or np.ptp(weight[kept]) == 0 else weight[kept]
        target = TargetRows(event[kept], kept_weight)
        fitted = event.astype(float) if y is None else y
        return cls(RankedTable.of(features[kept], names), fitted[kept], target, logistic)

    def rows(self, index: np.ndarray) -> Sample:
        """Some of the rows."""
        weight = None if self.target.weight is None else self.target.weight[index]
        return Sample(
            self.table.rows(index), self.y[index], TargetRows(self.target.positive[index], weight), self.logistic
        )

    @property
    def is_constant(self) -> bool:
        """Whether there is nothing to tell apart."""
        return not 0 < self.target.total_positive < self.target.total


def induce(sample: Sample, settings: InductionSettings, seed: int) -> Induction:
    """Grow trees, weigh features, gather candidates, search. Deterministic for a seed."""
    if sample.is_constant or all(len(values) < 2 for values in sample.table.values):
        return Induction(RulePath(settings.limits.max_cost), CandidateTable([], *(np.zeros(0) for _ in range(3))), None)
    matrix = tree_matrix(sample.table, sample.y, sample.target.weight, settings.trees.n_jobs)
    booster = fit_trees(matrix, settings.trees, derived_seed(seed, "trees"), logistic=sample.logistic)
    boosters, shap = [booster], None
    if settings.needs_shap:
        shap = explain(booster, sample, settings, seed)
    if settings.use_shap_in_xgb:
        biased = derived_seed(seed, "biased trees")
        boosters.insert(
            0, fit_trees(matrix, settings.trees, biased, importance=shap.weights, logistic=sample.logistic)
        )
    conjunctions = path_conjunctions(
        [tree for model in boosters for tree in tree_nodes(model)], settings.limits.max_conditions
    )
    if settings.limits.max_conditions > 1:
        conjunctions = conjunctions.including(pair_conjunctions(sample.table, sample.target, n_cuts=3, n_best=20))
    candidates = scored_candidates(
        conjunctions,
        sample.table,
        sample.target,
        limit=settings.n_candidates,
        min_rows=max(2.0, settings.min_coverage * sample.target.total),
    )
    coefficient = l1_coefficients(
        candidates,
        sample.table,
        sample.target,
        n_best=settings.n_screened,
        max_rows=settings.screen_rows,
        weights=shap.weights if shap is not None and settings.use_shap_in_lasso else None,
    )
    candidates = replace(candidates, coefficient=coefficient)
    search = RuleSearch(sample.table, sample.target, settings.limits)
    return Induction(search.path(_pool(candidates, settings)), candidates, shap)


def explain(booster: object, sample: Sample, settings: InductionSettings, seed: int) -> Explanation:
    """SHAP values of up to `shap_rows` rows, drawn at random (distinct ones, if asked)."""
    index = np.arange(sample.table.n_rows)
    if settings.unique_rows_in_shap:
        index = distinct_rows(sample.table.ranks.T, sample.target.positive)
    if len(index) > settings.shap_rows:
        index = np.sort(rng(seed, "shap rows").choice(index, settings.shap_rows, replace=False))
    values = shap_values(booster, sample.table.rows(index), settings.trees.n_jobs, approximate=settings.fast_shap)
    return Explanation(index, values)


def distinct_rows(features: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Number of the first row of each distinct (features [row, feature], target [row]) pair, in order."""
    joined = np.ascontiguousarray(np.column_stack([features, y]))
    as_bytes = joined.view(np.dtype((np.void, joined.dtype.itemsize * joined.shape[1]))).ravel()
    return np.sort(np.unique(as_bytes, return_index=True)[1])


def _pool(candidates: CandidateTable, settings: InductionSettings) -> list[Literal]:
    """Plain literals the search may combine: the best by themselves, of each length, and those the L1 step kept."""
    chosen: dict[int, None] = {}
    plain = np.array([not literal.negated for literal in candidates.literals], dtype=bool)
    lengths = np.array([literal.cost for literal in candidates.literals])
    for cost in np.unique(lengths):
        chosen.update(dict.fromkeys(np.flatnonzero(plain & (lengths == cost))[: settings.n_pool // 4].tolist()))
    by_coefficient = np.argsort(-candidates.coefficient, kind="stable")
    kept = [int(i) for i in by_coefficient if plain[i] and candidates.coefficient[i] > 0][: settings.n_pool]
    chosen.update(dict.fromkeys(kept))
    return [candidates.literals[i] for i in sorted(chosen)]


def validate(
    sample: Sample, settings: InductionSettings, seed: int, *, n_splits: int, n_repeats: int, alpha: float
) -> SizeChoice | None:
    """Inner cross-validation of the whole induction; None if a class has too few rows to be split.

    It is repeated on different folds while all repeats together predict at most `MAX_FOLD_ROWS` rows: what a repeat
    settles on few rows, many rows settle at once.
    """
    smallest = int(min(np.count_nonzero(sample.target.positive), np.count_nonzero(~sample.target.positive)))
    if smallest < 2:
        return None
    n_costs = settings.limits.max_cost + 1
    n_repeats = max(1, min(n_repeats, MAX_FOLD_ROWS // sample.table.n_rows))
    # Explaining rows is the dearest part of a fit; weights need fewer of them than a figure.
    settings = replace(settings, shap_rows=min(settings.shap_rows, settings.fold_shap_rows))

    def fit_path(rows: np.ndarray) -> list[RuleSet]:
        found = induce(sample.rows(rows), settings, derived_seed(seed, "inner fold"))
        return [literals for _, literals in found.path.monotone()]

    def apply(literals: RuleSet, rows: np.ndarray) -> np.ndarray:
        return sample.table.rows(rows).rule_mask(literals)

    predictions = []
    for repeat in range(n_repeats):
        folds = stratified_folds(sample.target.positive, min(n_splits, smallest), rng(seed, "folds", repeat))
        predictions.append(out_of_fold(fit_path, apply, folds, n_costs))
    return choose_size(np.stack(predictions), sample.target.positive, alpha=alpha, weight=sample.target.weight)


def stratified_rows(positive: np.ndarray, n_rows: int, seed: int) -> np.ndarray:
    """Up to `n_rows` row numbers, each class in proportion, in order."""
    if len(positive) <= n_rows:
        return np.arange(len(positive))
    draws = rng(seed, "rows")
    chosen = []
    for label in (False, True):
        rows = np.flatnonzero(positive == label)
        share = max(min(len(rows), 1), round(n_rows * len(rows) / len(positive)))
        chosen.append(draws.choice(rows, share, replace=False))
    return np.sort(np.concatenate(chosen))
