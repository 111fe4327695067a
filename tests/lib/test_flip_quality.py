"""Metric tables, high quality, and unions of flips on each scope's own rows."""

import json

import numpy as np
import pandas as pd
import pytest

from lib.artifacts import write_csv
from lib.cli import rng
from lib.flip_metrics import QualityCut
from lib.flip_quality import coverage_report, layer_report, scope_flips, union_p_value
from lib.flip_rows import EvaluatedRows
from lib.flip_rule_tables import (
    RuleRun,
    best_per_neuron,
    collect_rules,
    rule_lengths,
    scope_summary,
    write_rule_tables,
)
from lib.flip_table import FlipTable
from lib.flip_targets import FlipTarget
from lib.neuron_intervention import FlipMatrix
from lib.neurons import Neuron

NEURONS = (Neuron("m5", 1), Neuron("m5", 2), Neuron("a2.h1", 3))
POLICY = "is_correct_zero_decode_only"


def _rule_file(root, neuron, target, scope, **columns):
    prefix = {"train": "train_", "test": "", "test_selected": "test_selected_", "all_fit": "all_fit_"}[scope]
    row = {
        "expression": "(a > 1 & b <= 2) OR (c > 3)",
        "dataset_coverage": 0.3,
        "MCC": 0.5,
        "TPR": 0.5,
        "TNR": 0.5,
        "BalancedAcc": 0.5,
        "F1(target=1|fire)": 0.4,
        "P(target=1|fire)": 0.6,
        "n_eval": 90,
        "n_pos": 30,
    }
    if scope != "train":
        row |= {"computed_on": scope, "Precision": 0.6, "MCC_low95": 0.55, "p_value": 0.001, "MCC_gain": 0.2}
    path = root / POLICY / neuron.key / f"rule_combo_{prefix}{target.column(neuron)}.csv"
    write_csv(path, pd.DataFrame([row | columns]))


def _files(root):
    first, second, third = NEURONS
    for scope in ("train", "test", "all_fit"):
        # First neuron: "any" is best on TRAIN, "c2i" happens to be better on TEST.
        _rule_file(root, first, FlipTarget.ANY, scope, MCC={"train": 0.9, "test": 0.72, "all_fit": 0.9}[scope])
        _rule_file(root, first, FlipTarget.C2I, scope, MCC={"train": 0.8, "test": 0.95, "all_fit": 0.8}[scope])
        _rule_file(root, second, FlipTarget.I2C, scope, MCC=0.71, dataset_coverage=0.004 if scope == "test" else 0.2)
        _rule_file(root, third, FlipTarget.ANY, scope, MCC=0.6)
    return RuleRun(root, POLICY, NEURONS)


def test_held_out_the_target_chosen_on_train_speaks_for_the_neuron(tmp_path):
    rules = collect_rules(_files(tmp_path), QualityCut())
    best = best_per_neuron(rules, "test", QualityCut())
    # The better TEST score of the other target does not count; the second neuron's rule covers too few rows.
    assert best[["neuron_key", "flip_target", "MCC"]].values.tolist() == [
        ["m5_1", "flip_m5_1", 0.72],
        ["a2_h1_3", "flip_a2_h1_3", 0.6],
    ]
    assert best["high_quality"].tolist() == [True, False]
    assert best["badge"].tolist() == [True, False]
    described = best_per_neuron(rules, "all_fit", QualityCut())
    assert described["neuron_key"].tolist() == ["m5_1", "m5_2", "a2_h1_3"]
    assert not described["badge"].any()


@pytest.mark.parametrize("change", [{"MCC_low95": 0.49}, {"p_value": 0.2}, {"MCC_gain": 0.0}, {"MCC": 0.69}])
def test_each_condition_of_the_badge_is_needed(tmp_path, change):
    _rule_file(tmp_path, NEURONS[0], FlipTarget.ANY, "train")
    _rule_file(tmp_path, NEURONS[0], FlipTarget.ANY, "test", **({"MCC": 0.8} | change))
    rules = collect_rules(RuleRun(tmp_path, POLICY, NEURONS[:1]), QualityCut())
    assert not rules["badge"].any()


def test_q_values_count_one_test_per_neuron(tmp_path):
    rules = collect_rules(_files(tmp_path), QualityCut())
    tested = rules[rules["q_value"].notna()]
    assert sorted(tested["flip_target"]) == ["flip_a2_h1_3", "flip_i2c_m5_2", "flip_m5_1"]
    assert set(tested["score_scope"]) == {"test"}


