"""Runs a list of commands one after the other: finished ones are skipped, a failed one does not stop the others."""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from lib import pipeline
from lib.artifacts import model_slug, plain, write_json
from lib.cli import Report, UserError, build_parser
from lib.grid import Cell
from lib.run_names import REGIMES, RunPaths

REPOSITORY = Path(__file__).resolve().parent.parent
MANIFEST = "rule_combo_metrics_manifest.json"
RECORD = "run_metadata.json"
_NOT_IN_RESULTS = ("force", "quiet", "dry_run")


def no_reason() -> str | None:
    """A step that is always done."""
    return None


def nothing() -> None:
    """A step that leaves no record."""


@dataclass(frozen=True)
class Step:
    """One command. skip_reason: why it need not be run, or None. finish: called after success."""

    title: str
    command: list[str]
    skip_reason: Callable[[], str | None] = field(default=no_reason)
    finish: Callable[[], None] = field(default=nothing)


def run_steps(steps: Sequence[Step], report: Report, *, dry_run: bool) -> int:
    """Run (or print) every step; 1 if any failed, and then their list comes last."""
    failures = []
    for number, step in enumerate(steps, start=1):
        reason = step.skip_reason()
        if dry_run:
            report.line(f"# {step.title}: {reason}" if reason else shlex.join(step.command))
            continue
        report.heading(f"{number}/{len(steps)} {step.title}")
        if reason:
            report.line(reason)
            continue
        code = subprocess.run(step.command, cwd=REPOSITORY, check=False).returncode
        if code == 0:
            step.finish()
        elif code in (130, -2):
            raise KeyboardInterrupt
        else:
            failures.append((step, code))
            report.line(f"failed with exit code {code}: {step.title}; going on")
    if failures:
        sys.stderr.write(f"{len(failures)} of {len(steps)} steps failed:\n")
        for step, code in failures:
            sys.stderr.write(f"  {step.title} (exit code {code}): {shlex.join(step.command)}\n")
    return 1 if failures else 0


# ---------------------------------------------------------------- cells of the grid


def parse_pipeline(arguments: Sequence[str]) -> argparse.Namespace:
    """The pipeline's arguments, read by its own parser."""
    add_arguments = partial(pipeline.add_arguments, experiment=arguments[0])
    return build_parser(add_arguments, None).parse_args(list(arguments))


def cell_paths(cell: Cell, extra: Sequence[str]) -> RunPaths:
    """Where a cell's files are, seen from the repository."""
    return pipeline.resolve(parse_pipeline(cell.pipeline_arguments(extra)))


def cell_step(cell: Cell, extra: Sequence[str]) -> Step:
    """The pipeline run of a cell; skipped when a run with these settings ended here and nothing has changed since."""
    arguments = cell.pipeline_arguments(extra)
    command = ["bash", "_run_pipeline.sh", *arguments]
    record = CellRecord(cell_paths(cell, extra), command, _settings(arguments))
    if "--force" in extra:
        return Step(cell.title, command, finish=record.write)
    return Step(cell.title, command, record.skip_reason, record.write)


def _settings(arguments: Sequence[str]) -> dict[str, Any]:
    """What a command line means, whatever its spelling: two scripts of the grid ask for the same run in other words."""
    args = vars(parse_pipeline(arguments))
    return plain({name: value for name, value in sorted(args.items()) if name not in _NOT_IN_RESULTS})


@dataclass(frozen=True)
class CellRecord:
    """What was run for a cell, and the fingerprints of the stages behind it."""

    paths: RunPaths
    command: list[str]
    settings: dict[str, Any]

    @property
    def path(self) -> Path:
        """cache/grid/<task>/<model>/<run>.json"""
        folder = REPOSITORY / self.paths.cache_root / "grid" / self.paths.task / model_slug(self.paths.ai_model)
        return folder / f"{self.paths.choices.run_name}.json"

    def skip_reason(self) -> str | None:
        """Why the cell need not be run, or None."""
        stats_dir = REPOSITORY / self.paths.stats_dir
        if (stats_dir / MANIFEST).is_file() and not (stats_dir / RECORD).is_file():
            return f"archived results, left as they are (--force runs it again): {self.paths.stats_dir}"
        stored = _read(self.path)
        now = self._fingerprints()
        if stored.get("settings") == self.settings and stored.get("fingerprints") == now and all(now.values()):
            return f"finished: {self.paths.stats_dir}"
        return None

    def write(self) -> None:
        """Declare the cell finished."""
        content = {"command": self.command, "settings": self.settings, "fingerprints": self._fingerprints()}
        write_json(self.path, content)

    def _fingerprints(self) -> dict[str, str | None]:
        paths = replace(self.paths, data_root=REPOSITORY / self.paths.data_root)
        folders = [paths.features_dir, paths.circuits_dir, *map(paths.regime_dir, REGIMES), paths.stats_dir]
        return {
            folder.relative_to(paths.model_dir).as_posix(): _read(folder / RECORD).get("fingerprint")
            for folder in folders
        }


def _read(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def one_data_root(cells: Sequence[Cell], extra: Sequence[str]) -> Path:
    """The folder of results that all cells share."""
    if not cells:
        raise UserError("no cell is left; widen TASKS, MODELS or MODES")
    return cell_paths(cells[0], extra).data_root
