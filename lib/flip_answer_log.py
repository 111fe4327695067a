"""The store of ablated answers: an append-only file of lines, one ablated group each, that survives being killed.

A line holds the group's neurons, the packed bits of the datapoints whose answer changed, and those answers. The first
line names the fingerprint of everything that determines the answers and holds the baseline answers. Whatever follows
the first line that is torn or altered is dropped, and measured again.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lib.artifacts import atomic_write
from lib.checked_lines import cut_off, encode_line, read_lines, write_lines
from lib.cli import UserError
from lib.neurons import Neuron

Group = tuple[Neuron, ...]


class ChangedAnswers(NamedTuple):
    """Datapoints (positions, ascending) whose answer changed, and the new answers in the same order."""

    rows: np.ndarray
    answers: tuple[str, ...]


def group_key(group: Iterable[Neuron]) -> str:
    """Name of a group: its neurons in order, joined by `+`; empty for the no-op edit."""
    return "+".join(str(neuron) for neuron in sorted(group, key=lambda neuron: neuron.sort_key))


class AnswerLog:
    """Answers of `n_rows` datapoints, before ablation and under the ablation of each group.

    load: read what the file holds. mend: cut off a torn last line on the disk too; only for who goes on writing.
    """

    def __init__(
        self, path: str | Path, fingerprint: str, n_rows: int, *, load: bool = True, mend: bool = True
    ) -> None:
        self.path = Path(path)
        self.fingerprint = fingerprint
        self.n_rows = n_rows
        self.baseline: list[str] | None = None
        self.d_model = 0
        self.runs: dict[str, ChangedAnswers] = {}
        if load and self.path.is_file():
            self._load(mend)

    def start(self, baseline: Sequence[str], d_model: int) -> None:
        """Begin the file with the baseline answers and the width of the model."""
        if len(baseline) != self.n_rows:
            raise ValueError(f"{len(baseline)} baseline answers for {self.n_rows} datapoints")
        self.baseline, self.d_model = list(baseline), d_model
        write_lines(self.path, [self._head()], anew=True)

    def append(self, groups: Sequence[Group], runs: Sequence[ChangedAnswers]) -> None:
        """Store the runs; they are on disk when this returns."""
        keys = [group_key(group) for group in groups]
        lines = [encode_run(key, run, self.n_rows) for key, run in zip(keys, runs, strict=True)]
        write_lines(self.path, lines, anew=False)
        self.runs.update(zip(keys, runs, strict=True))

    def extract(self, path: str | Path, groups: Sequence[Group], datapoints: np.ndarray) -> AnswerLog:
        """Write (anew) a log of some groups and datapoints (positions, ascending), renumbered from 0, and return it."""
        extracted = AnswerLog(path, self.fingerprint, len(datapoints), load=False)
        extracted.baseline, extracted.d_model = [self.baseline[datapoint] for datapoint in datapoints], self.d_model
        for group in groups:
            run = self.runs[group_key(group)]
            answers = dict(zip(run.rows.tolist(), run.answers, strict=True))
            rows = np.flatnonzero(np.isin(datapoints, run.rows))
            extracted.runs[group_key(group)] = ChangedAnswers(
                rows, tuple(answers[int(datapoints[row])] for row in rows)
            )
        with atomic_write(path, "wb") as handle:
            handle.write(encode_line(extracted._head()))
            handle.writelines(encode_line(encode_run(*run, extracted.n_rows)) for run in extracted.runs.items())
        return extracted

    def _head(self) -> dict[str, Any]:
        """The first line."""
        return {
            "fingerprint": self.fingerprint,
            "n_rows": self.n_rows,
            "d_model": self.d_model,
            "baseline": self.baseline,
        }

    @classmethod
    def read(cls, path: str | Path) -> AnswerLog:
        """A finished log, whatever its settings; the file stays as it is."""
        lines, n_good = read_lines(Path(path))
        if not lines or n_good < Path(path).stat().st_size:
            raise UserError(f"{path} is damaged; delete it and run stage 7 again")
        head = lines[0]
        if not (isinstance(head, dict) and {"fingerprint", "n_rows"} <= head.keys()):
            raise UserError(f"{path} is no log of answers; delete it and run stage 7 again")
        return cls(path, head["fingerprint"], head["n_rows"], mend=False)

    def missing(self, groups: Iterable[Group]) -> list[Group]:
        """Those of the groups whose answers are not stored, each once."""
        return [group for group in dict.fromkeys(groups) if group_key(group) not in self.runs]

    def _load(self, mend: bool) -> None:
        """Read the whole lines and cut off the rest, so that appending goes on after a whole one."""
        lines, n_good = read_lines(self.path)
        try:
            head: dict[str, Any] = lines[0] if lines else {"fingerprint": self.fingerprint, "n_rows": self.n_rows}
            if (head["fingerprint"], head["n_rows"]) != (self.fingerprint, self.n_rows):
                raise ValueError("it belongs to other settings")
            self.runs = dict(decode_run(line, self.n_rows) for line in lines[1:])
            self.baseline, self.d_model = head.get("baseline"), head.get("d_model", 0)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.path} is damaged ({error}); delete it and run stage 7 again") from None
        if mend:
            cut_off(self.path, n_good)


def encode_run(key: str, run: ChangedAnswers, n_rows: int) -> dict[str, Any]:
    """The JSON line of one group."""
    bits = np.zeros(n_rows, dtype=bool)
    bits[run.rows] = True
    return {
        "group": key,
        "changed": base64.b64encode(np.packbits(bits).tobytes()).decode("ascii"),
        "answers": list(run.answers),
    }


def decode_run(record: dict[str, Any], n_rows: int) -> tuple[str, ChangedAnswers]:
    """The group's key and run of a JSON line; ValueError if bits and answers disagree."""
    packed = np.frombuffer(base64.b64decode(record["changed"], validate=True), dtype=np.uint8)
    rows = np.flatnonzero(np.unpackbits(packed))
    if len(packed) != -(-n_rows // 8) or len(rows) != len(record["answers"]) or (rows >= n_rows).any():
        raise ValueError(f"bits and answers of group {record['group']!r} disagree")
    return record["group"], ChangedAnswers(rows, tuple(record["answers"]))