def test_a_target_that_only_knows_the_baseline_does_not_speak_for_its_neuron(tmp_path):
    # The neuron breaks every right answer: "any" scores 0.95 on TRAIN, but "was right before" scores 1.0 there.
    for scope in ("train", "test"):
        _rule_file(tmp_path, NEURONS[0], FlipTarget.ANY, scope, MCC=0.95, baseline_rule_MCC=1.0)
        _rule_file(tmp_path, NEURONS[0], FlipTarget.C2I, scope, MCC=0.4, baseline_rule_MCC=0.0)
    rules = collect_rules(RuleRun(tmp_path, POLICY, NEURONS[:1]), QualityCut())
    assert best_per_neuron(rules, "test", QualityCut())["flip_target"].tolist() == ["flip_c2i_m5_1"]


def test_a_rule_that_never_fires_stays_text(tmp_path):
    _rule_file(tmp_path, NEURONS[0], FlipTarget.ANY, "train", expression="FALSE")
    rules = collect_rules(RuleRun(tmp_path, POLICY, NEURONS[:1]), QualityCut())
    assert rules["expression"].tolist() == ["FALSE"]
    assert rules["rule_len_atoms"].tolist() == [0]


def test_rules_of_other_policies_and_neurons_stay_out(tmp_path):
    run = _files(tmp_path)
    other = tmp_path / "is_correct_mean_decode_only" / "m5_1" / "rule_combo_flip_m5_1.csv"
    write_csv(other, pd.DataFrame([{"MCC": 1.0}]))
    _rule_file(tmp_path, Neuron("m9", 9), FlipTarget.ANY, "test", MCC=1.0)
    assert set(collect_rules(run, QualityCut())["neuron_key"]) == {"m5_1", "m5_2", "a2_h1_3"}


def test_tables_and_manifest_have_the_promised_names(tmp_path):
    run, stats = _files(tmp_path), tmp_path / "stats" / "run"
    rules = collect_rules(run, QualityCut())
    write_rule_tables(stats, run, rules, QualityCut(), ["test", "all_fit"], topk=50, stats_dirname="run")
    names = {path.name for path in stats.iterdir()}
    kinds = ("all", "best_per_neuron", "top_50")
    assert {f"rule_combo_metrics_{scope}{kind}.csv" for scope in ("", "test_", "all_fit_") for kind in kinds} <= names
    assert {"rule_combo_metrics_all_fit.csv", "rule_combo_metrics_all_scopes.csv"} <= names
    manifest = json.loads((stats / "rule_combo_metrics_manifest.json").read_text())
    assert manifest["signature"] == "rule_combo_metrics_from_raw_v1"
    assert manifest["score_scopes_written"] == ["test", "all_fit"]
    assert manifest["n_raw_rule_combo_files"] == 12 == len(manifest["raw_rule_combo_files"])
    assert manifest["raw_rule_combo_files"][0]["path"].startswith(POLICY)


def test_a_run_without_rules_writes_headers_not_nothing(tmp_path):
    run = RuleRun(tmp_path, POLICY, NEURONS)
    rules = collect_rules(run, QualityCut())
    write_rule_tables(tmp_path / "stats", run, rules, QualityCut(), ["test"], topk=50, stats_dirname="run")
    table = pd.read_csv(tmp_path / "stats" / "rule_combo_metrics_test_all.csv")
    assert len(table) == 0 and "MCC" in table
    summary = scope_summary(rules, "test", QualityCut(), (0.1, 0.5, 0.9))
    assert (summary["n_neurons_with_rules"], summary["MCC"]["n"]) == (0, 0)


@pytest.mark.parametrize(
    ("text", "lengths"),
    [("(a > 1 & b <= 2) OR (c > 3)", (3, 2, 2)), ("(NOT(a_b <= -0.5e-3))", (1, 1, 1)), ("FALSE", (0, 0, 0))],
)
def test_rule_lengths(text, lengths):
    assert tuple(rule_lengths(text).values()) == lengths


def test_published_rule_files_give_the_published_rows(tmp_path, test_data):
    example = test_data / "published_example" / "stage_7"
    neurons = (Neuron("m3", 9), Neuron("a2.h1", 11))
    rules = collect_rules(RuleRun(example, "is_correct_mean_positional_decode_only", neurons), QualityCut())
    published = pd.read_csv(example / "stats" / "runA" / "rule_combo_metrics_all_scopes.csv")
    keys = ["flip_target", "score_scope"]
    shared = [name for name in published.columns if name not in ("rule_combo_path", "neuron_rank")]
    assert list(rules.columns[: len(published.columns)]) == list(published.columns)
    theirs = (
        published[published["neuron_key"].isin(["m3_9", "a2_h1_11"])]
        .set_index(keys)[shared[5:5] + [name for name in shared if name not in keys]]
        .sort_index()
    )
    ours = rules.set_index(keys)[theirs.columns].sort_index()
    pd.testing.assert_frame_equal(ours, theirs, check_dtype=False)


# ---------------------------------------------------------------- coverage


