"""Statistics of the reports: numbers worked out by hand, and properties of Holm's correction."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib.reporting.stats import (
    Alternative,
    area_under_thresholds,
    bootstrap_mean,
    bootstrap_paired_difference,
    fisher_combined,
    holm,
    mann_whitney,
    paired_summary,
    sign_flip_test,
    sign_test,
    stars,
    tail_mean,
    threshold_grid,
)

P_VALUES = st.lists(st.floats(0, 1) | st.just(math.nan), max_size=12)


def random():
    return np.random.default_rng(0)


def test_holm_of_three():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])


def test_holm_does_not_count_an_unknown_comparison():
    assert holm([0.01, math.nan, 0.04, 0.03]) == pytest.approx([0.03, math.nan, 0.06, 0.06], nan_ok=True)


@given(P_VALUES)
def test_holm_never_lowers_a_p_value_and_keeps_the_order(p):
    adjusted = holm(p)
    known = [(raw, new) for raw, new in zip(p, adjusted, strict=True) if not math.isnan(raw)]
    assert all(raw <= new <= 1 for raw, new in known)
    assert [new for _, new in sorted(known)] == sorted(new for _, new in known)
    assert [math.isnan(new) for new in adjusted] == [math.isnan(raw) for raw in p]


@given(P_VALUES)
def test_holm_is_the_step_down_procedure(p):
    # By definition: reject at level a as long as the k-th smallest of m is at most a / (m - k).
    known = sorted(value for value in p if not math.isnan(value))
    for alpha in (0.01, 0.05, 0.3):
        rejected = 0
        while rejected < len(known) and known[rejected] * (len(known) - rejected) <= alpha:
            rejected += 1
        assert int((holm(p) <= alpha).sum()) == rejected


def test_sign_and_sign_flip_of_four_differences():
    d = [3, 1, -1, 2]
    assert sign_test(d, Alternative.GREATER) == pytest.approx(5 / 16)
    assert sign_flip_test(d, Alternative.GREATER, random()) == (3 / 16, "exact")


@given(st.lists(st.integers(-6, 6), max_size=8), st.sampled_from(Alternative))
def test_sign_flip_equals_counting_every_pattern(d, alternative):
    nonzero = [value for value in d if value]
    p, mode = sign_flip_test(d, alternative, random())
    if not nonzero:
        assert math.isnan(p) and mode == ""
        return
    sums = [
        sum(sign * value for sign, value in zip(signs, nonzero, strict=True))
        for signs in product((-1, 1), repeat=len(nonzero))
    ]
    observed = sum(nonzero)
    hits = {
        Alternative.GREATER: sum(s >= observed for s in sums),
        Alternative.LESS: sum(s <= observed for s in sums),
        Alternative.TWO_SIDED: sum(abs(s) >= abs(observed) for s in sums),
    }[alternative]
    assert p == pytest.approx(hits / len(sums))


def test_many_pairs_are_drawn_and_count_the_observed_pattern():
    p, mode = sign_flip_test(np.ones(30), Alternative.GREATER, random())
    assert mode == "monte_carlo"
    assert p == pytest.approx(1 / 200_001)


def test_a_rounding_difference_is_no_negative_pair():
    # Two equal areas computed in another order differ by 4e-16.
    assert paired_summary([0.3 - (0.1 + 0.2), 1.0])[:4] == (2, 1, 1, 0)
    assert sign_test([-4e-16, 1.0], Alternative.GREATER) == 0.5


def test_no_differences_give_no_p_value():
    assert paired_summary([]).n_pairs == 0
    assert math.isnan(sign_test([0, 0], Alternative.GREATER))


def test_area_of_counts_over_thresholds():
    grid = [0.70, 0.75, 0.80, 0.85, 0.90]
    assert area_under_thresholds(grid, [6, 5, 4, 2, 1]) == pytest.approx(3.625)
    assert area_under_thresholds(grid[::-1], [1, 2, 4, 5, 6]) == pytest.approx(3.625)
    assert math.isnan(area_under_thresholds(grid, [6, 5, math.nan, 2, 1]))


def test_threshold_grid_has_thirty_points():
    grid = threshold_grid(0.70, 0.99, 0.01)
    assert len(grid) == 30 and grid[0] == 0.7 and grid[10] == 0.8 and grid[-1] == 0.99


@pytest.mark.parametrize(("low", "high", "step"), [(0.7, 0.9, 0), (0.7, 0.9, -1), (0.9, 0.7, 0.1)])
def test_impossible_grid_is_refused(low, high, step):
    with pytest.raises(ValueError, match="no thresholds"):
        threshold_grid(low, high, step)


def test_rank_test_by_hand():
    # All of A above all of B: U = 9, exact two-sided p = 2 / C(6, 3).
    assert mann_whitney([4, 5, 6], [1, 2, 3]) == pytest.approx((9.0, 0.1))
    assert mann_whitney([4, 5, 6], [1, 2, 3], Alternative.GREATER).p == pytest.approx(0.05)
    assert mann_whitney([1, 1], [1]).p == 1.0
    assert math.isnan(mann_whitney([], [1.0]).p)


def test_fisher_by_hand():
    # -2 ln(0.1 * 0.1) = 9.2103 with four degrees of freedom: p = exp(-x/2) (1 + x/2).
    half = -math.log(0.01)
    assert fisher_combined([0.1, 0.1, math.nan]) == pytest.approx(math.exp(-half) * (1 + half))
    assert math.isnan(fisher_combined([]))
    assert 0 <= fisher_combined([0.0, 0.5]) < 1e-200


def test_stars():
    assert [stars(p) for p in (0.0009, 0.001, 0.01, 0.05, math.nan)] == ["***", "**", "*", "ns", ""]


def test_tail_mean_of_nothing_is_unknown():
    assert tail_mean([0.8, 0.9, 1.0], 0.9) == pytest.approx(0.95)
    assert math.isnan(tail_mean([0.1], 0.9))


def test_bootstrap_of_constants_has_no_width():
    units = [(np.full(5, 0.9), np.full(3, 0.4)), (np.full(2, 0.7), np.full(9, 0.4))]
    interval = bootstrap_paired_difference(units, lambda x: x.mean(axis=-1), sample_size=0, n_boot=500, random=random())
    # Each draw takes two of the units with differences 0.5 and 0.3.
    assert interval.mean == pytest.approx(0.4, abs=0.02)
    assert (interval.low, interval.high) == pytest.approx((0.3, 0.5))


def test_bootstrap_leaves_out_a_unit_without_neurons():
    units = [(np.full(4, 0.9), np.full(4, 0.4)), (np.array([0.5]), np.array([]))]
    interval = bootstrap_paired_difference(units, lambda x: x.mean(axis=-1), sample_size=3, n_boot=50, random=random())
    assert interval == pytest.approx((0.5, 0.5, 0.5))


def test_bootstrap_is_the_same_for_the_same_seed():
    values = [0.1, 0.5, 0.7, 0.9]
    assert bootstrap_mean(values, n_boot=200, random=random()) == bootstrap_mean(values, n_boot=200, random=random())
