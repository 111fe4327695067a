"""The oracle of stage 6: group tests answered from the log where it can, from the engine where it must."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

from lib.group_test_log import CHANGED, FLIPPED, UNCHANGED, UNKNOWN, GroupTestLog, group_name, neuron_code
from lib.neurons import Neuron

if TYPE_CHECKING:
    from lib.ablation_engine import AblatedAnswers, AblationEngine

_EVALUATIONS_PER_CALL = 4096


class FlipAnswers(Protocol):
    """What is needed of `lib.flip_oracle.FlipOracle`."""

    engine: AblationEngine
    """Asked by the diagnostics only."""
    baseline_labels: np.ndarray

    def flips_and_answers(
        self, groups: Sequence[Sequence[Neuron]], datapoints: Sequence[int]
    ) -> tuple[np.ndarray, AblatedAnswers]:
        """Flips [group, datapoint] and the answers behind them."""


class LoggedOracle:
    """Group tests of one rule: candidates and datapoints by number, outcomes kept in the log.

    answers: runs the model. neurons: the candidates. rows: `original_idx` of each datapoint. progress: told the number
    of (group, datapoint) pairs that the model evaluated.
    """

    def __init__(
        self,
        answers: FlipAnswers,
        neurons: Sequence[Neuron],
        rows: np.ndarray,
        log: GroupTestLog,
        *,
        progress: Callable[[int], None] = lambda n: None,
    ) -> None:
        self.answers, self.neurons, self.rows, self.log = answers, neurons, rows, log
        self.progress = progress
        self.n_run = 0
        """(group, datapoint) pairs that the model evaluated."""
        self.n_remembered = 0
        """Pairs that the log knew."""
        self._codes = np.array([neuron_code(neuron) for neuron in neurons], dtype=np.int64)

    def __call__(self, groups: list[tuple[int, ...]], datapoints: np.ndarray) -> np.ndarray:
        """Flips of each group on each datapoint, bool [group, datapoint]."""
        return self.outcomes(groups, datapoints) == FLIPPED

    def outcomes(self, groups: Sequence[tuple[int, ...]], datapoints: np.ndarray) -> np.ndarray:
        """Outcome of each group on each datapoint, int8 [group, datapoint]; what the log lacks is tested and logged."""
        datapoints = np.asarray(datapoints, dtype=np.int64)
        names = [self.name(group) for group in groups]
        found = self.log.outcomes(names, self.rows[datapoints])
        missing = found == UNKNOWN
        self.n_remembered += int((~missing).sum())
        for columns, members in _equal_rows(missing):
            step = max(1, _EVALUATIONS_PER_CALL // len(columns))
            for start in range(0, len(members), step):
                part = members[start : start + step]
                found[np.ix_(part, columns)] = self._run(
                    [groups[i] for i in part], [names[i] for i in part], datapoints[columns]
                )
        return found

    def remembered(self, group: Sequence[int], datapoints: np.ndarray) -> np.ndarray:
        """Outcome of a finished test on each datapoint, int8 [datapoint]."""
        return self.log.outcomes([self.name(group)], self.rows[datapoints])[0]

    def name(self, group: Sequence[int]) -> str:
        """The group's name in the log."""
        return group_name(self._codes[np.asarray(group, dtype=np.int64)])

    def answers_of(self, candidate: int, datapoints: np.ndarray) -> dict[int, str]:
        """Changed answers of a candidate tested alone on these datapoints, by `original_idx`."""
        known = self.log.answers(self.name((candidate,)))
        return {row: known[row] for row in self.rows[datapoints].tolist() if row in known}

    def _run(self, groups: list[tuple[int, ...]], names: list[str], datapoints: np.ndarray) -> np.ndarray:
        """Test groups on the model and log them, int8 [group, datapoint]."""
        neurons = [[self.neurons[index] for index in group] for group in groups]
        flips, answers = self.answers.flips_and_answers(neurons, datapoints.tolist())
        outcomes = np.where(flips, FLIPPED, np.where(answers.changed, CHANGED, UNCHANGED)).astype(np.int8)
        rows = self.rows[datapoints]
        texts: list[dict[int, str]] = [{} for _ in groups]
        for (group, column), text in answers.texts.items():
            # Answers under single neurons are shown to people; those under groups are a by-product of the search.
            if len(groups[group]) == 1:
                texts[group][int(rows[column])] = text
        self.log.add(names, [len(group) for group in groups], rows, outcomes, texts)
        self.n_run += outcomes.size
        self.progress(outcomes.size)
        return outcomes


def _equal_rows(missing: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Groups that lack the same datapoints: (columns, groups) for each such set, nothing for complete groups."""
    patterns, members = np.unique(missing, axis=0, return_inverse=True)
    return [
        (np.flatnonzero(pattern), np.flatnonzero(members.ravel() == number))
        for number, pattern in enumerate(patterns)
        if pattern.any()
    ]
