"""Rule files: published columns in order, honest scopes, text that scores as recorded."""

from __future__ import annotations

import ast

import numpy as np
import pandas as pd
import pytest

from lib.rule_files import LabelledRows, best_disjunction, rule_table_frame, selected_indices, write_rules
from lib.rule_metrics import rule_scores
from lib.ruleshap import RuleSHAP
from lib.text_and_rules import Rule, load_rules, parse_rule

RULE_COLUMNS = [
    "rule_index",
    "is_negated",
    "rule_expression",
    "component_type",
    "dataset_coverage",
    "coefficient_sign",
    "importance",
    "min_condition_coverage",
    "path_gain_sum",
    "path_gain_max",
    "importance_weighted_by_gain",
    "P(ŷ_model=coefficient_sign | fire)",
    "R(fire | ŷ_model=coefficient_sign)",
    "F1(ŷ_model=coefficient_sign | fire)",
    "Lift(ŷ_model=coefficient_sign | fire)",
    "Acc(ŷ_rule vs ŷ_model)",
    "Coverage(ŷ_model=1 correct by ŷ_rule)",
    "Coverage(ŷ_model=0 correct by ŷ_rule)",
    "BalancedAcc(ŷ_rule vs ŷ_model)",
    "MCC(ŷ_rule vs ŷ_model)",
]
TRAIN_COLUMNS = [
    "found_solution",
    "success",
    "perfect_match",
    "target",
    "problem",
    "selected_rule_indices",
    "selected_literals",
    "expression",
    "dataset_coverage",
    "P(target=1|fire)",
    "R(fire|target=1)",
    "F1(target=1|fire)",
    "Lift(target=1|fire)",
    "Acc",
    "TPR",
    "TNR",
    "BalancedAcc",
    "MCC",
    "chosen_from",
    "empty_MCC",
    "best_single_MCC",
    "best_greedy_MCC",
    "screen_topk",
    "greedy_seed_metrics",
    "greedy_winning_seed_metric",
    "greedy_winning_seed_literal",
    "best_greedy_MCC_by_seed_metric",
]
SCORED_COLUMNS = [
    *TRAIN_COLUMNS,
    "selection_empty_MCC",
    "selection_best_single_MCC",
    "selection_best_greedy_MCC",
    "selection_best_greedy_MCC_by_seed_metric",
    "selection_greedy_winning_seed_metric",
    "selection_greedy_winning_seed_literal",
    "selection_MCC",
    "computed_on",
    "score_scope",
    "Precision",
    "n_eval",
    "n_pos",
    "n_neg",
    "n_fire",
    "tp",
    "fp",
    "tn",
    "fn",
    "target_prevalence",
    "rule_fire_rate",
]
NAMES = ("f0", "f1", "f2")


def rows_of(n_rows, seed):
    random = np.random.default_rng(seed)
    features = random.random((n_rows, 3))
    y = ((features[:, 0] > 0.7) | (features[:, 1] <= 0.2)) ^ (random.random(n_rows) < 0.05)
    return LabelledRows(features, NAMES, y)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rules")
    train, test = rows_of(400, 0), rows_of(150, 1)
    whole = train.followed_by(test)
    model = RuleSHAP(n_estimators=15).fit(train.features, train.y, feature_names=NAMES)
    all_fit = RuleSHAP(n_estimators=15).fit(whole.features, whole.y, feature_names=NAMES)
    paths = write_rules(folder, "is_correct", model, train, test=test, all_fit_model=all_fit, with_test_selected=True)
    return folder, paths, model, train, test


def test_names_and_order(written):
    folder, paths, *_ = written
    assert [path.name for path in paths] == [
        "association_rules_is_correct.csv",
        "rule_combo_train_is_correct.csv",
        "rule_combo_is_correct.csv",
        "rule_combo_test_selected_is_correct.csv",
        "optimal_rule_set_test_selected_is_correct.csv",
        "association_rules_all_fit_is_correct.csv",
        "rule_combo_all_fit_is_correct.csv",
        "optimal_rule_set_all_fit_is_correct.csv",
        "optimal_rule_set_is_correct.csv",
    ]
    assert {path.name for path in folder.iterdir()} == {path.name for path in paths}


