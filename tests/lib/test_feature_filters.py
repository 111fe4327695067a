"""Metrics by hand and against scikit-learn; each filter drops what it says, in order, with a reason."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score

from lib.cli import UserError
from lib.feature_filters import Filter, FilterOptions, feature_metrics, filter_features, variance_z


def column(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float32)[:, None]


def dropped(values: np.ndarray, labels: np.ndarray, **options) -> dict[int, Filter]:
    result = filter_features(values, feature_metrics(values, labels), FilterOptions(**options))
    assert [i for i, keep in enumerate(result.keep) if not keep] == sorted(result.reasons)
    return {index: filter_ for index, (filter_, _) in result.reasons.items()}


def test_metrics_by_hand():
    # Positive rows have 3 and 1, negative ones 1 and 0: of 4 pairs 3 are won and 1 is a tie.
    metrics = feature_metrics(column(3, 1, 1, 0), np.array([True, True, False, False]))
    assert metrics.auc[0] == 3.5 / 4
    # Best value first: recall 1/2 at precision 1, then recall 1 at precision 2/3.
    assert metrics.average_precision[0] == pytest.approx((1 + 2 / 3) / 2)
    assert metrics.ap_above_base[0] == pytest.approx(5 / 6 - 0.5)
    assert (metrics.mean_positive[0], metrics.mean_negative[0], metrics.n_distinct[0]) == (2, 0.5, 3)
    assert metrics.delta_std[0] == pytest.approx(1.5 / np.std([3, 1, 1, 0], ddof=1))


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=2, max_size=40))
def test_metrics_equal_scikit_learn(rows):
    values, labels = column(*[value for value, _ in rows]), np.array([label for _, label in rows])
    assume(0 < labels.sum() < len(labels))
    metrics = feature_metrics(values, labels)
    assert metrics.auc[0] == pytest.approx(roc_auc_score(labels, values[:, 0]))
    oriented = values[:, 0] if metrics.auc[0] >= 0.5 else -values[:, 0]
    assert metrics.average_precision[0] == pytest.approx(average_precision_score(labels, oriented))
    assert metrics.best_auc[0] >= 0.5


def test_one_class_alone_has_no_metrics():
    metrics = feature_metrics(column(1, 2), np.array([True, True]))
    assert np.isnan(metrics.auc[0])
    assert np.isnan(metrics.delta_std[0])


def test_constant_features_go_always():
    values = np.array([[1, 0], [1, 1], [1, 0], [1, 1]], dtype=np.float32)
    assert dropped(values, np.array([0, 1, 0, 1], dtype=bool)) == {0: Filter.CONSTANT}


def test_low_power_needs_one_passed_test():
    labels = np.arange(40) % 2 == 0
    useful, noise = labels.astype(float), (np.arange(40) // 2 % 2).astype(float)
    values = np.stack([useful, noise], axis=1).astype(np.float32)
    assert dropped(values, labels, drop_low_power=True, min_delta=0.2) == {1: Filter.LOW_POWER}
    assert dropped(values, labels, drop_low_power=True, min_delta=0.2, min_auc=0.5) == {}  # an AUC of 0.5 passes
    assert dropped(values, labels, drop_low_power=True, min_delta=0.0) == {}  # no active test


def test_a_feature_with_gaps_is_judged_by_its_filled_values():
    # Not applicable (0) in most rows of both classes, 1 only in positive ones.
    labels = np.arange(40) % 2 == 0
    values = np.zeros((40, 2), dtype=np.float32)
    values[labels, 0] = np.arange(20) < 8
    values[:, 1] = np.arange(40) // 2 % 2
    assert dropped(values, labels, drop_low_power=True) == {1: Filter.LOW_POWER}


def test_high_variance_is_a_robust_z_score_of_log_variance():
    generator = np.random.default_rng(0)
    values = (generator.random((500, 9)) < np.linspace(0.1, 0.5, 9)).astype(np.float32)
    values[:, 8] = generator.normal(scale=1000, size=500)
    labels = generator.random(500) < 0.5
    assert dropped(values, labels, drop_high_variance=True, z_threshold=10) == {8: Filter.HIGH_VARIANCE}
    assert dropped(values, labels) == {}


def test_equal_variances_say_nothing_about_the_odd_one():
    assert variance_z(np.array([0.25, 0.25, 0.25, 9.0])).tolist() == [0, 0, 0, 0]


def test_a_filter_that_would_leave_nothing_is_not_applied():
    labels = np.arange(40) % 2 == 0
    values = (np.arange(40) // 2 % 2).astype(np.float32)[:, None]
    result = filter_features(values, feature_metrics(values, labels), FilterOptions(drop_low_power=True))
    assert result.keep.all()
    assert "low predictive power" in result.notes[0]


def test_near_duplicates_are_compared_with_kept_features_only():
    # A chain: b is close to a and to c, but a and c differ. Only b goes.
    angle = np.linspace(0, 2 * np.pi, 100, endpoint=False)
    values = np.stack([np.cos(angle + shift) for shift in (0.0, 0.4, 0.8)], axis=1).astype(np.float32)
    assert dropped(values, angle < 3, drop_near_duplicates=True, correlation_threshold=np.cos(0.5)) == {
        1: Filter.NEAR_DUPLICATE
    }


def test_opposite_features_are_duplicates():
    values = np.stack([np.arange(10) % 2, 1 - np.arange(10) % 2], axis=1).astype(np.float32)
    assert dropped(values, np.arange(10) < 5, drop_near_duplicates=True) == {1: Filter.NEAR_DUPLICATE}


@pytest.mark.parametrize("threshold", [0.0, -1.0, 1.5])
def test_a_senseless_threshold_is_refused(threshold):
    with pytest.raises(UserError, match="near_duplicate"):
        FilterOptions(correlation_threshold=threshold)
