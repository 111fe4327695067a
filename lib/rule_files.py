"""The rule files of stages 3 and 7: published names and columns, ours added at the end.

A file never says more than was done: TEST is the frozen TRAIN rule; TEST-selected and ALL-FIT are marked as not held
out.
Differs from the published files in that numbers are not rounded, `min_condition_coverage` is the coverage of the least
common condition itself, and a rule text always has every digit, so that text, mask and score agree.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from lib.artifacts import write_csv
from lib.cli import rng
from lib.rule_masks import TargetRows, pack
from lib.rule_metrics import RuleScores, benjamini_hochberg, fisher_p_values, metric_interval, rule_scores
from lib.text_and_rules import Conjunction, Rule, rule_file_path

if TYPE_CHECKING:
    from lib.ruleshap import RuleSHAP, RuleTable

TEST_SELECTED_SIGNATURE = "test_selected_from_train_rules_v1"
ALL_FIT_SIGNATURE = "all_fit_selected_scored_on_train_plus_eval_v2"
RULE_METRIC_COLUMNS = {
    "P(ŷ_model=coefficient_sign | fire)": "precision",
    "R(fire | ŷ_model=coefficient_sign)": "recall",
    "F1(ŷ_model=coefficient_sign | fire)": "f1",
    "Lift(ŷ_model=coefficient_sign | fire)": "lift",
    "Acc(ŷ_rule vs ŷ_model)": "accuracy",
    "Coverage(ŷ_model=1 correct by ŷ_rule)": "tpr",
    "Coverage(ŷ_model=0 correct by ŷ_rule)": "tnr",
    "BalancedAcc(ŷ_rule vs ŷ_model)": "balanced_accuracy",
    "MCC(ŷ_rule vs ŷ_model)": "mcc",
}
COMBO_METRIC_COLUMNS = {
    "dataset_coverage": "coverage",
    "P(target=1|fire)": "precision",
    "R(fire|target=1)": "recall",
    "F1(target=1|fire)": "f1",
    "Lift(target=1|fire)": "lift",
    "Acc": "accuracy",
    "TPR": "tpr",
    "TNR": "tnr",
    "BalancedAcc": "balanced_accuracy",
    "MCC": "mcc",
}


@dataclass(frozen=True)
class LabelledRows:
    """Rows that rules are fitted to or scored on. features: [row, feature]; y: bool [row]."""

    features: np.ndarray
    names: tuple[str, ...]
    y: np.ndarray

    def __post_init__(self) -> None:
        if self.features.shape != (len(self.y), len(self.names)):
            raise ValueError(f"{self.features.shape} features for {len(self.y)} rows and {len(self.names)} names")

    def __len__(self) -> int:
        return len(self.y)

    @property
    def columns(self) -> dict[str, np.ndarray]:
        """Feature columns by name."""
        return dict(zip(self.names, self.features.T, strict=True))

    def followed_by(self, other: LabelledRows) -> LabelledRows:
        """These rows, then the other's."""
        return LabelledRows(np.vstack([self.features, other.features]), self.names, np.concatenate([self.y, other.y]))


def rule_table_frame(rules: RuleTable) -> pd.DataFrame:
    """Candidate literals as published (section `association_rules`), one row each, best MCC first."""
    scores = rules.scores
    difference = np.abs(np.atleast_1d(scores.mean_difference))
    gain = np.abs(rules.gain_max)
    p_values = fisher_p_values(RuleScores(*(np.round(count) for count in scores))) if len(rules) else np.zeros(0)
    frame = {
        "rule_index": np.arange(len(rules)),
        "is_negated": [literal.negated for literal in rules.literals],
        "rule_expression": [literal.text() for literal in rules.literals],
        "component_type": ["rule"] * len(rules),
        "dataset_coverage": scores.coverage,
        "coefficient_sign": ["positive"] * len(rules),
        "importance": difference,
        "min_condition_coverage": rules.min_condition_coverage,
        "path_gain_sum": rules.gain_sum,
        "path_gain_max": rules.gain_max,
        "importance_weighted_by_gain": (1 + difference) * np.maximum(1.0, np.log(np.maximum(gain, 1e-300))),
        **{column: getattr(scores, metric) for column, metric in RULE_METRIC_COLUMNS.items()},
        "n_conditions": [len(literal.conditions) for literal in rules.literals],
        "tp": scores.tp,
        "fp": scores.fp,
        "fn": scores.fn,
        "tn": scores.tn,
        "p_value": p_values,
        "q_value": benjamini_hochberg(p_values),
        "shap_importance": rules.importance,
        "l1_coefficient": rules.coefficient,
    }
    return pd.DataFrame(frame)


