"""Pairing as an assignment: against brute force, and by hand."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cdist

from lib.cli import UserError, rng
from lib.pairing import Lengths, Pairing, distance_function, pair_by_similarity, pairing_report
from lib.spectral_options import METRICS


def lengths(*totals):
    return Lengths(np.array(totals), np.zeros(len(totals), dtype=int))


def pair(sources, targets, source_lengths, target_lengths, uses=1, tolerance=0, metric="euclidean"):
    column = [np.array(values, dtype=np.float32)[:, None] for values in (sources, targets)]
    return pair_by_similarity(
        *column, source_lengths, target_lengths, metric=metric, length_tolerance=tolerance, max_target_uses=uses
    )


def test_total_distance_is_minimised_not_each_one_greedily():
    # Greedily, 0 takes 1 and leaves 1.5 with 9 (8.5 in total); the assignment gives 1.5 its neighbour: 9 + 0.5... is
    # worse, so 0 -> 1 and 1.5 -> 2.
    result = pair([0, 1.5], [1, 2, 9], lengths(5, 5), lengths(5, 5, 5))
    assert result.targets.tolist() == [0, 1]


def test_equal_lengths_come_before_small_distances():
    result = pair([0.0], [0.0, 100.0], lengths(5), lengths(6, 5))
    assert result.targets.tolist() == [1]
    assert result.is_length_matched.tolist() == [True]


def test_reuse_comes_before_unequal_lengths_but_after_distance():
    near_twice = pair([0, 0.1], [0, 50], lengths(5, 5), lengths(5, 5), uses=2)
    assert sorted(near_twice.targets.tolist()) == [0, 1]
    only_match = pair([0, 0.1], [0, 50], lengths(5, 5), lengths(5, 9), uses=2)
    assert only_match.targets.tolist() == [0, 0]
    one_use = pair([0, 0.1], [0, 50], lengths(5, 5), lengths(5, 9), uses=1)
    assert sorted(one_use.targets.tolist()) == [0, 1]


def test_too_few_targets_are_used_as_often_as_needed():
    result = pair([0, 1, 2], [5], lengths(4, 4, 4), lengths(4))
    assert result.targets.tolist() == [0, 0, 0]


def test_equal_totals_with_another_split_do_not_match():
    source, target = Lengths(np.array([5]), np.array([2])), Lengths(np.array([6]), np.array([1]))
    assert not pair([0.0], [0.0], source, target).is_length_matched[0]
    assert pair([0.0], [0.0], source, target, tolerance=2).is_length_matched[0]


@given(st.integers(0, 10_000), st.integers(1, 4), st.integers(1, 5), st.integers(1, 3))
@settings(max_examples=60)
def test_equals_brute_force(seed, n_sources, n_targets, uses):
    stream = rng(seed, "pairing")
    sources, targets = stream.standard_normal((n_sources, 2)), stream.standard_normal((n_targets, 2))
    source_lengths, target_lengths = (
        Lengths(stream.integers(3, 5, n), np.zeros(n, int)) for n in (n_sources, n_targets)
    )
    result = pair_by_similarity(
        sources, targets, source_lengths, target_lengths, metric="cityblock", length_tolerance=0, max_target_uses=uses
    )
    distances = cdist(sources, targets, "cityblock")
    unmatched = source_lengths.prompt[:, None] != target_lengths.prompt[None]
    capacity = max(uses, -(-n_sources // n_targets))

    def cost(assignment):
        counts = np.bincount(assignment, minlength=n_targets)
        reuse = sum(count * (count - 1) // 2 for count in counts)
        own = np.arange(n_sources)
        return (unmatched[own, assignment].sum(), reuse, round(float(distances[own, assignment].sum()), 9))

    candidates = (np.array(a) for a in itertools.product(range(n_targets), repeat=n_sources))
    best = min(cost(a) for a in candidates if np.bincount(a).max() <= capacity)
    assert cost(result.targets) == pytest.approx(best)


@pytest.mark.parametrize("metric", METRICS)
def test_every_metric_gives_finite_order(metric):
    stream = rng(1, metric)
    sources, targets = stream.standard_normal((4, 5)), stream.standard_normal((7, 5))
    distances = distance_function(metric, np.concatenate([sources, targets]))(sources, targets)
    assert distances.shape == (4, 7)
    assert not np.isnan(distances).any()


def test_metrics_by_hand():
    left, right = np.array([[1.0, 0, 1, 1]]), np.array([[1.0, 1, 0, 1]])
    assert distance_function("euclidean", left)(left, right)[0, 0] == pytest.approx(2**0.5)
    assert distance_function("cosine", left)(left, right)[0, 0] == pytest.approx(1 - 2 / 3)
    # Two places agree as non-zero, two disagree.
    assert distance_function("kulczynski1", left)(left, right)[0, 0] == 1.0
    assert distance_function("sokalmichener", left)(left, right)[0, 0] == pytest.approx(4 / 6)


def test_unknown_metric_is_refused():
    with pytest.raises(UserError, match="unknown similarity metric"):
        distance_function("nearest", np.zeros((1, 1)))


def test_an_empty_side_is_refused():
    with pytest.raises(UserError, match="at least one datapoint"):
        pair([], [1.0], lengths(), lengths(3))


def test_report_counts_passes_and_uses():
    result = Pairing(np.array([1, 1, 0]), np.array([0.5, 1.0, 2.0]), np.array([True, True, False]))
    report = pairing_report(
        result,
        np.array([10, 11, 12]),
        np.array([7, 7, 6]),
        lengths(4, 4, 4),
        lengths(4, 4, 5),
        metric="euclidean",
        length_tolerance=0,
        max_target_uses=2,
        n_targets=2,
    )
    assert report["assignment_pass_counts"] == {
        "length-matched + unique": 1,
        "length-matched": 1,
        "unique": 1,
        "any": 0,
    }
    assert report["unique_target_used"] == 2 and report["target_reused_count"] == 1
    assert [pair["assignment_pass"] for pair in report["pair_meta"]] == [1, 2, 3]
    assert report["pair_meta"][0]["reuse_count"] == 2 and not report["pair_meta"][0]["is_unique_target"]
    assert report["pair_meta"][2]["len_diff"] == 1
