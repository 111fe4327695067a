"""Finding finished runs below a folder or in a zip, and reading their files with a status instead of a guess."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from lib.artifacts import record_that_differs
from lib.cli import UserError
from lib.reporting.issues import Issue, IssueLog
from lib.reporting.naming import RunName, canonical_order
from lib.reporting.scopes import Scope
from lib.zip_files import open_zip

if TYPE_CHECKING:
    import pandas as pd

Value = TypeVar("Value")
MANIFEST = "rule_combo_metrics_manifest.json"
MANIFEST_SIGNATURE = "rule_combo_metrics_from_raw_v1"
REGIMES = ("positive", "negative")
_RULES = "rule_extraction_results"
_RUN_FILES = (
    "scores.csv",
    MANIFEST,
    "flip_stats_global.json",
    "rule_metrics_summary.json",
    "rule_combo_metrics_best_per_neuron.csv",
    "rule_combo_metrics_test_selected_best_per_neuron.csv",
    "rule_combo_metrics_all.csv",
    "rule_combo_metrics_all_scopes.csv",
)
_CHANGED = "changed after its stage had written it (see its run_metadata.json); run that stage again"


class Status(Enum):
    """What reading an artifact gave."""

    OK = "ok"
    """There, and with content."""

    EMPTY = "empty"
    """There, and legitimately without content: counts as zero."""

    MISSING = "missing"
    """Not there: counts as unknown."""

    STALE = "stale"
    """There, but written from other raw files than the reader knows: not used."""

    INVALID = "invalid"
    """There, but unreadable: not used."""


@dataclass(frozen=True)
class Reading(Generic[Value]):
    """An artifact's status, its value (None unless OK or EMPTY) and, if it cannot be used, the reason."""

    status: Status
    value: Value | None = None
    reason: str = ""
    path: Path | None = None

    @property
    def is_usable(self) -> bool:
        """Whether there is a value: something, or legitimately nothing."""
        return self.status in (Status.OK, Status.EMPTY)

    def without_value(self) -> Reading[Any]:
        """The same status and reason, for what would have been made of the value."""
        return Reading(self.status, reason=self.reason, path=self.path)


def read_json(path: Path) -> Reading[Any]:
    """A JSON file; bare NaN and Infinity tokens become None. `{}` and `[]` are EMPTY."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda _: None)
    except FileNotFoundError:
        return Reading(Status.MISSING, reason="no such file", path=path)
    except (OSError, ValueError, RecursionError) as error:
        return Reading(Status.INVALID, reason=f"not readable as JSON ({_one_line(error)})", path=path)
    if record_that_differs(path):
        return Reading(Status.INVALID, reason=_CHANGED, path=path)
    return Reading(Status.OK if value not in ({}, [], None) else Status.EMPTY, value, path=path)


def read_table(path: Path, **options: Any) -> Reading[pd.DataFrame]:
    """A CSV file; a header without rows is EMPTY, and so is a file without any byte."""
    import pandas as pd

    try:
        frame = pd.read_csv(path, low_memory=False, **options)
    except FileNotFoundError:
        return Reading(Status.MISSING, reason="no such file", path=path)
    except pd.errors.EmptyDataError:
        return Reading(Status.EMPTY, pd.DataFrame(), path=path)
    except (OSError, ValueError) as error:
        return Reading(Status.INVALID, reason=f"not readable as CSV ({_one_line(error)})", path=path)
    if record_that_differs(path):
        return Reading(Status.INVALID, reason=_CHANGED, path=path)
    return Reading(Status.OK if len(frame) else Status.EMPTY, frame, path=path)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def block_of(value: Any, *keys: str) -> dict[str, Any]:
    """The dictionary at a path of keys in a JSON value; {} where there is none."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value if isinstance(value, dict) else {}


def expect(reading: Reading[Value], kind: type, what: str) -> Reading[Value]:
    """The reading, or INVALID if its value is not of the expected kind (dict, list)."""
    if reading.is_usable and not isinstance(reading.value, kind):
        return Reading(Status.INVALID, reason=f"{what} holds no {kind.__name__}", path=reading.path)
    return reading


# ---------------------------------------------------------------- runs and models


@dataclass(frozen=True)
class ModelRoot:
    """One task and model: the folder of its runs. `path` is None if only a bare `stats/` folder was given."""

    task: str
    org: str
    model: str
    stats_dir: Path
    path: Path | None = None

    @property
    def llm(self) -> str:
        """`org/model`, or the model alone where it has no organisation."""
        return f"{self.org}/{self.model}" if self.org else self.model

    @property
    def unit(self) -> str:
        """`task/llm`: the unit of paired comparisons."""
        return f"{self.task}/{self.llm}"

    @cached_property
    def run_names(self) -> list[str]:
        """Names of all run folders that hold a file, canonical order; hidden and empty ones are no runs."""
        names = [child.name for child in _folders(self.stats_dir) if any(child.iterdir())]
        return canonical_order(names)

    def run(self, name: str) -> RunFolder:
        """The run of that name, there or not."""
        return RunFolder(self, name)


