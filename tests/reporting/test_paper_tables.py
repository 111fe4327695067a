"""The paper's tables, every number counted again from the raw files (or the tree's own truth) without the library."""

from __future__ import annotations

import csv
import json
import re
import statistics
import subprocess
import sys

import pytest

import clean_results_for_export
import make_paper_tables
from lib.reporting.naming import RunMode
from lib.reporting.paper_tables import expected_run
from lib.reporting.paper_tables_search import bin_label, overlap_row, parse_bins, recall_cell
from tests import published_tree
from tests.published_tree import MODELS, N_CORRECT, N_ROWS
from tests.scripts import REPOSITORY

TASKS = ("arithmetic", "bon_jailbreaking")
SHORT_TASK = {"arithmetic": "Arithmetic", "bon_jailbreaking": "Jailbreaking", "hans_nli": "HANS NLI"}
SHORT_MODEL = dict(zip(MODELS, ("Qwen2-1.5B", "Qwen2-7B", "GPT-J"), strict=True))
TABLE_2_MODES = {
    "spectral_plan": "Rule split + spectral coverage",
    "spectral_split": "Spectral split (no rule)",
    "random_plan": "Rule split + random coverage",
    "fake_targets": "Fake rule split + spectral coverage",
}
THRESHOLDS = (0.7, 0.75, 0.8, 0.85, 0.9)
BINS = ((0.2, 0.3), (0.3, 0.5), (0.5, 1.0))


def make(data, out, *flags):
    return make_paper_tables.main(["--data_root", str(data), "--out_dir", str(out), "--quiet", *flags])


def rows_of(path):
    with open(path, encoding="utf-8") as handle:
        return list(csv.DictReader(handle))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(the tree with empty and broken cells, its tables)."""
    folder = tmp_path_factory.mktemp("tables")
    tree = published_tree.build(folder, scores=False)
    assert make(tree.data, folder / "out") == 0
    return tree, folder / "out"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The tables of a tree without any fault, HANS included."""
    folder = tmp_path_factory.mktemp("whole")
    tree = published_tree.build(folder, scores=False, states={})
    assert make(tree.data, folder / "out", "--include_hans_in_main_tables", "--strict") == 0
    return tree, folder / "out"


# ---------------------------------------------------------------- table 1


def test_table_1(made):
    tree, out = made
    rows = rows_of(out / "table1_main_high_quality_neurons.csv")
    assert [(row["Task"], row["Model"]) for row in rows] == [
        (task, model) for task in ("Arithmetic", "Jailbreaking") for model in ("Qwen2-7B", "GPT-J", "Qwen2-1.5B")
    ]
    for row in rows:
        task = next(name for name, label in SHORT_TASK.items() if label == row["Task"])
        cell = tree.cells[task, row["llm"], "spectral_plan"]
        assert int(row["# Loc."]) == len(cell.flips)
        for scope, column in (("test", "HQ(TEST)"), ("all_fit", "HQ(ALL-FIT)")):
            assert int(row[column]) == sum(mcc >= 0.7 for mcc in cell.best(scope).values())
        expected = {
            "∪(1→0) (elig. %)": 100 * cell.union("c2i") / N_CORRECT,
            "∪(0→1) (elig. %)": 100 * cell.union("i2c") / (N_ROWS - N_CORRECT),
        }
        for column, value in expected.items():
            if cell.state == "truncated_coverage":
                assert row[column] == "" and row["status"] == "invalid"
            else:
                assert float(row[column]) == pytest.approx(value)


def test_table_1_coverage_of_high_quality_neurons(made, tmp_path):
    tree, _ = made
    make(tree.data, tmp_path, "--which", "table1", "--table1_coverage_source", "hq")
    for row in rows_of(tmp_path / "table1_main_high_quality_neurons.csv"):
        task = next(name for name, label in SHORT_TASK.items() if label == row["Task"])
        cell = tree.cells[task, row["llm"], "spectral_plan"]
        if cell.state == "ok":
            high = {key for key, mcc in cell.best("all_fit").items() if mcc >= 0.7}
            flipped = set().union(*(rows for name, rows in cell.flips.items() if name.replace(":", "_") in high))
            assert float(row["∪(1→0) (elig. %)"]) == pytest.approx(
                100 * len([number for number in flipped if number < N_CORRECT]) / N_CORRECT
            )


