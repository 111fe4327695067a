"""RuleSHAP: a short disjunction of conjunctions that predicts a yes/no target, or the answer that there is none.

Boosted trees propose conjunctions; exact SHAP values of the trees say which features matter, and bias both the growth
of a second set of trees and the penalty of an L1 fit that screens the conjunctions; a search over small disjunctions
finds the best rule of every size; inner cross-validation says which size holds on unseen rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.utils.multiclass import check_classification_targets, type_of_target
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, check_random_state, validate_data

from lib.data_model_for_shap import Explanation, TreeSettings
from lib.rule_atoms import Literal
from lib.rule_candidates import CandidateTable
from lib.rule_conjunctions import literal_counts, rarest_condition
from lib.rule_induction import Induction, InductionSettings, Sample, induce, stratified_rows, validate
from lib.rule_metrics import RuleScores
from lib.rule_search import RuleSearch, SearchLimits
from lib.rule_selection import SizeChoice
from lib.text_and_rules import Conjunction, Rule

if TYPE_CHECKING:
    from sklearn.utils import Tags


@dataclass(frozen=True)
class RuleTable:
    """Candidate literals, best first, with what was measured on the fitted rows; all arrays are [literal].

    scores: counts against the target. importance: SHAP weight of the literal's features (their mean). coefficient: of
    the L1 step. gain_sum, gain_max: split gains. min_condition_coverage: the least share of rows that one condition
    alone covers.
    """

    literals: list[Conjunction]
    scores: RuleScores
    importance: np.ndarray
    coefficient: np.ndarray
    gain_sum: np.ndarray
    gain_max: np.ndarray
    min_condition_coverage: np.ndarray

    def __len__(self) -> int:
        return len(self.literals)


class _RuleSHAPBase(BaseEstimator):
    """What classifier and regressor share; see `RuleSHAP` for the parameters."""

    def __init__(
        self,
        *,
        max_conditions: int = 3,
        max_literals: int = 3,
        use_shap_in_xgb: bool = True,
        use_shap_in_lasso: bool = True,
        n_splits: int = 5,
        n_repeats: int = 1,
        alpha: float = 0.01,
        n_estimators: int = 40,
        max_depth: int = 4,
        learning_rate: float = 0.3,
        unique_rows_in_shap: bool = False,
        fast_shap: bool = False,
        explain: bool = False,
        require_rule: bool = False,
        max_search_rows: int = 50_000,
        random_state: int | None = 0,
        n_jobs: int = 1,
    ) -> None:
        self.max_conditions = max_conditions
        self.max_literals = max_literals
        self.use_shap_in_xgb = use_shap_in_xgb
        self.use_shap_in_lasso = use_shap_in_lasso
        self.n_splits = n_splits
        self.n_repeats = n_repeats
        self.alpha = alpha
        self.n_estimators = n_estimators
        self.max_depth = max_depth
        self.learning_rate = learning_rate
        self.unique_rows_in_shap = unique_rows_in_shap
        self.fast_shap = fast_shap
        self.explain = explain
        self.require_rule = require_rule
        self.max_search_rows = max_search_rows
        self.random_state = random_state
        self.n_jobs = n_jobs

    def induction_settings(self) -> InductionSettings:
        """The parameters as the induction takes them."""
        return InductionSettings(
            limits=SearchLimits(self.max_conditions, self.max_literals),
            trees=TreeSettings(self.n_estimators, self.max_depth, self.learning_rate, n_jobs=self.n_jobs),
            use_shap_in_xgb=self.use_shap_in_xgb,
            use_shap_in_lasso=self.use_shap_in_lasso,
            unique_rows_in_shap=self.unique_rows_in_shap,
            fast_shap=self.fast_shap,
            explain=self.explain,
        )

    def _names(self, feature_names: Sequence[str] | None) -> tuple[str, ...]:
        if feature_names is None:
            feature_names = getattr(self, "feature_names_in_", [f"x{i}" for i in range(self.n_features_in_)])
        if len(feature_names) != self.n_features_in_ or len(set(feature_names)) != len(feature_names):
            raise ValueError(f"{self.n_features_in_} distinct feature names are needed, got {len(feature_names)}")
        return tuple(map(str, feature_names))

    def _fit_event(
        self,
        features: np.ndarray,
        y: np.ndarray,
        event: np.ndarray,
        sample_weight: np.ndarray | None,
        feature_names: Sequence[str] | None,
        *,
        logistic: bool,
    ) -> np.ndarray:
        """Find the rule for `event` [row] with trees grown on `y` [row]; returns where it holds, bool [row]."""
        self.feature_columns_ = self._names(feature_names)
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        settings = self.induction_settings()
        everything = Sample.of(features, event, self.feature_columns_, y=y, weight=sample_weight, logistic=logistic)
        searched = stratified_rows(everything.target.positive, self.max_search_rows, seed)
        sample = everything if len(searched) == everything.table.n_rows else everything.rows(searched)
        found = induce(sample, settings, seed)
        self.validation_: SizeChoice | None = validate(
            sample, settings, seed, n_splits=self.n_splits, n_repeats=self.n_repeats, alpha=self.alpha
        )
        cost = 0 if self.validation_ is None else self.validation_.chosen_cost
        self.reason_ = "" if cost else _why_no_rule(everything, self.validation_, self.alpha)
        if self.require_rule and not cost:
            cost = settings.limits.max_cost
        path = [literals for _, literals in found.path.monotone()]
        if sample is not everything:
            search = RuleSearch(everything.table, everything.target, SearchLimits(bank_cuts=0))
            path[cost] = search.centred(search.refined(path[cost]))
        path = [tuple(sorted(literals, key=lambda literal: _rank_of(literal, everything))) for literals in path]
        self.path_: list[Rule] = [everything.table.rule(literals) for literals in path]
        self.rule_: Rule = self.path_[cost]
        self.explanation_: Explanation | None = found.shap
        self.rules_: RuleTable = _rule_table(found.candidates.including(path[cost]), everything, found.shap)
        self.feature_importances_ = _importances(found, everything.table.n_features)
        return self._covers(features)

    def _covers(self, features: np.ndarray) -> np.ndarray:
        columns = dict(zip(self.feature_columns_, features.T, strict=True))
        return self.rule_.covers(columns)

    def fires(self, X: np.ndarray) -> np.ndarray:
        """Where the rule holds, bool [row]."""
        check_is_fitted(self)
        return self._covers(validate_data(self, X, reset=False, dtype=np.float64))


class RuleSHAP(ClassifierMixin, _RuleSHAPBase):
    """A short rule for a yes/no target.

    Parameters:
        max_conditions: most conditions per literal. max_literals: most literals (disjuncts) of the rule.
        use_shap_in_xgb: grow a second set of trees whose features are drawn in proportion to their SHAP importance.
        use_shap_in_lasso: divide the L1 penalty of a candidate by the SHAP importance of its features.
        n_splits, n_repeats: folds of the inner cross-validation that chooses the rule's size, and how often it is done
            (less often above 60,000 rows in all).
        alpha: a rule is reported only if its out-of-fold agreement has a smaller p-value.
        n_estimators, max_depth, learning_rate: of the boosted trees.
        unique_rows_in_shap: explain distinct (features, target) rows only. fast_shap: Saabas' path attribution.
        explain: compute SHAP values even if neither use of them is on.
        require_rule: without a rule better than chance, take the best-looking one all the same (for controls).
        max_search_rows: above this many rows the search runs on a stratified sample; cuts are then set on all rows.

    Fitted attributes:
        rule_: the chosen `Rule` (no literal: none is better than chance); reason_: why there is none, or "".
        rules_: the candidates (`RuleTable`). path_: the best rule of at most each size, from 0.
        validation_: what inner cross-validation said, or None if a class has a single row.
        explanation_: SHAP values of some of the rows, or None.
        feature_importances_: their weights (without SHAP: split gains), sum 1.
    """

    def fit(
        self,
        X: np.ndarray,
        y: np.ndarray,
        sample_weight: np.ndarray | None = None,
        feature_names: Sequence[str] | None = None,
    ) -> RuleSHAP:
        """Learn from X [row, feature] and a target y [row] with at most two values (the greater one is "yes")."""
        features, y = validate_data(self, X, y, dtype=np.float64)
        check_classification_targets(y)
        if type_of_target(y) not in ("binary", "multiclass") or len(np.unique(y)) > 2:
            raise ValueError(f"Only binary classification is supported. The type of the target is {type_of_target(y)}.")
        weight = (
            None if sample_weight is None else _check_sample_weight(sample_weight, features, ensure_non_negative=True)
        )
        self.classes_, codes = np.unique(y, return_inverse=True)
        # One class: a numeric or boolean target that is never true has no "yes"; anything else is taken as "yes".
        event = codes == 1 if len(self.classes_) == 2 else np.full(len(y), bool(self.classes_[0]))
        fires = self._fit_event(features, event.astype(float), event, weight, feature_names, logistic=True)
        self._positive_share = _shares(fires, event, weight)
        return self

    def predict(self, X: np.ndarray) -> np.ndarray:
        """The target's value: "yes" where the rule holds; without a rule, the commoner value. [row]"""
        fires = self.fires(X)
        if len(self.classes_) == 1:
            return np.repeat(self.classes_, len(fires))
        if not self.rule_.literals:
            fires = np.full(len(fires), self._positive_share[0] > 0.5)
        return self.classes_[fires.astype(int)]

    def predict_proba(self, X: np.ndarray) -> np.ndarray:
        """Share of each class among fitted rows on the same side of the rule, [row, class]."""
        fires = self.fires(X)
        if len(self.classes_) == 1:
            return np.ones((len(fires), 1))
        yes = np.where(fires, self._positive_share[1], self._positive_share[0])
        return np.stack([1 - yes, yes], axis=1)

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_class = False
        return tags