@dataclass(frozen=True)
class RunFolder:
    """One run's files: typed readers, each with a status."""

    root: ModelRoot
    run_name: str

    @property
    def path(self) -> Path:
        """The run's folder under `stats/`."""
        return self.root.stats_dir / self.run_name

    @cached_property
    def name(self) -> RunName | None:
        """What the name says, or None for a name outside the grammar."""
        return RunName.parse(self.run_name)

    @property
    def exists(self) -> bool:
        """Whether the run's folder is there."""
        return self.path.is_dir()

    @cached_property
    def manifest(self) -> Reading[dict[str, Any]]:
        """The rule tables' manifest: STALE if its signature is not the known one."""
        reading = expect(read_json(self.path / MANIFEST), dict, "the manifest")
        if reading.is_usable and (reading.value or {}).get("signature") != MANIFEST_SIGNATURE:
            reason = f"manifest signature is {(reading.value or {}).get('signature')!r}; run stage 7 again"
            return Reading(Status.STALE, reason=reason, path=reading.path)
        return reading

    @cached_property
    def flip_global(self) -> Reading[dict[str, Any]]:
        """`flip_stats_global.json`."""
        return expect(read_json(self.path / "flip_stats_global.json"), dict, "flip statistics")

    @cached_property
    def coverage(self) -> Reading[dict[str, Any]]:
        """`high_quality_neuron_flip_coverage.json`."""
        return expect(read_json(self.path / "high_quality_neuron_flip_coverage.json"), dict, "coverage")

    @cached_property
    def coverage_by_layer(self) -> Reading[dict[str, Any]]:
        """`high_quality_neuron_flip_coverage_by_layer.json`."""
        return expect(read_json(self.path / "high_quality_neuron_flip_coverage_by_layer.json"), dict, "coverage")

    @cached_property
    def by_neuron(self) -> Reading[pd.DataFrame]:
        """`flip_stats_by_neuron.csv`."""
        return read_table(self.path / "flip_stats_by_neuron.csv")

    def summary(self, scope: Scope) -> Reading[dict[str, Any]]:
        """`rule_metrics_summary_<scope>.json`; the file without a scope, of older runs, means `test`."""
        reading = read_json(self.path / f"rule_metrics_summary_{scope.slug}.json")
        if reading.status is Status.MISSING and scope is Scope.TEST:
            reading = read_json(self.path / "rule_metrics_summary.json")
        return expect(reading, dict, "rule summary")

    def scores(self, wanted: Callable[[str], bool]) -> Reading[pd.DataFrame]:
        """The wanted columns of the run's `scores.csv`, all rows."""
        path = self.path / "scores.csv"
        reading = read_table(path, nrows=0, index_col=False)
        if not reading.is_usable or reading.value is None:
            return reading
        names = [name for name in reading.value.columns if wanted(name)]
        # One column always, so that the rows are counted.
        return read_table(path, usecols=names or list(reading.value.columns[:1]))

    def note(self, issues: IssueLog, reading: Reading[Any], artifact: str) -> None:
        """Enter a reading that cannot be used in the issues."""
        if not reading.is_usable:
            issues.add(
                Issue(self.root.task, self.root.llm, self.run_name, artifact, reading.status.value, reading.reason)
            )


# ---------------------------------------------------------------- discovery


@contextlib.contextmanager
def open_tree(path: str | Path) -> Iterator[Path]:
    """The folder to read: the given one, or a zip's content in a temporary folder that is removed at the end.

    Raises:
        UserError: nothing there, or the zip is broken or has a member that would land outside.
    """
    path = Path(path)
    if path.is_dir():
        yield path
        return
    if not path.is_file():
        raise UserError(f"no results at {path}; give a folder with finished runs or a .zip of one")
    if not zipfile.is_zipfile(path):
        raise UserError(f"{path} is neither a folder nor a zip; give a folder with finished runs or a .zip of one")
    with tempfile.TemporaryDirectory(prefix="mecharule_zip_") as folder:
        # The archive's name takes part in finding out task and model, as a folder's would.
        target = Path(folder) / path.stem
        _unpack(path, target)
        yield target


def _unpack(path: Path, target: Path) -> None:
    target.mkdir()
    with open_zip(path) as archive:
        members = [info for info in archive.infolist() if _is_wanted(info.filename)]
        n_bytes, n_free = sum(info.file_size for info in members), shutil.disk_usage(target).free
        if n_bytes > n_free:
            raise UserError(
                f"{path} needs {n_bytes / 1e9:.1f} GB and {target.parents[1]} has {n_free / 1e9:.1f} GB left; "
                "set TMPDIR to a larger disk, or unpack it yourself"
            )
        archive.extractall(target, members=[info.filename for info in members])


