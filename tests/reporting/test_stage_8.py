"""Stage 8 end to end: every number of its tables from the raw files, counted again without its code."""

from __future__ import annotations

import math
import shutil
import statistics
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from lib.reporting.distributions import BestMode, panel_stars
from lib.reporting.experiments import read_flips, sweep
from lib.reporting.naming import RunMode, RunName
from tests import published_tree as published
from tests.reporting.conftest import EMPTY_CELL, no_absolute_path, number, provenance, raw_best, raw_union, read_rows
from tests.scripts import run_script

THRESHOLDS = (0.70, 0.80, 0.90)
FLAGS = ["--thr_min", "0.7", "--thr_max", "0.9", "--thr_step", "0.1", "--quiet"]
LABELS = [mode.stage_8_label for mode in RunMode]


def label_of(cell) -> str:
    return RunName.parse(cell.run_name).mode.stage_8_label


@pytest.fixture(scope="module")
def out(tree, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stage8") / "out"
    assert run_script("8_compare_experiments", ["--stats_path", tree.data, "--out_dir", folder, *FLAGS]) == 0
    return folder


def test_every_sweep_row_is_counted_from_the_raw_files(tree, out):
    for cell in tree.cells.values():
        leaf = out / cell.model_dir / "leaf_stats_dir_outputs"
        rows = [row for row in read_rows(leaf / "threshold_sweep_summary.csv") if row["stats_label"] == label_of(cell)]
        assert [float(row["threshold"]) for row in rows] == list(THRESHOLDS)
        best = raw_best(tree.stats(cell), "test")
        for row, threshold in zip(rows, THRESHOLDS, strict=True):
            high = [key for key, found in best.items() if float(found["MCC"]) >= threshold]
            assert int(row["n_high_quality_neurons"]) == len(high)
            for direction in ("c2i", "i2c"):
                union = raw_union(tree.stats(cell), high, direction)
                assert int(row[f"union_{direction}_count"]) == union
                assert float(row[f"union_{direction}_pct"]) == pytest.approx(100 * union / published.N_ROWS)
            assert (row["score_scope"], row["min_rule_dataset_coverage"]) == ("test", "0.005")
            assert row["status"] == ("ok" if best else "empty")
            assert (row["stats_dirname"], row["metric_col"], row["scores_rows"]) == (cell.run_name, "MCC", "60")


def test_the_empty_control_counts_as_zero_and_its_model_stays(tree, out):
    coverage = read_rows(out / "aggregated_by_task" / "threshold_sweep_coverage.csv")
    assert [(row["llm"], row["n_runs"], row["is_complete"]) for row in coverage] == [
        (llm, "5", "True") for llm in published.MODELS[:2]
    ]
    rows = [
        row
        for row in read_rows(out / "aggregated_by_task" / "threshold_sweep_all_tasks_all_llms.csv")
        if row["llm"] == EMPTY_CELL[1] and row["stats_label"].startswith("Fake")
    ]
    assert [(row["n_high_quality_neurons"], float(row["net_acc_pp"])) for row in rows] == [("0", 0.0)] * 3
    assert read_rows(out / "report_issues.csv") == []


def test_the_aggregate_holds_the_leaves(tree, out):
    rows = read_rows(out / "aggregated_by_task" / "threshold_sweep_all_tasks_all_llms.csv")
    assert len(rows) == 2 * 5 * 3
    assert rows == read_rows(out / "aggregated_by_task" / "arithmetic" / "threshold_sweep_all_llms.csv")
    for row in rows:
        assert float(row["net_acc_pp"]) == pytest.approx(float(row["union_i2c_pct"]) - float(row["union_c2i_pct"]))


def test_bands_are_means_of_the_models(out):
    base = out / "aggregated_by_task" / "arithmetic"
    rows = read_rows(base / "threshold_sweep_all_llms.csv")
    for row in read_rows(base / "plot_union_flip_c2i_pct_by_task.csv"):
        values = [
            float(other["union_c2i_pct"])
            for other in rows
            if other["stats_label"] == row["stats_label"] and float(other["threshold"]) == float(row["threshold"])
        ]
        half = 1.96 * statistics.stdev(values) / math.sqrt(len(values))
        assert float(row["mean"]) == pytest.approx(statistics.mean(values))
        assert float(row["high"]) - float(row["mean"]) == pytest.approx(half)


def product(row):
    covered = float(row["dataset_coverage"])
    return float(row["BalancedAcc"]) * max(covered, 1 - covered)


METRICS = {
    "MCC": lambda row: float(row["MCC"]),
    "F1": lambda row: float(row["F1"]),
    "BalancedAcc": lambda row: float(row["BalancedAcc"]),
    "balanced_accuracy_x_dataset_coverage": product,
}


def raw_samples(tree, llm, metric):
    return {
        label_of(cell): [METRICS[metric](row) for row in raw_best(tree.stats(cell), "test").values()]
        for cell in tree.cells.values()
        if cell.llm == llm
    }


def hand_holm(values):
    """Holm by its definition, one comparison at a time."""
    known = sorted(value for value in values if not math.isnan(value))
    m = len(known)
    return [
        value if math.isnan(value) else min(1.0, max((m - k) * known[k] for k in range(m) if known[k] <= value))
        for value in values
    ]


@pytest.mark.parametrize("llm", published.MODELS[:2])
def test_distributions_of_a_model(tree, out, llm):
    leaf = out / "arithmetic" / llm / "leaf_stats_dir_outputs"
    tests = read_rows(leaf / "compare_rule_metrics_distributions_tests.csv")
    summary = read_rows(leaf / "compare_rule_metrics_distributions_summary.csv")
    assert len(summary) == 5 * 4 and len(tests) == 10 * 4
    for metric in METRICS:
        samples = raw_samples(tree, llm, metric)
        for row in (row for row in summary if row["metric"] == metric):
            values = samples[row["stats_label"]]
            assert int(row["n"]) == len(values)
            if values:
                assert float(row["mean"]) == pytest.approx(statistics.mean(values))
                assert float(row["median"]) == pytest.approx(statistics.median(values))
                assert float(row["p_ge_0.80"]) == pytest.approx(sum(v >= 0.8 for v in values) / len(values))
        found = [row for row in tests if row["metric"] == metric]
        # Each pair of runs once: ten for five runs, and the multiplicity counts no other.
        assert [(row["A"], row["B"]) for row in found] == list(combinations(LABELS, 2))
        raw_p = []
        for row in found:
            a, b = samples[row["A"]], samples[row["B"]]
            p = stats.mannwhitneyu(a, b, alternative="two-sided").pvalue if a and b else math.nan
            raw_p.append(p)
            assert number(row["p"]) == pytest.approx(p, nan_ok=True)
            assert (int(row["n_A"]), int(row["n_B"])) == (len(a), len(b))
            if a and b:
                assert float(row["median_diff"]) == pytest.approx(statistics.median(a) - statistics.median(b))
        adjusted = [number(row["p_holm_within_metric"]) for row in found]
        assert adjusted == pytest.approx(hand_holm(raw_p), nan_ok=True)


def test_combined_tests_over_models(tree, out):
    rows = read_rows(out / "aggregated_by_task" / "compare_rule_metrics_distributions_tests_combined_by_task.csv")
    assert len(rows) == 10 * 4
    per_model = {metric: [raw_samples(tree, llm, metric) for llm in published.MODELS[:2]] for metric in METRICS}
    for row in rows:
        units = [(unit[row["A"]], unit[row["B"]]) for unit in per_model[row["metric"]]]
        p = [stats.mannwhitneyu(a, b, alternative="two-sided").pvalue for a, b in units if a and b]
        statistic = -2 * sum(math.log(value) for value in p)
        assert int(row["n_llm"]) == len(p)
        assert float(row["p_fisher"]) == pytest.approx(stats.chi2.sf(statistic, 2 * len(p)))
        pooled = [statistics.median(units[0][side] + units[1][side]) for side in (0, 1)]
        assert float(row["median_diff_pooled"]) == pytest.approx(pooled[0] - pooled[1])


def test_best_rows_of_all_models(tree, out):
    rows = read_rows(out / "aggregated_by_task" / "rule_metrics_best_per_neuron_all_tasks_all_llms.csv")
    expected = sorted(
        (cell.llm, cell.run_name, key, float(best["MCC"]))
        for cell in tree.cells.values()
        for key, best in raw_best(tree.stats(cell), "test").items()
    )
    assert sorted((row["llm"], row["stats_dirname"], row["neuron_key"], float(row["MCC"])) for row in rows) == expected
    assert {row["score_scope"] for row in rows} == {"test"}


def test_figures_and_provenance(out):
    leaf = out / "arithmetic" / published.MODELS[0] / "leaf_stats_dir_outputs"
    for stem in ("plot_high_quality_neurons", "plot_union_flip_c2i_pct", "compare_rule_metrics_distributions_ecdf"):
        assert (leaf / f"{stem}.pdf").stat().st_size > 1000
    no_absolute_path(out)
    stored = provenance(out)
    assert stored["script"] == "8_compare_experiments.py"
    assert all(entry["path"].startswith("arithmetic/") and entry["sha256"] for entry in stored["inputs"])


def test_a_missing_run_leaves_its_model_out_and_is_named(tree, tmp_path, capsys, no_figures):
    shutil.copytree(tree.data, tmp_path / "data")
    cell = tree.cells["arithmetic", published.MODELS[0], "brute_force"]
    shutil.rmtree(tmp_path / "data" / cell.stats_dir)
    flags = ["--stats_path", tmp_path / "data", "--out_dir", tmp_path / "out", *FLAGS, "--thr_step", "0.2"]
    assert run_script("8_compare_experiments", flags) == 0
    rows = read_rows(tmp_path / "out" / "aggregated_by_task" / "threshold_sweep_all_tasks_all_llms.csv")
    assert {row["llm"] for row in rows} == {published.MODELS[1]}
    assert f"missing: arithmetic {published.MODELS[0]}: runs: 4 of 5 runs" in capsys.readouterr().out
    assert run_script("8_compare_experiments", [*flags, "--strict"]) == 2
    assert "4 of 5 runs" in capsys.readouterr().err


def test_one_stats_folder_of_a_variant_in_all_fit(tree, tmp_path, capsys, no_figures):
    """A user's own small runs are all of one circuit size; theirs are compared, straight in the output folder."""
    source = tree.stats(tree.cells["arithmetic", published.MODELS[0], "spectral_plan"])
    for size in ("-M2000", "-M3000"):
        name = source.name.replace("_sample-", f"_sample{size}-")
        shutil.copytree(source, tmp_path / "stats" / name)
        (tmp_path / "stats" / name / "scores.csv").unlink()
    shutil.copytree(source, tmp_path / "stats" / (source.name.replace("_sample-", "_sample-M2000-") + "-fake_targets"))
    flags = ["--stats_path", tmp_path / "stats", "--out_dir", tmp_path / "out", *FLAGS, "--score_scope", "all_fit"]
    assert run_script("8_compare_experiments", flags) == 0
    told = capsys.readouterr().out
    assert "comparing the runs of variant M2000" in told and "missing:" in told and "scores.csv" in told
    rows = read_rows(tmp_path / "out" / "threshold_sweep_summary.csv")
    best = raw_best(source, "all_fit")
    assert [int(row["n_high_quality_neurons"]) for row in rows[:3]] == [
        sum(float(found["MCC"]) >= t for found in best.values()) for t in THRESHOLDS
    ]
    assert [row["union_c2i_pct"] for row in rows[:3]] == [""] * 3, "without scores.csv flips are unknown, not zero"
    assert {row["score_scope"] for row in rows} == {"all_fit"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--score_scope", "tset"], "'tset' is not a score scope"),
        (["--thr_step", "0"], "--thr_step > 0"),
        (["--best_mode", "tail@x"], "choose mean, median or tail@<value>"),
        (["--run_name_regex", "nothing_like_this"], "no runs of the five modes"),
        (["--variant", "M7"], "no run of it"),
    ],
)
def test_mistakes_are_one_line(tree, tmp_path, capsys, flags, message):
    arguments = ["--stats_path", tree.data, "--out_dir", tmp_path / "out", "--quiet", *flags]
    assert run_script("8_compare_experiments", arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_nothing_found_is_an_error(tmp_path, capsys):
    (tmp_path / "data").mkdir()
    assert run_script("8_compare_experiments", ["--stats_path", tmp_path / "data", "--out_dir", tmp_path / "o"]) == 2
    assert "no finished runs" in capsys.readouterr().err


# ---------------------------------------------------------------- pieces


def scores_frame():
    """Neuron a flips rows 1 and 2, b rows 2 and 3; five rows of six were evaluated."""
    return pd.DataFrame(
        {
            "flip_c2i_m0_1": [False, True, True, False, False, None],
            "flip_c2i_m0_2": ["False", "true", "1", "0", "False", ""],
            "flip_c2i_m0_3": [0, 0, 1, 1, 0, np.nan],
        }
    )


def test_the_union_of_two_neurons():
    flips = read_flips(scores_frame(), ["m0_1", "m0_3"], "c2i")
    assert flips.union(np.array([True, True])) == (3, 5)
    assert flips.union(np.array([False, False])) == (0, 5)
    assert read_flips(scores_frame(), ["m0_2"], "c2i").union(np.array([True])) == (2, 5)


def test_a_neuron_without_column_is_unknown():
    flips = read_flips(scores_frame(), ["m9_9"], "c2i")
    assert flips.union(np.array([True])) == (0, 0)


def test_the_sweep_says_sixty_percent():
    best = pd.DataFrame({"layer_key": ["m0", "m0"], "neuron_id": [1, 3], "MCC": [0.9, 0.7]})
    table = sweep(best, "MCC", np.array([0.7, 0.8, 0.95]), scores_frame())
    assert table["union_c2i_pct"].tolist() == [60.0, 40.0, 0.0]
    assert table["n_high_quality_neurons"].tolist() == [2, 1, 0]


def test_neurons_without_a_flip_column_have_no_share():
    best = pd.DataFrame({"layer_key": ["m9"], "neuron_id": [9], "MCC": [0.8]})
    table = sweep(best, "MCC", np.array([0.7, 0.9]), scores_frame())
    assert math.isnan(table["union_c2i_pct"][0]) and table["union_c2i_pct"][1] == 0.0


def test_stars_are_given_against_the_best_run_only():
    high = np.linspace(0.9, 1, 20)
    samples = {"a": high, "b": np.linspace(0, 0.5, 20), "c": high.copy(), "d": np.array([])}
    assert panel_stars(samples, BestMode.parse("tail@0.9")) == {"a": "best", "b": "***", "c": "ns", "d": ""}
    assert BestMode.parse("mean").best({"x": np.array([])}) is None
