"""The task interface: a behaviour of a language model that can be prompted for, scored and described by features.

To write a task, subclass `FeatureTaskSpec` in a module of your own and bind an instance to `TASK_SPEC` there:

    class MySettings(TaskSettings): ...   # a frozen dataclass; each field, made with `setting()`, is a flag of stage 1
    class MyTask(FeatureTaskSpec): ...    # the two abstract methods below; the others have defaults
    TASK_SPEC = MyTask()

and give `--task_module my_package.my_module` to every stage. Stage 1 records the settings; later stages get the task as
stage 1 ran it from `resolve_task_spec(module, features_scores_dir)`, so its flags are typed once. A task module should
import nothing heavy at its top: it is loaded to print `--help`. `docs/tasks.md` has a complete example.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self, get_type_hints

from lib.artifacts import expecting, read_json, write_json
from lib.cli import UserError, finite

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

    from lib.feature_representation import Feature

TASK_SETTINGS_FILE = "task_settings.json"
DEFAULT_TASK_MODULE = "lib.tasks.arithmetic_task"


class AnswerScore(NamedTuple):
    """What an answer shows: True or False for the behaviour, None if it cannot be told; and why."""

    label: bool | None
    reason: str = ""


# ---------------------------------------------------------------- settings that are flags

def setting(default: Any, help_text: str, *, env: str | None = None, choices: Sequence[str] | None = None,
            identity: bool = True) -> Any:
    """A field of `TaskSettings`: default, help of its flag, environment variable that replaces the default, choices.

    `identity=False` is for one that only says where something is (a path, a server): it is recorded, but answers made
    with another value of it are still the same answers.
    """
    return dataclasses.field(default=default, metadata={"help": help_text, "env": env, "choices": choices,
                                                        "identity": identity})


@dataclasses.dataclass(frozen=True)
class TaskSettings:
    """What changes a task's prompts, answers or labels. Subclasses are frozen dataclasses; fields have plain types."""

    max_new_tokens: int = setting(10, "greedy tokens per answer, here and in every ablation")

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"--max_new_tokens {self.max_new_tokens}: an answer needs at least 1 token")

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser, title: str) -> None:
        """One flag per field: booleans as `--x`/`--no-x`, enums as a choice of their values."""
        group = parser.add_argument_group(title)
        hints = get_type_hints(cls)
        for field in dataclasses.fields(cls):
            options = _flag_options(hints[field.name], field)
            group.add_argument(f"--{field.name}", **options)

    @classmethod
    def from_arguments(cls, args: argparse.Namespace) -> Self:
        """The settings that the flags (or their environment variables) ask for."""
        return cls.from_json({field.name: getattr(args, field.name) for field in dataclasses.fields(cls)})

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Settings from recorded values; absent ones take their default, unknown ones are refused."""
        hints = get_type_hints(cls)
        unknown = sorted(set(values) - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise UserError(f"unknown task settings {', '.join(unknown)}: recorded for another task or version; "
                            "run stage 1 again")
        return cls(**{name: hints[name](value) if _is_enum(hints[name]) else value for name, value in values.items()})

    def to_json(self) -> dict[str, Any]:
        """All settings by name, enums by value."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value.value if isinstance(value, Enum) else value for name, value in values.items()}

    def identity(self) -> dict[str, Any]:
        """The settings that decide prompts, answers or labels."""
        places = {field.name for field in dataclasses.fields(self) if not field.metadata["identity"]}
        return {name: value for name, value in self.to_json().items() if name not in places}


def _is_enum(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Enum)


def _flag_options(kind: Any, field: dataclasses.Field) -> dict[str, Any]:
    """argparse options of one settings field."""
    text, env = field.metadata["help"], field.metadata["env"]
    default = field.default.value if isinstance(field.default, Enum) else field.default
    if kind is bool:
        options: dict[str, Any] = {"action": argparse.BooleanOptionalAction}
    elif _is_enum(kind):
        options = {"choices": [member.value for member in kind]}
    else:
        options = {"type": finite if kind is float else kind, "choices": field.metadata["choices"]}
    if env:
        text += f" [environment: {env}]"
        default = _environment_value(env, kind, default)
    return {**options, "default": default, "help": text}


def _environment_value(env: str, kind: Any, default: Any) -> Any:
    """The default of a flag, unless its environment variable is set."""
    text = os.environ.get(env, "").strip()
    if not text:
        return default
    if kind is bool:
        return text.lower() not in ("0", "false", "no", "off")
    try:
        return text if _is_enum(kind) else kind(text)
    except ValueError:
        raise UserError(f"environment variable {env}={text!r} is not a valid {kind.__name__}") from None


# ---------------------------------------------------------------- the interface