class RuleSHAPRegressor(RegressorMixin, _RuleSHAPBase):
    """A short rule for where a number is large: its upper `1 - tail_quantile` tail. Parameters as in `RuleSHAP`."""

    def __init__(
        self,
        *,
        tail_quantile: float = 0.9,
        max_conditions: int = 3,
        max_literals: int = 3,
        use_shap_in_xgb: bool = True,
        use_shap_in_lasso: bool = True,
        n_splits: int = 5,
        n_repeats: int = 1,
        alpha: float = 0.01,
        n_estimators: int = 40,
        max_depth: int = 4,
        learning_rate: float = 0.3,
        unique_rows_in_shap: bool = False,
        fast_shap: bool = False,
        explain: bool = False,
        require_rule: bool = False,
        max_search_rows: int = 50_000,
        random_state: int | None = 0,
        n_jobs: int = 1,
    ) -> None:
        super().__init__(
            max_conditions=max_conditions,
            max_literals=max_literals,
            use_shap_in_xgb=use_shap_in_xgb,
            use_shap_in_lasso=use_shap_in_lasso,
            n_splits=n_splits,
            n_repeats=n_repeats,
            alpha=alpha,
            n_estimators=n_estimators,
            max_depth=max_depth,
            learning_rate=learning_rate,
            unique_rows_in_shap=unique_rows_in_shap,
            fast_shap=fast_shap,
            explain=explain,
            require_rule=require_rule,
            max_search_rows=max_search_rows,
            random_state=random_state,
            n_jobs=n_jobs,
        )
        self.tail_quantile = tail_quantile

    def fit(
        self,
        X: np.ndarray,
        y: np.ndarray,
        sample_weight: np.ndarray | None = None,
        feature_names: Sequence[str] | None = None,
    ) -> RuleSHAPRegressor:
        """Learn from X [row, feature] and numbers y [row]."""
        features, y = validate_data(self, X, y, dtype=np.float64, y_numeric=True)
        weight = (
            None if sample_weight is None else _check_sample_weight(sample_weight, features, ensure_non_negative=True)
        )
        self.tail_threshold_ = float(np.quantile(y, self.tail_quantile))
        fires = self._fit_event(
            features, y.astype(float), y >= self.tail_threshold_, weight, feature_names, logistic=False
        )
        self._means = _shares(fires, y, weight)
        return self

    def predict(self, X: np.ndarray) -> np.ndarray:
        """Mean of the fitted rows on the same side of the rule, [row]."""
        return np.where(self.fires(X), self._means[1], self._means[0])

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        # A yes/no rule cannot follow a number closely.
        tags.regressor_tags.poor_score = True
        return tags


