"""Metrics against scikit-learn and hand-computed counts; uncertainty against its definition."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics

from lib.rule_masks import TargetRows, pack, row_hashes, unpack
from lib.rule_metrics import (
    RuleScores,
    benjamini_hochberg,
    bootstrap_interval,
    fisher_p_values,
    mcc,
    metric_interval,
    permutation_p_value,
    rule_scores,
)


def test_scores_by_hand():
    fires = np.array([1, 1, 1, 0, 0, 0, 0, 0], dtype=bool)
    y = np.array([1, 1, 0, 1, 0, 0, 0, 0])
    scores = rule_scores(fires, y)
    assert scores == RuleScores(tp=2, fp=1, fn=1, tn=4)
    assert scores.precision == pytest.approx(2 / 3)
    assert scores.recall == pytest.approx(2 / 3)
    assert scores.lift == pytest.approx((2 / 3) / (3 / 8))
    assert scores.coverage == pytest.approx(3 / 8)
    assert scores.balanced_accuracy == pytest.approx((2 / 3 + 4 / 5) / 2)
    assert scores.mcc == pytest.approx((2 * 4 - 1 * 1) / np.sqrt(3 * 3 * 5 * 5))
    assert scores.mean_difference == pytest.approx(2 / 3 - 1 / 5)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=60))
@pytest.mark.filterwarnings("ignore:A single label")
def test_scores_agree_with_scikit_learn(pairs):
    fires, y = np.array(pairs).T
    scores = rule_scores(fires, y)
    assert scores.mcc == pytest.approx(metrics.matthews_corrcoef(y, fires))
    assert scores.accuracy == pytest.approx(metrics.accuracy_score(y, fires))
    if scores.tp:
        assert scores.f1 == pytest.approx(metrics.f1_score(y, fires))
    else:
        assert np.isnan(scores.f1)


def test_many_rules_at_once():
    random = np.random.default_rng(0)
    masks, y = random.random((5, 40)) < 0.3, random.random(40) < 0.5
    many = rule_scores(masks, y)
    for rule in range(5):
        one = rule_scores(masks[rule], y)
        assert many.at(rule) == one
        assert many.mcc[rule] == pytest.approx(one.mcc)


def test_undefined_metrics():
    never = rule_scores(np.zeros(4, dtype=bool), np.array([1, 0, 1, 0]))
    assert np.isnan(never.precision)
    assert np.isnan(never.lift)
    assert never.mcc == 0
    assert np.isnan(rule_scores(np.ones(3, dtype=bool), np.zeros(3)).recall)
    # Counts of a whole table fit no 64-bit product of four margins.
    assert mcc(4e9, 0, 0, 4e9) == pytest.approx(1)


def test_bootstrap_covers_the_truth_as_often_as_it_says():
    random = np.random.default_rng(1)
    hits = 0
    for draw in range(200):
        fires = random.random(300) < 0.4
        y = random.random(300) < np.where(fires, 0.7, 0.2)
        low, high = bootstrap_interval(fires, y, "precision", np.random.default_rng(draw), n=400)
        hits += low <= 0.7 <= high
    assert 0.90 <= hits / 200 <= 0.99


def test_a_share_without_a_miss_is_not_certain():
    fires = np.arange(40) < 14
    low, high = metric_interval(fires, fires, "precision", np.random.default_rng(0))
    # 14 hits in 14: the share whose 14th power is 2.5 %.
    assert low == pytest.approx(0.025 ** (1 / 14))
    assert high == 1.0
    assert np.isnan(metric_interval(np.zeros(5, dtype=bool), np.ones(5), "precision", np.random.default_rng(0))).all()
    assert metric_interval(fires, fires, "mcc", np.random.default_rng(0)) == pytest.approx((1.0, 1.0))


def test_fisher_p_value_is_the_tail_of_the_urn():
    # 2 hits in 3 draws from 8 balls with 3 red ones: (3C2 5C1 + 3C3) / 8C3.
    assert fisher_p_values(RuleScores(2, 1, 1, 4)) == pytest.approx(16 / 56)


def test_benjamini_hochberg_by_hand():
    assert benjamini_hochberg(np.array([0.04, 0.01, 0.03, 0.5])) == pytest.approx(
        [0.04 * 4 / 3, 0.04, 0.04 * 4 / 3, 0.5]
    )
    assert benjamini_hochberg(np.zeros(0)).size == 0


def test_permutation_p_value_is_never_zero():
    assert permutation_p_value(3.0, np.array([1.0, 2.0, 3.0, 4.0])) == pytest.approx(3 / 5)
    assert permutation_p_value(9.0, np.zeros(4)) == pytest.approx(1 / 5)


@given(st.integers(1, 200), st.integers(0, 2**32 - 1))
def test_packed_counts_are_the_counts(n_rows, seed):
    random = np.random.default_rng(seed)
    masks, y = random.random((4, n_rows)) < 0.4, random.random(n_rows) < 0.5
    packed = pack(masks)
    assert np.array_equal(unpack(packed, n_rows), masks)
    n_true, n_fire = TargetRows(y).counts(packed)
    assert n_true.tolist() == [(mask & y).sum() for mask in masks]
    assert n_fire.tolist() == masks.sum(axis=1).tolist()
    # Weights of one give the same counts by the other route.
    weighted = TargetRows(y, np.ones(n_rows)).counts(packed)
    assert np.allclose(weighted, (n_true, n_fire))
    same = [[np.array_equal(a, b) for a in masks] for b in masks]
    hashes = row_hashes(packed)
    assert (hashes[:, None] == hashes[None, :]).tolist() == same
