"""Stage 11 end to end: counts, costs and changes from the raw files, counted again without its code."""

from __future__ import annotations

import json
import math
import shutil
import statistics
from argparse import Namespace
from types import SimpleNamespace

import pytest

from lib.reporting.naming import MAIN_RUN
from lib.reporting.sensitivity import place_runs
from tests import published_tree as published
from tests.reporting.conftest import no_absolute_path, raw_best, read_rows
from tests.scripts import run_script

LLM = published.MODELS[0]
THRESHOLDS = ("0.50", "0.70", "0.85")


def stats_root(tree):
    return tree.data / "arithmetic" / LLM / "rule_extraction_results" / "neuron_flip_rules" / "stats"


def cells_of(tree):
    """(cell, M, tau) of the runs of the main mode."""
    found = [(tree.cells["arithmetic", LLM, "spectral_plan"], 43008, 0.2)]
    sizes = {"-M25000-": 25000, "-M80000-": 80000}
    for cell in tree.sensitivity:
        size = next((size for part, size in sizes.items() if part in cell.run_name), 43008)
        rate = float(cell.run_name.rpartition("-tau")[2]) if "-tau" in cell.run_name else 0.2
        found.append((cell, size, rate))
    return found


@pytest.fixture(scope="module")
def out(tree, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stage11") / "out"
    flags = [
        "--stats_root",
        stats_root(tree),
        "--out_dir",
        folder,
        "--paper_fig_dir",
        folder / "fig",
        "--quality_thresholds",
        *THRESHOLDS,
        "--quiet",
    ]
    assert run_script("11_summarize_sensitivity_analysis", flags) == 0
    return folder


def raw_costs(tree, cell):
    """(group tests, candidates) of every searched circuit of both regimes, from the run's own folders."""
    found = []
    for regime in ("positive", "negative"):
        folder = tree.data / cell.circuit_dir / cell.bag_label / f"{regime}_baseline"
        for entry in json.loads((folder / "rule_knockout.json").read_text()):
            if entry["status"] != "ok":
                continue
            detail = json.loads((folder / "is_correct" / f"rule_{entry['circuit_id']:04d}.json").read_text())
            units = {
                (layer, index)
                for record in detail["ablations"]
                for layer, ids in record["layers_neurons_dict"].items()
                for index in ids
            }
            found.append((entry["n_ablation_groups"], len(units)))
    return found


@pytest.mark.parametrize("scope", ["test", "all_fit"])
def test_rows_are_counted_from_the_raw_files(tree, out, scope):
    rows = {row["run_name"]: row for row in read_rows(out / scope / "sensitivity_summary.csv")}
    assert len(rows) == 5 + 5
    for cell, size, rate in cells_of(tree):
        row = rows[cell.run_name]
        assert (float(row["M"]), float(row["tau"])) == (size, rate)
        mcc = [float(best["MCC"]) for best in raw_best(tree.stats(cell), scope).values()]
        for threshold in THRESHOLDS:
            assert int(row[f"n_quality_ge_{threshold}"]) == sum(value >= float(threshold) for value in mcc)
        assert float(row["quality_median_from_csv"]) == pytest.approx(statistics.median(mcc))
        costs = raw_costs(tree, cell)
        groups = [n for n, _ in costs]
        assert int(row["cha_budget_n_circuits"]) == len(costs)
        assert float(row["cha_budget_total"]) == sum(groups)
        assert float(row["cha_budget_sd"]) == pytest.approx(statistics.stdev(groups))
        assert float(row["cha_budget_sem"]) == pytest.approx(statistics.stdev(groups) / len(groups) ** 0.5)
        assert float(row["cha_budget_pct_of_N_mean"]) == pytest.approx(statistics.mean(100 * g / n for g, n in costs))
        assert float(row["cha_budget_pct_of_2N_minus_1_mean"]) == pytest.approx(
            statistics.mean(100 * g / (2 * n - 1) for g, n in costs)
        )
        halves = [sum(g for g, _ in raw_costs(tree, cell)[part]) for part in (slice(0, 3), slice(3, 6))]
        assert [float(row[f"cha_budget_{name}_total"]) for name in ("positive", "negative")] == halves
        assert (row["score_scope"], row["min_rule_dataset_coverage"], row["status"]) == (scope, "0.005", "ok")


def test_other_modes_are_listed_but_have_no_place(tree, out):
    rows = read_rows(out / "test" / "sensitivity_summary.csv")
    placed = {cell.run_name for cell, _, _ in cells_of(tree)}
    assert all((row["M"] == "") == (row["run_name"] not in placed) for row in rows)
    # The control's tests are its own: the run that it controls keeps its cost.
    fake = next(row for row in rows if row["run_name"] == f"{MAIN_RUN}-fake_targets")
    main = next(row for row in rows if row["run_name"] == MAIN_RUN)
    cell = tree.cells["arithmetic", LLM, "fake_targets"]
    assert float(fake["cha_budget_total"]) == sum(n for n, _ in raw_costs(tree, cell))
    assert fake["cha_budget_total"] != main["cha_budget_total"]


def test_a_run_of_a_share_has_no_place_among_runs_of_numbers():
    args = Namespace(baseline_run_name=MAIN_RUN, baseline_M=43008, baseline_tau=0.2)
    names = [MAIN_RUN.replace("_sample-", f"_sample-M{size}-") for size in ("500", "0.5")]
    number, share = place_runs([SimpleNamespace(run_name=name) for name in names], args)
    assert (number.size, number.rate) == (500.0, 0.2)
    assert math.isnan(share.size) and math.isnan(share.rate)


@pytest.mark.parametrize("scope", ["test", "all_fit"])
def test_series_and_changes_leave_the_baseline_out(tree, out, scope):
    compact = read_rows(out / scope / "plots" / "quality_threshold_sensitivity_compact.csv")
    placed = cells_of(tree)
    for row in compact:
        limit, factor = float(row["threshold"]), row["factor"]
        members = [(m, t, cell) for cell, m, t in placed if (m == 43008 if factor == "tau" else t == 0.2)]
        counts = {
            (m, t): sum(float(b["MCC"]) >= limit for b in raw_best(tree.stats(cell), scope).values())
            for m, t, cell in members
        }
        start = counts.pop((43008, 0.2))
        changes = [abs(value - start) for value in counts.values()]
        assert float(row["baseline_count"]) == start
        assert float(row["median_abs_change"]) == statistics.median(changes)
        assert float(row["max_abs_change"]) == max(changes)
        series = read_rows(out / scope / "plots" / f"count_ge_{limit:.2f}_vs_{factor}.csv")
        assert [float(point[factor]) for point in series] == sorted(m if factor == "M" else t for m, t, _ in members)
    assert [(row["factor"], row["threshold"]) for row in compact] == [(f, t) for f in ("tau", "M") for t in THRESHOLDS]


def test_files_of_both_scopes(out):
    summary = read_rows(out / "sensitivity_summary_all_scopes.csv")
    assert [row["score_scope"] for row in summary] == ["test"] * 10 + ["all_fit"] * 10
    assert len(read_rows(out / "quality_threshold_sensitivity_compact_all_scopes.csv")) == 2 * 2 * len(THRESHOLDS)
    assert MAIN_RUN in (out / "README_quality_threshold_sensitivity.md").read_text()
    for scope in ("test", "all_fit"):
        for stem in (
            "cha_budget_vs_tau",
            "quality_threshold_sensitivity_vs_tau",
            "quality_threshold_sensitivity_heatmap_M",
        ):
            assert (out / scope / "plots" / f"{stem}.pdf").stat().st_size > 1000
        assert (out / "fig" / scope / "cha_budget_vs_tau.pdf").is_file()
        assert read_rows(out / scope / "report_issues.csv") == []
    no_absolute_path(out)


def test_one_run_is_enough(tree, tmp_path, no_figures):
    shutil.copytree(stats_root(tree) / MAIN_RUN, tmp_path / "stats" / MAIN_RUN.replace("-decode_only", ""))
    flags = ["--stats_root", tmp_path / "stats", "--out_dir", tmp_path / "out", "--score_scope", "test", "--quiet"]
    assert run_script("11_summarize_sensitivity_analysis", flags) == 0
    (row,) = read_rows(tmp_path / "out" / "sensitivity_summary.csv")
    assert row["cha_budget_n_circuits"] == "0", "the circuits are not there"
    compact = read_rows(tmp_path / "out" / "plots" / "quality_threshold_sensitivity_compact.csv")
    assert {(row["max_abs_change"], row["n_other_runs"]) for row in compact} == {("", "0")}
    issues = read_rows(tmp_path / "out" / "report_issues.csv")
    assert [issue["artifact"] for issue in issues] == [
        f"{name}_baseline/rule_knockout.json" for name in ("positive", "negative")
    ]


def test_the_baseline_of_small_runs_is_found_by_its_size(tree, tmp_path, no_figures):
    name = MAIN_RUN.replace("_sample-", "_sample-M2000-")
    for target in (name, f"{name}-tau0.3", f"{name}-fake_targets"):
        shutil.copytree(stats_root(tree) / MAIN_RUN, tmp_path / "stats" / target)
    flags = ["--stats_root", tmp_path / "stats", "--out_dir", tmp_path / "out", "--score_scope", "test", "--quiet"]
    assert run_script("11_summarize_sensitivity_analysis", [*flags, "--baseline_M", "2000"]) == 0
    compact = read_rows(tmp_path / "out" / "plots" / "quality_threshold_sensitivity_compact.csv")
    assert [row["n_other_runs"] for row in compact] == ["1"] * 6 + ["0"] * 6
    assert {row["median_abs_change"] for row in compact[:6]} == {"0.0"}


def test_no_baseline_is_one_line_that_lists_the_runs(tree, tmp_path, capsys):
    shutil.copytree(stats_root(tree) / f"{MAIN_RUN}-tau0.3", tmp_path / "stats" / f"{MAIN_RUN}-tau0.3")
    flags = ["--stats_root", tmp_path / "stats", "--out_dir", tmp_path / "out"]
    assert run_script("11_summarize_sensitivity_analysis", flags) == 2
    error = capsys.readouterr().err
    assert f"{MAIN_RUN}-tau0.3 (M=43008, tau=0.3)" in error and error.count("\n") == 1


def test_several_models_or_none_are_errors(tree, tmp_path, capsys):
    flags = ["--stats_root", tree.data, "--out_dir", tmp_path / "out"]
    assert run_script("11_summarize_sensitivity_analysis", flags) == 2
    assert "holds several models" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    flags[1] = tmp_path / "empty"
    assert run_script("11_summarize_sensitivity_analysis", flags) == 2
    assert "no finished runs" in capsys.readouterr().err