@pytest.mark.parametrize(
    ("name", "columns"),
    [
        ("association_rules_is_correct", RULE_COLUMNS),
        ("optimal_rule_set_is_correct", RULE_COLUMNS),
        ("rule_combo_train_is_correct", TRAIN_COLUMNS),
        ("rule_combo_is_correct", SCORED_COLUMNS),
        (
            "rule_combo_test_selected_is_correct",
            [
                *SCORED_COLUMNS,
                "selection_scope",
                "heldout_valid",
                "test_selected_combo_cache_signature",
                "test_selected_source_rules",
                "test_selected_n_eval_rows",
            ],
        ),
        (
            "rule_combo_all_fit_is_correct",
            [
                *SCORED_COLUMNS,
                "selection_scope",
                "heldout_valid",
                "all_fit_cache_signature",
                "all_fit_source_scope",
                "all_fit_n_train_rows",
                "all_fit_n_eval_rows",
            ],
        ),
    ],
)
def test_published_columns_come_first_in_order(written, name, columns):
    header = pd.read_csv(written[0] / f"{name}.csv").columns.tolist()
    assert header[: len(columns)] == columns


def test_recorded_scores_are_those_of_the_text(written):
    folder, _, model, train, test = written
    row = pd.read_csv(folder / "rule_combo_is_correct.csv").iloc[0]
    scores = rule_scores(parse_rule(row["expression"]).covers(test.columns), test.y)
    assert (row["tp"], row["fp"], row["fn"], row["tn"]) == tuple(scores)
    assert row["MCC"] == scores.mcc
    assert row["computed_on"] == "test"
    assert row["selection_MCC"] == rule_scores(model.rule_.covers(train.columns), train.y).mcc
    assert row["MCC_low95"] <= row["MCC"] <= row["MCC_high95"]
    for _, literal in pd.read_csv(folder / "association_rules_is_correct.csv").iloc[::50].iterrows():
        scores = rule_scores(parse_rule(literal["rule_expression"]).covers(train.columns), train.y)
        assert literal["MCC(ŷ_rule vs ŷ_model)"] == scores.mcc
        assert literal["tp"] == scores.tp


def test_optimal_set_holds_the_literals_of_the_rule(written):
    folder, _, model, *_ = written
    stored = load_rules(folder, "is_correct")
    assert tuple(rule.rule.literals[0] for rule in stored) == model.rule_.literals
    assert [rule.rule_id for rule in stored] == list(range(len(stored)))
    indices = ast.literal_eval(pd.read_csv(folder / "rule_combo_is_correct.csv")["selected_rule_indices"][0])
    table = rule_table_frame(model.rules_)
    assert [table["rule_expression"][index] for index in indices] == [rule.text for rule in stored]
    assert table["rule_index"].tolist() == list(range(len(table)))
    assert selected_indices(model.rule_, model.rules_) == indices


def test_scopes_say_what_they_are(written):
    folder, _, _, train, test = written
    chosen_on_test = pd.read_csv(folder / "rule_combo_test_selected_is_correct.csv").iloc[0]
    assert not chosen_on_test["heldout_valid"]
    assert chosen_on_test["test_selected_n_eval_rows"] == len(test)
    assert chosen_on_test["MCC"] >= pd.read_csv(folder / "rule_combo_is_correct.csv")["MCC"][0] - 0.1
    whole = pd.read_csv(folder / "rule_combo_all_fit_is_correct.csv").iloc[0]
    assert whole["n_eval"] == len(train) + len(test)
    assert whole["all_fit_source_scope"] == "train_plus_eval"


def test_no_rule_is_written_as_such(tmp_path):
    train = rows_of(60, 3)
    train = LabelledRows(train.features, NAMES, np.zeros(60, dtype=bool))
    model = RuleSHAP().fit(train.features, train.y, feature_names=NAMES)
    write_rules(tmp_path, "t", model, train)
    row = pd.read_csv(tmp_path / "rule_combo_t.csv", keep_default_na=False, dtype=str).iloc[0]
    assert row["found_solution"] == "False"
    assert row["expression"] == "FALSE"
    assert row["computed_on"] == "train_selection"
    assert row["reason"] == "the target has one value only"
    assert pd.read_csv(tmp_path / "optimal_rule_set_t.csv").columns.tolist()[:20] == RULE_COLUMNS


def test_best_literals_for_other_rows(written):
    *_, model, train, test = written
    rule = best_disjunction(model.rules_, test, max_literals=2)
    assert 1 <= rule.n_literals <= 2
    best_single = max(rule_scores(literal.covers(test.columns), test.y).mcc for literal in model.rules_.literals)
    assert rule_scores(rule.covers(test.columns), test.y).mcc >= best_single
    assert best_disjunction(model.rules_, LabelledRows(test.features, NAMES, np.zeros(150, dtype=bool)), 2) == Rule(())


def test_shapes_have_to_agree():
    with pytest.raises(ValueError, match="names"):
        LabelledRows(np.zeros((3, 2)), ("a",), np.zeros(3, dtype=bool))
