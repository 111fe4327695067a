"""Stage 10 end to end: totals, pairs and tests from the raw files, counted again without its code."""

from __future__ import annotations

import math
import statistics
from itertools import product

import pandas as pd
import pytest

from lib.reporting.naming import RunMode, RunName
from tests import published_tree as published
from tests.reporting.conftest import EMPTY_CELL, no_absolute_path, number, raw_best, read_rows
from tests.scripts import run_script

GRID = (0.70, 0.75, 0.80, 0.85, 0.90)
MAIN = RunMode.SPECTRAL_PLAN.value
OTHERS = [RunMode.SPECTRAL_SPLIT.value, RunMode.RANDOM_PLAN.value, RunMode.FAKE_TARGETS.value]


def method_of(cell):
    return RunName.parse(cell.run_name).mode.value


def raw_count(tree, cell, scope, threshold):
    return sum(float(best["MCC"]) >= threshold for best in raw_best(tree.stats(cell), scope).values())


@pytest.fixture(scope="module")
def long_csv(tree, tmp_path_factory):
    """Counts of both scopes in the form of Table 2's long CSV, one of them unknown."""
    rows = [
        {
            "task": cell.task,
            "org": cell.llm.split("/")[0],
            "model": cell.llm.split("/")[1],
            "Method": method_of(cell),
            "score_scope": scope,
            "threshold": threshold,
            "n_high_quality_neurons": raw_count(tree, cell, scope, threshold),
        }
        for cell in tree.cells.values()
        for scope in ("test", "all_fit")
        for threshold in GRID
    ]
    path = tmp_path_factory.mktemp("long") / "table2_threshold_sweep_per_run_long.csv"
    pd.DataFrame(rows).to_csv(path, index=False)
    return path


