"""Other rule learners on the same split: the yardstick by which a user judges whether the rules are worth having."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

import numpy as np

from lib.cli import UserError, derived_seed
from lib.rule_induction import stratified_rows
from lib.rule_metrics import rule_scores

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
    """SkopeRules of `imodels`: precise rules of bagged trees, deduplicated; the vote needed is set on TRAIN by MCC."""

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


def _imodels() -> object:
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
    return FittedBaseline(_quiet(model.predict), len(used) + linear, sum(map(_n_comparisons, used)) + linear)


def _skope(features: np.ndarray, y: np.ndarray, seed: int) -> FittedBaseline:
    model = _imodels().SkopeRulesClassifier(random_state=seed).fit(features, y)
    if not model.rules_:
        return FittedBaseline(lambda matrix: np.zeros(len(matrix), dtype=bool), 0, 0)

    def vote(matrix: np.ndarray) -> np.ndarray:
        return model.predict_proba(matrix)[:, 1]

    # Its own cut, half of all votes, finds nothing where several different rules are true.
    votes = vote(features)
    cuts = np.unique(votes)[:-1]
    scores = [float(rule_scores(votes > cut, y).mcc) for cut in cuts]
    cut = float(cuts[int(np.argmax(scores))]) if scores else 0.5
    return FittedBaseline(
        _quiet(lambda matrix: vote(matrix) > cut), len(model.rules_), sum(map(_n_comparisons, model.rules_))
    )


def _n_comparisons(rule: object) -> int:
    return str(rule).count(" and ") + 1


def _tree(features: np.ndarray, y: np.ndarray, seed: int) -> FittedBaseline:
    from sklearn.tree import DecisionTreeClassifier

    model = DecisionTreeClassifier(max_depth=TREE_DEPTH, random_state=seed).fit(features, y)
    leaves = model.tree_.children_left < 0
    yes = leaves & (model.tree_.value[:, 0, :].argmax(axis=1) == 1)
    return FittedBaseline(_quiet(model.predict), int(yes.sum()), int(_depths(model.tree_)[yes].sum()))


def _depths(tree: object) -> np.ndarray:
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
    return FittedBaseline(_quiet(pipeline.predict), used, used)


def _quiet(predict: Callable[[np.ndarray], np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
    def fires(matrix: np.ndarray) -> np.ndarray:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return np.asarray(predict(matrix)) > 0.5

    return fires