def _rank_of(literal: Literal, sample: Sample) -> tuple:
    """Sort key of a rule's literals: the best by itself first."""
    counts = sample.target.counts(sample.table.literal_bits(literal, sample.target.all_bits))
    return -round(float(sample.target.mcc(*counts)), 12), literal


def _why_no_rule(sample: Sample, checked: SizeChoice | None, alpha: float) -> str:
    if sample.is_constant:
        return "the target has one value only"
    if checked is None:
        return "too few rows of one class to validate a rule"
    if checked.p_value > alpha:
        return f"no rule agrees with unseen rows better than chance (p = {checked.p_value:.2g}, {alpha:g} needed)"
    return "no rule is better than none by more than a standard error"


def _shares(fires: np.ndarray, values: np.ndarray, weight: np.ndarray | None) -> tuple[float, float]:
    """Mean of values where the rule is silent and where it holds; the overall mean for an empty side."""
    weight = np.ones(len(values)) if weight is None else weight
    overall = float(np.average(values, weights=weight))

    def mean(side: np.ndarray) -> float:
        return float(np.average(values[side], weights=weight[side])) if weight[side].sum() > 0 else overall

    return mean(~fires), mean(fires)


def _importances(found: Induction, n_features: int) -> np.ndarray:
    """Weight of each feature, sum 1 (0 if nothing was learned): SHAP, or else split gains of the candidates."""
    if found.shap is not None:
        return found.shap.weights
    gains = np.zeros(n_features)
    for literal, gain in zip(found.candidates.literals, found.candidates.gain_max, strict=True):
        for atom in literal.atoms:
            gains[atom.feature] = max(gains[atom.feature], gain)
    return gains / gains.sum() if gains.sum() > 0 else gains


