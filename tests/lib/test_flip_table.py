"""The flip table and its statistics, with numbers one can check by hand."""

import numpy as np
import pandas as pd
import pytest

from lib.artifacts import write_csv
from lib.cli import UserError
from lib.flip_rows import EvaluatedRows
from lib.flip_table import (
    FlipTable,
    flip_frame,
    global_statistics,
    neuron_statistics,
    neurons_of_frame,
    read_flip_table,
)
from lib.flip_targets import FlipTarget, MinimumCounts, target_of_column
from lib.neuron_intervention import UNKNOWN, FlipMatrix
from lib.neurons import Neuron

M = Neuron("m5", 16)
A = Neuron("a16.h21", 3)


def _table():
    # Rows 2, 3, 5, 7 of a file of nine; the last is held out. m5:16 loses row 2 and gains row 5; a16.h21:3 gains row 7,
    # and its answer to row 3 cannot be judged.
    baseline = np.array([True, True, False, False])
    ablated = np.array([[0, 1, 1, 0], [1, UNKNOWN, 0, 1]], dtype=np.int8)
    rows = EvaluatedRows(np.array([2, 3, 5, 7]), np.array(["discovery", "train", "train", "test"], dtype=object))
    return FlipTable((M, A), rows, FlipMatrix(baseline, ablated, ablated != baseline))


def _scores():
    labels = [False, False, True, True, False, False, True, False, True]
    return pd.DataFrame({"prompt": list("abcdefghi"), "is_correct": labels, "is_test": [False] * 7 + [True, False]})


@pytest.mark.parametrize("neuron", [M, A])
@pytest.mark.parametrize("target", list(FlipTarget))
def test_column_names_round_trip(neuron, target):
    column = target.column(neuron)
    assert target_of_column(column, neuron.key) is target
    columns = [kind.column(neuron) for kind in FlipTarget]
    assert neurons_of_frame(["prompt", "flip_side", "flip_c2i_of_things", *columns]) == [neuron]


def test_flip_columns_are_false_where_the_flip_cannot_happen_and_empty_where_unknown():
    frame = flip_frame(_table(), _scores(), 9, keep_unsampled=False, sampled=True)
    assert list(frame.columns) == [
        "prompt",
        "is_correct",
        "is_test",
        "_orig_row",
        "_sampled",
        "_evaluated",
        "_spectral_sampled_center",
        "_role",
        "flip_m5_16",
        "flip_c2i_m5_16",
        "flip_i2c_m5_16",
        "flip_a16_h21_3",
        "flip_c2i_a16_h21_3",
        "flip_i2c_a16_h21_3",
    ]
    assert frame["_orig_row"].tolist() == [2, 3, 5, 7]
    assert frame["prompt"].tolist() == ["c", "d", "f", "h"]
    assert frame["flip_m5_16"].tolist() == [True, False, True, False]
    assert frame["flip_c2i_m5_16"].tolist() == [True, False, False, False]
    assert frame["flip_i2c_m5_16"].tolist() == [False, False, True, False]
    assert frame["flip_a16_h21_3"].isna().tolist() == [False, True, False, False]


@pytest.mark.parametrize("keep_unsampled", [False, True])
def test_a_written_table_reads_back(tmp_path, keep_unsampled):
    table = _table()
    path = tmp_path / "scores.csv"
    write_csv(path, flip_frame(table, _scores(), 9, keep_unsampled=keep_unsampled, sampled=False))
    frame = pd.read_csv(path)
    assert len(frame) == (9 if keep_unsampled else 4)
    back = read_flip_table(path, neurons_of_frame(frame.columns), "is_correct")
    assert back.neurons == table.neurons
    assert back.rows.rows.tolist() == table.rows.rows.tolist()
    assert back.rows.roles.tolist() == table.rows.roles.tolist()
    assert np.array_equal(back.matrix.ablated, table.matrix.ablated)
    assert np.array_equal(back.baseline, table.baseline)


