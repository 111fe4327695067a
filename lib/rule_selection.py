"""How long the rule may be: inner cross-validation over sizes, parsimony within one standard error, honest refusal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from lib.rule_atoms import RuleSet
from lib.rule_metrics import RuleScores, fisher_p_values


def stratified_folds(positive: np.ndarray, n_splits: int, rng: np.random.Generator) -> np.ndarray:
    """Fold number of each row, [row]; each class is spread evenly over the folds."""
    folds = np.empty(len(positive), dtype=np.int64)
    for label in (False, True):
        rows = rng.permutation(np.flatnonzero(positive == label))
        folds[rows] = np.arange(len(rows)) % n_splits
    return folds


@dataclass(frozen=True)
class SizeChoice:
    """What inner cross-validation says.

    scores: pooled out-of-fold MCC of the best rule of at most each cost, [cost]. chosen_cost: the smallest one within
    one standard error of the best; 0 means no rule is better than chance. p_value: of the best cost's out-of-fold
    agreement, corrected for the number of costs tried.
    """

    scores: np.ndarray
    best_cost: int
    chosen_cost: int
    p_value: float
    chosen_scores: RuleScores


def choose_size(
    predictions: np.ndarray, positive: np.ndarray, *, alpha: float, weight: np.ndarray | None = None
) -> SizeChoice:
    """The smallest rule size that predicts unseen rows as well as the best size, up to one standard error.

    predictions: out-of-fold, bool [repeat, cost, row], cost 0 all False. The error is that of the *difference* of two
    pooled correlations on the same rows (influence functions), so it does not drown a literal that covers few rows.
    """
    weight = np.ones(len(positive)) if weight is None else weight
    by_cost = np.swapaxes(predictions, 0, 1)
    counts = [_counts(repeats, positive, weight) for repeats in by_cost]
    scores = np.array([float(count.mcc) for count in counts])
    influences = [_influence(repeats, positive, weight, count) for repeats, count in zip(by_cost, counts, strict=True)]
    best = int(np.argmax(np.round(scores, 9)))
    chosen = next(
        cost
        for cost in range(best + 1)
        if scores[best] - scores[cost] <= _standard_error(influences[best] - influences[cost]) + 1e-9
    )
    n_tried = max(1, len({fires.tobytes() for fires in by_cost[1:]}))
    p_value = min(1.0, n_tried * float(fisher_p_values(_whole(counts[best])))) if best else 1.0
    if p_value > alpha:
        chosen = 0
    return SizeChoice(scores, best, chosen, p_value, counts[chosen])


def _counts(repeats: np.ndarray, positive: np.ndarray, weight: np.ndarray) -> RuleScores:
    """Counts of predictions [repeat, row], averaged over the repeats."""
    return RuleScores(*(float((cell.mean(axis=0) * weight).sum()) for cell in _cells(repeats, positive)))


def _cells(fires: np.ndarray, positive: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    return fires & positive, fires & ~positive, ~fires & positive, ~fires & ~positive


def _whole(counts: RuleScores) -> RuleScores:
    """Counts as whole numbers, for the exact test (weights may be fractions)."""
    return RuleScores(*(round(float(count)) for count in counts))


def _influence(repeats: np.ndarray, positive: np.ndarray, weight: np.ndarray, counts: RuleScores) -> np.ndarray:
    """First-order effect of each row on the MCC, averaged over repeats, [row]: the gradient by its cell's share."""
    shares = np.array(counts) / counts.n
    step = 1e-6
    gradient = [float(RuleScores(*(shares + step * unit)).mcc - RuleScores(*shares).mcc) / step for unit in np.eye(4)]
    effect = sum(slope * cell.mean(axis=0) for cell, slope in zip(_cells(repeats, positive), gradient, strict=True))
    return weight / weight.mean() * effect


def _standard_error(influence_difference: np.ndarray) -> float:
    return float(influence_difference.std() / np.sqrt(len(influence_difference)))


def out_of_fold(
    fit_path: Callable[[np.ndarray], list[RuleSet]],
    apply: Callable[[RuleSet, np.ndarray], np.ndarray],
    folds: np.ndarray,
    n_costs: int,
) -> np.ndarray:
    """Predictions for rows by rules that never saw them, bool [cost, row].

    fit_path(rows): the best rule for each cost from those rows; apply(rule, rows): where it fires.
    """
    predictions = np.zeros((n_costs, len(folds)), dtype=bool)
    for fold in np.unique(folds):
        held_out = np.flatnonzero(folds == fold)
        for cost, literals in enumerate(fit_path(np.flatnonzero(folds != fold))):
            if literals:
                predictions[cost, held_out] = apply(literals, held_out)
    return predictions