def selected_indices(rule: Rule, rules: RuleTable) -> list[int]:
    """Rows of the rule table that hold the rule's literals, in the rule's order."""
    position = {literal: index for index, literal in reversed(list(enumerate(rules.literals)))}
    return [position[literal] for literal in rule.literals]


def combo_row(model: RuleSHAP, rule: Rule, rows: LabelledRows) -> dict[str, Any]:
    """The selected disjunction and its scores on the rows it was selected on (`rule_combo_train`)."""
    fires = rule.covers(rows.columns)
    scores = rule_scores(fires, rows.y)
    perfect = bool(rule.literals) and bool(np.array_equal(fires, rows.y))
    best_single = float(np.max(model.rules_.scores.mcc, initial=0.0))
    best_search = float(rule_scores(model.path_[-1].covers(rows.columns), rows.y).mcc)
    return {
        "found_solution": bool(rule.literals),
        "success": perfect,
        "perfect_match": perfect,
        "target": "y_target",
        "problem": "classification",
        "selected_rule_indices": str(selected_indices(rule, model.rules_)),
        "selected_literals": str([literal.text() for literal in rule.literals]),
        "expression": rule.text(),
        **_metrics(scores),
        "chosen_from": ("empty", "single", "search")[min(rule.n_literals, 2)],
        "empty_MCC": 0.0,
        "best_single_MCC": best_single,
        "best_greedy_MCC": best_search,
        "screen_topk": len(model.rules_),
        "greedy_seed_metrics": "['MCC']",
        "greedy_winning_seed_metric": "MCC",
        "greedy_winning_seed_literal": "",
        "best_greedy_MCC_by_seed_metric": str({"MCC": best_search}),
    }


def _metrics(scores: RuleScores) -> dict[str, float]:
    return {column: float(getattr(scores, metric)) for column, metric in COMBO_METRIC_COLUMNS.items()}


def _added_columns(model: RuleSHAP, rule: Rule, rows: LabelledRows, seed: int) -> dict[str, Any]:
    """Our columns, at the end of every combo file: size, inner cross-validation, 95 % intervals."""
    checked = model.validation_
    fires = rule.covers(rows.columns)
    intervals: dict[str, float] = {}
    for column, metric in (("MCC", "mcc"), ("P(target=1|fire)", "precision"), ("Lift(target=1|fire)", "lift")):
        low, high = metric_interval(fires, rows.y, metric, rng(seed, "bootstrap", metric))
        intervals |= {f"{column}_low95": low, f"{column}_high95": high}
    return {
        "n_literals": rule.n_literals,
        "n_conditions": rule.n_conditions,
        "inner_cv_MCC": float(checked.chosen_scores.mcc) if checked is not None else float("nan"),
        "inner_cv_p_value": checked.p_value if checked is not None else float("nan"),
        **intervals,
        "reason": model.reason_,
    }


def scored_row(
    selection: dict[str, Any], rule: Rule, rows: LabelledRows, *, scope: str, chosen_from: str
) -> dict[str, Any]:
    """The selected disjunction scored on other rows: selection scores move to `selection_*`, counts are added."""
    scores = rule_scores(rule.covers(rows.columns), rows.y)
    blank = dict.fromkeys(("empty_MCC", "best_single_MCC", "best_greedy_MCC", "best_greedy_MCC_by_seed_metric"), "")
    moved = (
        "empty_MCC",
        "best_single_MCC",
        "best_greedy_MCC",
        "best_greedy_MCC_by_seed_metric",
        "greedy_winning_seed_metric",
        "greedy_winning_seed_literal",
        "MCC",
    )
    return {
        **selection,
        **_metrics(scores),
        **blank,
        "chosen_from": chosen_from,
        **{f"selection_{name}": selection[name] for name in moved},
        "computed_on": scope,
        "score_scope": scope,
        "Precision": float(scores.precision),
        "n_eval": int(scores.n),
        "n_pos": int(scores.n_positive),
        "n_neg": int(scores.n - scores.n_positive),
        "n_fire": int(scores.n_fire),
        "tp": int(scores.tp),
        "fp": int(scores.fp),
        "tn": int(scores.tn),
        "fn": int(scores.fn),
        "target_prevalence": float(scores.prevalence),
        "rule_fire_rate": float(scores.coverage),
    }


def best_disjunction(rules: RuleTable, rows: LabelledRows, max_literals: int) -> Rule:
    """The disjunction of TRAIN literals that fits other rows best: optimistic, for comparison with published scopes."""
    target = TargetRows(rows.y)
    bits = [pack(literal.covers(rows.columns)) for literal in rules.literals]
    chosen: list[Conjunction] = []
    covered, best = np.zeros_like(target.all_bits), 0.0
    while bits and len(chosen) < max_literals:
        scores = target.mcc(*target.counts(np.stack(bits) | covered))
        index = int(np.argmax(scores))
        if scores[index] <= best + 1e-12:
            break
        chosen.append(rules.literals[index])
        covered, best = covered | bits[index], float(scores[index])
    return Rule(tuple(chosen))


