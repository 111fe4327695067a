"""The feature table: types, index spaces, and what is refused."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from lib.artifacts import write_json
from lib.cli import UserError
from lib.scores_table import load_scores, sanitize_label

TASK = SimpleNamespace(DEFAULT_INPUT="prompt", DEFAULT_OUTPUT="raw_output", DEFAULT_TARGETS=("is_correct",))
TABLE = """prompt,raw_output,is_correct,row_id,op_add,gcd_1,is_test,split
1+2=,3,True,0,1.0,,False,train
9-2=,,False,1,0.0,0.5,True,test
7*8=,007,False,2,0.0,1.0,False,train
4+4=,NA,,3,1.0,1.0,False,train
2+2=,4,True,4,1.0,0.0,False,train
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "scores.csv").write_text(TABLE)
    write_json(
        tmp_path / "features.json", [{"label": "Op: add"}, {"label": "GCD > 1", "column": "gcd_1"}, {"label": "gone"}]
    )
    return tmp_path


def test_types_and_missing_values(folder):
    table = load_scores(folder, TASK)
    assert table.feature_names == ["op_add", "gcd_1"]
    # Answers stay text: no numbers, no missing values.
    assert table.frame["raw_output"].tolist() == ["3", "", "007", "NA", "4"]
    assert table.features()[0].tolist() == [1.0, 0.0]
    assert table.target().tolist() == [True, False, False, False, True]


def test_index_spaces(folder):
    table = load_scores(folder, TASK)
    assert table.test_rows.tolist() == [1]
    assert table.subset_rows("all").tolist() == [0, 2, 3, 4]
    assert table.subset_rows("positive").tolist() == [0, 4]
    # A row without a label is in neither baseline.
    assert table.subset_rows("negative").tolist() == [2]
    with pytest.raises(UserError, match="no baseline subset"):
        table.subset_rows("both")


def test_a_file_without_the_target_is_refused(folder):
    task = SimpleNamespace(DEFAULT_INPUT="prompt", DEFAULT_OUTPUT="answer", DEFAULT_TARGETS=("is_jailbroken",))
    with pytest.raises(UserError, match="no column is_jailbroken"):
        load_scores(folder, task)


def test_a_target_that_is_no_label_is_refused(folder):
    (folder / "scores.csv").write_text(TABLE.replace("9-2=,,False", "9-2=,,maybe"))
    with pytest.raises(UserError, match="not a yes/no column"):
        load_scores(folder, TASK)


@pytest.mark.parametrize("content", [{}, [1], [{"name": "x"}], [{"label": "absent"}]])
def test_bad_catalogue_is_refused(folder, content):
    write_json(folder / "features.json", content)
    with pytest.raises(UserError):
        load_scores(folder, TASK)


def test_labels_become_column_names():
    assert sanitize_label("Relative closeness ≤ 10%") == "relative_closeness_10"
    assert np.all([sanitize_label(label) == "a_b" for label in ("A b", "a_b", "--a/b--")])
