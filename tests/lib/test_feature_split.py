"""The TRAIN/TEST split: a fifth of the rows, of each label, of each region; groups stay together; it always ends."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.feature_moments import moments
from lib.feature_split import cluster_rows, principal_components, split_rows


def blobs(sizes: list[int], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Points around well separated centres, and the number of the centre."""
    generator = np.random.default_rng(seed)
    places = np.repeat(np.arange(len(sizes)), sizes)
    return generator.normal(scale=0.01, size=(sum(sizes), 2)) + 100.0 * places[:, None], places


def test_each_label_and_each_region_gives_a_fifth():
    values, places = blobs([50, 50])
    labels = np.arange(100) % 4 == 0
    split = split_rows(values, labels.astype(int), None, seed=3)
    assert split.is_test.sum() == 20
    assert split.is_test[labels].sum() == 5
    assert [split.is_test[places == place].sum() for place in (0, 1)] == pytest.approx([10, 10], abs=2)


def test_one_outlier_does_not_hang_the_search_for_clusters():
    # With two clusters the outlier is alone in one: too small, whatever their number.
    values = np.zeros((60, 2))
    values[0] = 1e9
    assert not cluster_rows(values, seed=0).any()
    assert split_rows(values, np.zeros(60, dtype=int), None, seed=0).is_test.sum() == 12


@settings(max_examples=40)
@given(st.integers(2, 60), st.integers(0, 5))
def test_small_tables_are_split_too(n_rows, seed):
    labels = np.arange(n_rows) % 2
    is_test = split_rows(np.zeros((n_rows, 3)), labels, None, seed).is_test
    assert 1 <= is_test.sum() <= n_rows // 5 + 1
    assert not is_test.all()


def test_rows_of_a_group_stay_together():
    groups = np.repeat([f"request {i}" for i in range(15)], 8)
    values, _ = blobs([60, 60])
    split = split_rows(values, np.arange(120) % 2, groups, seed=1)
    assert split.n_groups == 15
    assert split.is_test.sum() == 3 * 8
    for group in np.unique(groups):
        assert len(set(split.is_test[groups == group])) == 1


def test_a_single_group_is_split_by_rows():
    split = split_rows(np.zeros((50, 1)), np.zeros(50, dtype=int), np.full(50, "one"), seed=1)
    assert split.n_groups is None
    assert split.is_test.sum() == 10


def test_the_seed_decides_and_nothing_else():
    values, _ = blobs([40, 40])
    labels = np.arange(80) % 2
    first = split_rows(values, labels, None, seed=1).is_test
    np.testing.assert_array_equal(first, split_rows(values, labels, None, seed=1).is_test)
    assert (first != split_rows(values, labels, None, seed=2).is_test).any()


def test_principal_components_keep_95_percent_of_the_variance():
    # 12 columns that are copies of 2 independent ones: two components suffice.
    base = np.random.default_rng(0).normal(size=(200, 2))
    values = base[:, [0, 1] * 6].astype(np.float32)
    points = principal_components(values)
    assert points.shape == (200, 2)
    assert points.var(axis=0, ddof=1).sum() == pytest.approx(12, rel=1e-4)


def test_constant_columns_play_no_part():
    assert principal_components(np.ones((20, 3))).shape == (20, 0)
    assert not cluster_rows(np.ones((20, 3)), seed=0).any()


def test_moments_over_blocks_equal_numpy():
    values = np.random.default_rng(0).normal(loc=1e4, size=(40_000, 3)).astype(np.float32)
    values[:, 2] = 7
    summary = moments(values)
    np.testing.assert_allclose(summary.covariance, np.cov(values.astype(float), rowvar=False), atol=1e-9)
    assert summary.correlation[2, 0] == 0.0
