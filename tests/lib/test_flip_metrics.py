"""Intervals, chance and the gain over the baseline rule."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.cli import rng
from lib.flip_metrics import (
    BaselineRule,
    block_p_value,
    bootstrap_intervals,
    choose_baseline_rule,
    group_counts,
    honest_scores,
    q_values,
)
from lib.rule_metrics import fisher_p_values, rule_scores


def test_bootstrap_by_counts_equals_bootstrap_by_rows():
    random = np.random.default_rng(0)
    fires, flipped = random.random(300) < 0.4, random.random(300) < 0.5
    flipped |= fires & (random.random(300) < 0.6)
    low, high = bootstrap_intervals(group_counts(fires, flipped, np.arange(300)), rng(0, "a"), 4000)["MCC"]
    by_rows = []
    for _ in range(2000):
        rows = random.integers(0, 300, 300)
        by_rows.append(float(rule_scores(fires[rows], flipped[rows]).mcc))
    assert (low, high) == pytest.approx(np.quantile(by_rows, [0.025, 0.975]), abs=0.02)


def test_an_interval_of_a_metric_that_is_never_defined_is_empty():
    never, flipped = np.zeros(25, dtype=bool), np.arange(25) < 5
    intervals = bootstrap_intervals(group_counts(never, flipped, np.arange(25)), rng(0, "a"), 100)
    assert np.isnan(intervals["P(target=1|fire)"]).all()
    assert intervals["MCC"] == (0.0, 0.0)


def test_counts_of_groups():
    fires = np.array([1, 1, 0, 0, 1, 0], dtype=bool)
    flipped = np.array([1, 0, 1, 0, 1, 0], dtype=bool)
    counts = group_counts(fires, flipped, np.array([7, 7, 7, 3, 3, 3]))
    assert counts.tolist() == [[1, 0, 0, 2], [1, 1, 1, 0]]  # hits, false alarms, misses, right silences of 3, then 7


def test_copies_of_a_prompt_are_no_new_evidence():
    # 60 prompts, each five times over: what is known is what 60 prompts tell.
    random = np.random.default_rng(0)
    fires = random.random(60) < 0.4
    flipped = np.where(random.random(60) < 0.25, ~fires, fires)
    alone = bootstrap_intervals(group_counts(fires, flipped, np.arange(60)), rng(0, "a"), 4000)["MCC"]
    fives = [np.repeat(values, 5) for values in (fires, flipped, np.arange(60))]
    together = bootstrap_intervals(group_counts(*fives), rng(0, "b"), 4000)["MCC"]
    as_rows = bootstrap_intervals(group_counts(fives[0], fives[1], np.arange(300)), rng(0, "c"), 4000)["MCC"]
    assert together == pytest.approx(alone, abs=0.03)
    assert as_rows[1] - as_rows[0] < 0.6 * (alone[1] - alone[0])


def test_block_p_values_hold_where_variants_flip_together():
    # 24 prompts in five variants; rule and flips go by prompt and have nothing to do with each other.
    random = np.random.default_rng(5)
    groups = np.repeat(np.arange(24), 5)
    by_row, by_block = [], []
    for number in range(150):
        fires, flipped = (np.repeat(random.random(24) < 0.4, 5) for _ in range(2))
        by_row.append(float(fisher_p_values(rule_scores(fires, flipped))))
        by_block.append(block_p_value(fires, flipped, groups, rng(number, "p"), 200))
    assert np.mean(np.array(by_row) <= 0.05) > 0.15  # rows taken for independent call chance a finding
    assert np.mean(np.array(by_block) <= 0.05) <= 0.09
    scores = honest_scores(fives := groups < 8, fives, fives, BaselineRule.NEVER, rng(0, "d"), 10, held_out=True)
    grouped = honest_scores(fives, fives, fives, BaselineRule.NEVER, rng(0, "d"), 10, held_out=True, groups=groups)
    assert scores["p_value"] < 1e-20 < grouped["p_value"] < 0.01


def test_the_p_value_is_that_of_a_permutation_test():
    random = np.random.default_rng(1)
    flipped = np.arange(40) < 12
    fires = (np.arange(40) % 3 == 0) | (np.arange(40) < 5)
    exact = honest_scores(fires, flipped, flipped, BaselineRule.NEVER, rng(0, "b"), 10, held_out=True)["p_value"]
    observed = float(rule_scores(fires, flipped).mcc)
    null = [float(rule_scores(fires, random.permutation(flipped)).mcc) for _ in range(20_000)]
    assert exact == pytest.approx(np.mean(np.array(null) >= observed - 1e-12), abs=0.01)


def test_rows_that_chose_the_rule_give_no_p_value():
    flipped = np.arange(40) < 12
    assert np.isnan(
        honest_scores(flipped, flipped, flipped, BaselineRule.NEVER, rng(0, "b"), 10, held_out=False)["p_value"]
    )


def test_a_neuron_that_breaks_everything_has_no_gain():
    # It flips exactly the rows that were right: the rule "was right before" says all there is to say.
    baseline = np.arange(100) < 40
    flipped = baseline.copy()
    rule = choose_baseline_rule(flipped, baseline)
    assert rule is BaselineRule.POSITIVE
    scores = honest_scores(flipped, flipped, baseline, rule, rng(0, "c"), 100, held_out=True)
    assert scores["baseline_rule_MCC"] == pytest.approx(1.0)
    assert scores["MCC_gain"] == pytest.approx(0.0)


def test_where_the_baseline_is_constant_its_rule_knows_nothing():
    flipped, baseline = np.arange(30) < 10, np.ones(30, dtype=bool)
    assert choose_baseline_rule(flipped, baseline) is BaselineRule.NEVER


@settings(max_examples=50)
@given(st.lists(st.one_of(st.none(), st.floats(0, 1)), min_size=1, max_size=20))
def test_q_values_ignore_what_was_not_tested(p_values):
    given_values = np.array([np.nan if p is None else p for p in p_values])
    q = q_values(given_values)
    tested = ~np.isnan(given_values)
    assert np.array_equal(np.isnan(q), ~tested)
    assert (q[tested] >= given_values[tested] - 1e-15).all()
    assert np.allclose(q[tested], q_values(given_values[tested]))
