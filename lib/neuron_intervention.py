"""Flip matrices: what the ablation of each neuron (or group) does to the answer of every datapoint.

The engine answers, a log keeps the answers, a task labels them. Labels are always derived from stored answers, so a
change of the scorer never needs the model again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from lib.flip_answer_log import AnswerLog, ChangedAnswers, Group, group_key
from lib.neurons import Neuron

UNKNOWN = -1


class Engine(Protocol):
    """What is needed of `lib.ablation_engine.AblationEngine`."""

    @property
    def baseline_answers(self) -> Sequence[str]:
        """Answers without an ablation, [datapoint]."""

    def prepare(self, groups: Sequence[Sequence[Neuron]]) -> None:
        """Get ready for all these groups at once."""

    def answers(
        self,
        groups: Sequence[Sequence[Neuron]],
        datapoints: Sequence[int],
        progress: Callable[[int], None] | None = None,
    ) -> Any:
        """`.changed` bool [group, datapoint] and `.texts`, a dict from (group, datapoint) to the changed answer.

        progress: told the number of (group, datapoint) pairs just answered.
        """


class Scorer(Protocol):
    """What is needed of a task."""

    def score_answers(self, rows: Sequence[Any], answers: Sequence[str]) -> Sequence[Any]:
        """For each (row, answer) an object whose `.label` is True, False, or None where it cannot be told."""


@dataclass(frozen=True)
class FlipMatrix:
    """Labels before and after the ablation of each neuron (or group).

    baseline: bool [row]. ablated: int8 [neuron, row], 1 true, 0 false, UNKNOWN where the task could not tell.
    changed: bool [neuron, row], the answer's text is not the baseline's (its label may be the same).
    """

    baseline: np.ndarray
    ablated: np.ndarray
    changed: np.ndarray

    @property
    def known(self) -> np.ndarray:
        """Where the label after ablation is known, bool [neuron, row]."""
        return self.ablated != UNKNOWN

    @property
    def flips(self) -> np.ndarray:
        """Where the label changed, bool [neuron, row]."""
        return self.known & ((self.ablated == 1) != self.baseline)

    def take_rows(self, mask: np.ndarray) -> FlipMatrix:
        """The rows where the mask [row] is True."""
        return FlipMatrix(self.baseline[mask], self.ablated[:, mask], self.changed[:, mask])


def measure_answers(
    engine: Engine,
    groups: Sequence[Group],
    log: AnswerLog,
    *,
    chunk: int = 128,
    progress: Callable[[int], None] | None = None,
) -> int:
    """Ablate each group on all datapoints of the log, skipping those it has; returns how many were measured.

    Groups go to the engine in chunks of equal size, those of the last layers first (the cheapest), and each chunk is
    stored before the next. Where the baseline of all datapoints does not fit into memory the engine computes it once
    per chunk: small chunks lose little when killed, large ones are faster.
    progress: told the number of answers just found.
    """
    pending = sorted(log.missing(groups), key=_first_place, reverse=True)
    if pending:
        engine.prepare(pending)
    n_chunks = -(-len(pending) // chunk)
    for number in range(n_chunks):
        batch = pending[number * len(pending) // n_chunks : (number + 1) * len(pending) // n_chunks]
        result = engine.answers(batch, range(log.n_rows), progress)
        log.append(batch, [_changed_answers(result, place) for place in range(len(batch))])
    return len(pending)


def _first_place(group: Group) -> tuple[int, bool, int, int]:
    """Where a group first touches the network; an empty one never does, which is past the end."""
    return min((neuron.sort_key for neuron in group), default=(1_000_000, True, 0, 0))


def _changed_answers(result: Any, group: int) -> ChangedAnswers:
    rows = np.flatnonzero(result.changed[group])
    return ChangedAnswers(rows, tuple(result.texts[group, int(row)] for row in rows))


class AnswerLabels:
    """Labels of answers by the task, each distinct (row, answer) asked once."""

    def __init__(self, task: Scorer, records: Sequence[Any]) -> None:
        self._task = task
        self._records = records
        self._known: dict[tuple[int, str], int] = {}

    def __call__(self, rows: Iterable[int], answers: Iterable[str]) -> np.ndarray:
        """Labels int8 of answers to the rows (positions in the records): 1, 0 or UNKNOWN."""
        keys = [(int(row), answer) for row, answer in zip(rows, answers, strict=True)]
        new = [key for key in dict.fromkeys(keys) if key not in self._known]
        if new:
            scores = self._task.score_answers([self._records[row] for row, _ in new], [answer for _, answer in new])
            for key, score in zip(new, scores, strict=True):
                self._known[key] = UNKNOWN if score.label is None else int(score.label)
        return np.array([self._known[key] for key in keys], dtype=np.int8)


def label_flips(groups: Sequence[Group], log: AnswerLog, labels: AnswerLabels) -> FlipMatrix:
    """Score stored answers: the flip matrix of the groups, in their order."""
    baseline = labels(range(log.n_rows), log.baseline)
    ablated = np.tile(baseline, (len(groups), 1))
    changed = np.zeros(ablated.shape, dtype=bool)
    for position, group in enumerate(groups):
        run = log.runs[group_key(group)]
        changed[position, run.rows] = True
        ablated[position, run.rows] = labels(run.rows, run.answers)
    ablated[:, baseline == UNKNOWN] = UNKNOWN
    return FlipMatrix(baseline == 1, ablated, changed)


def random_neurons(
    like: Sequence[Neuron], d_model: int, exclude: Iterable[Neuron], random: np.random.Generator
) -> list[Neuron]:
    """For each neuron given a random one of the same component, none of them excluded or drawn twice.

    Fewer are returned where a component has no more free ones.
    """
    taken = set(exclude)
    drawn: list[Neuron] = []
    for neuron in like:
        free = [index for index in range(d_model) if Neuron(neuron.layer_label, index) not in taken]
        if free:
            drawn.append(Neuron(neuron.layer_label, int(random.choice(free))))
            taken.add(drawn[-1])
    return drawn