def _coverage_table():
    # Ten rows, the last four held out; five of them right before ablation.
    baseline = np.array([True, False] * 5)
    flips = np.zeros((3, 10), dtype=bool)
    flips[0, [0, 1, 6]] = True
    flips[1, [6, 7]] = True
    flips[2, [2, 3, 8]] = True
    roles = np.array(["train"] * 6 + ["test"] * 4, dtype=object)
    ablated = np.where(flips, ~baseline, baseline).astype(np.int8)
    return FlipTable(NEURONS, EvaluatedRows(np.arange(10), roles), FlipMatrix(baseline, ablated, flips))


def test_coverage_is_counted_on_the_rows_of_its_scope(tmp_path):
    rules = collect_rules(_files(tmp_path), QualityCut())
    table = _coverage_table()
    flips = [scope_flips(table, rules, scope, QualityCut()) for scope in ("test", "all_fit")]
    report = coverage_report(flips, QualityCut(), "is_correct", rng(0, "x"))
    held_out, everything = report["score_scopes"]["test"], report["score_scopes"]["all_fit"]
    # Held out only m5:1 is of high quality: it flips row 6 of rows 6..9, of which all three flip 6, 7, 8.
    assert held_out["n_neurons_high_quality"] == 1
    assert held_out["flip_any"] == {"union_high": 1, "sum_high": 1, "union_all_in_scope": 3}
    assert held_out["all_rule_bearing_in_scope"]["sum_any"] == 4
    assert held_out["ratios"]["coverage_share_any"] == {"numerator": 1, "denominator": 3, "percent": 100 / 3}
    assert held_out["ratios"]["prevalence_c2i"] == {"numerator": 1, "denominator": 2, "percent": 50.0}
    # ALL-FIT: m5:1 and m5:2 on all ten rows.
    assert everything["n_neurons_high_quality"] == 2
    assert everything["flip_any"] == {"union_high": 4, "sum_high": 5, "union_all_in_scope": 7}
    assert everything["ratios"]["overlap_any"]["percent"] == pytest.approx(125.0)
    assert report["primary_score_scope"] == "test"
    assert report["flip_any"]["union_share_of_all"] == pytest.approx(1 / 3)
    assert report["scope_pair_diagnostics"] == {
        "n_hq_both": 1,
        "n_hq_t_only": 0,
        "n_hq_f_only": 1,
        "same_hq_neuron_set": False,
    }


def test_layers_are_in_network_order_with_their_own_unions(tmp_path):
    rules = collect_rules(_files(tmp_path), QualityCut())
    table = _coverage_table()
    flips = [scope_flips(table, rules, scope, QualityCut()) for scope in ("test", "all_fit")]
    layers = layer_report(table, flips, QualityCut())["layers"]
    assert [(row["layer_key"], row["n_neurons_total"]) for row in layers] == [("a2_h1", 1), ("m5", 2)]
    assert layers[1]["flip_any_union_all"] == 4
    assert layers[1]["flip_any_union_all_test"] == 2
    assert layers[1]["flip_any_union_high_test"] == layers[1]["flip_any_union_high"] == 1
    assert layers[1]["n_neurons_high_quality_all_fit"] == 2
    assert layers[0]["n_neurons_high_quality"] == 0


def test_union_p_values_are_uniform_when_high_quality_means_nothing():
    random = np.random.default_rng(0)
    n_rows = 60
    p_values = []
    for trial in range(60):
        flips = random.random((12, n_rows)) < 0.1
        ablated = flips.astype(np.int8)
        rows = EvaluatedRows(np.arange(n_rows), np.array(["test"] * n_rows, dtype=object))
        table = FlipTable(
            tuple(Neuron("m0", i) for i in range(12)), rows, FlipMatrix(np.zeros(n_rows, dtype=bool), ablated, flips)
        )
        rules = pd.DataFrame(
            columns=["score_scope", "dataset_coverage", "chosen_on_train", "MCC", "neuron_key", "neuron_rank"]
        )
        scope = scope_flips(table, rules, "all_fit", QualityCut())
        scope.is_high[random.choice(12, 4, replace=False)] = True
        p_values.append(union_p_value(scope, FlipTarget.ANY, rng(trial, "p")))
    assert 0.35 < np.mean(p_values) < 0.72
    assert np.mean(np.array(p_values) <= 0.1) < 0.25


def test_no_or_only_high_quality_neurons_have_no_p_value(tmp_path):
    rules = collect_rules(_files(tmp_path), QualityCut())
    scope = scope_flips(_coverage_table(), rules, "all_fit", QualityCut(threshold_all_fit=0.99))
    assert np.isnan(union_p_value(scope, FlipTarget.ANY, rng(0, "p")))
    scope.is_high[:] = True
    assert np.isnan(union_p_value(scope, FlipTarget.ANY, rng(0, "p")))
