"""Exact bounds against tables and definitions; the error of sequential looks against simulation."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from lib.cli import rng
from lib.confidence_bounds import (
    NEVER,
    flip_rate_interval,
    lower_flip_rate,
    min_datapoints_to_prune,
    min_flips_to_keep,
    plan_looks,
    rate_difference_interval,
    upper_flip_rate,
)
from lib.group_testing import DEFAULT_LOOKS

# n, epsilon, k*, bound at k* - 1, bound at k*: the published decision table.
PUBLISHED = [
    (64, 0.1, 2, 0.0840, 0.1084),
    (64, 0.2, 7, 0.19297, 0.2125),
    (64, 0.3, 12, 0.2868, 0.3046),
    (64, 0.4, 18, 0.3909, 0.4076),
    (64, 0.5, 24, 0.4890, 0.5049),
    (100, 0.2, 12, 0.1883, 0.2002),
    (32, 0.2, 2, 0.1622, 0.2081),
    (16, 0.2, 0, None, 0.2059),
]


@pytest.mark.parametrize(("n", "epsilon", "keep", "below", "reached"), PUBLISHED)
def test_integer_rule_of_the_published_table(n, epsilon, keep, below, reached):
    assert min_flips_to_keep(n, epsilon, 0.025) == keep
    assert float(upper_flip_rate(keep, n, 0.025)) == pytest.approx(reached, abs=6e-5)
    if below is not None:
        assert float(upper_flip_rate(keep - 1, n, 0.025)) == pytest.approx(below, abs=6e-5)


def test_bound_of_no_flips_is_the_closed_form():
    assert float(upper_flip_rate(0, 20, 0.05)) == pytest.approx(1 - 0.05 ** (1 / 20), rel=1e-12)


def test_no_datapoint_and_all_flipped_bound_nothing():
    assert upper_flip_rate([0, 5], [0, 5], 0.025).tolist() == [1.0, 1.0]
    assert lower_flip_rate([0, 0], [0, 5], 0.025).tolist() == [0.0, 0.0]
    assert flip_rate_interval(0, 0) is None


@given(st.integers(1, 200), st.data(), st.floats(0.001, 0.4))
@settings(max_examples=60)
def test_upper_bound_is_where_seeing_so_few_flips_has_probability_alpha(n, data, alpha):
    k = data.draw(st.integers(0, n - 1))
    bound = float(upper_flip_rate(k, n, alpha))
    assert binom.cdf(k, n, bound) == pytest.approx(alpha, rel=1e-6)


def test_two_sided_interval_by_hand():
    # 0 of 10 at 95 %: the upper limit solves (1 - p)^10 = 0.025.
    interval = flip_rate_interval(0, 10)
    assert interval == pytest.approx((0.0, 0.0, 1 - 0.025**0.1))


def test_smallest_useful_slice():
    assert min_datapoints_to_prune(0.2, 0.025) == 17
    assert min_flips_to_keep(17, 0.2, 0.025) == 1


def test_difference_of_rates_matches_newcombes_worked_example():
    # Newcombe (1998), method 10, 56/70 against 48/80: 0.2 with limits 0.0524 and 0.3339.
    assert rate_difference_interval((56, 70), (48, 80)) == pytest.approx((0.2, 0.0524, 0.3339), abs=5e-5)
    assert rate_difference_interval((1, 2), (0, 0)) is None


# ---------------------------------------------------------------- looks


def test_one_look_is_the_published_rule():
    plan = plan_looks(64, (), 0.2, 0.025)
    assert (plan.n_seen, plan.prune_at_most, plan.split_from) == ((64,), (6,), (7,))


def test_looks_beyond_the_slice_are_dropped():
    assert plan_looks(20, (8, 16, 32), 0.2, 0.025).n_seen == (8, 16, 20)


def test_epsilon_zero_never_prunes():
    plan = plan_looks(64, (8,), 0.0, 0.025)
    assert plan.prune_at_most == (NEVER,) and plan.split_from == (0,)


def test_default_looks_prune_silence_at_half_the_cost_and_keep_the_last_boundary():
    plan = plan_looks(64, (8, 16, 32), 0.2, 0.025)
    assert plan.prune_at_most[-1] == 6
    assert plan.expected_datapoints(0.0) == 32
    assert plan.expected_datapoints(0.9) < 9


def test_ease_changes_when_to_give_up_and_nothing_else():
    # The first eight datapoints flip under anything: two early flips say nothing of the other 56.
    ease = (1.0,) * 8 + (0.02,) * 56
    known, unknown = plan_looks(64, (8, 16, 32), 0.2, 0.025, ease), plan_looks(64, (8, 16, 32), 0.2, 0.025)
    assert known.n_seen == unknown.n_seen and known.prune_at_most == unknown.prune_at_most
    assert known.split_from[0] > unknown.split_from[0]
    assert known.split_from[-1] == unknown.split_from[-1] == 7


@given(st.integers(10, 120), st.lists(st.integers(4, 100), max_size=5), st.floats(0.05, 0.6), st.floats(0.005, 0.1))
@settings(max_examples=60)
def test_error_over_all_looks_stays_within_alpha(n, looks, epsilon, alpha):
    plan = plan_looks(n, tuple(looks), epsilon, alpha)
    for rate in (epsilon, min(1.0, epsilon * 1.1), min(1.0, epsilon * 2)):
        assert plan.prune_probability(rate) <= alpha + 1e-12
    # What a look prunes, the plain bound on the datapoints seen so far would prune as well.
    for seen, limit in zip(plan.n_seen, plan.prune_at_most, strict=True):
        assert limit == NEVER or float(upper_flip_rate(limit, seen, alpha)) < epsilon


def test_looks_seldom_reverse_what_all_datapoints_say():
    plan = plan_looks(64, DEFAULT_LOOKS, 0.2, 0.025)
    assert (plan.n_seen, plan.prune_at_most) == ((8, 24, 40, 64), (NEVER, 0, 1, 6))
    # 7 flips of 64: none among the first 24; or one of these, none of the next 16 and six of the last 24.
    orders = math.comb(40, 7) + 24 * math.comb(24, 6)
    assert plan.reversal_probability(7) == pytest.approx(orders / math.comb(64, 7))
    assert plan.reversal_probability(0) == 1.0 and plan.reversal_probability(64) == 0.0


@given(st.integers(10, 120), st.lists(st.integers(4, 100), max_size=5), st.floats(0.05, 0.6), st.floats(0.005, 0.1))
@settings(max_examples=60)
def test_whoever_all_datapoints_would_keep_is_seldom_pruned_early(n, looks, epsilon, alpha):
    plan = plan_looks(n, tuple(looks), epsilon, alpha)
    keep = min_flips_to_keep(n, epsilon, alpha)
    chances = [plan.reversal_probability(flips) for flips in range(keep, n + 1)]
    assert chances[0] <= 0.05 + 1e-9
    assert all(fewer >= more - 1e-12 for fewer, more in itertools.pairwise(chances))
    assert plan.prune_at_most[-1] < keep or keep == 0


def test_simulated_reversals():
    """10,000 orders of 7, 9 and 12 flips among 64 datapoints."""
    plan = plan_looks(64, DEFAULT_LOOKS, 0.2, 0.025)
    generator = rng(7, "orders")
    for flips in (7, 9, 12):
        orders = np.argsort(generator.random((10_000, 64)), axis=1) < flips
        totals = orders.cumsum(axis=1)
        limits = zip(plan.n_seen[:-1], plan.prune_at_most, strict=False)
        pruned = np.any([totals[:, seen - 1] <= limit for seen, limit in limits], axis=0)
        exact = plan.reversal_probability(flips)
        assert abs(pruned.mean() - exact) <= 4 * np.sqrt(exact / 10_000)


@pytest.mark.parametrize("epsilon", [0.1, 0.2, 0.5])
@pytest.mark.parametrize("looks", [(), (8, 16, 32), (16, 32), (20, 40), (17, 24, 32, 40, 48, 56)])
@pytest.mark.parametrize("n", [48, 64, 100])
def test_simulated_false_prune_rate(n, looks, epsilon):
    """10,000 groups per effect, flips drawn one by one: the share pruned at or above epsilon is at most alpha."""
    alpha, n_runs = 0.025, 10_000
    plan = plan_looks(n, looks, epsilon, alpha)
    generator = rng(7, n, looks, epsilon)
    for effect in (epsilon, 1.05 * epsilon, 1.25 * epsilon, 0.8 * epsilon):
        totals = np.cumsum(generator.random((n_runs, n)) < effect, axis=1)
        pruned = np.zeros(n_runs, dtype=bool)
        for seen, limit in zip(plan.n_seen, plan.prune_at_most, strict=True):
            pruned |= totals[:, seen - 1] <= limit
        exact = plan.prune_probability(effect)
        noise = 4 * np.sqrt(max(exact * (1 - exact), 1e-6) / n_runs)
        assert abs(pruned.mean() - exact) <= noise
        if effect >= epsilon:
            assert pruned.mean() <= alpha + noise
