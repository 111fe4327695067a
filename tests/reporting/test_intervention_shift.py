"""The comparison of two interventions, every number counted again from the tree's own truth."""

from __future__ import annotations

import csv
import json
import math

import pytest

import summarize_intervention_shift
from tests import published_tree
from tests.published_tree import N_CORRECT, N_ROWS, Cell


def write_pair(root, left: dict[str, set[int]], right: dict[str, set[int]], rules=()):
    """Two runs of one model with given flips; returns (stats folder of the first, of the second, the two cells)."""
    cells = []
    for bag, flips in (("a", left), ("b", right)):
        cell = Cell(
            "arithmetic",
            "org/model",
            "spectral_plan",
            "rule_split-spectral_sample-decode_only",
            f"agonist_neurons-fast-spectral_anchor-{bag}",
            False,
            flips=flips,
        )
        cell.rules = [row for row in rules if row["neuron_key"].replace("_", ":") in flips]
        published_tree._write_stats(root / "data" / cell.stats_dir, cell, scores=False)
        cells.append(cell)
    return root / "data" / cells[0].stats_dir, root / "data" / cells[1].stats_dir, cells


def rule(neuron: str, mcc: float, scope: str = "all_fit") -> dict:
    label, _, index = neuron.partition(":")
    return dict.fromkeys(published_tree.RULE_COLUMNS, "") | {
        "layer_key": label,
        "neuron_id": int(index),
        "neuron_key": f"{label}_{index}",
        "score_scope": scope,
        "computed_on": scope,
        "MCC": mcc,
        "dataset_coverage": 0.1,
        "flip_target": f"flip_{label}_{index}",
    }


def summarize(tmp_path, left, right, *flags):
    out = tmp_path / "out"
    code = summarize_intervention_shift.main(
        ["--baseline_dir", str(left), "--candidate_dir", str(right), "--output_csv", str(out / "summary.csv"), *flags]
    )
    report = json.loads((out / "intervention_shift_report.json").read_text()) if code == 0 else None
    return code, out, report


def rows_of(path):
    with open(path) as handle:
        return list(csv.DictReader(handle))


LEFT = {"m0:1": set(range(10)), "m0:2": set(range(30, 50)), "m1:3": set(range(6)), "m2:9": {1, 2, 3}}
RIGHT = {"m0:1": set(range(20)), "m0:2": set(range(30, 44)), "m1:3": set(range(6)), "m3:5": {50, 51}}


def test_neurons_are_paired_and_counted(tmp_path):
    left, right, _ = write_pair(tmp_path, LEFT, RIGHT)
    code, out, report = summarize(tmp_path, left, right, "--no_plots")
    assert code == 0
    assert report["neuron_sets"] == {
        "n_baseline": 4,
        "n_candidate": 4,
        "n_overlap": 3,
        "n_gained": 1,
        "n_lost": 1,
        "jaccard": 3 / 5,
    }
    rows = {f"{row['layer_key']}:{row['neuron_id']}": row for row in rows_of(out / "summary.csv")}
    assert set(rows) == set(LEFT) | set(RIGHT)
    for neuron, row in rows.items():
        counts = [len(side.get(neuron, ())) for side in (LEFT, RIGHT)]
        assert float(row["delta_flip_any_rate"]) == pytest.approx((counts[1] - counts[0]) / N_ROWS)
        both = neuron in LEFT and neuron in RIGHT
        assert row["status"] == ("overlap" if both else "lost" if neuron in LEFT else "gained")
        assert (row["paired_delta_flip_any_count"] != "") == both
    paired = report["paired_overlap_stats"]["flip_any_rate"]
    deltas = [10 / 60, -6 / 60, 0.0]
    assert paired["n"] == 3 and paired["mean_delta"] == pytest.approx(sum(deltas) / 3)
    assert (paired["share_higher"], paired["share_lower"], paired["share_equal"]) == (1 / 3, 1 / 3, 1 / 3)
    assert paired["sign_test_p"] == 1.0 and paired["spearman"] == pytest.approx(0.5)
    union = report["union_missing_as_zero_stats"]["flip_any_rate"]
    assert union["n"] == 5 and "spearman" not in union
    assert union["mean_delta"] == pytest.approx((10 - 6 + 0 - 3 + 2) / 60 / 5)


def test_globals_are_compared(tmp_path):
    left, right, cells = write_pair(tmp_path, LEFT, RIGHT)
    _, _, report = summarize(tmp_path, left, right, "--no_plots")
    block = report["global_comparison"]["union_flip_any_unique_count"]
    assert (block["baseline"], block["candidate"]) == (cells[0].union("any"), cells[1].union("any")) == (30, 36)
    assert block["delta"] == 6 and block["relative_delta"] == pytest.approx(0.2)


