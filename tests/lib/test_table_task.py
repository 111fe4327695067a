"""A user's table as a task: reading, matching of answers, features of columns, and stages 1 and 2 on it."""

from __future__ import annotations

import json
import re

import numpy as np
import pandas as pd
import pytest

from lib.cli import UserError
from lib.scores_table import load_scores
from lib.task_spec import resolve_task_spec
from lib.tasks.table_task import Match, TableSettings, TableTask, first_label
from tests.models import tiny_model
from tests.scripts import run_script

ROWS = {
    "question": ["What is the capital of France?", "Is 7 prime?", "How many legs has a spider?", "Who wrote Emma?"],
    "gold": ["Paris", "yes", "8", "Jane Austen"],
    "topic": ["geography", "math", "animals", "books"],
    "difficulty": ["1", "2.5", "", "4"],
    "checked": ["yes", "no", "yes", ""],
}


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "mine.csv"
    pd.DataFrame(ROWS).to_csv(path, index=False)
    return path


def task(path, **settings) -> TableTask:
    return TableTask(TableSettings(task_file=str(path), **{"prompt_col": "question", "answer_col": "gold", **settings}))


def right(expected: str, answer: str, match: Match, labels=(), **settings) -> bool:
    rows = [{"prompt": "p", "expected_answer": expected, "labels": list(labels)}]
    return TableTask(TableSettings(match=match, **settings)).is_answer_positive(rows, [answer])[0]


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".json", ".parquet"])
def test_every_kind_of_file_gives_the_same_examples(table, suffix):
    frame, path = pd.DataFrame(ROWS), table.with_suffix(suffix)
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
        frame.to_parquet(path)
    elif suffix in (".jsonl", ".json"):
        frame.to_json(path, orient="records", lines=suffix == ".jsonl")
    else:
        frame.to_csv(path, index=False, sep="\t" if suffix == ".tsv" else ",")
    assert task(path).examples(0) == task(table).examples(0)
    assert task(path).examples(0)[0] == {
        "prompt": "What is the capital of France?",
        "expected_answer": "Paris",
        "columns": {"topic": "geography", "difficulty": "1", "checked": "yes"},
    }


def test_columns_template_and_limit(table):
    some = task(table, feature_cols="topic", prompt_template="Q: {prompt}\\nA:", limit=2).examples(3)
    assert len(some) == 2
    assert some == task(table, feature_cols="topic", prompt_template="Q: {prompt}\\nA:", limit=2).examples(3)
    assert some[0]["prompt"].startswith("Q: ") and some[0]["prompt"].endswith("\nA:")
    assert list(some[0]["columns"]) == ["topic"]
    assert task(table, feature_cols="").examples(0)[0]["columns"] == {}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt_col": "nope"}, "no column nope; its columns are question, gold"),
        ({"feature_cols": "topic,x"}, "no column x"),
        ({"match": Match.NUMERIC}, "row 1 is not a number: 'Paris'"),
        ({"answer_col": "difficulty"}, "row 3 is empty"),
        ({"prompt_col": "checked"}, "prompt of row 4 is empty"),
    ],
)
def test_mistakes_about_columns_are_named(table, settings, message):
    with pytest.raises(UserError, match=re.escape(message)):
        task(table, **settings).examples(0)


def test_mistakes_about_files_are_named(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "b.csv").write_text("")
    (tmp_path / "c.json").write_text("{broken")
    (tmp_path / "d.csv").write_text("question,gold\n")
    for name, message in (("a.txt", "unknown kind"), ("b.csv", "cannot be read"), ("c.json", "cannot be read"),
                          ("d.csv", "no rows"), ("absent.csv", "not found")):  # fmt: skip
        with pytest.raises(UserError, match=message):
            task(tmp_path / name).examples(0)
    with pytest.raises(UserError, match="--task_file"):
        TableTask().examples(0)


@pytest.mark.parametrize(
    "wrong",
    [{"prompt_template": "no place"}, {"tolerance": -1.0}, {"limit": -1}, {"prompt_col": "a", "answer_col": "a"}],
)
def test_senseless_settings_are_refused(wrong):
    with pytest.raises(UserError, match="--"):
        TableSettings(**wrong)


@pytest.mark.parametrize(
    ("expected", "answer", "match", "result"),
    [
        ("Paris", " paris.\nIt is", Match.EXACT, True),
        ("Paris", "Paris, of course", Match.EXACT, False),
        ("New  York", "new york!", Match.EXACT, True),
        ("8", "It has 8 legs", Match.NUMERIC, True),
        ("8", "eight", Match.NUMERIC, False),
        ("1,000", "1000", Match.NUMERIC, True),
        ("8", "8.5", Match.NUMERIC, False),
        (r"(?i)paris|france", "in FRANCE", Match.REGEX, True),
        (r"^paris$", "Paris", Match.REGEX, False),
    ],
)
def test_matching(expected, answer, match, result):
    assert right(expected, answer, match) is result


