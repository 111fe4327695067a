"""What the page of one run is made from: every artifact through its own reader, with what could not be used noted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lib.cli import UserError
from lib.reporting.artifacts import REGIMES, ModelRoot, Reading, RunFolder, Status, expect, read_json, read_table
from lib.reporting.issues import Issue, IssueLog
from lib.reporting.localization import Agonist, agonists, knockout
from lib.reporting.rules import DEFAULT_MIN_COVERAGE, DEFAULT_THRESHOLD, load_rule_rows
from lib.reporting.scopes import Scope

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

    from lib.flip_answer_log import AnswerLog
    from lib.flip_table import FlipTable
    from lib.neurons import Neuron
    from lib.scores_table import ScoresTable, TableLayout
    from lib.task_spec import FeatureTaskSpec

Value = TypeVar("Value")
ANSWERS_FILE = "ablated_answers.jsonl"
_MAX_LAYERS, _MAX_WIDTH = 10_000, 2**31
_TASKS_DIR = Path(__file__).resolve().parents[2] / "tasks"


@dataclass(frozen=True)
class PageOptions:
    """What the page shows. max_prompts: flipped prompts per neuron."""

    max_prompts: int = 20
    hq_threshold: float = DEFAULT_THRESHOLD
    min_coverage: float = DEFAULT_MIN_COVERAGE


def is_possible(neuron: Neuron) -> bool:
    """Whether a model can have such a neuron: a damaged file may name anything."""
    try:
        return neuron.layer < _MAX_LAYERS and neuron.index < _MAX_WIDTH
    except (UserError, ValueError):
        return False


@dataclass
class PageInputs:
    """One run of a model root. `run` is None where no search has begun: then only behaviour and rules can be shown."""

    root: ModelRoot
    folder: Path
    run: RunFolder | None
    options: PageOptions
    issues: IssueLog = field(default_factory=IssueLog)

    def note(self, artifact: str, status: str, reason: str) -> None:
        """Enter something that the page has to do without."""
        name = self.run.run_name if self.run else ""
        self.issues.add(Issue(self.root.task, self.root.llm, name, artifact, status, self.short(reason)))

    def short(self, reason: object) -> str:
        """A reason without this machine's folders: paths from the model root on."""
        text = " ".join(str(reason).split())
        for base in {f"{self.folder}/", f"{self.folder.resolve()}/"}:
            text = text.replace(base, "")
        return text

    def take(self, reading: Reading[Value], artifact: str) -> Value | None:
        """The value; None, with a note, if the artifact cannot be used."""
        if not reading.is_usable:
            self.note(artifact, reading.status.value, reading.reason)
        return reading.value

    def attempt(self, read: Callable[[], Value], artifact: str) -> Value | None:
        """What a reader that raises gives; None, with a note, if it refuses."""
        try:
            return read()
        except (UserError, ValueError) as error:
            # A damaged file may also hold text where a number has to be.
            self.note(artifact, Status.INVALID.value, str(error))
            return None

    # ------------------------------------------------------------ behaviour and features

    @property
    def features_dir(self) -> Path:
        """Stage 2's folder."""
        return self.folder / "feature_report"

    @property
    def rules_dir(self) -> Path:
        """Stage 3's folder."""
        return self.folder / "rule_extraction_results"

    @cached_property
    def task(self) -> FeatureTaskSpec | None:
        """The built-in task of that name, for the names of its columns and labels; None for any other."""
        from lib.task_spec import resolve_task_spec

        if self.root.task not in {path.stem.removesuffix("_task") for path in _TASKS_DIR.glob("*_task.py")}:
            return None
        module = f"lib.tasks.{self.root.task}_task"
        try:
            return resolve_task_spec(module, self.features_dir)
        except UserError:
            return resolve_task_spec(module)

    @cached_property
    def statistics(self) -> dict[str, Any]:
        """`dataset_stats.json`."""
        path = self.features_dir / "dataset_stats.json"
        reading = expect(read_json(path), dict, "behaviour statistics")
        return self.take(reading, "feature_report/dataset_stats.json") or {}

    @cached_property
    def task_settings(self) -> dict[str, Any]:
        """Settings of the task that stage 1 recorded; {} for older results."""
        recorded = expect(read_json(self.features_dir / "task_settings.json"), dict, "task settings").value or {}
        settings = recorded.get("settings")
        return settings if isinstance(settings, dict) else {}

    @cached_property
    def features(self) -> list[dict[str, Any]]:
        """The feature catalogue."""
        reading = expect(read_json(self.features_dir / "features.json"), list, "feature catalogue")
        found = self.take(reading, "feature_report/features.json") or []
        return [item for item in found if isinstance(item, dict)]

    @cached_property
    def layout(self) -> TableLayout | None:
        """Columns of the feature table: those of the task that are there, else the usual ones."""
        from lib.scores_table import TableLayout

        header = read_table(self.features_dir / "scores.csv", nrows=0, index_col=False)
        if header.value is None:
            return None
        names = [str(name) for name in header.value.columns]
        task = self.task
        prompts = [task.DEFAULT_INPUT] if task else []
        answers = [task.DEFAULT_OUTPUT] if task else []
        targets = [name for name in (task.DEFAULT_TARGETS if task else ()) if name in names]
        usual = [name for name in names if name.startswith("is_") and name != "is_test"]
        return TableLayout(
            next((name for name in (*prompts, "prompt") if name in names), "prompt"),
            next((name for name in (*answers, "raw_output", "output", "answer") if name in names), "raw_output"),
            tuple(targets or usual[:1] or ["is_correct"]),
        )

    @cached_property
    def scores(self) -> ScoresTable | None:
        """Prompts, answers, labels and features of every datapoint."""
        from lib.scores_table import load_scores

        layout = self.layout
        if layout is None:
            self.note("feature_report/scores.csv", "missing", "no such file, or not readable as CSV")
            return None
        return self.attempt(lambda: load_scores(self.features_dir, layout), "feature_report/scores.csv")

    @property
    def target(self) -> str:
        """The label that is studied."""
        return self.layout.DEFAULT_TARGETS[0] if self.layout else "is_correct"

    # ------------------------------------------------------------ search

    @cached_property
    def agonists(self) -> dict[str, list[Agonist] | None]:
        """Agonists by regime; None where the search has not finished."""
        return self._by_regime(agonists, "neuron_buckets.json")

    @cached_property
    def circuits(self) -> dict[str, list[dict[str, Any]] | None]:
        """Searched circuits by regime, as `rule_knockout.json` states them; None where the search has not finished."""
        return self._by_regime(knockout, "rule_knockout.json")

    def _by_regime(self, read: Callable[[RunFolder, str], Reading[Value]], name: str) -> dict[str, Value | None]:
        if self.run is None:
            return dict.fromkeys(REGIMES)
        return {regime: self.take(read(self.run, regime), f"{regime}_baseline/{name}") for regime in REGIMES}

    # ------------------------------------------------------------ flips and anchored rules

    @cached_property
    def flip_global(self) -> dict[str, Any]:
        """`flip_stats_global.json`."""
        if self.run is None:
            return {}
        return self.take(self.run.flip_global, "flip_stats_global.json") or {}

    @cached_property
    def by_neuron(self) -> pd.DataFrame | None:
        """`flip_stats_by_neuron.csv`, most flips first."""
        return self.take(self.run.by_neuron, "flip_stats_by_neuron.csv") if self.run else None

    @cached_property
    def flips(self) -> FlipTable | None:
        """Flips of every neuron on every evaluated prompt."""
        from lib.flip_table import neurons_of_frame, read_flip_table

        if self.run is None:
            return None
        path = self.run.path / "scores.csv"
        header = self.take(read_table(path, nrows=0, index_col=False), "scores.csv of the run")
        if header is None:
            return None
        names = [str(name) for name in header.columns]
        target = next((name for name in (self.target, "is_correct", "is_jailbroken") if name in names), self.target)
        neurons = self.attempt(lambda: neurons_of_frame(names), "scores.csv of the run") or []
        neurons = [neuron for neuron in neurons if is_possible(neuron)]
        if not neurons:
            return None
        return self.attempt(lambda: read_flip_table(path, neurons, target), "scores.csv of the run")

    @cached_property
    def answers(self) -> AnswerLog | None:
        """Answers before and after ablation, on the rows of the flip table; older results have none."""
        from lib.flip_answer_log import AnswerLog

        if self.run is None or self.flips is None:
            return None
        path = self.run.path / ANSWERS_FILE
        if not path.is_file():
            self.note(ANSWERS_FILE, "missing", "no such file: answers after ablation are not shown")
            return None
        log = self.attempt(lambda: AnswerLog.read(path), ANSWERS_FILE)
        if log is not None and not (isinstance(log.baseline, list) and len(log.baseline) == len(self.flips.rows)):
            self.note(ANSWERS_FILE, "stale", "it has other rows than scores.csv; run stage 7 again")
            return None
        return log

    @property
    def width(self) -> int | None:
        """Coordinates per component, as stage 7 recorded it."""
        width = self.answers.d_model if self.answers is not None else None
        return width if isinstance(width, int) and 0 < width < _MAX_WIDTH else None

    def rules(self, scope: Scope) -> pd.DataFrame | None:
        """Rule rows of every neuron and target in a scope, after the coverage floor."""
        return self._rules.get(scope)

    @cached_property
    def _rules(self) -> dict[Scope, pd.DataFrame | None]:
        if self.run is None:
            return {}
        return {
            scope: self.take(load_rule_rows(self.run, scope, self.options.min_coverage), f"rule tables, {scope.slug}")
            for scope in (Scope.TEST, Scope.ALL_FIT)
        }

    @cached_property
    def feature_columns(self) -> dict[str, np.ndarray]:
        """Features of the evaluated prompts by name, each [row of the flip table]."""
        if self.scores is None or self.flips is None or self._rows_are_strange:
            return {}
        rows = self.flips.rows.rows
        return {name: self.scores.frame[name].to_numpy()[rows] for name in self.scores.feature_names}

    @cached_property
    def _rows_are_strange(self) -> bool:
        """Whether the flips name rows that the feature table does not have: then no prompt belongs to a flip."""
        if self.scores is None or self.flips is None or not len(self.flips.rows):
            return False
        rows = self.flips.rows.rows
        strange = int(rows.max()) >= len(self.scores) or int(rows.min()) < 0
        if strange:
            self.note("scores.csv of the run", "stale", "it names rows that feature_report/scores.csv does not have")
        return strange

    @cached_property
    def prompts(self) -> list[str] | None:
        """Prompt of each row of the flip table."""
        if self.scores is None or self.flips is None or self._rows_are_strange:
            return None
        prompts = self.scores.prompts
        return [prompts[row] for row in self.flips.rows.rows]
