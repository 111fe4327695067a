"""A task from your own table: prompts, expected answers and, if you like, columns that become features.

The file is CSV, TSV, JSONL, JSON (a list of objects) or Parquet. `--match` says when an answer is right:

    exact    its first line equals the expected answer, letter case, spaces and end punctuation apart
    numeric  its first number differs from the expected one by at most tolerance * max(1, |expected|)
    regex    the expected answer is a regular expression that occurs in it
    label    of all expected answers of the table, the one that occurs first in it (as whole words) is the expected one

Feature columns hold numbers, or yes/no, or words; words give one feature per value. Some features of the prompt's text
are always there, so a table without feature columns works too.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import regex

from lib.answers import first_line, first_number, has_ended, number_has_ended
from lib.cli import UserError, require_file, rng
from lib.task_spec import AnswerScore, FeatureTaskSpec, TaskSettings, setting, target_statistics

if TYPE_CHECKING:
    import pandas as pd

    from lib.feature_representation import Feature

SEARCH_SECONDS = 2.0
MAX_GROUPS = 20
"""Accuracy is broken down by columns with at most this many values."""
_READERS = {".csv": "read_csv", ".tsv": "read_csv", ".jsonl": "read_json", ".ndjson": "read_json", ".json": "read_json",
            ".parquet": "read_parquet"}


class Match(Enum):
    """When an answer is right."""

    EXACT = "exact"
    """First line equal, letter case, spaces and end punctuation apart."""

    NUMERIC = "numeric"
    """First number equal within the tolerance."""

    REGEX = "regex"
    """The expected regular expression occurs."""

    LABEL = "label"
    """The first of all the table's expected answers to occur is the expected one."""


@dataclass(frozen=True)
class TableSettings(TaskSettings):
    """Flags of a table task."""

    max_new_tokens: int = setting(10, "greedy tokens per answer, here and in every ablation")
    task_file: str = setting("", "the table: .csv, .tsv, .jsonl, .json or .parquet", identity=False)
    prompt_col: str = setting("prompt", "column of the prompts")
    answer_col: str = setting("answer", "column of the expected answers")
    feature_cols: str = setting("*", "columns to make features of, separated by commas; *: all others; empty: none")
    match: Match = setting(Match.EXACT, "when an answer is right: exact, numeric, regex or label")
    tolerance: float = setting(0.0, "under --match numeric, allowed difference relative to max(1, |expected|)")
    prompt_template: str = setting("{prompt}", "text given to the model; {prompt} stands for the table's prompt, "
                                               "\\n for a line break")
    limit: int = setting(0, "number of prompts, drawn at random; 0: all")

    def __post_init__(self) -> None:
        super().__post_init__()
        if "{prompt}" not in self.prompt_template:
            raise UserError("--prompt_template must contain {prompt}")
        if self.tolerance < 0 or self.limit < 0:
            raise UserError("--tolerance and --limit must not be negative")
        if self.prompt_col == self.answer_col:
            raise UserError(f"--prompt_col and --answer_col are both {self.prompt_col!r}")


def read_table(path: Path) -> pd.DataFrame:
    """A table with all cells as text, missing ones empty.

    Raises:
        UserError: unknown kind of file, or not readable as what its name says.
    """
    import pandas as pd

    suffix = path.suffix.lower()
    if suffix not in _READERS:
        raise UserError(f"{path}: unknown kind of table {suffix!r}; give one of {', '.join(_READERS)}")
    options: dict[str, Any] = {"dtype": str, "keep_default_na": False} if suffix in (".csv", ".tsv") else {}
    if suffix == ".tsv":
        options["sep"] = "\t"
    if _READERS[suffix] == "read_json":
        options = {"lines": suffix != ".json", "dtype": False}
    try:
        frame = getattr(pd, _READERS[suffix])(path, **options)
    except (OSError, ValueError, ImportError, TypeError) as error:
        raise UserError(f"{path} cannot be read as a {suffix} table: {' '.join(str(error).split())}") from None
    if not isinstance(frame, pd.DataFrame) or frame.empty:
        raise UserError(f"{path} holds no rows")
    frame.columns = [str(name) for name in frame.columns]
    return frame.map(lambda value: "" if value is None or value != value else str(value).strip())


