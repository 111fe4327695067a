"""Stage 3 from the command line: files, freshness, controls, honest answers, user mistakes."""

from __future__ import annotations

import json
import re

import numpy as np
import pandas as pd
import pytest

from lib.text_and_rules import load_rules
from tests.scripts import run_script

FAST = ["--npermutations", "2", "--stability_resamples", "2", "--inner_repeats", "1", "--quiet"]
PROMISED = ["--npermutations", "5", "--only_unique_datapoints_in_shap", "--use_shap_in_xgb", "--use_shap_in_lasso"]


def make_features_dir(folder, n_rows=260, *, noise=False):
    """A small feature report with the planted rule `carry_count > 1.5`, or pure noise."""
    random = np.random.default_rng(0)
    frame = pd.DataFrame(
        {
            "prompt": [f"{i}+{i}=" for i in range(n_rows)],
            "raw_output": ["1"] * n_rows,
            "carry_count": random.integers(0, 4, n_rows),
            "operand_a": random.random(n_rows),
            "is_even": random.random(n_rows) < 0.5,
        }
    )
    frame["is_correct"] = (
        random.random(n_rows) < 0.4 if noise else (frame["carry_count"] > 1) ^ (random.random(n_rows) < 0.05)
    )
    frame["is_correct"] = frame["is_correct"].astype(object)
    frame.loc[3, "is_correct"] = None
    frame["is_test"] = np.arange(n_rows) % 5 == 0
    folder.mkdir(parents=True, exist_ok=True)
    frame.to_csv(folder / "scores.csv", index=False)
    names = ["Carry count", "Operand a", "Is even"]
    (folder / "features.json").write_text(
        json.dumps([{"label": name, "description": f"what {name} says"} for name in names])
    )
    return folder


@pytest.fixture(scope="module")
def features_dir(tmp_path_factory):
    return make_features_dir(tmp_path_factory.mktemp("features"))


def extract(features_dir, rules_dir, *flags):
    return run_script(
        "3_extract_rules", ["--features_scores_dir", features_dir, "--rules_dir", rules_dir, *FAST, *flags]
    )


def contents(folder):
    return {
        path.relative_to(folder): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "run_metadata" not in path.name and path.name != ".lock"
    }


