"""The reports on what our own stages 6 and 7 write: every number counted again from tested groups, flips and rules."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lib.artifacts import write_csv
from lib.reporting import models, plots, sensitivity_plots
from tests.reporting import own_runs, recount
from tests.reporting.conftest import number, read_rows
from tests.reporting.own_runs import MODELS, RUNS, SIZE, details, run_name, stats_dir
from tests.reporting.recount import searched
from tests.scripts import run_script

CELLS = [(MODELS[0], run) for run in RUNS] + [(MODELS[1], "main")]
REGIMES = ("positive", "negative")


def save_data(stem, figure, data):
    write_csv(Path(f"{stem}.csv"), data)
    Path(f"{stem}.pdf").write_bytes(b"%PDF")
    return [Path(f"{stem}.pdf"), Path(f"{stem}.csv")]


@pytest.fixture(scope="module")
def patch():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def data(tmp_path_factory, patch):
    return own_runs.build(tmp_path_factory.mktemp("own"), patch)


@pytest.fixture(scope="module")
def out(data, tmp_path_factory, patch):
    """Tables and stages 8 to 11, each by its command."""
    for module in (plots, models, sensitivity_plots):
        patch.setattr(module, "save_figure", save_data)
    out = tmp_path_factory.mktemp("reports")
    commands = {
        "make_paper_tables": ["--data_root", data, "--out_dir", out / "tables"],
        "8_compare_experiments": ["--stats_path", data, "--out_dir", out / "8"],
        "9_compare_models": ["--task_dir", data / "arithmetic", "--out_dir", out / "9"],
        "10_compute_threshold_sweep_stats": [
            *("--csv", out / "tables" / "table2_threshold_sweep_per_run_long.csv", "--n_boot", "20"),
            *("--data_root", data, "--out_dir", out / "10"),
        ],
        "11_summarize_sensitivity_analysis": [
            *("--stats_root", data / "arithmetic" / MODELS[0], "--out_dir", out / "11"),
            *("--baseline_run_name", run_name("main"), "--baseline_M", SIZE),
        ],
    }
    for script, arguments in commands.items():
        assert run_script(script, [*map(str, arguments), "--quiet"]) == 0
    return out


# ---------------------------------------------------------------- counting again


def quality(data, model, run, scope: str) -> dict[str, float]:
    return recount.quality(stats_dir(data, model, run), scope)


def n_high(data, model, run, scope, threshold=0.7) -> int:
    return recount.n_high(stats_dir(data, model, run), scope, threshold)


def flips(data, model, run, direction: str, keys=None) -> tuple[int, int]:
    return recount.flips(stats_dir(data, model, run), direction, keys)


# ---------------------------------------------------------------- what the stages wrote


def test_the_runs_are_what_the_tests_rely_on(data):
    assert len(quality(data, MODELS[0], "main", "test")) == 4
    assert quality(data, MODELS[0], "fake", "test") == {}
    for model, run in CELLS:
        assert (stats_dir(data, model, run) / "run_metadata.json").is_file()
    assert all(searched(d) < len(d["ablations"]) for d in details(data, MODELS[0], "main", "positive"))
    assert len(details(data, MODELS[0], "brute", "positive")) == 1


# ---------------------------------------------------------------- tables


def test_table_1(data, out):
    for row in read_rows(out / "tables" / "table1_main_high_quality_neurons.csv"):
        model = row["llm"]
        assert int(row["# Loc."]) == len(own_runs.PLANTED[model])
        assert int(row["HQ(TEST)"]) == n_high(data, model, "main", "test")
        assert int(row["HQ(ALL-FIT)"]) == n_high(data, model, "main", "all_fit")
        for direction, column in (("c2i", "∪(1→0) (elig. %)"), ("i2c", "∪(0→1) (elig. %)")):
            hit, eligible = flips(data, model, "main", direction)
            assert float(row[column]) == pytest.approx(100 * hit / eligible)


def test_table_2_and_stage_10(data, out):
    rows = read_rows(out / "tables" / "table2_threshold_sweep_per_run_long.csv")
    runs = {run_name(run): run for run in RUNS}
    seen = [row for row in rows if row["run_name"] in runs and row["scope_available"] == "True"]
    assert len(seen) == 3 * 2 * 5  # main of both models and the control of one; two scopes; five thresholds
    for row in seen:
        expected = n_high(data, row["llm"], runs[row["run_name"]], row["score_scope"], float(row["threshold"]))
        assert int(row["n_high_quality_neurons"]) == expected
    for scope in ("test", "all_fit"):
        (pair,) = read_rows(out / "10" / scope / "method_comparison_primary_threshold_pairs.csv")
        assert float(pair["A"]) == n_high(data, MODELS[0], "main", scope) and float(pair["B"]) == 0.0
        assert pair["llm"] == MODELS[0] and pair["B_method"].startswith("Fake")


def test_table_3(data, out):
    rows = read_rows(out / "tables" / "table3_compact_bf_vs_cha.csv")
    for regime in REGIMES:
        (row,) = [row for row in rows if row["Baseline"] == regime]
        (brute,) = details(data, MODELS[0], "brute", regime)
        main = details(data, MODELS[0], "main", regime)[brute["circuit_id"]]
        theirs = {a["neuron"] for a in brute["agonists"] if a["max_effect"] >= 0.2}
        both = theirs & {a["neuron"] for a in main["agonists"]}
        assert theirs and row["Overall"].startswith(f"{len(both)}/{len(theirs)} ")
        assert int(row["N"]) == SIZE and int(row["BF ablations"]) == 2 * SIZE - 1
        assert int(row["CHA ablations"]) == searched(main)
        assert row["Budget of N"] == f"{100 * searched(main) / SIZE:.2f}%"
        assert row["Budget"] == f"{100 * searched(main) / (2 * SIZE - 1):.2f}%"


def test_table_12_counts_the_audit_apart(data, out):
    rows = read_rows(out / "tables" / "table12_cha_ablation_budget.csv")
    assert len(rows) == 2 * len(MODELS)
    for row in rows:
        found = details(data, row["llm"], "main", {"pos": "positive", "neg": "negative"}[row["Baseline"]])
        counts = [searched(detail) for detail in found]
        assert row["n ablation_groups (by circuit id)"] == ",".join(f"{n}:{count}" for n, count in enumerate(counts))
        assert int(row["Audit"]) == sum(len(d["ablations"]) for d in found) - sum(counts) > 0
        assert float(row["% of N"]) == pytest.approx(100 * sum(counts) / (SIZE * len(counts)))


def test_tables_9_to_11(data, out):
    correct = [row["is_correct"] == "True" for row in read_rows(data / "arithmetic/B/feature_report/scores.csv")]
    for row in read_rows(out / "tables" / "table9_baseline_performance.csv"):
        assert float(row["rate"]) == pytest.approx(sum(correct) / len(correct))
    shown = read_rows(out / "tables" / "table11_top10_eapig_vs_cha.csv")
    place = own_runs.circuits_dir(data, MODELS[1], "main") / "neural_circuits" / "manifest.json"
    strength: dict[str, float] = {}
    for entry in json.loads(place.read_text()):
        for key, score in entry["metadata_topn"]["neuron_label_score"].items():
            label, index = key.strip("()").replace("'", "").split(", ")
            strength[f"{label}:{index}"] = max(abs(score), strength.get(f"{label}:{index}", 0.0))
    ranked = sorted(strength, key=lambda neuron: -strength[neuron])
    assert [row["EAP-IG neuron"] for row in shown] == ranked[:10]
    assert shown[0]["CHA neuron"] == "m2:5"


# ---------------------------------------------------------------- stages 8, 9 and 11


def test_stage_8(data, out):
    runs = {run_name(run): run for run in RUNS}
    leaf = out / "8" / "arithmetic" / MODELS[0] / "leaf_stats_dir_outputs" / "threshold_sweep_summary.csv"
    rows = [row for row in read_rows(leaf) if row["threshold"] in ("0.7", "0.9")]
    assert len(rows) == 2 * 3
    for row in rows:
        run = runs[row["stats_dirname"]]
        high = [key for key, mcc in quality(data, MODELS[0], run, "test").items() if mcc >= float(row["threshold"])]
        assert int(row["n_high_quality_neurons"]) == len(high)
        for direction in ("c2i", "i2c"):
            assert int(row[f"union_{direction}_count"]) == flips(data, MODELS[0], run, direction, high)[0]


def test_stage_9(data, out):
    rows = read_rows(out / "9" / "run_summary_by_model.csv")
    assert len(rows) == len(CELLS)
    by_name = {(row["model_root"], row["run_name"]): row for row in rows}
    for model, run in CELLS:
        row = by_name[f"arithmetic/{model}", run_name(run)]
        assert int(float(row["n_neurons_with_rules"])) == len(quality(data, model, run, "test"))
        found = details(data, model, run, "positive")
        agonists = {a["neuron"]: a["max_effect"] for d in found for a in d["agonists"]}
        assert int(float(row["n_tau_agonists"])) == len(agonists)
        counts = [searched(detail) for detail in found]
        assert float(row["n_ablation_groups_total"]) == sum(counts)
        assert float(row["pct_of_N"]) == pytest.approx(100 * sum(counts) / (SIZE * len(counts)))
        if run == "brute":
            assert counts == [SIZE]


def test_stage_11(data, out):
    for scope in ("test", "all_fit"):
        rows = {row["run_name"]: row for row in read_rows(out / "11" / scope / "sensitivity_summary.csv")}
        for run in ("main", "tau"):
            row = rows[run_name(run)]
            assert (number(row["M"]), number(row["tau"])) == (SIZE, 0.2 if run == "main" else 0.5)
            assert int(row["n_quality_ge_0.70"]) == n_high(data, MODELS[0], run, scope)
            counts = [searched(d) for regime in REGIMES for d in details(data, MODELS[0], run, regime)]
            assert number(row["cha_budget_total"]) == sum(counts)
            assert int(row["cha_budget_n_circuits"]) == len(counts)


# ---------------------------------------------------------------- export


def test_the_export_of_our_runs_gives_the_same_tables_and_holds_no_prompt(data, out, tmp_path):
    assert run_script("clean_results_for_export", [str(data), str(tmp_path / "data")]) == 0
    arguments = ["--data_root", str(tmp_path / "data"), "--out_dir", str(tmp_path / "tables"), "--quiet"]
    assert run_script("make_paper_tables", arguments) == 0
    names = [path.name for path in sorted((out / "tables").iterdir()) if path.name != "provenance.json"]
    assert len(names) > 30
    for name in names:
        assert (tmp_path / "tables" / name).read_bytes() == (out / "tables" / name).read_bytes(), name
    prompt = read_rows(data / "arithmetic/B/feature_report/scores.csv")[0]["prompt"]
    assert prompt == "0: " + prompt[3:] and prompt.endswith("=")
    for path in (tmp_path / "data").rglob("*"):
        assert path.is_dir() or prompt.encode() not in path.read_bytes(), path
