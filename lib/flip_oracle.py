"""From ablated answers to flips: the task's label of each changed answer, asked for once per (datapoint, text)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from lib.ablation_engine import AblatedAnswers, AblationEngine
from lib.neurons import Neuron

ScoreAnswers = Callable[[list[dict[str, object]], list[str]], Sequence[bool]]
"""A task's `is_answer_positive`: (rows, answers) -> labels."""
LabelIsSettled = Callable[[dict[str, object], str], bool]
"""A task's `label_is_settled`: (row, beginning of an answer) -> whether the rest cannot change the label."""


class FlipOracle:
    """Says which datapoints flip when a group of neurons is ablated.

    engine: answers for datapoints numbered as `rows`. rows: the datapoints as the task's scorer wants them.
    baseline_labels: [datapoint] label of the un-ablated answer, by the same scorer. is_settled: lets the engine stop
    where the label of a changed answer is known; answers under a single neuron, which people read, are made whole.
    """

    def __init__(
        self,
        engine: AblationEngine,
        score: ScoreAnswers,
        rows: list[dict[str, object]],
        is_settled: LabelIsSettled | None = None,
    ) -> None:
        self.engine = engine
        self.score = score
        self.rows = rows
        self.is_settled = is_settled
        self._labels: dict[tuple[int, str], bool] = {}
        everything = list(range(len(rows)))
        self.baseline_labels = self._labels_of([(d, engine.baseline_answers[d]) for d in everything])

    def flips(self, groups: Sequence[Sequence[Neuron]], datapoints: Sequence[int]) -> np.ndarray:
        """True where the label differs from the baseline's, [group, datapoint]."""
        return self.flips_and_answers(groups, datapoints)[0]

    def flips_and_answers(
        self, groups: Sequence[Sequence[Neuron]], datapoints: Sequence[int]
    ) -> tuple[np.ndarray, AblatedAnswers]:
        """Flips [group, datapoint] with the answers behind them, those of larger groups as far as they matter."""

        def is_settled(group: int, datapoint: int, text: str) -> bool:
            return len(groups[group]) > 1 and self.is_settled(self.rows[datapoint], text)

        answers = self.engine.answers(groups, datapoints, is_settled=is_settled if self.is_settled else None)
        flips = np.zeros(answers.changed.shape, dtype=bool)
        keys = list(answers.texts)
        labels = self._labels_of([(int(datapoints[column]), answers.texts[group, column]) for group, column in keys])
        for (group, column), label in zip(keys, labels, strict=True):
            flips[group, column] = label != self.baseline_labels[int(datapoints[column])]
        return flips, answers

    def _labels_of(self, pairs: list[tuple[int, str]]) -> np.ndarray:
        """Labels of (datapoint, answer) pairs; the scorer sees each distinct pair once in the oracle's life."""
        new = [pair for pair in dict.fromkeys(pairs) if pair not in self._labels]
        if new:
            scored = self.score([self.rows[datapoint] for datapoint, _ in new], [text for _, text in new])
            self._labels.update(zip(new, map(bool, scored), strict=True))
        return np.array([self._labels[pair] for pair in pairs], dtype=bool)
