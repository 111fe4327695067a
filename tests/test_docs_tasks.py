"""The worked example of docs/tasks.md: it runs as it stands there."""

from __future__ import annotations

import argparse
import importlib
import json
import re
import sys

import pandas as pd
import pytest

from tests.documented_commands import documented_module
from tests.models import tiny_model
from tests.scripts import REPOSITORY, run_script

PAGE = REPOSITORY / "docs/tasks.md"
MODULE = "documented_tasks.weekday_task"


@pytest.fixture
def example(tmp_path, monkeypatch):
    """The page's code as the module `documented_tasks.weekday_task`."""
    (tmp_path / "documented_tasks").mkdir()
    (tmp_path / "documented_tasks/weekday_task.py").write_text(documented_module("docs/tasks.md", "weekday_task.py"))
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module(MODULE)
    del sys.modules[MODULE], sys.modules["documented_tasks"]


def test_the_example_scores_answers(example):
    task = example.TASK_SPEC
    rows = task.examples(0)[:3]
    assert [row["expected"] for row in rows] == ["Tuesday", "Wednesday", "Thursday"]
    scores = task.score_answers(rows, [" tuesday.", "not Monday but Wednesday", "soon"])
    assert [score.label for score in scores] == [True, False, False]
    assert [score.reason for score in scores] == ["names tuesday", "names Monday", "names no weekday"]
    assert (task.answer_is_complete("a Sun"), task.answer_is_complete("a Sunday")) == (False, True)


def test_the_example_goes_through_stages_1_and_2(example, tmp_path, capsys):
    tiny_model("llama").model.save_pretrained(tmp_path / "tiny")
    tiny_model("llama").tokenizer.save_pretrained(tmp_path / "tiny")
    module, answers, report = ["--task_module", MODULE, "--quiet"], tmp_path / "llm_io_data.pkl", tmp_path / "report"
    stage_1 = [*module, "--ai_model", tmp_path / "tiny", "--most_days", "9", "--prompts_answers_pkl_file", answers]
    assert run_script("1_generate_prompts_and_answers", stage_1) == 0
    assert run_script("2_generate_features", [*module, "--no_llm", "--no_plots", "-i", answers, "-o", report]) == 0
    frame = pd.read_csv(report / "scores.csv")
    assert len(frame) == 63
    assert frame["number_of_days"].tolist() == frame["n_days"].tolist()
    passed = frame["start"].map(example.DAYS.index) + frame["n_days"] >= 7
    assert frame["same_week"].tolist() == (~passed).astype(float).tolist()
    assert json.loads((report / "task_settings.json").read_text())["settings"]["most_days"] == 9
    # The sources that features.json shows give what the table holds.
    info = {"start": "Friday", "n_days": 3}
    for feature, expected in zip(example.TASK_SPEC.SEED_FEATURES, (3, False), strict=True):
        space: dict = {}
        exec(feature.python_src, space)
        assert space[feature.fn_name]("", info) == expected
    capsys.readouterr()
    assert run_script("1_generate_prompts_and_answers", [*stage_1, "--most_days", "0"]) == 2
    assert capsys.readouterr().err.startswith("error: --most_days 0")


def test_the_page_names_files_and_flags_that_exist():
    page = PAGE.read_text(encoding="utf-8")
    from lib.pipeline import add_arguments
    from lib.stages.behaviour import PLAIN_SUFFIX

    assert f"llm_io_data{PLAIN_SUFFIX}" in page
    known = set()
    for experiment in ("arithmetic", "hans_nli", "bon_jailbreaking", "table"):
        parser = argparse.ArgumentParser()
        add_arguments(parser, experiment)
        known |= set(parser._option_string_actions)
    for script in ("1_generate_prompts_and_answers.py", "2_generate_features.py", "build_bon_dataset.py", "lib/cli.py"):
        known |= set(re.findall(r'"(--[a-zA-Z_]+)"', (REPOSITORY / script).read_text(encoding="utf-8")))
    used = set(re.findall(r"--[a-z][a-z_-]*[a-z]", page)) - {"--most_days", "--help"}
    assert used <= known, used - known
