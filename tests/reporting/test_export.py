"""The export: keeps what tables need, leaks no text or path, never touches its input."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest

import clean_results_for_export
from lib.export import drop_reason, without_local_paths
from tests import published_tree
from tests.scripts import run_script

SECRET = "how to pick a lock"


@pytest.fixture
def tree(tmp_path):
    tree = published_tree.build(
        tmp_path, tasks=("arithmetic",), models=published_tree.MODELS[:1], states={}, sensitivity=False
    )
    report = tree.data / "arithmetic" / published_tree.MODELS[0] / "feature_report" / "scores.csv"
    rows = report.read_text().splitlines()
    report.write_text("\n".join([rows[0], *(row.replace("p", SECRET, 1) for row in rows[1:])]) + "\n")
    cell = tree.cells["arithmetic", published_tree.MODELS[0], "spectral_plan"]
    detail = tree.data / cell.circuit_dir / cell.bag_label / "positive_baseline" / "is_correct" / "rule_0000.json"
    content = json.loads(detail.read_text()) | {"answers_after_ablation": {"m0:1": {"3": SECRET}}}
    detail.write_text(json.dumps(content))
    info = tree.data / cell.circuit_dir / "neural_circuits" / "dataset_info.json"
    info.write_text(
        json.dumps(
            {
                "scores_path": f"{tree.data}/arithmetic/x/scores.csv",
                "ratio": "12/3 = 4",
                "log": "/home/someone/runs/log.txt",
                "page": "https://example.org/a/b",
            }
        )
    )
    (tree.stats(cell) / "notes.pkl").write_bytes(b"pickle")
    (tree.stats(cell) / "ablated_answers.jsonl").write_text(SECRET)
    return tree


def content_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def run(*arguments):
    return clean_results_for_export.main([str(argument) for argument in arguments])


def test_manifest_lists_every_file_once_with_relative_paths(tree, tmp_path):
    before = content_of(tree.data)
    out = tmp_path / "out"
    assert run(tree.data, out, "--manifest", tmp_path / "m.json") == 0
    assert content_of(tree.data) == before
    text = (out / "export_manifest.json").read_text()
    manifest = json.loads(text)
    assert str(tmp_path) not in text and (tmp_path / "m.json").read_text() == text
    kept, dropped = ({record["path"] for record in manifest[name]} for name in ("kept", "dropped"))
    assert kept | dropped == set(before) and not kept & dropped
    assert set(content_of(out)) == kept | {"export_manifest.json"}
    assert manifest["n_kept"] == len(kept) and manifest["n_dropped"] == len(dropped) == 2


def test_no_text_pickle_or_local_path_leaves_the_house(tree, tmp_path):
    out = tmp_path / "out"
    run(tree.data, out)
    everything = b"".join(content_of(out).values()).decode()
    assert SECRET not in everything and str(tmp_path) not in everything and "/home/someone" not in everything
    assert not [name for name in content_of(out) if name.endswith((".pkl", ".jsonl"))]
    cell = tree.cells["arithmetic", published_tree.MODELS[0], "spectral_plan"]
    info = json.loads((out / cell.circuit_dir / "neural_circuits" / "dataset_info.json").read_text())
    assert info == {
        "scores_path": "data/arithmetic/x/scores.csv",
        "ratio": "12/3 = 4",
        "log": "log.txt",
        "page": "https://example.org/a/b",
    }
    with open(out / cell.stats_dir / "scores.csv") as handle:
        header = next(csv.reader(handle))
    assert "prompt" not in header and {"is_correct", "is_test"} < set(header)
    assert sum(name.startswith("flip_") for name in header) == 3 * len(cell.flips)


def test_output_that_overlaps_the_input_is_refused_and_nothing_is_lost(tree, tmp_path, capsys):
    before = content_of(tree.data)
    link = tmp_path / "link"
    link.symlink_to(tree.data)
    for output in (tree.data, tree.data / "arithmetic", tree.root, link, tmp_path / "x" / ".." / "data"):
        assert run(tree.data, output, "--force") == 2
        assert "overlaps" in capsys.readouterr().err
    assert run(tree.data, tmp_path / "out", "--manifest", tree.data / "m.json") == 2
    assert content_of(tree.data) == before


def test_existing_output_needs_force_and_only_an_export_is_replaced(tree, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(tree.data, out) == 0
    first = content_of(out)
    assert run(tree.data, out) == 2 and "--force" in capsys.readouterr().err
    (out / "stale.txt").write_text("old")
    assert run(tree.data, out, "--force") == 0
    assert content_of(out) == first
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years")
    assert run(tree.data, precious, "--force") == 2 and (precious / "thesis.txt").read_text() == "years"
    assert [path for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_failed_export_is_one_line_and_leaves_no_half_output(tree, tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(shutil, "copyfile", fail)
    assert run(tree.data, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "disk full" in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
    assert [path for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_dry_run_writes_nothing_and_a_folder_without_results_is_an_error(tree, tmp_path, capsys):
    assert run(tree.data, tmp_path / "out", "--dry-run", "--verbose") == 0
    assert "keep arithmetic/" in capsys.readouterr().out and not (tmp_path / "out").exists()
    (tmp_path / "empty").mkdir()
    assert run(tmp_path / "empty", tmp_path / "out") == 2
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name, is_kept",
    [
        ("arithmetic/org/m/feature_report/features.json", True),
        ("arithmetic/m/feature_report/features.json", True),
        ("arithmetic/org/m/feature_report/features.md", False),
        (
            "arithmetic/org/m/rule_extraction_results/neuron_flip_rules_mean-donor/stats/r/flip_stats_by_neuron.csv",
            True,
        ),
        ("arithmetic/org/m/rule_extraction_results/neuron_flip_rules/stats/r/rule_combo_metrics_test_all.csv", True),
        ("arithmetic/org/m/rule_extraction_results/neuron_flip_rules/is_correct_zero/m1_2/rule_combo_x.csv", False),
        (
            "t/o/m/neural_circuit_discovery_results/eap/c/agonist_neurons/positive_baseline/per_rule/t/rule_0001.json",
            True,
        ),
        ("t/o/m/neural_circuit_discovery_results/eap/c/agonist_neurons/positive_baseline/group_tests.jsonl", False),
        ("t/o/m/neural_circuit_discovery_results/eap/ablation_cache/neural_circuits/manifest.json", False),
    ],
)
def test_what_is_kept(name, is_kept):
    assert (drop_reason(name) is None) == is_kept


def test_paths_are_told_from_divisions_and_addresses(tmp_path):
    text = f'{tmp_path}/data/a/b.csv, 8/2/2, a/b/c, http://h/x/y, "/opt/data/t/m.csv", C:\\Users\\me\\x.csv'
    assert without_local_paths(text, tmp_path / "data") == (
        'data/a/b.csv, 8/2/2, a/b/c, http://h/x/y, "data/t/m.csv", x.csv',
        3,
    )


def test_comparisons_of_the_export_equal_those_of_the_original(tmp_path, monkeypatch):
    # The data behind the figures are compared, so the figures need not be drawn.
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *_, **__: None)
    tree = published_tree.build(tmp_path, tasks=("arithmetic",), models=published_tree.MODELS[:1])
    assert run(tree.data, tmp_path / "export") == 0
    stats = f"arithmetic/{published_tree.MODELS[0]}/rule_extraction_results/neuron_flip_rules/stats"
    made = []
    for data in (tree.data, tmp_path / "export"):
        out = tmp_path / f"made_from_{data.name}"
        for script, arguments in (
            ("8_compare_experiments", ["--stats_path", data]),
            ("9_compare_models", ["--task_dir", data / "arithmetic"]),
            ("11_summarize_sensitivity_analysis", ["--stats_root", data / stats]),
        ):
            assert run_script(script, [*arguments, "--out_dir", out / script, "--quiet"]) == 0
        made.append({name: text for name, text in content_of(out).items() if name.endswith(".csv")})
    assert made[0] == made[1] and len(made[0]) > 20
