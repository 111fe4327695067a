"""Are the artifacts there that the tables need? Standard library only, so that it can be asked before set-up.

Reads a folder, or a `.zip` that is still packed. Nothing is written. A *problem* keeps something out of the tables; a
*note* does not, unless `--strict` asks for the whole grid.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lib.cli import UserError
from lib.grid import MODELS, TASKS, mode_word
from lib.reporting.artifacts import MANIFEST, MANIFEST_SIGNATURE
from lib.reporting.naming import RunMode, RunName
from lib.zip_files import READ_ERRORS, open_zip

DOI = "10.5281/zenodo.20533529"
DOWNLOAD = f"download data.zip and cache.zip from https://doi.org/{DOI}"
LANDMARKS = ("README.md", "requirements.txt", "run_paper_tables_generation.sh")
METHOD_DIR = "eap_ig_inputs"
REGIMES = ("positive", "negative")
# Above this a JSON file is not parsed; only its last byte is looked at.
_MAX_PARSED_BYTES = 30_000_000
_BLOCK_BYTES = 1 << 20

Node = Path | zipfile.Path


@dataclass(frozen=True)
class Finding:
    """Something to know about a place, and what to do about it."""

    where: str
    message: str
    remedy: str
    is_problem: bool = True

    def __str__(self) -> str:
        return f"{'problem' if self.is_problem else 'note'}: {self.where}: {self.message}; {self.remedy}"


@dataclass
class ModelReport:
    """Runs of one task and model; modes: mode word -> ok, empty, broken or missing; others: run name -> the same."""

    task: str
    llm: str
    modes: dict[str, str] = field(default_factory=dict)
    others: dict[str, str] = field(default_factory=dict)


@dataclass
class Check:
    """Everything found below a root."""

    root: Path
    strict: bool = False
    findings: list[Finding] = field(default_factory=list)
    models: list[ModelReport] = field(default_factory=list)
    sizes: dict[str, int] = field(default_factory=dict)

    @property
    def is_fine(self) -> bool:
        """No problem was found."""
        return not any(finding.is_problem for finding in self.findings)

    def run(self) -> Check:
        """Look at everything."""
        missing = [name for name in LANDMARKS if not (self.root / name).is_file()]
        if missing:
            self._add(
                str(self.root),
                f"no {', '.join(missing)}: not the repository",
                "change to the repository's folder or give --root",
                is_problem=True,
            )
        data, cache = self._folder("data", needed=True), self._folder("cache", needed=False)
        for place in model_dirs(data) if data else ():
            self._model(*place, cache)
        if data and not self.models:
            self._add("data", "no finished run in it", f"{DOWNLOAD}, or run bash run_mecharule_experiments.sh")
        self._grid()
        return self

    def to_json(self) -> dict[str, Any]:
        """All of it, for `--json`."""
        return {
            "fine": self.is_fine,
            "doi": DOI,
            "sizes": self.sizes,
            "models": [asdict(m) for m in self.models],
            "findings": [asdict(finding) for finding in self.findings],
        }

    def _add(self, where: str, message: str, remedy: str, is_problem: bool = True) -> None:
        self.findings.append(Finding(where, message, remedy, is_problem))

    # ------------------------------------------------------------ data and cache as a whole

    def _folder(self, name: str, *, needed: bool) -> Node | None:
        """The folder, or the archive that holds it; None if neither is there."""
        folder, archive = self.root / name, self.root / f"{name}.zip"
        if folder.is_dir():
            nested = folder / name
            if nested.is_dir():
                fix = f"mv {name} {name}.outer && mv {name}.outer/{name} . && rmdir {name}.outer"
                self._add(name, f"unpacked one level too deep: {name}/{name}", f"run: {fix}")
                folder = nested
            self.sizes[name] = _size(folder)
            if not any(folder.iterdir()):
                self._add(name, "empty", f"{DOWNLOAD} and run: unzip {name}.zip", needed)
                return None
            return folder
        if archive.is_file():
            return self._packed(name, archive)
        why = "" if needed else " (the tables do not need it, running stages again does)"
        self._add(
            name,
            f"missing{why}",
            f"{DOWNLOAD}, put them beside README.md and run: unzip {name}.zip",
            needed or self.strict,
        )
        return None

    def _packed(self, name: str, archive: Path) -> Node | None:
        self.sizes[archive.name] = archive.stat().st_size
        try:
            with open_zip(archive) as opened:
                has_content = bool(opened.namelist())
        except UserError as error:
            self._add(archive.name, f"cannot be opened ({error})", f"{DOWNLOAD} again")
            return None
        inside = zipfile.Path(archive)
        inner = inside / f"{name}/"
        if not has_content:
            self._add(archive.name, "empty", f"{DOWNLOAD} again")
            return None
        self._add(
            archive.name,
            "still packed (the tables can be made from it as it is)",
            f"to unpack it, run: unzip {archive.name}",
            is_problem=False,
        )
        return inner if inner.is_dir() else inside

    # ------------------------------------------------------------ a task and model

    def _model(self, task: str, llm: str, folder: Node, cache: Node | None) -> None:
        report = ModelReport(task, llm, {mode_word(mode): "missing" for mode in RunMode})
        self.models.append(report)
        for name in ("scores.csv", "features.json"):
            if not (folder / "feature_report" / name).is_file():
                self._add(
                    f"{task}/{llm}/feature_report/{name}",
                    "missing (stages cannot be run again without it)",
                    f"{DOWNLOAD} again, or run stage 2",
                    self.strict,
                )
        if cache and not _below(cache, f"{task}/{llm}/llm_io_data.pkl").is_file():
            self._add(
                f"cache/{task}/{llm}/llm_io_data.pkl",
                "missing (the tables do not need it)",
                "run stage 1 before later stages",
                is_problem=False,
            )
        stats = _below(folder, "rule_extraction_results/neuron_flip_rules/stats")
        for run in sorted((child for child in _children(stats) if child.is_dir()), key=lambda child: child.name):
            parsed = RunName.parse(run.name)
            status = self._run(task, llm, folder, run, parsed)
            if parsed and parsed.mode and not parsed.variant:
                report.modes[mode_word(parsed.mode)] = status
            else:
                report.others[run.name] = status

    def _run(self, task: str, llm: str, folder: Node, run: Node, name: RunName | None) -> str:
        faults = list(run_faults(run))
        if name and not name.variant and name.mode in (RunMode.SPECTRAL_PLAN, RunMode.BRUTE_FORCE):
            faults += search_faults(_below(folder, f"{name.discovery_base}/{METHOD_DIR}/{name.circuit_label}"), name)
        again = ""
        if name and name.mode and not name.variant:
            again = (
                f", or run it again: TASKS={task} MODELS={llm} MODES={mode_word(name.mode)} "
                "bash run_mecharule_experiments.sh -- --force"
            )
        for fault in faults:
            self._add(f"{task}/{llm}/{run.name}", fault, f"{DOWNLOAD} again{again}")
        return "broken" if faults else "empty" if _n_rows(run / "rule_combo_metrics_test_all.csv") == 0 else "ok"

    def _grid(self) -> None:
        present = {
            (model.task, model.llm, mode): status for model in self.models for mode, status in model.modes.items()
        }
        absent = [
            (task, llm, mode_word(mode))
            for task in TASKS
            for llm in MODELS
            for mode in RunMode
            if present.get((task, llm, mode_word(mode)), "missing") == "missing"
        ]
        if len(absent) == len(TASKS) * len(MODELS) * len(RunMode):
            return
        for task, llm, mode in absent:
            self._add(
                f"{task}/{llm}/{mode}",
                "this run of the grid is not there",
                f"{DOWNLOAD}, or run: TASKS={task} MODELS={llm} MODES={mode} bash run_mecharule_experiments.sh",
                self.strict,
            )


# ---------------------------------------------------------------- looking at files


def model_dirs(data: Node) -> Iterator[tuple[str, str, Node]]:
    """(task, model, folder) of every model with stage-7 results: <task>/<model> or <task>/<organisation>/<model>."""
    for task in _folders(data):
        for first in _folders(task):
            if (first / "rule_extraction_results").is_dir():
                yield task.name, first.name, first
                continue
            for second in _folders(first):
                if (second / "rule_extraction_results").is_dir():
                    yield task.name, f"{first.name}/{second.name}", second


def run_faults(run: Node) -> Iterator[str]:
    """What is wrong with the stage-7 folder of a run, one line each."""
    manifest, fault = _small_json(run / MANIFEST)
    manifest = manifest if isinstance(manifest, dict) else {}
    if fault:
        yield fault
    elif manifest.get("signature") != MANIFEST_SIGNATURE:
        yield f"{MANIFEST} is stale (unknown signature), so its ALL-FIT rows are not used"
    # Older stage 7 wrote no table at all for a run without any rule.
    if manifest.get("n_raw_rule_combo_files") != 0:
        yield from _scope_faults(run)
    for name in ("flip_stats_global.json", "high_quality_neuron_flip_coverage.json"):
        fault = _json_fault(run / name)
        if fault:
            yield fault
    if not (run / "flip_stats_by_neuron.csv").is_file():
        yield "flip_stats_by_neuron.csv is missing"


def _scope_faults(run: Node) -> Iterator[str]:
    for scope, others in (("test", ("rule_combo_metrics_all.csv",)), ("all_fit", ())):
        names = (f"rule_combo_metrics_{scope}_all.csv", "rule_combo_metrics_all_scopes.csv", *others)
        if all(_n_rows(run / name) is None for name in names):
            yield f"{names[0]} is missing, or has not even a header"


def search_faults(circuit_dir: Node, name: RunName) -> Iterator[str]:
    """What is wrong with the files of stages 5 and 6 that Tables 3 and 10 to 13 read."""
    manifests = [f"{place}manifest.json" for place in ("neural_circuits/", "")]
    present = [path for path in manifests if _below(circuit_dir, path).is_file()]
    fault = _json_fault(_below(circuit_dir, present[0]), present[0]) if present else f"{manifests[0]} is missing"
    if fault:
        yield fault
    for regime in REGIMES:
        for file in ("rule_knockout.json", "neuron_buckets.json"):
            label = f"{name.bag_label}/{regime}_baseline/{file}"
            fault = _json_fault(_below(circuit_dir, label), label)
            if fault:
                yield fault


def _below(node: Node, path: str) -> Node:
    for piece in path.split("/"):
        node = node / piece
    return node


def _children(node: Node) -> list[Node]:
    return list(node.iterdir()) if node.is_dir() else []


def _folders(node: Node) -> list[Node]:
    return sorted(
        (child for child in _children(node) if child.is_dir() and not child.name.startswith((".", "__"))),
        key=lambda child: child.name,
    )


def _json_fault(path: Node, label: str = "") -> str | None:
    """Why a JSON file cannot be used; None if it can."""
    return _small_json(path, label)[1]


def _small_json(path: Node, label: str = "") -> tuple[Any, str | None]:
    """The value of a JSON file (None above the size that is parsed), and why it cannot be used, if it cannot."""
    label = label or path.name
    if not path.is_file():
        return None, f"{label} is missing"
    try:
        with path.open("rb") as handle:
            content = handle.read(_MAX_PARSED_BYTES + 1)
            if len(content) <= _MAX_PARSED_BYTES:
                return json.loads(content), None
            # The end of what is not blank, however long the file is.
            while block := handle.read(_BLOCK_BYTES):
                content = block if block.strip() else content
        return None, None if content.rstrip()[-1:] in (b"}", b"]") else f"{label} is cut off"
    except READ_ERRORS as error:
        if isinstance(error, json.JSONDecodeError | UnicodeDecodeError | RecursionError):
            return None, f"{label} is not JSON: {error}"
        return None, f"{label} cannot be read ({error})"


def _n_rows(path: Node) -> int | None:
    """Rows below the header of a CSV file; None without a header, or if it cannot be read."""
    if not path.is_file():
        return None
    try:
        with path.open("rb") as handle:
            lines = sum(block.count(b"\n") for block in iter(lambda: handle.read(_BLOCK_BYTES), b""))
    except READ_ERRORS:
        return None
    return lines - 1 if lines else None


def _size(folder: Path) -> int:
    return sum(os.lstat(os.path.join(place, name)).st_size for place, _, names in os.walk(folder) for name in names)