def test_table_1_says_not_available_instead_of_another_denominator(made, tmp_path):
    tree, _ = made
    assert make(tree.data, tmp_path, "--which", "1", "--table1_coverage_score_scope", "test") == 0
    assert all(row["∪(1→0) (elig. %)"] == "" for row in rows_of(tmp_path / "table1_main_high_quality_neurons.csv"))
    assert "no c2i coverage of scope test" in (tmp_path / "report_issues.csv").read_text()


# ---------------------------------------------------------------- table 2


def available(cell, scope):
    return cell.state not in ("missing_rules", "missing_run") and not (
        cell.state == "stale_manifest" and scope != "test"
    )


def test_table_2_per_run(whole):
    tree, out = whole
    rows = rows_of(out / "table2_threshold_sweep_per_run_long.csv")
    assert len(rows) == 9 * 4 * 2 * 5
    for row in rows:
        mode = next(word for word, label in TABLE_2_MODES.items() if label == row["Method"])
        best = tree.cells[row["task"], row["llm"], mode].best(row["score_scope"])
        assert int(row["n_rule_bearing_neurons"]) == len(best)
        assert int(row["n_high_quality_neurons"]) == sum(m >= float(row["threshold"]) for m in best.values())


def test_table_2_totals_count_zero_as_zero_and_leave_missing_out(made):
    tree, out = made
    rows = {(row["Method"], row["score_scope"]): row for row in rows_of(out / "table2_threshold_sweep_totals.csv")}
    assert len(rows) == 8
    for mode, label in TABLE_2_MODES.items():
        for scope in ("test", "all_fit"):
            cells = [tree.cells[task, model, mode] for task in TASKS for model in MODELS]
            best = [cell.best(scope) for cell in cells if available(cell, scope)]
            row = rows[label, scope]
            assert int(row["units"]) == len(best)
            assert int(row["All"]) == sum(map(len, best))
            for threshold in THRESHOLDS:
                assert int(row[f"t = {threshold:.2f}"]) == sum(m >= threshold for b in best for m in b.values())
    # The control that found nothing is counted: six units, not five.
    assert rows[TABLE_2_MODES["fake_targets"], "test"]["units"] == "6"
    assert rows[TABLE_2_MODES["spectral_split"], "test"]["units"] == "5"
    long = rows_of(out / "table2_threshold_sweep_per_run_long.csv")
    empty = [row for row in long if row["status"] == "empty"]
    assert empty and all(row["n_high_quality_neurons"] == "0" and row["scope_available"] == "True" for row in empty)
    missing = [row for row in long if row["status"] == "missing"]
    assert missing and all(row["n_high_quality_neurons"] == "" for row in missing)


def test_stale_manifest_keeps_the_held_out_rows_only(made, tmp_path):
    tree, _ = made
    make(tree.data, tmp_path, "--which", "table2", "--include_hans_in_main_tables")
    rows = [
        row
        for row in rows_of(tmp_path / "table2_threshold_sweep_per_run_long.csv")
        if (row["task"], row["llm"]) == ("hans_nli", MODELS[1]) and row["Method"] == TABLE_2_MODES["random_plan"]
    ]
    assert {(row["score_scope"], row["status"]) for row in rows} == {("test", "ok"), ("all_fit", "stale")}