class FeatureTaskSpec(ABC):
    """A behaviour to study. Instances are immutable: `configured()` gives a task with other settings."""

    NAME: ClassVar[str]
    """Short name, as in `lib/tasks/<NAME>_task.py`."""
    DEFAULT_INPUT: ClassVar[str] = "prompt"
    """Column of the prompts."""
    DEFAULT_OUTPUT: ClassVar[str] = "raw_output"
    """Column of the answers."""
    DEFAULT_TARGETS: ClassVar[tuple[str, ...]] = ("is_correct",)
    """Boolean label columns; the first is the behaviour that stages 4 to 7 study, rules are extracted for all."""
    GROUP_COLUMN: ClassVar[str | None] = None
    """Rows that share this column's value (variants of one request) stay on one side of the TRAIN/TEST split."""
    POSITIVE_NAME: ClassVar[str] = "correctly answered"
    NEGATIVE_NAME: ClassVar[str] = "incorrectly answered"
    SYSTEM_PROMPT: ClassVar[str] = ""
    """Guidance for the language model that proposes features."""
    TOKENS_DICT_KEYS: ClassVar[str] = ""
    """Comma-separated keys of the `info` dictionary that proposed feature functions may use."""
    Settings: ClassVar[type[TaskSettings]] = TaskSettings

    def __init__(self, settings: TaskSettings | None = None, recorded_in: Path | None = None) -> None:
        self.settings = settings or self.Settings()
        self.recorded_in = recorded_in
        """The file that the settings come from; None if they are the user's own of this moment."""

    def configured(self, settings: TaskSettings, recorded_in: Path | None = None) -> Self:
        """This task with other settings."""
        return type(self)(settings, recorded_in)

    @property
    def MAX_NEW_TOKENS(self) -> int:  # noqa: N802 (published name)
        """Greedy tokens per answer."""
        return self.settings.max_new_tokens

    @property
    def SEED_FEATURES(self) -> list[Feature]:  # noqa: N802 (published name)
        """Built-in features, our own code: they run natively on whole columns."""
        return []

    # -- stage 1: prompts, answers, labels

    @property
    def depends_on_seed(self) -> bool:
        """True if `examples` uses its seed: then answers made with another seed do not match."""
        return True

    def input_files(self) -> dict[str, Path]:
        """Files that `examples` reads, by what they are: answers made from other content do not match."""
        return {}

    @abstractmethod
    def examples(self, seed: int) -> list[dict[str, Any]]:
        """The datapoints, each with the prompt (stripped, as the model will see it) and whatever scoring needs."""

    @abstractmethod
    def score_answers(self, rows: Sequence[Mapping[str, Any]], answers: Sequence[str]) -> list[AnswerScore]:
        """The label of each answer to the prompt of its row (a row of `scores.csv` as a dictionary)."""

    def is_answer_positive(self, rows: Sequence[Mapping[str, Any]], answers: Sequence[str]) -> list[bool]:
        """`score_answers` where every answer must have a label.

        Raises:
            UserError: an answer could not be scored (a judge is down, say): no label is made up.
        """
        scores = self.score_answers(rows, answers)
        unknown = [score.reason for score in scores if score.label is None]
        if unknown:
            raise UserError(f"{len(unknown)} of {len(scores)} answers have no label ({unknown[0]}); "
                            "mend the cause and run again")
        return [bool(score.label) for score in scores]

    def cache_from_answers(self, examples: Sequence[dict[str, Any]], answers: Sequence[str]) -> Any:
        """The content of `llm_io_data.pkl`, built-in containers and scalars only: by default one dictionary per
        datapoint, the example with its answer and its label."""
        scores = self.score_answers(examples, answers)
        return [{**example, self.DEFAULT_OUTPUT: answer, self.DEFAULT_TARGETS[0]: score.label}
                for example, answer, score in zip(examples, answers, scores, strict=True)]

    def dataset_from_cache(self, cache: Any) -> pd.DataFrame:
        """One row per datapoint: prompt, answer, targets (boolean, missing if unknown), other columns.

        Raises:
            UserError: the content is not this task's.
        """
        import pandas as pd

        needed = {self.DEFAULT_INPUT, self.DEFAULT_OUTPUT, *self.DEFAULT_TARGETS}
        if not isinstance(cache, list) or not cache or not all(isinstance(i, dict) and needed <= set(i) for i in cache):
            raise UserError(f"not a cache of answers of the task {self.NAME} (dictionaries with "
                            f"{', '.join(sorted(needed))}), or empty; is it another task's?")
        frame = pd.DataFrame(cache)
        frame[self.DEFAULT_OUTPUT] = frame[self.DEFAULT_OUTPUT].fillna("")
        return typed_labels(frame, self.DEFAULT_TARGETS)

    def mend_labels(self, cache: Any) -> Any | None:
        """The cache with labels that could not be made before; None if there is nothing to mend or it failed again."""
        return None

    def answer_is_complete(self, text: str) -> bool:
        """True if no further token can change the label of an answer that begins with `text`: decoding may stop."""
        return False

    def label_is_settled(self, row: Mapping[str, Any], text: str) -> bool:
        """True if every answer to the row's prompt that begins with `text` has the label of `text` itself.

        Unlike `answer_is_complete` it may use what the row says of the right answer. The search asks it of answers
        under groups of neurons and leaves out what cannot matter.
        """
        return False

    def get_basic_statistics(self, frame: pd.DataFrame) -> dict[str, Any]:
        """What `dataset_stats.json` says; by default the count and share of each target."""
        return target_statistics(frame, self.DEFAULT_TARGETS)

    # -- stage 2: features

    def seed_features(self, frame: pd.DataFrame) -> list[Feature]:
        """The built-in features for this dataset: `SEED_FEATURES`, unless they depend on its columns."""
        return self.SEED_FEATURES

    def parse_prompt_row(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The `info` dictionary of a row, the second argument of proposed feature functions."""
        return {}

    def native_columns(self, frame: pd.DataFrame) -> Mapping[str, np.ndarray]:
        """Columns [row] that the seed features compute from, parsed once for the whole table."""
        return {name: frame[name].to_numpy() for name in frame.columns}


def typed_labels(frame: pd.DataFrame, targets: Sequence[str]) -> pd.DataFrame:
    """The frame with its target columns as booleans, nullable ones where a label is not known.

    Raises:
        UserError: a label is something else.
    """
    for name in targets:
        known = frame[name].dropna()
        if not known.map(lambda label: isinstance(label, bool)).all():
            raise UserError(f"the label {name} of a datapoint is neither true nor false nor unknown")
        frame[name] = frame[name].astype(bool if len(known) == len(frame) else "boolean")
    return frame


def target_statistics(frame: pd.DataFrame, targets: Sequence[str]) -> dict[str, Any]:
    """`n_examples`, and per target `n_labeled_<t>`, `pct_<t>` (a share in [0, 1], None without labels), `n_<t>`."""
    statistics: dict[str, Any] = {"n_examples": len(frame)}
    for name in targets:
        labels = frame[name].dropna()
        positive = int(labels.astype(bool).sum())
        statistics |= {f"n_labeled_{name}": len(labels), f"pct_{name}": positive / len(labels) if len(labels) else None,
                       f"n_{name}": positive}
    return statistics


# ---------------------------------------------------------------- finding a task

def resolve_task_spec(module: str, features_scores_dir: str | Path | None = None) -> FeatureTaskSpec:
    """The `TASK_SPEC` of a module, with the settings that stage 1 recorded if a feature folder is given.

    A folder without recorded settings (an older archive) gives the task's defaults.

    Raises:
        UserError: no such module, or it has no TASK_SPEC.
    """
    if not all(piece.isidentifier() for piece in module.split(".")):
        raise UserError(f"no task module {module!r}; a module's name looks like lib.tasks.arithmetic_task")
    try:
        task = importlib.import_module(module).TASK_SPEC
    except ModuleNotFoundError as error:
        if error.name and (module == error.name or module.startswith(error.name + ".")):
            raise UserError(f"no task module {module!r}; built-in ones are lib.tasks.<name>_task, "
                            "with <name> as in the folder lib/tasks") from None
        raise
    except AttributeError:
        raise UserError(f"task module {module!r} has no TASK_SPEC; bind an instance of FeatureTaskSpec to it") from None
    if features_scores_dir is None:
        return task
    path = Path(features_scores_dir) / TASK_SETTINGS_FILE
    if not path.is_file():
        return task
    settings = read_task_settings(path, module)
    with expecting("a record of task settings", path):
        return task.configured(task.Settings.from_json(settings), recorded_in=path)


def read_task_settings(path: str | Path, module: str) -> dict[str, Any]:
    """The recorded settings of `module`'s task; a `UserError` if they belong to another task."""
    stored = read_json(path, "task settings")
    if not isinstance(stored, dict) or stored.get("task_module") != module:
        recorded = stored.get("task_module") if isinstance(stored, dict) else None
        raise UserError(f"{path} was recorded for the task {recorded!r}, not {module!r}; "
                        "give the same --task_module as in stage 1")
    if not isinstance(stored.get("settings"), dict):
        raise UserError(f"{path} holds no settings of a task; run stage 1 again")
    return stored["settings"]


def write_task_settings(folder: str | Path, module: str, task: FeatureTaskSpec) -> Path:
    """Record beside the feature table how the task was run; `resolve_task_spec` reads it."""
    path = Path(folder) / TASK_SETTINGS_FILE
    write_json(path, {"task_module": module, "task": task.NAME, "settings": task.settings.to_json()})
    return path


def task_module_of(argv: Sequence[str] | None) -> str:
    """The task module that a command line names, or the default one: needed before its flags can be parsed."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--task_module", default=DEFAULT_TASK_MODULE)
    known, _ = early.parse_known_args(sys.argv[1:] if argv is None else list(argv))
    return known.task_module


def add_task_settings(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> None:
    """Add the flags of the task that the command line names; a task that cannot be loaded ends the command."""
    try:
        task = resolve_task_spec(task_module_of(argv))
        task.Settings.add_arguments(parser, f"task {task.NAME}")
    except UserError as error:
        parser.exit(2, f"error: {error}\n")