def normalized(text: str) -> str:
    """Text for exact comparison: one case, single spaces, no punctuation at the end."""
    return " ".join(text.split()).casefold().rstrip(".,;:!?")


class TableTask(FeatureTaskSpec):
    """Right or wrong answers to a user's prompts."""

    NAME = "table"
    Settings = TableSettings
    TOKENS_DICT_KEYS = "columns"
    SYSTEM_PROMPT = ("You study why a language model answers some prompts as expected and others not. Propose short, "
                     "testable properties of a prompt that tell the two groups apart and say different things: topic, "
                     "length, wording, form of the question, numbers, names, negation, required steps.")

    settings: TableSettings

    @property
    def depends_on_seed(self) -> bool:
        """Only a limited set is drawn at random."""
        return self.settings.limit > 0

    def input_files(self) -> dict[str, Path]:
        """The table."""
        if not self.settings.task_file:
            raise UserError("this task needs --task_file <table>, with --prompt_col and --answer_col")
        return {"table": require_file(self.settings.task_file, "table", "check --task_file")}

    def examples(self, seed: int) -> list[dict[str, Any]]:
        """One per row of the table, with its expected answer and its feature columns."""
        path = self.input_files()["table"]
        frame = read_table(path)
        chosen = self._feature_columns(list(frame.columns), path)
        if (frame[self.settings.prompt_col] == "").any():
            row = int((frame[self.settings.prompt_col] == "").to_numpy().argmax())
            raise UserError(f"{path}: the prompt of row {row + 1} is empty")
        if 0 < self.settings.limit < len(frame):
            rows = rng(seed, "table", "limit").choice(len(frame), self.settings.limit, replace=False)
            frame = frame.iloc[sorted(rows.tolist())]
        template = self.settings.prompt_template.replace("\\n", "\n")
        examples = [{"prompt": template.replace("{prompt}", row[self.settings.prompt_col]).strip(),
                     "expected_answer": row[self.settings.answer_col],
                     "columns": {name: row[name] for name in chosen}} for row in frame.to_dict("records")]
        self._check_expected(examples, path)
        if self.settings.match is not Match.LABEL:
            return examples
        labels = sorted({example["expected_answer"] for example in examples})
        return [{**example, "labels": labels} for example in examples]

    def _feature_columns(self, columns: list[str], path: Path) -> list[str]:
        """The table's columns that become features."""
        fixed = [self.settings.prompt_col, self.settings.answer_col]
        wanted = [name.strip() for name in self.settings.feature_cols.split(",") if name.strip()]
        missing = [name for name in [*fixed, *wanted] if name not in columns and name != "*"]
        if missing:
            raise UserError(f"{path} has no column {', '.join(missing)}; its columns are {', '.join(columns)}")
        return [name for name in columns if name not in fixed] if wanted == ["*"] else wanted

    def _check_expected(self, examples: Sequence[Mapping[str, Any]], path: Path) -> None:
        """Expected answers must be numbers, regular expressions or texts, as `--match` needs."""
        for number, example in enumerate(examples, start=1):
            expected = example["expected_answer"]
            problem = None if expected else "is empty"
            if expected and self.settings.match is Match.NUMERIC and _as_number(expected) is None:
                problem = f"is not a number: {expected!r}"
            if self.settings.match is Match.REGEX:
                try:
                    regex.compile(expected)
                except regex.error as error:
                    problem = f"is not a regular expression: {expected!r} ({error})"
            if problem:
                raise UserError(f"{path}: the expected answer of row {number} {problem}")

    # -- answers

    def score_answers(self, rows: Sequence[Mapping[str, Any]], answers: Sequence[str]) -> list[AnswerScore]:
        """Right or wrong by `--match`."""
        return [AnswerScore(self._is_right(row, answer)) for row, answer in zip(rows, answers, strict=True)]

    def _is_right(self, row: Mapping[str, Any], answer: str) -> bool:
        expected = str(row["expected_answer"])
        if self.settings.match is Match.EXACT:
            return normalized(first_line(answer)) == normalized(expected)
        if self.settings.match is Match.REGEX:
            return _occurs(expected, answer)
        if self.settings.match is Match.LABEL:
            return first_label(answer, _label_list(row["labels"])) == normalized(expected)
        number, gold = first_number(first_line(answer)), _as_number(expected)
        if number is None or gold is None:
            return False
        return abs(float(number) - gold) <= self.settings.tolerance * max(1.0, abs(gold))

    def answer_is_complete(self, text: str) -> bool:
        """True once the compared part of the answer has ended."""
        if self.settings.match is Match.EXACT:
            return has_ended(text)
        if self.settings.match is Match.NUMERIC:
            return has_ended(text) or number_has_ended(text.lstrip().replace("−", "-"))
        return False

    def dataset_from_cache(self, cache: Any) -> pd.DataFrame:
        """One row per prompt; the table's feature columns come with the prefix `input_`."""
        import pandas as pd

        from lib.tasks.text_features import INPUT_PREFIX

        needed = {"prompt", "expected_answer", "columns", "raw_output", "is_correct"}
        if not isinstance(cache, list) or not cache or not all(isinstance(i, dict) and needed <= set(i) for i in cache):
            raise UserError("not a cache of a table task's answers; is it another task's, or empty?")
        rows = [{**{key: value for key, value in item.items() if key != "columns"},
                 **{f"{INPUT_PREFIX}{name}": value for name, value in item["columns"].items()}} for item in cache]
        return pd.DataFrame(rows).astype({"is_correct": bool})

    def get_basic_statistics(self, frame: pd.DataFrame) -> dict[str, Any]:
        """Accuracy, also by each column with few values."""
        from lib.tasks.text_features import INPUT_PREFIX

        statistics = target_statistics(frame, self.DEFAULT_TARGETS) | {"accuracy": float(frame["is_correct"].mean())}
        for name in frame.columns:
            if name.startswith(INPUT_PREFIX) and frame[name].nunique() <= MAX_GROUPS:
                groups = sorted(frame.groupby(name)["is_correct"])
                statistics[f"accuracy_by_{name.removeprefix(INPUT_PREFIX)}"] = {
                    str(value): {"accuracy": float(labels.mean()), "n": len(labels)} for value, labels in groups}
        return statistics

    # -- features

    def parse_prompt_row(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """`columns`: the table's feature columns, by name."""
        from lib.tasks.text_features import INPUT_PREFIX

        return {"columns": {name.removeprefix(INPUT_PREFIX): value for name, value in row.items()
                            if isinstance(name, str) and name.startswith(INPUT_PREFIX)}}

    def seed_features(self, frame: pd.DataFrame) -> list[Feature]:
        """Features of the prompt's text, then those of the table's columns."""
        from lib.tasks.text_features import INPUT_PREFIX, column_features, text_features

        names = [name for name in frame.columns if name.startswith(INPUT_PREFIX)]
        columns = [column_features(name.removeprefix(INPUT_PREFIX), frame[name].tolist()) for name in names]
        return [*text_features(), *itertools.chain.from_iterable(columns)]


def _occurs(pattern: str, answer: str) -> bool:
    """Whether a table's pattern occurs in an answer; one that searches without end is the table's mistake."""
    try:
        return regex.search(pattern, answer, timeout=SEARCH_SECONDS) is not None
    except TimeoutError:
        raise UserError(f"the regular expression {pattern!r} takes more than {SEARCH_SECONDS:g} s on an answer of "
                        f"{len(answer)} characters; write one without nested repetitions") from None


def _as_number(text: str) -> float | None:
    number = first_number(text.replace("−", "-"))
    return None if number is None or normalized(text).replace(",", "") != number.rstrip(".") else float(number)


def _label_list(labels: Any) -> list[str]:
    """Labels as a list: in `scores.csv` they are JSON."""
    return json.loads(labels) if isinstance(labels, str) else list(labels)


def first_label(answer: str, labels: Sequence[str]) -> str | None:
    """The normalized label that occurs first in an answer as whole words; of two at one place the longer one."""
    text = normalized(answer)
    found = []
    for label in map(normalized, labels):
        match = re.search(rf"(?<!\w){re.escape(label)}(?!\w)", text)
        if match:
            found.append((match.start(), -len(label), label))
    return min(found)[2] if found else None


TASK_SPEC = TableTask()
