"""Stage 9 end to end: every number of its tables from the raw files, counted again without its code."""

from __future__ import annotations

import json
import shutil
import statistics

import pytest

from lib.reporting.naming import RunName
from tests import published_tree as published
from tests.reporting.conftest import EMPTY_CELL, no_absolute_path, number, raw_best, read_rows
from tests.scripts import run_script

AGGREGATES = {
    "tau": "n_tau_agonists",
    "mcc": "rule_mcc_median",
    "cost": "median_n_ablation_groups",
    "sel": "median_abs_acc_gap",
    "frac_eps": "frac_eps_selective",
    "frac_hq": "frac_neurons_hq",
}


def main_runs(tree):
    return ",".join(dict.fromkeys(cell.run_name for cell in tree.cells.values()))


@pytest.fixture(scope="module")
def out(tree, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stage9") / "out"
    flags = ["--task_dir", tree.data / "arithmetic", "--out_dir", folder, "--runs", main_runs(tree), "--quiet"]
    assert run_script("9_compare_models", flags) == 0
    return folder


def raw_regime(tree, cell):
    folder = tree.data / cell.circuit_dir / cell.bag_label / "positive_baseline"
    buckets = json.loads((folder / "neuron_buckets.json").read_text())["non_catastrophic_agonists"]
    entries = [entry for entry in json.loads((folder / "rule_knockout.json").read_text()) if entry["status"] == "ok"]
    units = []
    for entry in entries:
        detail = json.loads((folder / "is_correct" / f"rule_{entry['circuit_id']:04d}.json").read_text())
        units.append(
            len(
                {
                    (layer, index)
                    for record in detail["ablations"]
                    for layer, ids in record["layers_neurons_dict"].items()
                    for index in ids
                }
            )
        )
    return [entry["last_record"] for entry in buckets.values()], [e["n_ablation_groups"] for e in entries], units


def test_every_row_is_counted_from_the_raw_files(tree, out):
    rows = {(row["model_root"], row["run_name"]): row for row in read_rows(out / "run_summary_by_model.csv")}
    assert len(rows) == len(tree.cells)
    for cell in tree.cells.values():
        row = rows[cell.model_dir, cell.run_name]
        mcc = [float(best["MCC"]) for best in raw_best(tree.stats(cell), "test").values()]
        flips = json.loads((tree.stats(cell) / "flip_stats_global.json").read_text())
        records, groups, units = raw_regime(tree, cell)
        gaps = [abs(record["accuracy_gap"]) for record in records]
        assert int(row["n_neurons_with_rules"]) == len(mcc)
        assert float(row["union_c2i_rate"]) == pytest.approx(flips["union_c2i_unique_rate"])
        assert float(row["n_tau_agonists"]) == sum(record["max_effect"] >= 0.2 for record in records)
        assert float(row["n_ablation_groups_total"]) == sum(groups)
        assert float(row["median_n_ablation_groups"]) == statistics.median(groups)
        assert float(row["mean_n_ablation_groups"]) == pytest.approx(statistics.mean(groups))
        assert float(row["pct_of_N"]) == pytest.approx(100 * sum(groups) / sum(units))
        assert float(row["pct_of_2N_minus_1"]) == pytest.approx(100 * sum(groups) / sum(2 * n - 1 for n in units))
        if mcc:
            assert float(row["rule_mcc_median"]) == pytest.approx(statistics.median(mcc))
            assert float(row["frac_neurons_hq"]) == pytest.approx(sum(value >= 0.7 for value in mcc) / len(mcc))
        if gaps:
            assert float(row["median_abs_acc_gap"]) == pytest.approx(statistics.median(gaps))
            assert float(row["frac_eps_selective"]) == pytest.approx(sum(gap >= 0.2 for gap in gaps) / len(gaps))
        assert (row["score_scope"], row["min_rule_dataset_coverage"], row["variant_kind"]) == (
            "test",
            "0.005",
            "decode-only",
        )
        assert row["condition"] == RunName.parse(cell.run_name).mode.stage_9_label


def test_the_empty_control_is_zero(tree, out):
    cell = tree.cells[EMPTY_CELL]
    row = next(
        row
        for row in read_rows(out / "run_summary_by_model.csv")
        if (row["model_root"], row["run_name"]) == (cell.model_dir, cell.run_name)
    )
    zeros = ("n_neurons_with_rules", "frac_neurons_hq", "n_tau_agonists", "union_flip_any_rate")
    assert [float(row[name]) for name in zeros] == [0] * 4
    assert (row["status"], row["rule_mcc_median"]) == ("empty", "")
    assert read_rows(out / "report_issues.csv") == []


def test_means_over_models(out):
    summary = read_rows(out / "run_summary_by_model.csv")
    for row in read_rows(out / "agg_summary_by_run.csv"):
        members = [other for other in summary if other["condition_key"] == row["condition_key"]]
        assert int(row["n_models"]) == len(members) == 2
        for name, column in AGGREGATES.items():
            values = [value for value in (number(other[column]) for other in members) if value == value]
            assert float(row[f"mean_{name}"]) == pytest.approx(statistics.mean(values))
            if len(values) == 2:
                assert float(row[f"std_{name}"]) == pytest.approx(statistics.stdev(values), abs=1e-12)


def test_figures_and_paths(out):
    for stem in ("cross_model_n_tau_agonists", "agg_rule_mcc_median"):
        assert (out / "plots" / f"{stem}.pdf").stat().st_size > 1000
    assert len(list((out / "plots").glob("ecdf_mcc_*.pdf"))) == 5
    no_absolute_path(out)


def test_runs_without_decode_only_have_their_own_circuits(tmp_path, no_figures):
    """HANS: names without -decode_only; the columns of the search were empty for them."""
    tree = published.build(
        tmp_path / "t",
        tasks=("hans_nli",),
        models=published.MODELS[:1],
        modes=("spectral_plan",),
        states={},
        sensitivity=False,
    )
    flags = ["--task_dir", tree.data / "hans_nli", "--out_dir", tmp_path / "out", "--quiet"]
    assert run_script("9_compare_models", flags) == 0
    (row,) = read_rows(tmp_path / "out" / "run_summary_by_model.csv")
    (cell,) = tree.cells.values()
    assert float(row["n_tau_agonists"]) == sum(value >= 0.2 for value in cell.effects["positive"].values())
    assert (row["variant_kind"], row["task"]) == ("full", "hans_nli")
    (aggregated,) = read_rows(tmp_path / "out" / "agg_summary_by_run.csv")
    assert (aggregated["n_models"], aggregated["std_mcc"]) == ("1", "")


def test_a_model_that_lacks_a_run(tree, tmp_path, capsys, no_figures):
    shutil.copytree(tree.data / "arithmetic", tmp_path / "arithmetic")
    cell = tree.cells["arithmetic", published.MODELS[0], "brute_force"]
    shutil.rmtree(tmp_path / cell.stats_dir)
    flags = [
        "--task_dir",
        tmp_path / "arithmetic",
        "--out_dir",
        tmp_path / "out",
        "--runs",
        main_runs(tree),
        "--drop_incomplete_models",
        "--quiet",
    ]
    assert run_script("9_compare_models", flags) == 0
    assert f"{published.MODELS[0]} {cell.run_name}: run: no such run folder" in capsys.readouterr().out
    coverage = {row["model"]: row for row in read_rows(tmp_path / "out" / "model_run_coverage.csv")}
    assert coverage["Qwen2-1.5B-Instruct"]["missing_runs"] == cell.run_name
    assert {row["model"] for row in read_rows(tmp_path / "out" / "run_summary_by_model.csv")} == {"Qwen2-7B-Instruct"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--runs", "nothing"], "no model has such a run"),
        (["--score_scope", "tset"], "is not a score scope"),
    ],
)
def test_mistakes_are_one_line(tree, tmp_path, capsys, flags, message):
    arguments = ["--task_dir", tree.data / "arithmetic", "--out_dir", tmp_path, "--quiet", *flags]
    assert run_script("9_compare_models", arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_nothing_found_and_several_tasks_are_errors(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert run_script("9_compare_models", ["--task_dir", tmp_path / "empty", "--out_dir", tmp_path / "o"]) == 2
    tree = published.build(
        tmp_path / "t",
        tasks=("arithmetic", "hans_nli"),
        models=published.MODELS[:1],
        modes=("spectral_plan",),
        states={},
        sensitivity=False,
    )
    assert run_script("9_compare_models", ["--task_dir", tree.data, "--out_dir", tmp_path / "o"]) == 2
    assert "holds several tasks (arithmetic, hans_nli)" in capsys.readouterr().err