def test_support_floor_comes_before_the_best_row(tmp_path):
    tree = published_tree.build(
        tmp_path, tasks=("arithmetic",), models=MODELS[:1], states={}, sensitivity=False, scores=False
    )
    cell = tree.cells["arithmetic", MODELS[0], "spectral_plan"]
    path = tree.stats(cell) / "rule_combo_metrics_test_all.csv"
    rows = rows_of(path)[:1] * 2
    rows = [
        row | {"MCC": mcc, "dataset_coverage": cover}
        for row, mcc, cover in zip(rows, (1.0, 0.72), (0.001, 0.02), strict=True)
    ]
    published_tree._write_csv(path, published_tree.RULE_COLUMNS, rows)
    make(tree.data, tmp_path / "out", "--which", "table2", "--score_scopes", "test", "--thresholds", "0.7,0.75")
    counts = [
        row["n_high_quality_neurons"]
        for row in rows_of(tmp_path / "out" / "table2_threshold_sweep_per_run_long.csv")
        if row["Method"] == TABLE_2_MODES["spectral_plan"]
    ]
    assert counts == ["1", "0"]


def test_selection_on_test_is_only_made_on_request_and_says_so(made, tmp_path):
    tree, out = made
    assert not any("selected" in row["score_scope"] for row in rows_of(out / "table2_threshold_sweep_totals.csv"))
    make(tree.data, tmp_path, "--which", "table1,table2", "--score_scopes", "HQ-T")
    assert "optimistic" in (tmp_path / "table1_main_high_quality_neurons.md").read_text()
    rows = rows_of(tmp_path / "table2_threshold_sweep_totals.csv")
    assert {row["Score scope"] for row in rows} == {"HQ(selected on TEST)"}


# ---------------------------------------------------------------- tables 3, 12, 13


def raw_regime(tree, cell, regime):
    """Straight from the files: (bucket, circuit id -> (groups, its single tests, its number of candidates))."""
    folder = tree.data / cell.circuit_dir / cell.bag_label / f"{regime}_baseline"
    bucket = json.loads((folder / "neuron_buckets.json").read_text())["non_catastrophic_agonists"]
    circuits = {}
    for path in sorted((folder / "is_correct").glob("rule_*.json")):
        detail = json.loads(path.read_text())
        singles, units = {}, set()
        for record in detail["ablations"]:
            members = [f"{layer}:{i}" for layer, ids in record["layers_neurons_dict"].items() for i in ids]
            units |= set(members)
            if len(members) == 1:
                singles[members[0]] = record["max_effect"]
        circuits[detail["circuit_id"]] = (len(detail["ablations"]), singles, len(units))
    return bucket, circuits


def recall_by_hand(tree, task, model, regime):
    """(bins of (recovered, all), group tests, N) on the circuits that both have searched."""
    brute_bucket, brute = raw_regime(tree, tree.cells[task, model, "brute_force"], regime)
    main_bucket, main = raw_regime(tree, tree.cells[task, model, "spectral_plan"], regime)
    shared = set(brute) & set(main)
    theirs = {n: e for c in shared for n, e in brute[c][1].items() if n in brute_bucket}
    ours = {n: e for c in shared for n, e in main[c][1].items() if n in main_bucket}
    cells = []
    for low, high in BINS:
        inside = [n for n, e in theirs.items() if low <= e < high or e == high == 1.0]
        cells.append((sum(ours.get(n, 0) >= 0.2 for n in inside), len(inside)))
    return cells, sum(main[c][0] for c in shared), sum(brute[c][2] for c in shared)


def cell_of(part, of):
    return f"{part}/{of} ({100 * part / of:.1f}%)" if of else "0/0"


