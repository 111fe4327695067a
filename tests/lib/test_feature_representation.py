"""Column names of features: injective, never those of the dataset."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lib.feature_representation import Feature, Origin, assign_columns, per_row

RESERVED = ("prompt", "raw_output", "is_correct", "row_id", "is_test", "split")


def test_names_are_sanitized_labels_where_possible():
    assert assign_columns(["GCD > 1", "op1 in [0,25]"], RESERVED) == ["gcd_1", "op1_in_0_25"]


def test_a_genuine_numbered_name_keeps_it_and_repeats_take_the_next_free_one():
    # 'a_b' twice; the second may not take a_b_2, which is the third label's own name.
    assert assign_columns(["A b", "a_b", "A b 2", "a b!"], RESERVED) == ["a_b", "a_b_3", "a_b_2", "a_b_4"]


def test_dataset_columns_are_left_alone():
    assert assign_columns(["Prompt", "Split", "Is test", "Row ID"], RESERVED) == [
        "feature_prompt",
        "feature_split",
        "feature_is_test",
        "feature_row_id",
    ]


def test_labels_without_ascii_letters_get_a_name():
    assert assign_columns(["≤", "数"], RESERVED) == ["feature", "feature_2"]


@given(st.lists(st.text("aAb_ 12≤", max_size=6), max_size=12))
def test_names_are_injective_and_never_reserved(labels):
    columns = assign_columns(labels, ["a", "a_1", "b"])
    assert len(set(columns)) == len(labels)
    assert not {"a", "a_1", "b"} & set(columns)
    assert all(columns)


def test_catalogue_entry():
    feature = Feature("L", "what", "def f(prompt, info): ...", "f", Origin.SEED, native=per_row(len, "prompt"))
    assert list(feature.to_json()) == ["label", "description", "python_src", "fn_name", "origin"]
    assert feature.to_json()["origin"] == "predefined"


def test_a_row_function_becomes_a_column_function():
    native = per_row(lambda a, b: None if b == 0 else a / b, "a", "b")
    np.testing.assert_array_equal(native({"a": np.array([1, 2]), "b": np.array([2, 0])}), [0.5, np.nan])
