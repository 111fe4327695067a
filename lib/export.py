"""Copying what the tables need out of a folder of results, without prompts, answers, pickles or local paths."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from lib.artifacts import file_digest, write_json
from lib.cli import UserError

MANIFEST_NAME = "export_manifest.json"
# Files kept below <task>/<model>/, by folder pattern; `*` does not cross a slash.
KEPT = {
    "feature_report": ("dataset_stats.json", "features.json", "scores.csv"),
    "rule_extraction_results/neuron_flip_rules*/stats/*": (
        "scores.csv", "flip_stats_*.csv", "flip_stats_*.json", "flip_stats_top*.pdf", "rule_combo_metrics_*.csv",
        "rule_combo_metrics_manifest.json", "rule_metrics_summary*.json", "rule_metrics*.tex",
        "rule_metrics_distributions*.pdf", "high_quality_neuron_flip_coverage*", "agonist_metric_*",
        "neuron_target_status.csv",
    ),
    "neural_circuit_discovery_results*/*/*": ("manifest.json", "dataset_info.json"),
    "neural_circuit_discovery_results*/*/*/neural_circuits": ("manifest.json", "dataset_info.json"),
    "neural_circuit_discovery_results*/*/*/*/*_baseline": (
        "rule_knockout.json", "neuron_buckets.json", "neuron_bucket_stats.json"),
    "neural_circuit_discovery_results*/*/*/*/*_baseline/*": ("rule_*.json", "cluster_*.json"),
    "neural_circuit_discovery_results*/*/*/*/*_baseline/per_rule/*": ("rule_*.json",),
}  # fmt: skip
_NEVER_FILES = ("*.pkl", "*.pickle", ".*", "*.tmp", "*.lock")
_NEVER_FOLDERS = ("cache", "*_cache", "__macosx", ".*")
_TEXT = (".json", ".csv", ".md", ".tex", ".txt")
# Columns of a scores.csv that hold no text: labels, split, bookkeeping, flips.
_SCORE_COLUMNS = ("is_*", "split", "row_id", "_*", "flip_*")
# Keys of stage 6's detail files that hold the model's answers.
_ANSWER_KEYS = ("answers_after_ablation",)
# An absolute path: not after a letter or digit, so neither a division nor a web address.
_ABSOLUTE = re.compile(r"(?<![\w.:/~-])(?:/(?:[^\s/\"',;:|<>]+/)+[^\s\"',;:|<>]*|[A-Za-z]:\\{1,2}[^\s\"',;|<>]+)")


@dataclass
class Export:
    """One export: what was kept, dropped (with the reason) and changed on the way; all paths relative to the data."""

    data_dir: Path
    kept: list[dict[str, Any]] = field(default_factory=list)
    dropped: list[dict[str, str]] = field(default_factory=list)
    normalised: list[dict[str, str]] = field(default_factory=list)

    def run(self, target: Path | None) -> None:
        """Sort every file, and copy those that are kept into `target` (None: only sort)."""
        for path in _files(self.data_dir):
            name = path.relative_to(self.data_dir).as_posix()
            reason = "a link" if path.is_symlink() else drop_reason(name)
            if reason:
                self.dropped.append({"path": name, "reason": reason})
                continue
            try:
                content, changes = normalise(name, path, self.data_dir)
            except (ValueError, csv.Error):
                self.dropped.append({"path": name, "reason": "unreadable, so texts in it could not be taken out"})
                continue
            self.normalised += [{"path": name, "change": change} for change in changes]
            record: dict[str, Any] = {"path": name, "size": len(content) if content else path.stat().st_size}
            if target is not None:
                copy = target / name
                copy.parent.mkdir(parents=True, exist_ok=True)
                if content is None:
                    shutil.copyfile(path, copy)
                else:
                    copy.write_bytes(content)
                record["sha256"] = file_digest(copy)
            self.kept.append(record)

    def manifest(self) -> dict[str, Any]:
        """The record of the export."""
        counts = {f"n_{name}": len(getattr(self, name)) for name in ("kept", "dropped", "normalised")}
        return {"data_dir": self.data_dir.name, **counts, **{k: v for k, v in asdict(self).items() if k != "data_dir"}}


def drop_reason(name: str) -> str | None:
    """Why a file is left out; None for one that is kept. `name` is relative to the data folder."""
    *folders, file = name.split("/")
    if any(fnmatchcase(folder.lower(), pattern) for folder in folders for pattern in _NEVER_FOLDERS):
        return "in a cache or hidden folder"
    if any(fnmatchcase(file.lower(), pattern) for pattern in _NEVER_FILES):
        return "a pickle, hidden or temporary file"
    # The model's folder is the second or (with an organisation) the third.
    for depth in (2, 3):
        below = folders[depth:]
        for pattern, files in KEPT.items():
            wanted = pattern.split("/")
            if len(wanted) == len(below) and all(map(fnmatchcase, below, wanted)):
                return None if any(fnmatchcase(file, choice) for choice in files) else "not needed by any table"
    return "not needed by any table"


# ---------------------------------------------------------------- contents


def normalise(name: str, path: Path, data_dir: Path) -> tuple[bytes | None, list[str]]:
    """(changed content or None to copy the file as it is, what was changed).

    Raises:
        ValueError: the file should lose its texts but cannot be read.
    """
    if path.suffix not in _TEXT:
        return None, []
    changes: list[str] = []
    text = path.read_text(encoding="utf-8", errors="surrogateescape")
    if path.name == "scores.csv":
        text, dropped = _without_texts(text)
        if dropped:
            changes.append(f"columns that may hold texts dropped: {', '.join(dropped)}")
    elif fnmatchcase(path.name, "rule_[0-9]*.json") or fnmatchcase(path.name, "cluster_[0-9]*.json"):
        content = json.loads(text)
        present = [key for key in _ANSWER_KEYS if isinstance(content, dict) and key in content]
        if present:
            text = json.dumps({key: value for key, value in content.items() if key not in present}, indent=1) + "\n"
            changes.append(f"answers dropped: {', '.join(present)}")
    text, n_paths = without_local_paths(text, data_dir)
    if n_paths:
        changes.append(f"{n_paths} absolute path(s) made relative")
    return (text.encode("utf-8", "surrogateescape"), changes) if changes else (None, [])


def _without_texts(text: str) -> tuple[str, list[str]]:
    """A scores.csv with the columns that hold no text, and the names of the others."""
    csv.field_size_limit(10_000_000)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header = next(reader, [])
    keep = [any(fnmatchcase(column, pattern) for pattern in _SCORE_COLUMNS) for column in header]
    if all(keep):
        return text, []
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    for row in (header, *reader):
        if len(row) != len(header):
            raise ValueError("a row has another number of cells than the header")
        writer.writerow([cell for cell, wanted in zip(row, keep, strict=True) if wanted])
    return out.getvalue(), [column for column, wanted in zip(header, keep, strict=True) if not wanted]


def without_local_paths(text: str, data_dir: Path) -> tuple[str, int]:
    """Absolute paths of the data folder as `data/...`, any other absolute path as its last part; and how many."""
    roots = sorted({str(data_dir), str(data_dir.resolve()), os.path.abspath(data_dir)}, key=len, reverse=True)
    n_paths = 0

    def relative(match: re.Match[str]) -> str:
        nonlocal n_paths
        n_paths += 1
        for root in roots:
            if match[0] == root or match[0].startswith(root + "/"):
                return "data" + match[0][len(root) :]
        # Results that were moved since: everything from the last folder called data.
        _, found, below = match[0].replace("\\\\", "/").replace("\\", "/").rpartition("/data/")
        return f"data/{below}" if found else below.rpartition("/")[2]

    return _ABSOLUTE.sub(relative, text), n_paths


def _files(folder: Path) -> Iterator[Path]:
    for place, folders, files in os.walk(folder):
        folders.sort()
        for name in sorted(files):
            yield Path(place) / name
        # Links to folders are reported, not followed.
        yield from (Path(place) / name for name in folders if (Path(place) / name).is_symlink())


# ---------------------------------------------------------------- the output folder


def check_places(data_dir: Path, output_dir: Path, manifest: Path | None) -> None:
    """Refuse anything that would write into the data or destroy something else.

    Raises:
        UserError: the input is no folder, or input and output overlap.
    """
    if not data_dir.is_dir():
        raise UserError(f"no results at {data_dir}; give the folder data/ of finished runs")
    source, target = data_dir.resolve(), output_dir.resolve()
    if source == target or source in target.parents or target in source.parents:
        raise UserError(f"the output {output_dir} overlaps the input {data_dir}; choose a folder outside of it")
    if manifest is not None and source in manifest.resolve().parents:
        raise UserError(f"the manifest {manifest} would be written into the input {data_dir}; choose another place")


@contextlib.contextmanager
def replacing(output_dir: Path, *, force: bool) -> Iterator[Path]:
    """A temporary folder beside `output_dir` that takes its place at the end; on failure nothing has changed.

    Raises:
        UserError: the output exists and `force` is not set, or it is not an earlier export; it cannot be written; or
            another export to the same place is running.
    """
    if output_dir.exists() or output_dir.is_symlink():
        if not force:
            raise UserError(f"{output_dir} exists; remove it, choose another folder, or give --force to replace it")
        if output_dir.is_symlink() or not (output_dir / MANIFEST_NAME).is_file():
            raise UserError(
                f"{output_dir} is not an earlier export (no {MANIFEST_NAME} in it), so --force does not "
                "replace it; remove it yourself or choose another folder"
            )
    temporary, old = (output_dir.with_name(f".{output_dir.name}.{word}") for word in ("partial", "old"))
    try:
        with _held(temporary):
            try:
                for left in (*temporary.iterdir(), old):  # by a run that was killed
                    left.unlink() if left.is_file() else shutil.rmtree(left, ignore_errors=True)
                yield temporary
                if output_dir.exists():
                    output_dir.rename(old)
                temporary.rename(output_dir)
            finally:
                for left in (temporary, old):
                    shutil.rmtree(left, ignore_errors=True)
    except OSError as error:
        raise UserError(
            f"cannot write {output_dir}: {error.strerror or error}; check permissions and free space"
        ) from error


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Make the folder if need be and hold it against other processes. The hold ends with this one, however it ends."""
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_there = folder.is_dir() and os.path.samestat(os.fstat(descriptor), folder.stat())
    except BlockingIOError:
        is_there = False
    try:
        if not is_there:
            raise UserError(f"another run is writing to {folder}; wait for it or choose another folder")
        yield
    finally:
        os.close(descriptor)


def export(data_dir: Path, output_dir: Path, manifest: Path | None, *, force: bool, dry_run: bool) -> Export:
    """Export `data_dir` to `output_dir`; with `dry_run` only say what would be kept.

    Raises:
        UserError: see `check_places` and `replacing`, or nothing is worth keeping.
    """
    check_places(data_dir, output_dir, manifest)
    result = Export(data_dir)
    with contextlib.nullcontext() if dry_run else replacing(output_dir, force=force) as target:
        result.run(target)
        if not result.kept:
            raise UserError(
                f"nothing in {data_dir} is a result of the pipeline; give the folder that holds "
                "<task>/<model>/rule_extraction_results"
            )
        if target is not None:
            write_json(target / MANIFEST_NAME, result.manifest())
    if manifest is not None:
        write_json(manifest, result.manifest())
    return result