def test_table_3(made):
    tree, out = made
    rows = {(row["Task"], row["Model"], row["Baseline"]): row for row in rows_of(out / "table3_compact_bf_vs_cha.csv")}
    sums: dict[tuple, list] = {}
    for task in TASKS:
        for model in MODELS:
            if tree.cells[task, model, "brute_force"].state != "ok":
                assert not any(key[:2] == (SHORT_TASK[task], SHORT_MODEL[model]) for key in rows)
                continue
            for regime in ("positive", "negative"):
                found = recall_by_hand(tree, task, model, regime)
                for key in (
                    (SHORT_TASK[task], SHORT_MODEL[model], regime),
                    (SHORT_TASK[task], SHORT_MODEL[model], "both"),
                    (SHORT_TASK[task], "All", "both"),
                    ("All", "All", "both"),
                ):
                    sums.setdefault(key, []).append(found)
    assert set(rows) == set(sums)
    for key, parts in sums.items():
        row, n = rows[key], sum(part[2] for part in parts)
        tests, tree_size = sum(part[1] for part in parts), sum(2 * part[2] - 1 for part in parts)
        assert (int(row["CHA ablations"]), int(row["N"]), int(row["BF ablations"])) == (tests, n, tree_size)
        assert row["Budget"] == f"{100 * tests / tree_size:.2f}%"
        assert row["Budget of N"] == f"{100 * tests / n:.2f}%"
        assert int(row["#completed experiments"]) == len(parts)
        for number, label in enumerate(("[0.2, 0.3)", "[0.3, 0.5)", "[0.5, 1.0]")):
            assert row[label] == cell_of(sum(p[0][number][0] for p in parts), sum(p[0][number][1] for p in parts))
        assert row["Overall"] == cell_of(sum(r for p in parts for r, _ in p[0]), sum(n for p in parts for _, n in p[0]))
    short = rows_of(out / "table3_e2_recall_budget.csv")
    assert short[0]["Task/model"] == "Arith./Qwen2-7B" and short[-1]["Task/model"] == "All completed"
    assert short[-1]["Overall"] == rows["All", "All", "both"]["Overall"]
    metadata = json.loads((out / "table3_compact_metadata.json").read_text())
    assert metadata["n_completed_baseline_records"] == len(short) - 1 == 10


def test_table_3_does_not_compare_different_circuits(tmp_path):
    """Brute force of another circuit than those searched is no comparison, and is said to be none."""
    tree = published_tree.build(tmp_path, tasks=("bon_jailbreaking",), models=MODELS[1:2], states={}, sensitivity=False)
    cell = tree.cells["bon_jailbreaking", MODELS[1], "brute_force"]
    folder = tree.data / cell.circuit_dir / cell.bag_label / "positive_baseline"
    entries = json.loads((folder / "rule_knockout.json").read_text())
    entries[0]["circuit_id"] = 7
    (folder / "rule_knockout.json").write_text(json.dumps(entries))
    make(tree.data, tmp_path / "out", "--which", "table3")
    rows = rows_of(tmp_path / "out" / "table3_e2_recall_budget.csv")
    assert [row["b"] for row in rows] == ["neg.", "all"]
    assert "no circuit was searched by both" in (tmp_path / "out" / "report_issues.csv").read_text()


def test_table_3_by_hand():
    brute, search = {"x": 0.25, "y": 0.4, "z": 0.9}, {"y", "z"}
    bins = parse_bins("0.2,0.3,0.5,1.0")
    found = [
        recall_cell(
            sum(n in search for n, e in brute.items() if low <= e < high), sum(low <= e < high for e in brute.values())
        )
        for low, high in bins
    ]
    assert found == ["0/1 (0.0%)", "1/1 (100.0%)", "1/1 (100.0%)"] and recall_cell(2, 3) == "2/3 (66.7%)"
    assert [bin_label(bins, number) for number in range(3)] == ["[0.2, 0.3)", "[0.3, 0.5)", "[0.5, 1.0]"]


def test_table_12(made):
    tree, out = made
    rows = rows_of(out / "table12_cha_ablation_budget.csv")
    assert len(rows) == 2 * len(TASKS) * len(MODELS)
    for row in rows:
        task = next(name for name, label in SHORT_TASK.items() if label == row["Task"])
        regime = {"pos": "positive", "neg": "negative"}[row["Baseline"]]
        _, circuits = raw_regime(tree, tree.cells[task, row["llm"], "spectral_plan"], regime)
        counts = [circuits[number][0] for number in sorted(circuits)]
        assert row["n ablation_groups (by circuit id)"] == ",".join(f"{k}:{circuits[k][0]}" for k in sorted(circuits))
        assert int(row["#rules"]) == len(counts)
        assert float(row["Mean"]) == pytest.approx(statistics.mean(counts))
        assert float(row["Median"]) == statistics.median(counts)
        assert row["Min–Max"] == f"{min(counts)}–{max(counts)}"
        n = sum(entry[2] for entry in circuits.values())
        assert float(row["% of N"]) == pytest.approx(100 * sum(counts) / n)
        assert float(row["% of 2N-1"]) == pytest.approx(100 * sum(counts) / (2 * n - len(counts)))