def _rule_table(candidates: CandidateTable, sample: Sample, shap: Explanation | None) -> RuleTable:
    """Candidates with their counts on all rows, best MCC first; ties: shorter, then text."""
    table, target = sample.table, sample.target
    conjunctions = [table.conjunction(literal) for literal in candidates.literals]
    n_true, n_fire = literal_counts(candidates.literals, table, target)
    if target.weight is None:
        n_true, n_fire = n_true.astype(int), n_fire.astype(int)
    positives, negatives = (
        n_true.dtype.type(total) for total in (target.total_positive, target.total - target.total_positive)
    )
    scores = RuleScores(n_true, n_fire - n_true, positives - n_true, negatives - n_fire + n_true)
    score = np.round(np.atleast_1d(scores.mcc), 12)
    order = np.array(
        sorted(
            range(len(conjunctions)), key=lambda i: (-score[i], candidates.literals[i].cost, conjunctions[i].text())
        ),
        dtype=int,
    )
    features = [sorted({atom.feature for atom in literal.atoms}) for literal in candidates.literals]
    weights = np.zeros(table.n_features) if shap is None else shap.weights
    importance = np.array([weights[members].mean() for members in features])
    alone = rarest_condition(candidates.literals, table, target)
    return RuleTable(
        [conjunctions[i] for i in order],
        scores.at(order),
        *(
            field[order]
            for field in (importance, candidates.coefficient, candidates.gain_sum, candidates.gain_max, alone)
        ),
    )
