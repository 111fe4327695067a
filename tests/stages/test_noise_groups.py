"""Which datapoints are noisy: asked of no more datapoints than it takes to find enough calm ones."""

from __future__ import annotations

import numpy as np
import pytest

from lib.cli import rng
from lib.stages.agonist_slices import noise_groups, noise_of_slices, noise_rates


class Fragile:
    """Datapoints in `always` flip under any group, those in `rarely` under the first one only."""

    def __init__(self, always=(), rarely=()):
        self.always, self.rarely, self.asked = set(always), set(rarely), []

    def __call__(self, groups, datapoints):
        self.asked.append(datapoints.tolist())
        flips = np.isin(datapoints, list(self.always))[None].repeat(len(groups), 0)
        flips[0] |= np.isin(datapoints, list(self.rarely))
        return flips


GROUPS = [(number,) for number in range(8)]
FIRST, SECOND = np.arange(22), np.arange(100, 122)


def test_calm_datapoints_among_the_first_are_enough():
    oracle = Fragile(always=[0, 100], rarely=[1])
    noise = noise_of_slices(oracle, GROUPS, [FIRST, SECOND], [16, 16], 0.2)
    # An eighth more than wanted: 18 of each slice, 17 of them calm.
    assert oracle.asked == [[*range(18), *range(100, 118)]]
    assert [rates.tolist() for rates in noise] == [[1.0, 0.125, *[0.0] * 16], [1.0, *[0.0] * 17]]


def test_the_rest_is_asked_only_where_calm_ones_are_missing():
    oracle = Fragile(always=[2, 5, 7])
    noise = noise_of_slices(oracle, GROUPS, [FIRST, SECOND], [16, 16], 0.2)
    assert oracle.asked == [[*range(18), *range(100, 118)], [18, 19, 20, 21]]
    assert [len(rates) for rates in noise] == [22, 18]
    assert np.flatnonzero(noise[0]).tolist() == [2, 5, 7]


@pytest.mark.parametrize(("first", "second"), [(0, 5), (5, 0), (3, 3)])
def test_short_slices_are_asked_whole(first, second):
    oracle = Fragile()
    noise = noise_of_slices(oracle, GROUPS, [FIRST[:first], SECOND[:second]], [16, 16], 0.2)
    assert [len(rates) for rates in noise] == [first, second]
    assert len(oracle.asked) == 1


def test_a_loud_group_is_not_counted():
    flips = np.zeros((4, 10), dtype=bool)
    flips[0], flips[1, 3] = True, True
    assert noise_rates(flips).tolist() == [0, 0, 0, 1 / 3, *[0] * 6]
    assert noise_rates(flips[:1]).tolist() == [0.0] * 10


def test_groups_are_weak_and_of_two_sizes():
    strengths = np.linspace(-1.0, 1.0, 640)
    groups = noise_groups(strengths, rng(0, "noise"))
    assert [len(group) for group in groups] == [10, 20] * 4
    strongest = set(np.argsort(-np.abs(strengths))[:40].tolist())
    assert not strongest & {member for group in groups for member in group}
    assert all(list(group) == sorted(set(group)) for group in groups)


def test_groups_leave_out_the_first_third_of_the_layers():
    strengths, layers = np.linspace(0.1, 1.0, 640), np.arange(640) % 6
    groups = noise_groups(strengths, rng(0, "noise"), layers)
    assert {int(layers[member]) for group in groups for member in group} == {2, 3, 4, 5}
    one_layer = noise_groups(strengths, rng(0, "noise"), np.full(640, 7))
    assert one_layer == noise_groups(strengths, rng(0, "noise"))