def _is_wanted(name: str) -> bool:
    parts = PurePosixPath(name).parts
    return bool(parts) and not any(part == "__MACOSX" or (part.startswith(".") and part != "..") for part in parts)


def _folders(path: Path) -> list[Path]:
    """Visible subfolders, sorted; links are not followed, so that nothing outside the root is read."""
    try:
        children = sorted(path.iterdir())
    except OSError:
        return []
    return [
        child
        for child in children
        if not child.name.startswith((".", "__MACOSX")) and not child.is_symlink() and child.is_dir()
    ]


def find_model_roots(folder: Path, flip_rules: str = "neuron_flip_rules") -> list[ModelRoot]:
    """Every task and model with runs below (or at) a folder, sorted by path.

    The folder may be a `data/` folder, a task's, a model's, or a `stats/` folder. Task and model come from the path
    below it; where that is too short, from the folder's own place after the last `data`. Only names are read above it.
    """
    folder = folder.absolute()
    found = [_root_at(folder, stats, flip_rules) for stats in _stats_folders(folder, flip_rules)]
    if not found:
        bare = next((path for path in (folder / "stats", folder) if _has_runs(path)), None)
        found = [_root_at(folder, bare, flip_rules)] if bare else []
    return sorted(found, key=lambda root: root.stats_dir)


def model_root_at(folder: Path, flip_rules: str = "neuron_flip_rules") -> ModelRoot:
    """The model root that a folder is taken to be, whether or not any run below it has finished."""
    folder = folder.absolute()
    return _root_at(folder, folder / _RULES / flip_rules / "stats", flip_rules)


def _stats_folders(folder: Path, flip_rules: str) -> Iterator[Path]:
    """`**/rule_extraction_results/<flip_rules>/stats`, without descending into the folders of circuits or caches."""
    if folder.name == _RULES:
        if (folder / flip_rules / "stats").is_dir():
            yield folder / flip_rules / "stats"
        return
    if folder.name.startswith("neural_circuit_discovery_results") or folder.name == "feature_report":
        return
    for child in _folders(folder):
        yield from _stats_folders(child, flip_rules)


def _has_runs(folder: Path) -> bool:
    return any((child / name).is_file() for child in _folders(folder) for name in _RUN_FILES)


def _root_at(folder: Path, stats: Path, flip_rules: str) -> ModelRoot:
    is_whole = stats.parts[-3:] == (_RULES, flip_rules, "stats")
    # A `stats/` folder of a whole tree stands for its model: circuits are read beside it, at their fixed place.
    path = stats.parent.parent.parent if is_whole else None
    task, org, model = _task_and_model(folder, path or stats)
    return ModelRoot(task, org, model, stats, path)


def _task_and_model(folder: Path, place: Path) -> tuple[str, str, str]:
    """(task, organisation or "", model) from a model folder's place below the given folder."""
    below = list(place.relative_to(folder).parts) if place.is_relative_to(folder) else []
    below = [part for part in below if part != "stats"]
    below = _after_data(below) or below
    if len(below) >= 3:
        return below[-3], below[-2], below[-1]
    if len(below) in (1, 2) and _names_a_task(folder):
        return folder.resolve().name, "/".join(below[:-1]), below[-1]
    # Too short to tell: a given task or model folder lies below `data`, as the pipeline writes it.
    given = [part for part in folder.resolve().parts if part not in (_RULES, "neuron_flip_rules", "stats")]
    whole = _after_data([*given, *below])
    if len(whole) in (2, 3):
        return whole[0], "/".join(whole[1:-1]), whole[-1]
    if len(below) == 2:
        return below[0], "", below[1]
    if len(below) == 1:
        return folder.resolve().name, "", below[0]
    return "unknown_task", "", folder.resolve().name


def _after_data(parts: list[str]) -> list[str]:
    """The parts after the last one called `data`; none if there is no such part."""
    return parts[len(parts) - parts[::-1].index("data") :] if "data" in parts else []


def _names_a_task(folder: Path) -> bool:
    module = Path(__file__).resolve().parent.parent / "tasks" / f"{folder.resolve().name}_task.py"
    return module.is_file() or folder.resolve().name == "jailbreaking"


def relative_to_any(path: Path, bases: list[Path]) -> str:
    """A path as it may be published: below one of the bases, else its name alone."""
    for base in bases:
        with contextlib.suppress(ValueError):
            return path.resolve().relative_to(base.resolve()).as_posix()
    return path.name