def write_rules(
    rules_dir: str | Path,
    target: str,
    model: RuleSHAP,
    train: LabelledRows,
    *,
    test: LabelledRows | None = None,
    all_fit_model: RuleSHAP | None = None,
    with_test_selected: bool = False,
    seed: int = 0,
    more_columns: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[Path]:
    """Write all rule files of one target and return their paths; `optimal_rule_set_<target>.csv` comes last.

    model: fitted on `train` only; `test` is scored once, with the frozen rule. all_fit_model: fitted on train and test.
    more_columns: file name -> columns that this file has besides.
    """
    folder = Path(rules_dir)
    paths = []
    for path, frame in _tables(folder, target, model, train, test, all_fit_model, with_test_selected, seed):
        write_csv(path, frame.assign(**(more_columns or {}).get(path.name, {})))
        paths.append(path)
    return paths


def _tables(
    folder: Path,
    target: str,
    model: RuleSHAP,
    train: LabelledRows,
    test: LabelledRows | None,
    all_fit_model: RuleSHAP | None,
    with_test_selected: bool,
    seed: int,
) -> Iterator[tuple[Path, pd.DataFrame]]:
    selection = combo_row(model, model.rule_, train)
    table = rule_table_frame(model.rules_)
    yield rule_file_path(folder, target, prefix="association_rules"), table
    on_train = {**selection, **_added_columns(model, model.rule_, train, seed)}
    yield folder / f"rule_combo_train_{target}.csv", pd.DataFrame([on_train])
    if test is not None and len(test):
        row = scored_row(selection, model.rule_, test, scope="test", chosen_from="frozen_train_combo_scored_on_test")
        row |= _added_columns(model, model.rule_, test, seed)
    else:
        row = {**on_train, "computed_on": "train_selection", "score_scope": "train_selection"}
    yield folder / f"rule_combo_{target}.csv", pd.DataFrame([row])
    if with_test_selected and test is not None and len(test):
        yield from _test_selected_tables(folder, target, model, test, table, seed)
    if all_fit_model is not None:
        yield from _all_fit_tables(folder, target, all_fit_model, train, test, seed)
    yield rule_file_path(folder, target), table.iloc[selected_indices(model.rule_, model.rules_)]


def _test_selected_tables(
    folder: Path, target: str, model: RuleSHAP, test: LabelledRows, table: pd.DataFrame, seed: int
) -> Iterator[tuple[Path, pd.DataFrame]]:
    rule = best_disjunction(model.rules_, test, model.max_literals)
    row = scored_row(
        combo_row(model, rule, test),
        rule,
        test,
        scope="test_selected",
        chosen_from="test_selected_from_train_emitted_rules",
    )
    row |= {
        "selection_scope": "test_selected",
        "heldout_valid": False,
        "test_selected_combo_cache_signature": TEST_SELECTED_SIGNATURE,
        "test_selected_source_rules": "train_emitted_rules",
        "test_selected_n_eval_rows": len(test),
    }
    row |= _added_columns(model, rule, test, seed)
    yield folder / f"rule_combo_test_selected_{target}.csv", pd.DataFrame([row])
    yield (rule_file_path(folder, target, scope="test_selected"), table.iloc[selected_indices(rule, model.rules_)])


def _all_fit_tables(
    folder: Path, target: str, model: RuleSHAP, train: LabelledRows, test: LabelledRows | None, seed: int
) -> Iterator[tuple[Path, pd.DataFrame]]:
    has_test = test is not None and len(test) > 0
    rows = train.followed_by(test) if has_test else train
    row = scored_row(
        combo_row(model, model.rule_, rows),
        model.rule_,
        rows,
        scope="all_fit",
        chosen_from="all_fit_selected_and_scored_on_all_rows",
    )
    row |= {
        "selection_scope": "all_fit",
        "heldout_valid": False,
        "all_fit_cache_signature": ALL_FIT_SIGNATURE,
        "all_fit_source_scope": "train_plus_eval" if has_test else "train_only_no_eval",
        "all_fit_n_train_rows": len(train),
        "all_fit_n_eval_rows": len(test) if has_test else 0,
    }
    row |= _added_columns(model, model.rule_, rows, seed)
    table = rule_table_frame(model.rules_)
    yield rule_file_path(folder, target, scope="all_fit", prefix="association_rules"), table
    yield folder / f"rule_combo_all_fit_{target}.csv", pd.DataFrame([row])
    yield rule_file_path(folder, target, scope="all_fit"), table.iloc[selected_indices(model.rule_, model.rules_)]