def test_high_quality_coverage_is_of_eligible_rows(tmp_path):
    rules = [rule("m0:1", 0.9), rule("m0:2", 0.71), rule("m1:3", 0.69)]
    left, right, _ = write_pair(tmp_path, LEFT, RIGHT, rules)
    _, out, _ = summarize(tmp_path, left, right)
    rows = {(row["intervention"], row["metric"]): row for row in rows_of(out / "intervention_shift_hq_summary.csv")}
    any_row, c2i, i2c = (rows["mean", metric] for metric in ("flip_any", "c2i", "i2c"))
    assert (any_row["identified_neurons"], any_row["high_quality_neurons"]) == ("4", "2")
    assert float(any_row["high_union_pct"]) == pytest.approx(100 * 30 / N_ROWS)
    assert float(c2i["high_union_pct"]) == pytest.approx(100 * 20 / N_CORRECT)
    assert float(i2c["high_union_pct"]) == pytest.approx(100 * 10 / (N_ROWS - N_CORRECT))
    assert float(any_row["hq_union_share_of_all_pct"]) == pytest.approx(100.0)
    assert any_row["hq_coverage_share_pct"] == any_row["high_union_pct"]
    # The layers use the same denominators as the overview.
    layers = {
        (row["intervention"], row["layer_key"]): row for row in rows_of(out / "intervention_shift_hq_by_layer.csv")
    }
    assert float(layers["mean", "m0"]["c2i_high_union_pct"]) == pytest.approx(100 * 20 / N_CORRECT)
    assert layers["mean-donor", "m0"]["high_quality_neurons"] == "2"


def test_disjoint_neurons_have_no_paired_numbers_and_no_scatter(tmp_path):
    left, right, _ = write_pair(tmp_path, {"m0:1": {1, 2}}, {"m1:1": {3}, "m1:2": {4}})
    code, out, report = summarize(tmp_path, left, right)
    assert code == 0 and report["neuron_sets"]["n_overlap"] == 0
    assert all(str(block).startswith("unavailable") for block in report["paired_overlap_stats"].values())
    assert not list(out.glob("*scatter*")) and not list(out.glob("*delta_hist*"))
    assert (out / "intervention_shift_hq_overview.pdf").stat().st_size > 1000


def test_figures_are_drawn_for_shared_neurons(tmp_path):
    left, right, _ = write_pair(tmp_path, LEFT, RIGHT)
    _, out, _ = summarize(tmp_path, left, right)
    names = {path.stem for path in out.glob("*.pdf")}
    assert {
        f"intervention_shift_{kind}_{metric}_rate"
        for kind in ("scatter", "delta_hist")
        for metric in ("flip_any", "c2i", "i2c")
    } <= names
    assert not any("semantic" in name for name in names)


def test_an_empty_run_is_zero_not_an_error(tmp_path):
    left, right, _ = write_pair(tmp_path, LEFT, {})
    code, _, report = summarize(tmp_path, left, right)
    assert code == 0 and report["neuron_sets"]["n_lost"] == 4
    assert report["union_missing_as_zero_stats"]["flip_any_rate"]["candidate_mean"] == 0


def test_scope_is_the_one_asked_for(tmp_path, capsys):
    """Published files state no coverage of the strict scope: nothing else may be shown under its name."""
    rules = [rule("m0:1", 0.9, scope) for scope in ("test", "all_fit")]
    left, right, _ = write_pair(tmp_path, LEFT, RIGHT, rules)
    code, out, _ = summarize(tmp_path, left, right, "--hq_score_scope", "test", "--no_plots")
    assert code == 2 and "--allow_missing_hq_coverage" in capsys.readouterr().err
    code, out, _ = summarize(
        tmp_path, left, right, "--hq_score_scope", "test", "--no_plots", "--allow_missing_hq_coverage"
    )
    assert code == 0
    row = rows_of(out / "intervention_shift_hq_summary.csv")[0]
    assert (row["score_scope"], row["high_quality_neurons"], row["high_union_pct"]) == ("test", "1", "")
    assert "no coverage" in (out / "report_issues.csv").read_text()


def test_threshold_is_that_of_the_scope(tmp_path):
    left, right, cells = write_pair(tmp_path, LEFT, RIGHT)
    for folder in (left, right):
        path = folder / "high_quality_neuron_flip_coverage.json"
        content = json.loads(path.read_text()) | {"quality_thresholds_by_scope": {"test": 0.7, "all_fit": 0.8}}
        path.write_text(json.dumps(content))
    _, out, _ = summarize(tmp_path, left, right, "--no_plots")
    assert rows_of(out / "intervention_shift_hq_summary.csv")[0]["quality_threshold"] == "0.8"


def test_mistakes_are_one_line(tmp_path, capsys):
    left, right, _ = write_pair(tmp_path, LEFT, RIGHT)
    for arguments in ((tmp_path / "none", right), (tmp_path, right)):
        assert summarize(tmp_path, *arguments)[0] == 2
    text = (right / "flip_stats_by_neuron.csv").read_text()
    (right / "flip_stats_by_neuron.csv").write_text(text.replace("neuron_id", "number"))
    assert summarize(tmp_path, left, right)[0] == 2
    assert summarize(tmp_path, left, left, "--candidate_label", "mean")[0] == 2
    assert capsys.readouterr().err.count("\n") == 4


def test_report_is_strict_json_without_local_paths(tmp_path):
    left, right, _ = write_pair(tmp_path, LEFT, RIGHT)
    _, out, report = summarize(tmp_path, left, right, "--no_plots")
    assert report["context"] == {"task": "arithmetic", "model": "org/model"}
    for path in out.glob("*.json"):
        text = path.read_text()
        assert "NaN" not in text and str(tmp_path) not in text, path.name
    assert not math.isnan(report["paired_overlap_stats"]["c2i_rate"]["mean_delta"])