def test_a_table_without_the_columns_is_a_user_error(tmp_path):
    path = tmp_path / "scores.csv"
    write_csv(path, _scores())
    with pytest.raises(UserError, match="flip_m5_16"):
        read_flip_table(path, [M], "is_correct")


def test_rates_have_the_denominators_they_claim():
    statistics = neuron_statistics(_table(), pd.DataFrame({"neuron": ["m5:16"], "confirmed_rate": [0.4]}))
    first, second = statistics.iloc[0], statistics.iloc[1]
    assert (first["neuron"], first["layer_key"], first["neuron_id"]) == ("m5:16", "m5", 16)
    assert (first["n_eval"], first["c2i_count"], first["i2c_count"], first["flip_any_count"]) == (4, 1, 1, 2)
    assert (first["flip_any_rate"], first["flip_any_pct"]) == (0.5, 50.0)
    assert (first["c2i_eligible_rate"], first["i2c_eligible_rate"]) == (0.5, 0.5)
    assert (first["test_n_eval"], first["test_flip_any_count"], first["test_flip_i2c_rate"]) == (1, 0, 0.0)
    assert np.isnan(first["test_flip_c2i_rate"])  # no held-out row held the behaviour
    assert (second["neuron"], second["n_eval"], second["i2c_count"]) == ("a16.h21:3", 3, 1)
    assert second["flip_any_rate"] == pytest.approx(1 / 3)
    assert second["test_flip_i2c_count"] == 1
    assert first["confirmed_rate"] == 0.4 and np.isnan(second["confirmed_rate"])


def test_unions_count_rows_once():
    result = global_statistics(_table())
    assert (result["n_neurons"], result["n_evaluated_rows"]) == (2, 4)
    assert result["sum_flip_any_counts_over_neurons"] == 3
    assert (result["union_flip_any_unique_count"], result["union_flip_any_unique_rate"]) == (3, 0.75)
    assert (result["union_c2i_unique_count"], result["union_c2i_eligible_rate"]) == (1, 0.5)
    assert (result["union_i2c_unique_count"], result["union_i2c_eligible_rate"]) == (2, 1.0)
    assert result["test"]["union_flip_any_unique_count"] == 1
    assert result["n_rows_by_role"] == {"discovery": 1, "train": 2, "test": 1, "variant": 0}


def test_a_run_without_neurons_has_empty_statistics():
    empty = FlipTable(
        (), _table().rows, FlipMatrix(_table().baseline, np.zeros((0, 4), np.int8), np.zeros((0, 4), bool))
    )
    assert len(neuron_statistics(empty)) == 0
    assert global_statistics(empty)["union_flip_any_unique_count"] == 0


@pytest.mark.parametrize(
    ("n_train", "n_test", "status"),
    [
        (20, 10, "ok"),
        (19, 10, "too_few_flips"),
        (20, 9, "too_few_flips"),
        (81, 10, "too_few_non_flips"),
        (20, 41, "too_few_non_flips"),
        (0, 0, "too_few_flips"),
    ],
)
def test_minimum_counts_hold_on_both_sides_and_for_both_classes(n_train, n_test, status):
    on_train, on_test = np.arange(100) < n_train, np.arange(50) < n_test
    assert MinimumCounts(20, 10).status(on_train, on_test) == status


def test_published_tables_are_read(test_data):
    path = test_data / "published_example" / "stage_7" / "stats" / "runA" / "scores.csv"
    neurons = neurons_of_frame(pd.read_csv(path, nrows=0).columns)
    assert [str(neuron).replace(".", "_") for neuron in neurons] == ["m5:16", "m3:9", "m3:8", "a2_h1:11", "m1:10"]
    table = read_flip_table(path, neurons, "is_correct")
    published = pd.read_csv(path.parent / "flip_stats_by_neuron.csv")
    ours = neuron_statistics(table)
    for column in ("neuron", "n_eval", "c2i_count", "i2c_count", "flip_any_count", "c2i_rate", "flip_any_pct"):
        expected = published[column].tolist()
        assert ours[column].tolist() == (expected if column == "neuron" else pytest.approx(expected))
