"""Stage 2 on recorded answers: the table, the catalogue, what was dropped and why, and byte-identical repeats."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from lib.scores_table import load_scores
from lib.task_spec import resolve_task_spec
from lib.tasks.arithmetic_task import TASK_SPEC, ArithmeticSettings
from tests.scripts import REPOSITORY, run_script

FLAGS = [
    "--no_llm",
    "--quiet",
    "--drop_near_duplicate_features",
    "--near_duplicate_features_threshold",
    "0.9999",
    "--drop_low_predictive_power_features",
    "--min_delta",
    "0.2",
]


@pytest.fixture
def answers(tmp_path):
    """A cache in which products and carrying sums are wrong, everything else right."""
    task = TASK_SPEC.configured(ArithmeticSettings(max_operand=9))
    examples = task.examples(0)
    texts = []
    for example in examples:
        problem = example["prompt"].rstrip("=")
        a, b = (int(digit) for digit in problem.split(example["operator_group"]))
        wrong = example["operator_group"] == "*" or (example["operator_group"] == "+" and a + b >= 10)
        texts.append(
            "wrong\r\n" if wrong else str({"+": a + b, "-": a - b}.get(example["operator_group"], a / b if b else 0))
        )
    path = tmp_path / "llm_io_data.pkl"
    path.write_bytes(pickle.dumps(task.cache_from_answers(examples, texts)))
    return path


def run(answers, folder, *extra: str, plots: bool = False) -> int:
    arguments = ["--prompts_answers_pkl_file", str(answers), "--features_scores_dir", str(folder), *FLAGS, *extra]
    return run_script("2_generate_features", arguments + ["--no_plots"] * (not plots))


def test_the_table(answers, tmp_path):
    assert run(answers, tmp_path / "report") == 0
    frame = pd.read_csv(tmp_path / "report/scores.csv", keep_default_na=False)
    catalogue = json.loads((tmp_path / "report/features.json").read_text())
    columns = [entry["column"] for entry in catalogue]
    # A seed feature that is the same everywhere has a column, and no place in the catalogue.
    metrics = pd.read_csv(tmp_path / "report/feature_metrics.csv", keep_default_na=False)
    in_table = metrics.loc[metrics["kept"] | (metrics["filter"] == "constant"), "column"].tolist()
    assert set(frame["same_sign"]) == {1.0}
    assert "same_sign" in in_table
    assert "same_sign" not in columns
    assert set(columns) < set(in_table)
    assert frame.columns.tolist() == [
        "row_id",
        "operator_group",
        "prompt",
        "num_out",
        "raw_output",
        "is_correct",
        "is_pure",
        *in_table,
        "is_test",
        "split",
    ]
    assert frame["prompt"].tolist() == sorted(frame["prompt"], reverse=True)
    assert frame["row_id"].tolist() == list(range(len(frame)))
    assert not frame[columns].isna().any().any()
    assert ((frame["split"] == "test") == frame["is_test"]).all()
    assert frame["is_test"].mean() == pytest.approx(0.2, abs=0.01)
    assert frame.loc[frame["is_test"], "is_correct"].mean() == pytest.approx(frame["is_correct"].mean(), abs=0.02)


def test_the_reader_of_later_stages_reads_it(answers, tmp_path):
    run(answers, tmp_path / "report")
    table = load_scores(tmp_path / "report", TASK_SPEC)
    assert {"operator_multiplication", "carry_in_addition"} <= set(table.feature_names)
    carry = table.features()[:, table.feature_names.index("carry_in_addition")]
    wrong_sum = (table.frame["operator_group"] == "+") & ~table.target()
    np.testing.assert_array_equal(carry == 1, wrong_sum)


def test_every_feature_is_accounted_for(answers, tmp_path):
    run(answers, tmp_path / "report")
    metrics = pd.read_csv(tmp_path / "report/feature_metrics.csv", keep_default_na=False)
    rejected = json.loads((tmp_path / "report/rejected_features.json").read_text())
    catalogue = json.loads((tmp_path / "report/features.json").read_text())
    assert len(metrics) == 86
    assert metrics.loc[metrics["kept"], "label"].tolist() == [entry["label"] for entry in catalogue]
    assert metrics.loc[~metrics["kept"], "label"].tolist() == [entry["label"] for entry in rejected]
    assert all(entry["reason"] and entry["filter"] for entry in rejected)
    by_label = {entry["label"]: entry["filter"] for entry in rejected}
    assert by_label["Same sign"] == "constant"
    assert metrics.set_index("label").loc["Operator: Multiplication", "mean_negative"] > 0.5


def test_metrics_are_of_train_rows_only(answers, tmp_path):
    # The recorded means are those of TRAIN rows, not of the table.
    run(answers, tmp_path / "first")
    metrics = pd.read_csv(tmp_path / "first/feature_metrics.csv")
    frame = pd.read_csv(tmp_path / "first/scores.csv")
    train = frame[~frame["is_test"]]
    for name in ("carry_in_addition", "operator_multiplication"):
        row = metrics.set_index("column").loc[name]
        assert row["mean_positive"] == pytest.approx(train.loc[train["is_correct"], name].mean())
        assert row["mean"] == pytest.approx(train[name].mean())


def test_a_second_run_changes_no_file_and_force_gives_the_same_bytes(answers, tmp_path):
    def files() -> dict:
        paths = [path for path in (tmp_path / "report").rglob("*") if path.is_file()]
        return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in paths}

    run(answers, tmp_path / "report", plots=True)
    before = files()
    assert "feature_distributions_01.png" in {path.name for path in before}
    assert run(answers, tmp_path / "report", plots=True) == 0
    assert files() == before
    run(answers, tmp_path / "report", "--force", plots=True)
    for path, (_, content) in files().items():
        assert path.name == "run_metadata.json" or content == before[path][1], path


def test_other_processes_write_the_same_bytes(answers, tmp_path):
    run(answers, tmp_path / "here")
    subprocess.run(
        [sys.executable, "2_generate_features.py", "-i", answers, "-o", tmp_path / "there", "--no_plots", *FLAGS],
        check=True,
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONHASHSEED": "77"},
        capture_output=True,
    )
    for name in ("scores.csv", "features.json", "feature_metrics.csv", "rejected_features.json"):
        assert (tmp_path / "here" / name).read_bytes() == (tmp_path / "there" / name).read_bytes(), name


def test_max_prompts_draws_across_the_table_and_keeps_the_share_of_labels(answers, tmp_path):
    run(answers, tmp_path / "all")
    run(answers, tmp_path / "some", "--max_prompts", "100")
    every, some = (pd.read_csv(tmp_path / name / "scores.csv") for name in ("all", "some"))
    assert len(some) == 100
    assert some["is_correct"].mean() == pytest.approx(every["is_correct"].mean(), abs=0.011)
    assert set(some["operator_group"]) == set("+-*/")


def test_later_stages_get_the_task_as_it_was_run(answers, tmp_path):
    settings = ArithmeticSettings(max_operand=9, max_new_tokens=4)
    record = {"settings": {"task_module": "lib.tasks.arithmetic_task", "task_settings": settings.to_json()}}
    answers.with_name("llm_io_data.run_metadata.json").write_text(json.dumps(record))
    assert run(answers, tmp_path / "report") == 0
    assert resolve_task_spec("lib.tasks.arithmetic_task", tmp_path / "report").MAX_NEW_TOKENS == 4
    assert resolve_task_spec("lib.tasks.arithmetic_task").MAX_NEW_TOKENS == 6


def test_an_answer_of_another_task_is_refused(answers, tmp_path, capsys):
    record = {"settings": {"task_module": "lib.tasks.other_task", "task_settings": {}}}
    answers.with_name("llm_io_data.run_metadata.json").write_text(json.dumps(record))
    assert run(answers, tmp_path / "report") == 2
    assert "lib.tasks.other_task" in capsys.readouterr().err


def test_a_class_that_is_absent_is_mentioned(tmp_path, capsys):
    task = TASK_SPEC.configured(ArithmeticSettings(max_operand=2))
    examples = task.examples(0)
    path = tmp_path / "llm_io_data.pkl"
    path.write_bytes(pickle.dumps(task.cache_from_answers(examples, ["none"] * len(examples))))
    assert run(path, tmp_path / "report", plots=True) == 0
    assert "no TRAIN row is positive (correctly answered)" in capsys.readouterr().out
    assert "nan" not in (tmp_path / "report/features.md").read_text()


@pytest.mark.parametrize("content", [b"", b"text", pickle.dumps({}), pickle.dumps([{"prompt": 1}])])
def test_unusable_caches_are_one_line(content, tmp_path, capsys):
    path = tmp_path / "llm_io_data.pkl"
    path.write_bytes(content)
    assert run(path, tmp_path / "report") == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert run(tmp_path / "absent.pkl", tmp_path / "report") == 2


@pytest.mark.parametrize(
    "content",
    ["", "{", '{"prompt": ""}\n', '{"prompt": "", "raw_output": "", "is_correct": "y", "is_pure": true}\n', "[1]\n"],
)
def test_unusable_plain_caches_are_one_line(content, tmp_path, capsys):
    path = tmp_path / "llm_io_data.jsonl"
    path.write_text(content)
    assert run(path, tmp_path / "report") == 2
    assert capsys.readouterr().err.count("\n") == 1