def test_table_13(made):
    tree, out = made
    sets = []
    for task in TASKS:
        cell = tree.cells[task, MODELS[1], "spectral_plan"]
        sets.append({n for regime in ("positive", "negative") for n, e in cell.effects[regime].items() if e >= 0.2})
    (row,) = rows_of(out / "table13_cross_task_overlap.csv")
    assert [int(row[name]) for name in ("|A|", "|J|", "|A ∩ J|")] == [*map(len, sets), len(sets[0] & sets[1])]
    assert float(row["Jaccard"]) == pytest.approx(len(sets[0] & sets[1]) / len(sets[0] | sets[1]))
    assert (out / "table13_intersection_neurons.txt").read_text().split() == sorted(sets[0] & sets[1])


def test_table_13_never_mixes_models(made, tmp_path):
    """One task of the asked-for model is not compared with the other task of another model."""
    tree, _ = made
    make(tree.data, tmp_path, "--which", "table13", "--table13_model", "no/such")
    assert json.loads((tmp_path / "table13_metadata.json").read_text())["present"] == []
    make(tree.data, tmp_path, "--which", "table13", "--models", MODELS[0])
    metadata = json.loads((tmp_path / "table13_metadata.json").read_text())
    assert metadata["model"] == MODELS[0] and metadata["status"] == "ok"


def test_overlap_by_hand():
    row = overlap_row("s", {"a", "b", "c", "d"}, {"c", "d", "e"})
    assert (row["|A|"], row["|J|"], row["|A ∩ J|"], row["Jaccard"]) == (4, 3, 2, 0.4)
    assert overlap_row("s", set(), set())["Jaccard"] == 0


def test_table_13_without_the_other_task_is_skipped_not_empty_sets(made, tmp_path):
    tree, _ = made
    assert make(tree.data, tmp_path, "--which", "table13", "--tasks", "arithmetic") == 0
    assert rows_of(tmp_path / "table13_cross_task_overlap.csv") == []
    metadata = json.loads((tmp_path / "table13_metadata.json").read_text())
    assert metadata["status"] == "skipped_missing_neuron_buckets" and metadata["jaccard"] is None


# ---------------------------------------------------------------- tables 9, 10, 11


def test_table_9(made):
    tree, out = made
    rows = rows_of(out / "table9_baseline_performance.csv")
    assert len(rows) == 9
    for row in rows:
        task = next(name for name, label in SHORT_TASK.items() if label == row["Task"])
        assert row["Value"] == f"{100 * published_tree.accuracy_of(task, row['llm']):.1f}%"
        assert row["Metric"] == ("Jailbreak rate" if task == "bon_jailbreaking" else "Accuracy")


def test_table_9_from_scores_when_there_are_no_statistics(tmp_path):
    tree = published_tree.build(tmp_path, tasks=("arithmetic",), models=MODELS[:1], states={}, sensitivity=False)
    (tree.data / "arithmetic" / MODELS[0] / "feature_report" / "dataset_stats.json").unlink()
    make(tree.data, tmp_path / "out", "--which", "9")
    (row,) = rows_of(tmp_path / "out" / "table9_baseline_performance.csv")
    assert row["Value"] == f"{100 * N_CORRECT / N_ROWS:.1f}%" and row["source"] == "scores.csv"