@pytest.fixture(scope="module")
def rules_dir(features_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("rules")
    assert extract(features_dir, folder, *PROMISED, "--baselines", "tree,logistic", "--emit_test_selected") == 0
    return folder


def test_the_planted_rule_and_its_files(rules_dir):
    assert [stored.text for stored in load_rules(rules_dir, "is_correct")] == ["carry_count > 1.5"]
    for name in (
        "association_rules_is_correct",
        "association_rules_all_fit_is_correct",
        "rule_combo_train_is_correct",
        "rule_combo_is_correct",
        "rule_combo_all_fit_is_correct",
        "rule_combo_test_selected_is_correct",
        "optimal_rule_set_all_fit_is_correct",
        "baselines_is_correct",
        "shap_statistics_is_correct",
        "permutation_null_is_correct",
    ):
        assert (rules_dir / f"{name}.csv").is_file()
    for name in ("shap_summary_plot", "shap_bar_plot", "candidates", "baselines"):
        for suffix in ("pdf", "png", "csv"):
            assert (rules_dir / "shap_plots" / f"{name}_is_correct.{suffix}").is_file()


def test_test_rows_are_scored_and_unlabelled_rows_left_out(rules_dir):
    row = pd.read_csv(rules_dir / "rule_combo_is_correct.csv").iloc[0]
    assert row["score_scope"] == "test"
    assert row["n_eval"] == 52
    train = pd.read_csv(rules_dir / "association_rules_is_correct.csv").iloc[0]
    assert train[["tp", "fp", "fn", "tn"]].sum() == 207  # 208 TRAIN rows, one without a label


def test_importance_and_null(rules_dir):
    statistics = pd.read_csv(rules_dir / "shap_statistics_is_correct.csv")
    assert statistics["feature"][0] == "carry_count"
    assert statistics["permutation_p_value"][0] == pytest.approx(1 / 6)
    null = pd.read_csv(rules_dir / "permutation_null_is_correct.csv")
    assert len(null) == 6
    assert null["best_MCC"][0] > null["best_MCC"][1:].max()


def test_summary_reads_as_text(rules_dir):
    page = (rules_dir / "rules_summary.md").read_text()
    assert "**`is_correct` is likely where** `carry_count` is above 1.5." in page
    assert "what Carry count says" in page
    assert page.count("answered") == 3
    assert re.search(r"TRAIN: covers \d+ rows .* precision [\d.]+ % \([\d.]+ % to .*, lift [\d.]+ \([\d.]+ to", page)
    assert "| logistic | TEST |" in page
    assert "nan" not in page


def test_second_run_is_instant_and_changes_nothing(features_dir, rules_dir, capsys):
    before = {path: path.stat().st_mtime_ns for path in rules_dir.rglob("*.csv")}
    assert extract(features_dir, rules_dir, *PROMISED, "--baselines", "tree,logistic", "--emit_test_selected") == 0
    out = capsys.readouterr().out
    assert "up to date" in out
    assert "carry_count > 1.5" in out
    assert before == {path: path.stat().st_mtime_ns for path in rules_dir.rglob("*.csv")}


def test_equal_runs_give_equal_bytes(features_dir, tmp_path):
    for name in ("one", "two"):
        assert extract(features_dir, tmp_path / name) == 0
    one, two = contents(tmp_path / "one"), contents(tmp_path / "two")
    page = next(path for path in one if path.name == "rules_summary.md")
    assert one.keys() == two.keys()
    assert one[page] == two[page]
    assert one == two


def test_other_flags_run_again_and_leave_no_file_of_the_old_run(features_dir, tmp_path, capsys):
    assert extract(features_dir, tmp_path, "--emit_test_selected") == 0
    assert extract(features_dir, tmp_path, "--no_emit_all_fit_rules") == 0
    assert "up to date" not in capsys.readouterr().out
    names = {path.name for path in tmp_path.iterdir()}
    assert not any("all_fit" in name or "test_selected" in name for name in names)


def test_fake_targets_are_a_control_of_their_own(features_dir, tmp_path):
    assert extract(features_dir, tmp_path) == 0
    real = contents(tmp_path)
    assert extract(features_dir, tmp_path, "--fake_targets") == 0
    both = contents(tmp_path)
    assert {path: both[path] for path in real} == real
    report = json.loads((tmp_path / "fake_targets_report.json").read_text())["is_correct"]
    assert report["abs_pearson_corr_true_vs_fake"] <= 0.05
    fake = pd.read_csv(tmp_path / "fake_targets.csv")
    source = pd.read_csv(features_dir / "scores.csv")
    assert fake["is_correct_fake"].isna().sum() == 1
    kept = source["is_correct"].notna()
    assert fake["is_correct_fake"][kept].astype(bool).sum() == source["is_correct"][kept].astype(bool).sum()
    # Later stages need some rule to study; its chance level is written beside it.
    assert load_rules(tmp_path, "is_correct_fake")
    row = pd.read_csv(tmp_path / "rule_combo_is_correct_fake.csv").iloc[0]
    assert "chance" in row["reason"]
    assert abs(row["MCC"]) < 0.35
    assert "control" in (tmp_path / "rules_summary_fake.md").read_text()


def test_noise_gives_no_rule(tmp_path, capsys):
    source = make_features_dir(tmp_path / "features", noise=True)
    assert extract(source, tmp_path / "rules") == 0
    assert "no rule" in capsys.readouterr().out
    assert "**No rule:**" in (tmp_path / "rules/rules_summary.md").read_text()
    assert pd.read_csv(tmp_path / "rules/optimal_rule_set_is_correct.csv").empty


def test_every_row_train_when_there_is_no_split(features_dir, tmp_path):
    source = tmp_path / "features"
    source.mkdir()
    pd.read_csv(features_dir / "scores.csv").drop(columns="is_test").to_csv(source / "scores.csv", index=False)
    (source / "features.json").write_text((features_dir / "features.json").read_text())
    assert (
        extract(source, tmp_path / "rules", "--only_unique_datapoints_in_rule_extraction", "--fast_shap_estimate") == 0
    )
    row = pd.read_csv(tmp_path / "rules/rule_combo_is_correct.csv").iloc[0]
    assert row["computed_on"] == "train_selection"
    assert not (tmp_path / "rules/rule_combo_all_fit_is_correct.csv").exists()


@pytest.mark.parametrize(
    "flags",
    [
        ["--baselines", "tree,forest"],
        ["--npermutations", "-1"],
        ["--max_rules", "0"],
        ["--rule_alpha", "2"],
        ["--inner_folds", "1"],
        ["--task_module", "lib.tasks.no_such_task"],
        ["--no_such_flag"],
    ],
)
def test_mistakes_in_flags(features_dir, tmp_path, flags, capsys):
    assert extract(features_dir, tmp_path, *flags) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_mistakes_in_input(features_dir, tmp_path, capsys):
    assert extract(tmp_path / "nowhere", tmp_path / "rules") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "nowhere" in error
    source = tmp_path / "features"
    source.mkdir()
    (source / "features.json").write_text("[]")
    (source / "scores.csv").write_text((features_dir / "scores.csv").read_text())
    assert extract(source, tmp_path / "rules") == 2
    assert capsys.readouterr().err.count("\n") == 1
