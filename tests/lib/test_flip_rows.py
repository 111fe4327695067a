"""Which rows stage 7 evaluates and what they may be used for."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.cli import UserError, rng
from lib.flip_rows import Role, assign_roles, choose_rows, group_numbers, stratified_sample
from lib.scores_table import load_scores
from tests.flip_world import TASK_SPEC, world_frame, write_world


def _scores(tmp_path, frame):
    return load_scores(write_world(tmp_path, frame, {"m1:1": 0.5})["features"], TASK_SPEC)


def test_a_discovery_row_is_never_held_out(tmp_path):
    frame = world_frame(50)
    scores = _scores(tmp_path, frame)
    # Every row was used for discovery, held-out ones too: nothing may judge.
    roles = assign_roles(scores, np.arange(50), None, rng(0, "x"))
    assert set(roles) == {Role.DISCOVERY.value}


def test_variants_of_one_prompt_stay_on_one_side(tmp_path):
    frame = world_frame(300)
    frame["source"] = np.arange(300) // 3
    scores = _scores(tmp_path, frame)
    groups = group_numbers(scores, "source")
    discovery = np.flatnonzero(~scores.is_test)[:10]
    roles = assign_roles(scores, discovery, groups, rng(0, "x"))
    for group in range(100):
        here = set(roles[groups == group]) - {Role.VARIANT.value}
        assert here <= {"test"} or "test" not in here
    assert not np.isin(roles[discovery], ["test", "variant"]).any()
    assert (roles == "test").sum() > 30
    # Nothing that stage 2 called TRAIN judges.
    assert scores.is_test[roles == "test"].all()
    given_up = (roles[~scores.is_test] == "variant").sum()
    assert given_up <= 0.2 * ((~scores.is_test).sum() - len(discovery))


def test_commuted_operands_are_one_group(tmp_path):
    frame = world_frame(4)
    frame["operand_a"], frame["operand_b"], frame["operator"] = [2, 3, 2, 2], [3, 2, 3, 4], ["+", "+", "*", "+"]
    numbers = group_numbers(_scores(tmp_path, frame), "operand_a, operand_b, operator")
    assert numbers[0] == numbers[1]
    assert len(set(numbers.tolist())) == 3


def test_an_unknown_group_column_is_named(tmp_path):
    with pytest.raises(UserError, match="nothere"):
        group_numbers(_scores(tmp_path, world_frame(4)), "nothere")


@settings(max_examples=60)
@given(sizes=st.lists(st.integers(1, 60), min_size=1, max_size=5), n_rows=st.integers(1, 120), seed=st.integers(0, 9))
def test_a_stratified_sample_has_the_asked_size_and_protects_small_classes(sizes, n_rows, seed):
    strata = np.repeat([f"s{i}" for i in range(len(sizes))], sizes)
    chosen = stratified_sample(strata, n_rows, rng(seed, "s"), clusters=np.arange(len(strata)) % 3)
    assert len(chosen) == min(n_rows, len(strata)) == len(set(chosen.tolist()))
    assert (np.diff(chosen) > 0).all()
    for number, size in enumerate(sizes):
        floor = min(size, n_rows // (2 * len(sizes)))
        assert (strata[chosen] == f"s{number}").sum() >= floor


def test_clusters_get_their_shares():
    # One class, clusters of 80, 15 and 5 rows: a fifth of each.
    clusters = np.repeat([0, 1, 2], [80, 15, 5])
    chosen = stratified_sample(np.array(["x"] * 100), 20, rng(0, "c"), clusters)
    assert np.bincount(clusters[chosen]).tolist() == [16, 3, 1]


def test_rows_without_a_label_are_not_evaluated(tmp_path):
    frame = world_frame(30).astype({"is_correct": object})
    frame.loc[4, "is_correct"] = None
    scores = _scores(tmp_path, frame)
    roles = assign_roles(scores, np.array([], dtype=int), None, rng(0, "x"))
    roles[6] = Role.VARIANT.value
    rows = choose_rows(scores, roles, max_points=None, random=rng(0, "y"))
    assert sorted(set(range(30)) - set(rows.rows.tolist())) == [4, 6]
    sampled = choose_rows(scores, roles, max_points=12, random=rng(0, "y"))
    assert len(sampled) == 12
    assert set(sampled.rows.tolist()) <= set(rows.rows.tolist())