@pytest.fixture(scope="module")
def out(tree, long_csv, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stage10") / "out"
    flags = ["--csv", long_csv, "--out_dir", folder, "--data-root", tree.data, "--n_boot", "500"]
    assert run_script("10_compute_threshold_sweep_stats", flags) == 0
    return folder


@pytest.mark.parametrize("scope", ["test", "all_fit"])
def test_totals_are_sums_of_the_raw_counts(tree, out, scope):
    for row in read_rows(out / scope / "table2_descriptive_totals.csv"):
        cells = [cell for cell in tree.cells.values() if method_of(cell) == row["method"]]
        for threshold in GRID:
            assert float(row[f"{threshold:.2f}"]) == sum(raw_count(tree, cell, scope, threshold) for cell in cells)
        assert row["score_scope"] == scope
    units = read_rows(out / scope / "table2_descriptive_n_runs.csv")
    assert {row[f"{threshold:.2f}"] for row in units for threshold in GRID} == {"2"}


def raw_endpoint(tree, cell, scope, endpoint):
    if endpoint == "count_at_0.70":
        return raw_count(tree, cell, scope, 0.70)
    y = [raw_count(tree, cell, scope, threshold) for threshold in GRID]
    return sum((a + b) / 2 * 0.05 for a, b in zip(y, y[1:], strict=False)) / 0.2


@pytest.mark.parametrize("scope", ["test", "all_fit"])
@pytest.mark.parametrize(("name", "endpoint"), [("primary_threshold", "count_at_0.70"), ("autc", "AUTC")])
def test_pairs_and_exact_tests(tree, out, scope, name, endpoint):
    pairs = read_rows(out / scope / f"method_comparison_{name}_pairs.csv")
    tests = read_rows(out / scope / f"method_comparison_{name}_exact_tests.csv")
    assert [row["B_method"] for row in tests] == OTHERS
    for row in tests:
        differences = []
        for llm in published.MODELS[:2]:
            values = {
                method_of(cell): raw_endpoint(tree, cell, scope, endpoint)
                for cell in tree.cells.values()
                if cell.llm == llm
            }
            differences.append(values[MAIN] - values[row["B_method"]])
            (pair,) = [p for p in pairs if p["llm"] == llm and p["B_method"] == row["B_method"]]
            assert float(pair["A"]) == pytest.approx(values[MAIN])
            assert float(pair["diff"]) == pytest.approx(differences[-1], abs=1e-9)
        assert int(row["n_pairs"]) == 2, "the empty control is a pair, with a count of zero"
        assert float(row["mean_diff"]) == pytest.approx(statistics.mean(differences), abs=1e-9)
        nonzero = [d for d in differences if abs(d) > 1e-9]
        sums = [
            sum(sign * abs(d) for sign, d in zip(signs, nonzero, strict=True))
            for signs in product((-1, 1), repeat=len(nonzero))
        ]
        expected = sum(s >= sum(nonzero) - 1e-9 for s in sums) / len(sums) if nonzero else math.nan
        assert number(row["signflip_p"]) == pytest.approx(expected, nan_ok=True)
        up = sum(d > 0 for d in nonzero)
        tail = sum(math.comb(len(nonzero), k) for k in range(up, len(nonzero) + 1)) / 2 ** len(nonzero)
        assert number(row["sign_p"]) == pytest.approx(tail if nonzero else math.nan, nan_ok=True)


def test_neurons_and_units(tree, out):
    neurons = read_rows(out / "test" / "per_neuron_scores.csv")
    expected = sorted(
        (cell.run_name, cell.llm.split("/")[1], key, float(best["MCC"]))
        for cell in tree.cells.values()
        if cell.mode != "brute_force"
        for key, best in raw_best(tree.stats(cell), "test").items()
    )
    assert (
        sorted(
            (row["run_name"], row["model"], f"{row['layer_key']}_{row['neuron_id']}", float(row["score"]))
            for row in neurons
        )
        == expected
    )
    units = {(row["unit"], row["method"]): row for row in read_rows(out / "test" / "per_unit_metrics.csv")}
    assert len(units) == 2 * 4
    for cell in tree.cells.values():
        if cell.mode == "brute_force":
            continue
        row = units[cell.model_dir, method_of(cell)]
        values = [float(best["MCC"]) for best in raw_best(tree.stats(cell), "test").values()]
        assert (int(row["n_neurons"]), int(row["n_ge_threshold"])) == (len(values), sum(v >= 0.7 for v in values))
        assert number(row["mean_score"]) == pytest.approx(statistics.mean(values) if values else math.nan, nan_ok=True)
    assert units[f"arithmetic/{EMPTY_CELL[1]}", RunMode.FAKE_TARGETS.value]["n_neurons"] == "0"


def test_the_bootstrap_is_about_the_observed_difference(out):
    for row in read_rows(out / "test" / "sampled_pairwise_comparisons.csv"):
        low, middle, high = (float(row[f"bootstrap_{name}"]) for name in ("ci95_lo", "mean_diff", "ci95_hi"))
        assert low <= float(row["mean_diff"]) <= high and low <= middle <= high
        assert row["sample_size_per_method_per_unit"] == "min_pair"


def test_the_same_seed_gives_the_same_bytes(tree, long_csv, out, tmp_path):
    flags = ["--csv", long_csv, "--out_dir", tmp_path / "out", "--data_root", tree.data, "--n-boot", "500"]
    assert run_script("10_compute_threshold_sweep_stats", flags) == 0
    for path in (out / "test").glob("*.csv"):
        assert path.read_bytes() == (tmp_path / "out" / "test" / path.name).read_bytes()
    no_absolute_path(tmp_path / "out")


def test_counts_as_a_statistic_keep_the_empty_control(tree, long_csv, tmp_path):
    flags = [
        "--csv",
        long_csv,
        "--out_dir",
        tmp_path,
        "--data_root",
        tree.data,
        "--sample_stat",
        "n_ge_threshold",
        "--n_boot",
        "50",
        "--score_scope",
        "test",
    ]
    assert run_script("10_compute_threshold_sweep_stats", flags) == 0
    rows = {row["B_method"]: row for row in read_rows(tmp_path / "sampled_pairwise_comparisons.csv")}
    fakes = [cell for cell in tree.cells.values() if cell.mode == "fake_targets"]
    mains = [cell for cell in tree.cells.values() if cell.mode == "spectral_plan"]
    expected = statistics.mean(
        raw_count(tree, a, "test", 0.7) - raw_count(tree, b, "test", 0.7) for a, b in zip(mains, fakes, strict=True)
    )
    assert float(rows[RunMode.FAKE_TARGETS.value]["mean_diff"]) == pytest.approx(expected)
    assert rows[RunMode.FAKE_TARGETS.value]["n_pairs"] == "2"


def write_long(path, rows, **columns):
    pd.DataFrame(
        [
            {"task": "arithmetic", "llm": llm, "Method": method, "threshold": 0.7, "n_high_quality_neurons": n}
            | columns
            for llm, method, n in rows
        ]
    ).to_csv(path, index=False)


def test_a_scope_without_rows_says_so_and_leaves_no_old_tables(tmp_path):
    write_long(tmp_path / "a.csv", [("x/A", MAIN, 3), ("x/A", OTHERS[0], 1)], score_scope="test")
    (tmp_path / "out" / "all_fit").mkdir(parents=True)
    (tmp_path / "out" / "all_fit" / "table2_descriptive_totals.csv").write_text("old\n")
    flags = ["--csv", tmp_path / "a.csv", "--out_dir", tmp_path / "out", "--thresholds", "0.7"]
    assert run_script("10_compute_threshold_sweep_stats", flags) == 0
    assert [path.name for path in (tmp_path / "out" / "all_fit").iterdir()] == ["NO_ROWS_FOR_SCORE_SCOPE.txt"]
    (pair,) = read_rows(tmp_path / "out" / "test" / "method_comparison_primary_threshold_pairs.csv")
    assert (pair["llm"], float(pair["diff"])) == ("x/A", 2.0)


def test_models_of_equal_name_stay_apart(tmp_path):
    rows = [
        {"task": "t", "org": org, "model": "M", "Method": method, "threshold": 0.7, "n_high_quality_neurons": n}
        for org, method, n in (("a", MAIN, 5), ("a", OTHERS[0], 1), ("b", MAIN, 1), ("b", OTHERS[0], 2))
    ]
    pd.DataFrame(rows).assign(score_scope="test").to_csv(tmp_path / "a.csv", index=False)
    flags = [
        "--csv",
        tmp_path / "a.csv",
        "--out_dir",
        tmp_path,
        "--thresholds",
        "0.7",
        "--tasks",
        "",
        "--score_scope",
        "test",
    ]
    assert run_script("10_compute_threshold_sweep_stats", flags) == 0
    pairs = read_rows(tmp_path / "method_comparison_primary_threshold_pairs.csv")
    assert [(pair["llm"], float(pair["diff"])) for pair in pairs] == [("a/M", 4.0), ("b/M", -1.0)]


def test_an_unknown_count_leaves_the_pair_out(tmp_path):
    rows = [("x/A", MAIN, 3), ("x/A", OTHERS[0], None), ("x/B", MAIN, 3), ("x/B", OTHERS[0], 0)]
    write_long(tmp_path / "a.csv", rows, score_scope="test")
    flags = ["--csv", tmp_path / "a.csv", "--out_dir", tmp_path, "--thresholds", "0.7", "--score_scope", "test"]
    assert run_script("10_compute_threshold_sweep_stats", flags) == 0
    pairs = read_rows(tmp_path / "method_comparison_primary_threshold_pairs.csv")
    assert [(pair["llm"], float(pair["diff"])) for pair in pairs] == [("x/B", 3.0)]
    counts = {row["method"]: row["0.70"] for row in read_rows(tmp_path / "table2_descriptive_n_runs.csv")}
    assert counts == {MAIN: "2", OTHERS[0]: "1"}


@pytest.mark.parametrize(
    ("columns", "flags", "message"),
    [
        ({}, [], "has no column score_scope; say with --score_scope"),
        ({"score_scope": "test"}, ["--primary_threshold", "0.65"], "no counts at threshold 0.65; the CSV has 0.7"),
        ({"score_scope": "test"}, ["--thresholds", "0.1", "0.2"], "none of --thresholds"),
        ({"score_scope": "test"}, ["--tasks", "hans_nli"], "no row of --tasks hans_nli; the CSV has arithmetic"),
        ({"score_scope": "test"}, ["--metric", "nothing"], "has no column nothing"),
        ({"score_scope": "test"}, ["--score_scope", "all_fit"], "has no row of scope all_fit"),
        ({"score_scope": "test", "Method": "other"}, [], "no row of a known method"),
    ],
)
def test_mistakes_are_one_line(tmp_path, capsys, columns, flags, message):
    write_long(tmp_path / "a.csv", [("x/A", MAIN, 3), ("x/A", OTHERS[0], 1)], **columns)
    assert run_script("10_compute_threshold_sweep_stats", ["--csv", tmp_path / "a.csv", *flags]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_an_unscoped_csv_counts_for_the_scope_that_is_named(tmp_path, capsys):
    write_long(tmp_path / "a.csv", [("x/A", MAIN, 3), ("x/A", OTHERS[0], 1)])
    flags = ["--csv", tmp_path / "a.csv", "--score-scope", "all_fit", "--thresholds", "0.7"]
    assert run_script("10_compute_threshold_sweep_stats", flags) == 0
    told = capsys.readouterr().out
    assert "HQ(ALL-FIT)" in told and "mean difference 2" in told and r"\toprule" in told


def test_table_2_goes_in_as_it_comes_out(tree, tmp_path):
    """The tables' long CSV of the same tree gives the same totals."""
    arguments = ["--data_root", tree.data, "--out_dir", tmp_path / "tables", "--which", "table2", "--quiet"]
    assert run_script("make_paper_tables", arguments) == 0
    flags = ["--csv", tmp_path / "tables" / "table2_threshold_sweep_per_run_long.csv", "--out_dir", tmp_path / "out"]
    assert run_script("10_compute_threshold_sweep_stats", flags) == 0
    for scope in ("test", "all_fit"):
        for row in read_rows(tmp_path / "out" / scope / "table2_descriptive_totals.csv"):
            cells = [cell for cell in tree.cells.values() if method_of(cell) == row["method"]]
            assert float(row["0.80"]) == sum(raw_count(tree, cell, scope, 0.80) for cell in cells)


def test_neurons_are_those_of_the_counted_runs(tree, tmp_path):
    # Counts of one model at one size were once set beside the neurons of every model at the commonest size.
    model = published.MODELS[0]
    flags = ["--data_root", tree.data, "--out_dir", tmp_path / "tables", "--which", "table2", "--quiet"]
    assert run_script("make_paper_tables", [*flags, "--models", model, "--variant", "M25000"]) == 0
    flags = ["--csv", tmp_path / "tables" / "table2_threshold_sweep_per_run_long.csv", "--out_dir", tmp_path / "out"]
    more = ["--data_root", tree.data, "--n_boot", "20", "--score_scope", "test"]
    assert run_script("10_compute_threshold_sweep_stats", [*flags, *more]) == 0
    neurons = read_rows(tmp_path / "out" / "per_neuron_scores.csv")
    assert neurons and {row["model"] for row in neurons} == {model.split("/")[1]}
    assert all("-M25000-" in row["run_name"] for row in neurons)
