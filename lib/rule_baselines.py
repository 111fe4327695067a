"""Other learners on the same split: the yardstick by which a user judges whether the rules are worth having.

Each says yes where its vote is above the cut of best MCC on TRAIN.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

import numpy as np

from lib.cli import UserError, derived_seed
from lib.rule_induction import stratified_rows
from lib.rule_metrics import mcc

if TYPE_CHECKING:
    from lib.rule_files import LabelledRows

# RuleFit needs minutes beyond this; all baselines see the same rows.
MAX_ROWS = 20_000
TREE_DEPTH = 4


class Baseline(Enum):
    """Which other learner."""

    RULEFIT = "rulefit"
    """RuleFit (Friedman and Popescu, 2008) of `imodels`: an L1-penalised linear model over tree rules."""

    SKOPE = "skope"
    """SkopeRules of `imodels`: precise rules of bagged trees, deduplicated."""

    TREE = "tree"
    """One decision tree of depth 4."""

    LOGISTIC = "logistic"
    """L1-penalised logistic regression on standardised features, strength by cross-validation."""


@dataclass(frozen=True)
class FittedBaseline:
    """A fitted baseline. predict: features [row, feature] -> bool [row]; the rest is what a reader has to take in."""

    predict: Callable[[np.ndarray], np.ndarray]
    n_rules: int
    n_conditions: int


def fit_baseline(baseline: Baseline, rows: LabelledRows, seed: int) -> FittedBaseline:
    """Fit on (at most `MAX_ROWS` of) the rows; a one-class target gives the constant prediction."""
    index = stratified_rows(rows.y, MAX_ROWS, derived_seed(seed, "baseline rows"))
    features, y = rows.features[index], rows.y[index].astype(int)
    if np.ptp(y) == 0:
        constant = bool(y[0])
        return FittedBaseline(lambda matrix: np.full(len(matrix), constant), 0, 0)
    fit = {Baseline.RULEFIT: _rulefit, Baseline.SKOPE: _skope, Baseline.TREE: _tree, Baseline.LOGISTIC: _logistic}
    with warnings.catch_warnings():
        # imodels still passes arguments that scikit-learn renamed.
        warnings.simplefilter("ignore")
        return fit[baseline](features, y, derived_seed(seed, "baseline", baseline.value))


def _imodels() -> Any:
    try:
        import imodels
    except ImportError as error:
        raise UserError(
            f"the baselines rulefit and skope need the package imodels ({error}); run: pip install imodels"
        ) from None
    return imodels


def _rulefit(features: np.ndarray, y: np.ndarray, seed: int) -> FittedBaseline:
    model = _imodels().RuleFitClassifier(random_state=seed).fit(features, y)
    used = [rule for rule in model.rules_ if abs(rule.args[0]) > 0]
    linear = int(np.count_nonzero(model.coef[: features.shape[1]])) if hasattr(model, "coef") else 0
    predict, _ = _by_votes(model, features, y)
    return FittedBaseline(predict, len(used) + linear, sum(map(_n_comparisons, used)) + linear)


def _skope(features: np.ndarray, y: np.ndarray, seed: int) -> FittedBaseline:
    model = _imodels().SkopeRulesClassifier(random_state=seed).fit(features, y)
    if not model.rules_:
        return FittedBaseline(lambda matrix: np.zeros(len(matrix), dtype=bool), 0, 0)
    predict, _ = _by_votes(model, features, y)
    return FittedBaseline(predict, len(model.rules_), sum(map(_n_comparisons, model.rules_)))


def _by_votes(model: Any, features: np.ndarray, y: np.ndarray) -> tuple[Callable[[np.ndarray], np.ndarray], float]:
    """(prediction, cut): yes where the model's share of yes is above the cut that gives the best MCC on TRAIN.

    Rules are chosen by MCC; a learner that is held to a share of one half instead would lose by that alone.
    """

    def votes(matrix: np.ndarray) -> np.ndarray:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return np.asarray(model.predict_proba(matrix))[:, 1]

    cut = best_cut(votes(features), y)
    return lambda matrix: votes(matrix) > cut, cut


def best_cut(votes: np.ndarray, y: np.ndarray) -> float:
    """Midpoint between the two neighbouring votes [row] that part the rows with the best MCC; first of equals."""
    values, inverse = np.unique(votes, return_inverse=True)
    if len(values) < 2:
        return 0.5
    n_below = np.cumsum(np.bincount(inverse))[:-1]
    true_below = np.cumsum(np.bincount(inverse, y))[:-1]
    fires, hits = len(y) - n_below, y.sum() - true_below
    place = int(np.argmax(np.round(mcc(hits, fires - hits, true_below, n_below - true_below), 12)))
    return float((values[place] + values[place + 1]) / 2)


def _n_comparisons(rule: object) -> int:
    return str(rule).count(" and ") + 1


def _tree(features: np.ndarray, y: np.ndarray, seed: int) -> FittedBaseline:
    from sklearn.tree import DecisionTreeClassifier

    model = DecisionTreeClassifier(max_depth=TREE_DEPTH, random_state=seed).fit(features, y)
    predict, cut = _by_votes(model, features, y)
    yes = (model.tree_.children_left < 0) & (model.tree_.value[:, 0, 1] > cut)
    return FittedBaseline(predict, int(yes.sum()), int(_depths(model.tree_)[yes].sum()))


def _depths(tree: Any) -> np.ndarray:
    """Depth of each node, [node]; children come after their parent."""
    depths = np.zeros(tree.node_count, dtype=int)
    for node in range(tree.node_count):
        for child in (tree.children_left[node], tree.children_right[node]):
            if child >= 0:
                depths[child] = depths[node] + 1
    return depths


def _logistic(features: np.ndarray, y: np.ndarray, seed: int) -> FittedBaseline:
    from sklearn.linear_model import LogisticRegressionCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    folds = min(3, int(np.bincount(y).min()))
    if folds < 2:
        constant = bool(y.mean() > 0.5)
        return FittedBaseline(lambda matrix: np.full(len(matrix), constant), 0, 0)
    model = LogisticRegressionCV(
        Cs=np.geomspace(0.01, 10, 7),
        l1_ratios=(1.0,),
        solver="liblinear",
        cv=folds,
        random_state=seed,
        scoring="neg_log_loss",
        use_legacy_attributes=False,
    )
    pipeline = make_pipeline(StandardScaler(), model).fit(features, y)
    used = int(np.count_nonzero(model.coef_))
    return FittedBaseline(_by_votes(pipeline, features, y)[0], used, used)
