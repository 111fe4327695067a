"""Flips from ablated answers: labels are asked for once, and answers of groups end where their label is settled."""

from __future__ import annotations

import numpy as np
import pytest

from lib.ablation_engine import AblatedAnswers
from lib.flip_oracle import FlipOracle
from lib.neurons import Neuron


class SpellingEngine:
    """Every group turns the answer "ab" of each datapoint into "xyz", token by token, until it is told to stop."""

    baseline_answers = ("ab", "ab")

    def answers(self, groups, datapoints, is_settled=None):
        texts = {}
        for group in range(len(groups)):
            for column, datapoint in enumerate(datapoints):
                begun = (text for text in ("x", "xy") if is_settled and is_settled(group, datapoint, text))
                texts[group, column] = next(begun, "xyz")
        return AblatedAnswers(np.ones((len(groups), len(datapoints)), dtype=bool), texts)


GROUPS = [[Neuron("m0", 1)], [Neuron("m0", 1), Neuron("m1", 2)]]


def score(rows, answers):
    return [answer == "ab" for answer in answers]


def test_only_answers_under_several_neurons_are_cut_short():
    oracle = FlipOracle(SpellingEngine(), score, [{"row": 0}, {"row": 1}], lambda row, text: len(text) > row["row"])
    flips, answers = oracle.flips_and_answers(GROUPS, [1, 0])
    assert answers.texts == {(0, 0): "xyz", (0, 1): "xyz", (1, 0): "xy", (1, 1): "x"}
    assert flips.all()


def test_without_a_task_that_settles_labels_answers_are_whole():
    _, answers = FlipOracle(SpellingEngine(), score, [{}, {}]).flips_and_answers(GROUPS, [0, 1])
    assert set(answers.texts.values()) == {"xyz"}


@pytest.mark.parametrize("n_calls", [1, 3])
def test_each_answer_is_scored_once(n_calls):
    seen = []

    def counting(rows, answers):
        seen.extend(answers)
        return score(rows, answers)

    oracle = FlipOracle(SpellingEngine(), counting, [{}, {}])
    for _ in range(n_calls):
        assert oracle.flips(GROUPS, [0, 1]).all()
    assert sorted(seen) == ["ab", "ab", "xyz", "xyz"]