def test_tolerance_is_relative_above_one_and_absolute_below():
    assert right("200", "203", Match.NUMERIC, tolerance=0.015)
    assert not right("200", "204", Match.NUMERIC, tolerance=0.015)
    assert right("0.5", "0.51", Match.NUMERIC, tolerance=0.015)


def test_the_first_label_counts_and_longer_ones_win():
    assert first_label("Not positive", ["positive", "not positive", "neutral"]) == "not positive"
    assert first_label("neutral rather than positive", ["positive", "neutral"]) == "neutral"
    assert first_label("positively", ["positive"]) is None
    assert right("neutral", "It is Neutral.", Match.LABEL, ["positive", "neutral"])


def test_complete_answers_keep_their_label():
    exact, numeric = TableTask(TableSettings()), TableTask(TableSettings(match=Match.NUMERIC))
    assert (exact.answer_is_complete("Paris\n"), exact.answer_is_complete("Paris")) == (True, False)
    assert (numeric.answer_is_complete("8 "), numeric.answer_is_complete("8.")) == (True, False)
    assert not TableTask(TableSettings(match=Match.LABEL)).answer_is_complete("positive\n")


def test_columns_become_features(table):
    mine = task(table)
    examples = mine.examples(0)
    frame = mine.dataset_from_cache(mine.cache_from_answers(examples, ["Paris", "no", "x", "?"]))
    columns = mine.native_columns(frame)
    values = {feature.label: feature.native(columns) for feature in mine.seed_features(frame)}
    np.testing.assert_array_equal(values["difficulty"], [1, 2.5, np.nan, 4])
    np.testing.assert_array_equal(values["checked"], [1, 0, 1, np.nan])
    np.testing.assert_array_equal(values["topic: math"], [0, 1, 0, 0])
    np.testing.assert_array_equal(values["Asks who"], [0, 0, 0, 1])
    np.testing.assert_array_equal(values["Numbers in prompt"], [0, 1, 0, 0])
    infos = [mine.parse_prompt_row(row) for row in frame.to_dict("records")]
    for feature in mine.seed_features(frame):
        namespace = {"re": re}
        exec(feature.python_src, namespace)  # our own source
        rows = [namespace[feature.fn_name](prompt, info) for prompt, info in zip(frame["prompt"], infos, strict=True)]
        expected = [np.nan if value is None else float(value) for value in rows]
        np.testing.assert_array_equal(feature.native(columns), expected, err_msg=feature.label)


def test_free_text_columns_give_no_features():
    from lib.tasks.text_features import column_features

    assert column_features("note", [f"text {i}" for i in range(50)]) == []
    assert column_features("empty", ["", ""]) == []


def test_stages_1_and_2_on_a_table(tmp_path):
    path = tmp_path / "mine.csv"
    frame = pd.DataFrame(
        {
            "q": [f"{a} plus {b}" for a in range(8) for b in range(8)],
            "a": "yes",
            "kind": ["x", "y"] * 32,
            "prompt": "own",
        }
    )
    frame.to_csv(path, index=False)
    tiny_model("llama").model.save_pretrained(tmp_path / "tiny")
    tiny_model("llama").tokenizer.save_pretrained(tmp_path / "tiny")
    module = ["--task_module", "lib.tasks.table_task", "--quiet"]
    answers = tmp_path / "llm_io_data.pkl"
    flags = ["--task_file", path, "--prompt_col", "q", "--answer_col", "a", "--match", "label", "--max_new_tokens", "2"]
    stage_1 = [*module, *flags, "--ai_model", tmp_path / "tiny", "--prompts_answers_pkl_file", answers]
    assert run_script("1_generate_prompts_and_answers", stage_1) == 0
    assert run_script("2_generate_features", [*module, "--no_llm", "-i", answers, "-o", tmp_path / "report"]) == 0
    plain = ["--no_plots", "-i", answers.with_suffix(".jsonl"), "-o", tmp_path / "plain"]
    assert run_script("2_generate_features", [*module, "--no_llm", *plain]) == 0
    assert (tmp_path / "plain/scores.csv").read_bytes() == (tmp_path / "report/scores.csv").read_bytes()
    mine = resolve_task_spec("lib.tasks.table_task", tmp_path / "report")
    table = load_scores(tmp_path / "report", mine)
    assert mine.settings.match is Match.LABEL
    assert len(table) == 64
    assert {"kind_x", "kind_y"} <= set(table.feature_names)
    assert mine.is_answer_positive(table.records(np.arange(2)), ["yes", "no"]) == [True, False]
    assert json.loads((tmp_path / "report/task_settings.json").read_text())["settings"]["task_file"] == str(path)
    moved = path.rename(tmp_path / "moved.csv")
    assert run_script("1_generate_prompts_and_answers", [*stage_1, "--task_file", moved]) == 0
    moved.rename(path)
    path.write_text(path.read_text().replace("yes", "no"))
    assert run_script("1_generate_prompts_and_answers", stage_1) == 2