def rankings(tree):
    """(attribution: (strength, layer, index) strongest first; neurons by flips), from the raw files."""
    cell = tree.cells["arithmetic", MODELS[1], "spectral_plan"]
    best: dict[tuple[int, int], float] = {}
    for entry in json.loads((tree.data / cell.circuit_dir / "neural_circuits" / "manifest.json").read_text()):
        for key, score in entry["metadata_topn"]["neuron_label_score"].items():
            layer, index = map(int, re.findall(r"\d+", key))
            best[layer, index] = max(best.get((layer, index), 0.0), abs(score))
    attributed = sorted(((-score, *place) for place, score in best.items()))
    flips = rows_of(tree.stats(cell) / "flip_stats_by_neuron.csv")
    flips.sort(
        key=lambda row: (
            -float(row["c2i_rate"]),
            -float(row["flip_any_rate"]),
            int(row["layer_label"][1:]),
            int(row["neuron_id"]),
        )
    )
    return attributed, [row["neuron"] for row in flips]


def test_tables_10_and_11(made):
    tree, out = made
    attributed, flippers = rankings(tree)
    rows = rows_of(out / "table11_top10_eapig_vs_cha.csv")
    assert len(rows) == 10
    for rank, row in enumerate(rows):
        score, layer, index = attributed[rank]
        assert row["EAP-IG neuron"] == f"m{layer}:{index}" and row["|IG|"] == f"{-score:.5f}"
        assert row["CHA neuron"] == (flippers[rank] if rank < len(flippers) else "")
    top = attributed[:50]
    for row in rows_of(out / "table10_layer_concentration.csv"):
        n_ig = sum(f"m{layer}" == row["Layer"] for _, layer, _ in top)
        n_cha = sum(neuron.startswith(row["Layer"] + ":") for neuron in flippers[:50])
        assert row["EAP-IG top-50"] == f"{n_ig} ({100 * n_ig / 50:.1f}%)"
        assert row["CHA top-50"] == f"{n_cha} ({100 * n_cha / len(flippers[:50]):.1f}%)"


# ---------------------------------------------------------------- as a whole


def test_broken_cells_are_named_and_strict_refuses_them(made, tmp_path, capsys):
    tree, out = made
    named = {(row["task"], row["llm"], row["run_name"]): row["status"] for row in rows_of(out / "report_issues.csv")}
    expected = {}
    for (task, model, mode), state in published_tree.STATES.items():
        if task in TASKS and state != "empty":
            status = "missing" if state == "missing_rules" else "invalid"
            expected[task, model, tree.cells[task, model, mode].run_name] = status
    assert named == expected
    assert make(tree.data, tmp_path, "--strict") == 2
    assert "--strict" in capsys.readouterr().err


def test_every_table_has_three_forms_and_plain_latex(whole):
    _, out = whole
    stems = {path.stem for path in out.glob("*.tex")}
    assert {
        "table1_main_high_quality_neurons",
        "table3_e2_recall_budget",
        "table9_baseline_performance",
        "table10_layer_concentration",
        "table11_top10_eapig_vs_cha",
        "table12_cha_ablation_budget",
        "table13_cross_task_overlap",
    } <= stems
    for stem in stems:
        assert (out / f"{stem}.csv").is_file() and (out / f"{stem}.md").is_file()
        text = (out / f"{stem}.tex").read_text()
        assert text.isascii() and r"\toprule" in text and text.count(r"\begin") == text.count(r"\end")
    assert "4 to 8" in (out / "unsupported_tables_note.txt").read_text()


def test_sources_are_recorded_without_local_paths(made):
    tree, out = made
    provenance = json.loads((out / "provenance.json").read_text())
    assert str(tree.root) not in json.dumps(provenance)
    names = {entry["path"] for entry in provenance["inputs"]}
    cell = tree.cells["arithmetic", MODELS[1], "spectral_plan"]
    assert f"{cell.stats_dir}/rule_combo_metrics_test_all.csv" in names and all(not n.startswith("/") for n in names)


