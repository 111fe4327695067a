"""Finding runs and reading their rule rows: zero, missing, stale and broken are told apart; nothing outside is read."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile

import pandas as pd
import pytest

from lib.cli import UserError
from lib.reporting.artifacts import ModelRoot, Status, find_model_roots, open_tree, read_json
from lib.reporting.localization import (
    Budget,
    CircuitCost,
    agonists,
    budget,
    candidates_by_layer,
    circuit_costs,
    detail_effects,
    effects_by_circuit,
    tree_size,
)
from lib.reporting.models import hq_threshold
from lib.reporting.naming import MAIN_RUN
from lib.reporting.rules import best_per_neuron, hq_count, load_best_rows, load_rule_rows
from lib.reporting.scopes import Scope
from tests import published_tree as published
from tests.reporting.conftest import EMPTY_CELL, raw_best
from tests.scripts import REPOSITORY


def run_with(tmp_path, tables, *, manifest=None, extra=()):
    """A run folder with these CSV tables: name -> rows."""
    root = ModelRoot("arithmetic", "", "M", tmp_path / "stats", None)
    run = root.run(MAIN_RUN)
    run.path.mkdir(parents=True)
    for name, rows in tables.items():
        pd.DataFrame(rows).to_csv(run.path / name, index=False)
    manifests = {"rule_combo_metrics_manifest.json": manifest} if manifest else {}
    for name, content in {**dict(extra), **manifests}.items():
        (run.path / name).write_text(json.dumps(content))
    return run


def row(mcc, coverage=0.1, neuron="m0_1", scope="test", **more):
    layer, _, index = neuron.rpartition("_")
    return {
        "layer_key": layer,
        "neuron_id": int(index),
        "neuron_key": neuron,
        "flip_target": f"flip_{neuron}",
        "score_scope": scope,
        "MCC": mcc,
        "F1": 0.5,
        "BalancedAcc": 0.5,
        "dataset_coverage": coverage,
        **more,
    }


GOOD = {"signature": "rule_combo_metrics_from_raw_v1", "n_raw_rule_combo_files": 3, "score_scopes_written": ["test"]}


# ---------------------------------------------------------------- rule rows


def test_the_floor_goes_before_the_best(tmp_path):
    # The perfect rule covers too little to count; the neuron's other rule does not reach 0.75.
    run = run_with(tmp_path, {"rule_combo_metrics_test_all.csv": [row(1.0, 0.001), row(0.72, 0.02)]})
    best = load_best_rows(run, Scope.TEST).value
    assert best["MCC"].tolist() == [0.72]
    assert (hq_count(best, 0.70), hq_count(best, 0.75)) == (1, 0)
    assert hq_count(load_best_rows(run, Scope.TEST, 0.0).value, 0.75) == 1


def test_the_target_chosen_on_train_speaks_for_a_neuron_of_ours(tmp_path):
    # The other target is better on TEST; taking it would be choosing on TEST.
    rows = [row(0.9, chosen_on_train=False), row(0.6, chosen_on_train=True)]
    run = run_with(tmp_path, {"rule_combo_metrics_test_all.csv": rows})
    assert load_best_rows(run, Scope.TEST).value["MCC"].tolist() == [0.6]
    assert best_per_neuron(pd.DataFrame(rows), Scope.ALL_FIT)["MCC"].tolist() == [0.9]


def test_ties_go_to_f1_and_unknown_values_last():
    rows = pd.DataFrame([row(float("nan")), row(0.8, F1=0.1), row(0.8, F1=0.9)])
    assert best_per_neuron(rows)["F1"].tolist() == [0.9]


def test_the_raw_files_name_decides_the_scope(tmp_path):
    names = [f"rule_combo_{scope}flip_m0_1.csv" for scope in ("test_selected_", "train_test_", "")]
    rows = [row(mcc, source_filename=name) for mcc, name in zip((0.9, 0.8, 0.3), names, strict=True)]
    run = run_with(tmp_path, {"rule_combo_metrics_all_scopes.csv": rows}, manifest=GOOD)
    assert load_rule_rows(run, Scope.TEST).value["MCC"].tolist() == [0.3]
    assert load_rule_rows(run, Scope.TEST_SELECTED).value["MCC"].tolist() == [0.9]


def test_files_without_a_scope_in_their_name_are_test(tmp_path):
    rows = [{key: value for key, value in row(0.8).items() if key != "score_scope"}]
    run = run_with(tmp_path, {"rule_combo_metrics_best_per_neuron.csv": rows}, manifest=GOOD)
    assert load_rule_rows(run, Scope.TEST).status is Status.OK
    assert load_rule_rows(run, Scope.ALL_FIT).status is Status.MISSING


@pytest.mark.parametrize(
    ("tables", "manifest", "extra", "status"),
    [
        ({}, {**GOOD, "n_raw_rule_combo_files": 0}, {}, Status.EMPTY),
        ({}, GOOD, {"flip_stats_global.json": {"n_neurons": 0}}, Status.EMPTY),
        ({}, GOOD, {"rule_metrics_summary_all_fit.json": {"n_neurons_with_rules": 0}}, Status.EMPTY),
        ({"rule_combo_metrics_all_fit_all.csv": [row(0.9, 0.001, scope="all_fit")]}, GOOD, {}, Status.EMPTY),
        ({}, GOOD, {}, Status.MISSING),
        ({"rule_combo_metrics_all_scopes.csv": [row(0.9)]}, GOOD, {}, Status.MISSING),
        ({"rule_combo_metrics_all_fit_all.csv": [row(0.9, scope="all_fit")]}, None, {}, Status.MISSING),
        ({"rule_combo_metrics_all_fit_all.csv": [row(0.9, scope="all_fit")]}, {"signature": "v0"}, {}, Status.STALE),
    ],
)
def test_zero_and_missing_are_told_apart(tmp_path, tables, manifest, extra, status):
    reading = load_best_rows(run_with(tmp_path, tables, manifest=manifest, extra=extra.items()), Scope.ALL_FIT)
    assert reading.status is status
    assert (reading.value is not None) == (status is Status.EMPTY)
    assert bool(reading.reason) == (status is not Status.EMPTY)


def test_a_broken_table_is_not_an_empty_one(tmp_path):
    run = run_with(tmp_path, {})
    (run.path / "rule_combo_metrics_test_all.csv").write_bytes(b"\xff\xfe\x00broken,\x80\n1")
    assert load_rule_rows(run, Scope.TEST).status is Status.INVALID


@pytest.mark.parametrize("scope", Scope)
def test_the_tree_is_read_as_it_was_written(tree, scope):
    roots = {root.unit: root for root in find_model_roots(tree.data)}
    for (task, llm, _), cell in tree.cells.items():
        reading = load_best_rows(roots[f"{task}/{llm}"].run(cell.run_name), scope)
        expected = {key: float(best["MCC"]) for key, best in raw_best(tree.stats(cell), scope.slug).items()}
        found = (
            {}
            if reading.status is Status.EMPTY
            else dict(zip(reading.value["neuron_key"], reading.value["MCC"], strict=True))
        )
        assert found == expected
        assert reading.status is (Status.OK if expected else Status.EMPTY)


def test_bare_nan_tokens_are_no_numbers(tmp_path):
    (tmp_path / "x.json").write_text('{"a": NaN, "b": [Infinity, 1]}')
    assert read_json(tmp_path / "x.json").value == {"a": None, "b": [None, 1]}
    (tmp_path / "x.json").write_text('{"a": ')
    assert read_json(tmp_path / "x.json").status is Status.INVALID


def test_a_scope_has_its_own_threshold():
    coverage = {
        "quality_threshold": 0.6,
        "primary_score_scope": "test_selected",
        "quality_thresholds_by_scope": {"all_fit": 0.8},
    }
    assert hq_threshold(coverage, Scope.ALL_FIT) == 0.8
    assert hq_threshold(coverage, Scope.TEST) == 0.7
    assert hq_threshold({"quality_threshold": 0.6}, Scope.TEST) == 0.6


# ---------------------------------------------------------------- discovery


@pytest.mark.parametrize(
    "below",
    [
        "",
        "arithmetic",
        "arithmetic/Qwen",
        "arithmetic/Qwen/Qwen2-7B-Instruct",
        "arithmetic/Qwen/Qwen2-7B-Instruct/rule_extraction_results/neuron_flip_rules/stats",
    ],
)
def test_task_and_model_from_any_folder_of_the_tree(tree, below):
    units = [root.unit for root in find_model_roots(tree.data / below)]
    assert "arithmetic/Qwen/Qwen2-7B-Instruct" in units
    assert all(unit.startswith("arithmetic/Qwen/Qwen2-") for unit in units)


def test_a_data_folder_above_the_root_misleads_nobody(tree, tmp_path):
    # A mount called /data, and a checkout in it: the task is not the name of the user.
    place = tmp_path / "data" / "user" / "repo" / "data"
    shutil.copytree(tree.data, place)
    assert [root.unit for root in find_model_roots(place)] == [root.unit for root in find_model_roots(tree.data)]
    assert [root.task for root in find_model_roots(place / "arithmetic")] == ["arithmetic"] * 2


def test_a_model_without_organisation(tree, tmp_path):
    shutil.copytree(tree.data / "arithmetic" / "Qwen" / "Qwen2-7B-Instruct", tmp_path / "data/arithmetic/SmolLM2")
    for folder in ("data", "data/arithmetic", "data/arithmetic/SmolLM2"):
        assert [root.unit for root in find_model_roots(tmp_path / folder)] == ["arithmetic/SmolLM2"]


def test_links_out_of_the_root_are_not_followed(tree, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "arithmetic").symlink_to(tree.data / "arithmetic")
    assert find_model_roots(tmp_path / "data") == []


def test_a_zip_reads_like_its_folder(tree, tmp_path):
    archive = shutil.make_archive(str(tmp_path / "data"), "zip", tree.root, "data")
    with open_tree(archive) as folder:
        assert [root.unit for root in find_model_roots(folder)] == [root.unit for root in find_model_roots(tree.data)]
    assert not folder.exists()


@pytest.mark.parametrize("name", ["../evil.txt", "a/../../evil.txt", "/evil.txt", "C:/evil.txt", "a\\..\\..\\evil.txt"])
def test_a_zip_cannot_write_outside(tmp_path, name):
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        archive.writestr(name, "x")
    with pytest.raises(UserError, match="leads outside"), open_tree(tmp_path / "data.zip"):
        pass


def test_a_link_in_a_zip_is_refused(tmp_path):
    info = zipfile.ZipInfo("data/link")
    info.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        archive.writestr(info, "/etc/passwd")
    with pytest.raises(UserError, match="is a link"), open_tree(tmp_path / "data.zip"):
        pass


@pytest.mark.parametrize("content", [None, b"PK\x03\x04broken", b"text"])
def test_nothing_readable_is_a_user_error(tmp_path, content):
    if content is not None:
        (tmp_path / "data.zip").write_bytes(content)
    with pytest.raises(UserError), open_tree(tmp_path / "data.zip"):
        pass


# ---------------------------------------------------------------- circuits


def test_agonists_effects_and_costs_are_as_written(tree):
    roots = {root.unit: root for root in find_model_roots(tree.data)}
    for (task, llm, mode), cell in tree.cells.items():
        run = roots[f"{task}/{llm}"].run(cell.run_name)
        for regime in ("positive", "negative"):
            found = agonists(run, regime)
            assert {agonist.neuron: agonist.effect for agonist in found.value} == cell.effects[regime]
            assert found.status is (Status.OK if cell.effects[regime] else Status.EMPTY)
            costs = circuit_costs(run, regime).value
            assert [cost.n_groups for cost in costs] == [circuit["n_groups"] for circuit in cell.circuits[regime]]
            if mode == "brute_force":
                assert [cost.n_candidates for cost in costs] == [len(c["units"]) for c in cell.circuits[regime]]
            by_circuit = effects_by_circuit(run, regime).value
            for circuit in cell.circuits[regime]:
                home = by_circuit[circuit["circuit_id"]]
                assert all(home[neuron] == cell.effects[regime][neuron] for neuron in circuit["agonists"])


def test_a_controls_costs_are_not_the_runs(tmp_path):
    # 25 group tests of the run, 125 of its control, in folders of the same names below different ones.
    for kind, n_groups in (("", 25), ("_fake_targets", 125)):
        folder = (
            tmp_path
            / f"neural_circuit_discovery_results{kind}"
            / "eap_ig_inputs"
            / "rule_split-spectral_sample-decode_only"
            / "agonist_neurons-fast-spectral_anchor"
            / "positive_baseline"
        )
        folder.mkdir(parents=True)
        entry = {"circuit_id": 0, "status": "ok", "n_ablation_groups": n_groups}
        (folder / "rule_knockout.json").write_text(json.dumps([entry]))
    root = ModelRoot("arithmetic", "", "M", tmp_path / "stats", tmp_path)
    assert [cost.n_groups for cost in circuit_costs(root.run(MAIN_RUN), "positive").value] == [25]
    assert [cost.n_groups for cost in circuit_costs(root.run(f"{MAIN_RUN}-fake_targets"), "positive").value] == [125]
    assert circuit_costs(root.run(f"{MAIN_RUN}-fake_targets"), "negative").status is Status.MISSING


def test_the_empty_control_has_an_empty_bucket(tree):
    cell = tree.cells[EMPTY_CELL]
    root = next(root for root in find_model_roots(tree.data) if root.llm == cell.llm)
    assert agonists(root.run(cell.run_name), "positive").status is Status.EMPTY


def test_the_size_of_a_tree():
    assert tree_size(43008) == 86015
    assert tree_size(0) is None and tree_size(None) is None


def test_budgets_take_numerator_and_denominator_from_the_same_circuits():
    costs = [CircuitCost("positive", 0, "", 30, 100), CircuitCost("positive", 1, "", 50, 60)]
    both, first = budget(costs), budget(costs, [0])
    assert both == Budget(80, 160, 2) and both.n_tree == 199 + 119
    assert (first.percent_of_singles, first.percent_of_tree) == pytest.approx((30.0, 100 * 30 / 199))
    unknown = budget([*costs, CircuitCost("positive", 2, "", 5, None)])
    assert unknown.n_candidates is None and unknown.percent_of_tree != unknown.percent_of_tree


def test_candidates_are_counted_from_the_groups():
    # A group of m0 states eight members but names three; m1's members are spread over groups of two layers.
    detail = {
        "ablations": [
            {"layers_neurons_dict": {"m0": [1, 2, 3]}, "group_size": 8},
            {"layers_neurons_dict": {"m1": [1], "a2.h0": [4]}, "group_size": 2},
            {"layers_units_dict": {"m1": [2]}, "group_size": 1},
        ]
    }
    assert candidates_by_layer(detail) == {"m0": 8, "m1": 2, "a2.h0": 1}
    assert candidates_by_layer({"candidate_counts_by_layer": {"m0": 7}, "ablations": []}) == {"m0": 7}
    assert candidates_by_layer({}) == {}


def test_confirmed_agonists_go_before_single_tests():
    detail = {
        "ablations": [
            {"layers_neurons_dict": {"m0": [1]}, "group_size": 1, "max_effect": 0.9},
            {"layers_neurons_dict": {"m0": [1, 2]}, "group_size": 2, "max_effect": 1.0},
            {"layers_neurons_dict": {"m0": [2]}, "group_size": 1, "max_effect": 0.1},
        ]
    }
    assert detail_effects(detail) == {"m0:1": 0.9, "m0:2": 0.1}
    assert detail_effects({**detail, "agonists": [{"neuron": "m0:1", "max_effect": 0.3}]}) == {"m0:1": 0.3}


def test_nothing_of_the_reports_imports_torch():
    modules = sorted(path.stem for path in (REPOSITORY / "lib" / "reporting").glob("*.py") if path.stem != "__init__")
    code = (
        f"import sys, importlib\nfor name in {modules!r}: importlib.import_module('lib.reporting.' + name)\n"
        "assert not {'torch', 'transformers', 'xgboost'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True)


def test_the_tree_of_this_module_has_what_the_tests_rely_on(tree):
    assert published.MODELS[0] in {cell.llm for cell in tree.cells.values()}
    assert tree.cells[EMPTY_CELL].rules == []


# ---------------------------------------------------------------- broken files


def test_neurons_are_known_by_their_key_alone(tmp_path):
    rows = [
        {key: value for key, value in row(0.8, neuron="a16_h21_7").items() if key not in ("layer_key", "neuron_id")}
    ]
    best = load_best_rows(run_with(tmp_path, {"rule_combo_metrics_test_all.csv": rows}), Scope.TEST).value
    assert (best["layer_key"].tolist(), best["neuron_id"].tolist()) == (["a16_h21"], [7])


@pytest.mark.parametrize("change", [{"neuron_id": "x"}, {"neuron_id": None}, {"layer_key": None}])
def test_a_row_that_names_no_neuron_is_invalid(tmp_path, change):
    run = run_with(tmp_path, {"rule_combo_metrics_test_all.csv": [row(0.8), {**row(0.9), **change}]})
    assert load_best_rows(run, Scope.TEST).status is Status.INVALID


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rule_knockout.json", [{"circuit_id": 0, "status": "ok", "n_ablation_groups": None}]),
        ("rule_knockout.json", {"circuit_id": 0}),
        ("neuron_buckets.json", {"non_catastrophic_agonists": {"m0:1": {"best_abs_gap": 0.4}}}),
        ("neuron_buckets.json", {"non_catastrophic_agonists": [1]}),
    ],
)
def test_half_a_cost_or_bucket_is_invalid_not_smaller(tmp_path, name, content):
    root = ModelRoot("arithmetic", "", "M", tmp_path / "stats", tmp_path)
    run = root.run(MAIN_RUN)
    folder = tmp_path / run.name.discovery_base / "eap_ig_inputs" / run.name.circuit_label / run.name.bag_label
    (folder / "positive_baseline").mkdir(parents=True)
    (folder / "positive_baseline" / name).write_text(json.dumps(content))
    reader = circuit_costs if name == "rule_knockout.json" else agonists
    assert reader(run, "positive").status is Status.INVALID


def test_a_detail_file_that_was_cut_off_is_named_not_left_out_of_the_costs(tmp_path):
    root = ModelRoot("arithmetic", "", "M", tmp_path / "stats", tmp_path)
    run = root.run(MAIN_RUN)
    folder = tmp_path / run.name.discovery_base / "eap_ig_inputs" / run.name.circuit_label / run.name.bag_label
    regime = folder / "positive_baseline"
    (regime / "is_correct").mkdir(parents=True)
    entry = {"circuit_id": 0, "rule_target": "is_correct", "status": "ok", "n_ablation_groups": 5}
    (regime / "rule_knockout.json").write_text(json.dumps([entry]))
    detail = regime / "is_correct" / "rule_0000.json"
    detail.write_text(json.dumps({"circuit_id": 0, "search_cost": {"n_candidates": 9}}))
    (cost,) = circuit_costs(run, "positive").value
    assert (cost.n_groups, cost.n_candidates) == (5, 9)
    detail.write_text(detail.read_text()[:20])
    reading = circuit_costs(run, "positive")
    assert (reading.status, reading.path) == (Status.INVALID, detail)
    assert reading.reason.startswith("rule_0000.json: not readable as JSON")
