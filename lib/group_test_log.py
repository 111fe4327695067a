"""The log of group tests: an append-only file, one line per test, that survives being killed.

The first line names the fingerprint of everything that decides a test's outcome; a log with another fingerprint is
started anew. Whatever follows the first line that is torn or altered is dropped: those tests are done again. Tests are
kept per datapoint, so rules that share datapoints share tests.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lib.checked_lines import cut_off, read_lines, write_lines
from lib.neurons import Neuron

UNKNOWN, UNCHANGED, CHANGED, FLIPPED = -1, 0, 1, 2
"""Outcome of a test on one datapoint: not tested, same answer, another answer with the same label, another label."""
_SYMBOLS = "012"


def neuron_code(neuron: Neuron) -> int:
    """A number that stands for the neuron in group names, the same in every run."""
    head = -1 if neuron.head is None else neuron.head
    return (neuron.layer << 44) | ((head + 1) << 28) | neuron.index


def group_name(codes: np.ndarray) -> str:
    """Name of a group of neurons, whatever their order: a digest of their codes [member]."""
    return hashlib.blake2b(np.sort(codes).astype("<i8").tobytes(), digest_size=12).hexdigest()


class GroupTestLog:
    """Outcomes of group tests by group name and datapoint row, in memory and on disk.

    path: the file, or None to keep outcomes in memory only. fingerprint: of all that decides an outcome.
    """

    def __init__(self, path: str | Path | None, fingerprint: str) -> None:
        self.path = None if path is None else Path(path)
        self.fingerprint = fingerprint
        self._column_of: dict[int, int] = {}
        self._outcomes: dict[str, np.ndarray] = {}
        self._answers: dict[str, dict[int, str]] = {}
        self._point_sets: dict[tuple[int, ...], int] = {}
        if self.path is not None:
            self._open()

    def __len__(self) -> int:
        return len(self._outcomes)

    def outcomes(self, names: Sequence[str], rows: np.ndarray) -> np.ndarray:
        """Outcome of each group on each datapoint row, UNKNOWN where not tested, int8 [group, datapoint]."""
        found = np.full((len(names), len(rows)), UNKNOWN, dtype=np.int8)
        columns = np.array([self._column_of.get(int(row), -1) for row in rows], dtype=np.int64)
        for place, name in enumerate(names):
            stored = self._outcomes.get(name)
            if stored is not None:
                known = (columns >= 0) & (columns < len(stored))
                found[place, known] = stored[columns[known]]
        return found

    def answers(self, name: str) -> dict[int, str]:
        """Changed answers of a group by datapoint row, for groups stored with answers."""
        return self._answers.get(name, {})

    def add(
        self,
        names: Sequence[str],
        sizes: Sequence[int],
        rows: np.ndarray,
        outcomes: np.ndarray,
        answers: Sequence[dict[int, str]],
    ) -> None:
        """Store tests of some groups on the same datapoint rows; on disk when this returns.

        outcomes: [group, datapoint]. answers: per group the changed answers worth keeping, by datapoint row.
        """
        point_set, lines = self._point_set(tuple(int(row) for row in rows))
        for name, size, values, texts in zip(names, sizes, outcomes, answers, strict=True):
            line = {"p": point_set, "g": name, "s": size, "v": "".join(_SYMBOLS[value] for value in values)}
            lines.append(line | ({"t": {str(row): text for row, text in texts.items()}} if texts else {}))
            self._keep(name, rows, values, texts)
        self._write(lines)

    # ------------------------------------------------------------ inside

    def _point_set(self, rows: tuple[int, ...]) -> tuple[int, list[dict[str, Any]]]:
        """Number of a set of datapoint rows, and the line that introduces it if it is new."""
        if rows in self._point_sets:
            return self._point_sets[rows], []
        number = self._point_sets[rows] = len(self._point_sets)
        return number, [{"points": number, "rows": list(rows)}]

    def _keep(self, name: str, rows: np.ndarray | Sequence[int], values: np.ndarray, texts: dict[int, str]) -> None:
        columns = [self._column_of.setdefault(int(row), len(self._column_of)) for row in rows]
        stored = self._outcomes.get(name)
        if stored is None or len(stored) <= max(columns):
            grown = np.full(len(self._column_of), UNKNOWN, dtype=np.int8)
            if stored is not None:
                grown[: len(stored)] = stored
            stored = self._outcomes[name] = grown
        stored[columns] = values
        if texts:
            self._answers.setdefault(name, {}).update(texts)

    def _write(self, lines: list[dict[str, Any]], *, anew: bool = False) -> None:
        if self.path is not None:
            write_lines(self.path, lines, anew=anew)

    def _open(self) -> None:
        """Read the whole lines of a log of this fingerprint and cut off the rest, or start a new file."""
        lines, n_good = read_lines(self.path)
        if not lines or lines[0].get("fingerprint") != self.fingerprint:
            self._write([{"log": 1, "fingerprint": self.fingerprint}], anew=True)
            return
        cut_off(self.path, n_good)
        rows_of: dict[int, list[int]] = {}
        for line in lines[1:]:
            if "points" in line:
                rows_of[line["points"]] = line["rows"]
                self._point_sets[tuple(line["rows"])] = line["points"]
            else:
                values = np.frombuffer(line["v"].encode(), dtype=np.uint8).astype(np.int8) - ord(_SYMBOLS[0])
                texts = {int(row): text for row, text in line.get("t", {}).items()}
                self._keep(line["g"], rows_of[line["p"]], values, texts)