@pytest.mark.parametrize(
    "flags",
    [
        ("--which", "table4"),
        ("--score_scopes", "tset"),
        ("--table3_bins", "0.3,0.2"),
        ("--which", "table10", "--table10_model", "no/such"),
    ],
)
def test_mistakes_are_errors_not_silence(made, tmp_path, flags, capsys):
    tree, _ = made
    assert make(tree.data, tmp_path / "out", *flags) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_no_results_is_an_error_and_nothing_outside_is_read(tmp_path, capsys):
    """The parent holds a table of that name, which the published code would have used."""
    (tmp_path / "table3_compact_bf_vs_cha.csv").write_text("Task,Model\nother,project\n")
    (tmp_path / "data").mkdir()
    assert make(tmp_path / "data", tmp_path / "out") == 2
    assert "no finished runs" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_reduced_run_of_another_model_gives_every_table(tmp_path):
    """A small model with another circuit size, as on a computer without a GPU: its runs are the ones compared."""
    from tests.published_tree import make_cell

    tree = published_tree.build(
        tmp_path, tasks=("arithmetic",), models=("SmolLM2-135M-Instruct",), modes=(), sensitivity=False
    )
    for mode in published_tree.MODES:
        cell = make_cell("arithmetic", "SmolLM2-135M-Instruct", mode, "ok", size="2000")
        tree.cells["arithmetic", "SmolLM2-135M-Instruct", mode] = cell
        published_tree._write_stats(tree.stats(cell), cell, scores=True)
        published_tree._write_circuits(tree.data / cell.circuit_dir, cell)
    assert make(tree.data, tmp_path / "out") == 0
    counts = json.loads((tmp_path / "out" / "paper_tables_manifest.json").read_text())
    assert counts.pop("table13_rows") == 0 and all(counts.values()), counts
    assert "SmolLM2" in (tmp_path / "out" / "table11_top10_eapig_vs_cha.md").read_text()


def test_missing_runs_are_called_what_they_would_be_called():
    assert expected_run(RunMode.BRUTE_FORCE, "M2000-tau0.3") == (
        "rule_split-spectral_sample-M2000-decode_only-agonist_neurons-spectral_anchor-tau0.3"
    )
    assert expected_run(RunMode.SPECTRAL_SPLIT, "") == ("spectral_split-decode_only-agonist_neurons-fast-random_anchor")


def test_no_heavy_import():
    program = (
        "import sys, lib.reporting.paper_tables_rules, lib.reporting.paper_tables_search, "
        "lib.reporting.paper_tables_layers, lib.reporting.intervention_shift_files; "
        "print([name for name in ('torch', 'transformers', 'xgboost') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr


def tables_in(out):
    return {
        path.name: path.read_bytes()
        for path in out.iterdir()
        if path.suffix in (".csv", ".md", ".tex", ".txt") or path.name.startswith("table")
    }


def test_tables_from_the_export_equal_those_of_the_original(made, tmp_path):
    tree, out = made
    assert clean_results_for_export.main([str(tree.data), str(tmp_path / "export")]) == 0
    assert make(tmp_path / "export", tmp_path / "out") == 0
    assert tables_in(tmp_path / "out") == tables_in(out) and len(tables_in(out)) > 30


def generate(data, out):
    return subprocess.run(
        ["bash", "run_paper_tables_generation.sh", str(data), str(out), "--n-boot", "200"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )


@pytest.mark.skipif(not (REPOSITORY / "10_compute_threshold_sweep_stats.py").is_file(), reason="stage 10 is not there")
def test_one_command_makes_everything_from_a_folder_and_from_an_archive(tmp_path):
    tree = published_tree.build(tmp_path)
    result = generate(tree.data, tmp_path / "out")
    assert result.returncode == 0, result.stderr + result.stdout
    for task, model, mode in published_tree.BROKEN:
        if task in TASKS:
            assert tree.cells[task, model, mode].run_name in result.stdout
    scopes = {path.name for path in (tmp_path / "out" / "stats").iterdir() if path.is_dir()}
    assert {"test", "all_fit"} <= scopes
    tree.zip()
    result = generate(tree.root / "data.zip", tmp_path / "zipped")
    assert result.returncode == 0, result.stderr + result.stdout
    assert tables_in(tmp_path / "zipped") == tables_in(tmp_path / "out")
