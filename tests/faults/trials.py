"""One stage, disturbed in one way, and what must hold afterwards.

After every disturbance: nothing partial stands under a final name, a record speaks only of files that are there whole,
the same command run again completes, and its result is byte for byte that of an undisturbed run (run records, which
hold times, excepted).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatch
from pathlib import Path

import numpy as np

from tests.faults.disturb import Fault, Kind
from tests.faults.forked import Child, Ending, command, preload
from tests.faults.worlds import LOGS, World

_LEFTOVER = re.compile(r"(^|/)\.([^/]+\.(tmp|partial|old)|converting-[^/]*)(/|$)")
_YEAR = 365 * 86400


@dataclass
class Trial:
    """What was done, how it ended, and what was wrong with that (nothing, if all is well)."""

    world: str
    fault: str
    detail: str
    outcome: str = ""
    problems: list[str] = field(default_factory=list)

    def to_json(self) -> dict:
        """The trial as a JSON object."""
        return asdict(self)


def is_record(name: str) -> bool:
    """Run records and locks: the files that may differ between equal runs."""
    return "run_metadata" in name.rpartition("/")[2] or name.endswith(".lock")


def is_leftover(name: str) -> bool:
    """A temporary file or folder that a killed run could not remove."""
    return bool(_LEFTOVER.search(name))


def results(folder: Path) -> dict[str, str]:
    """Digest of every result below the folder, by its name."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and not is_record(name) and not is_leftover(name):
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def n_leftovers(folder: Path) -> int:
    """How many temporary files of killed runs are there."""
    return sum(is_leftover(path.relative_to(folder).as_posix()) for path in folder.rglob("*") if path.is_file())


def differences(found: dict[str, str], wanted: dict[str, str]) -> list[str]:
    """In what two results differ, in words."""
    words = [f"missing: {name}" for name in wanted.keys() - found.keys()]
    words += [f"too much: {name}" for name in found.keys() - wanted.keys()]
    words += [f"other content: {name}" for name in wanted.keys() & found.keys() if wanted[name] != found[name]]
    return sorted(words)


class Bench:
    """A world made once, run undisturbed, and then disturbed again and again in the same place."""

    def __init__(self, world: World, root: Path, *, figures: bool = True) -> None:
        self.world, self.figures = world, figures
        self.home = root / world.name
        self.folder = self.home / "work"
        self._pristine, self.finished = self.home / "pristine", self.home / "finished"
        self.wanted: dict[str, str] = {}
        self.n_changes, self.seconds, self.cpu = 0, 0.0, 0.0

    # ------------------------------------------------------------ running

    def prepare(self, *, twice: bool = True) -> None:
        """Make the world and run it undisturbed; the second run says how long it takes without imports."""
        self.folder.mkdir(parents=True)
        made = self._child(lambda: self.world.make(self.folder) or 0).ending()
        if made.code != 0:
            raise RuntimeError(f"world {self.world.name} cannot be made: {made.err[-2000:]}")
        (self.folder / "out").mkdir(exist_ok=True)
        shutil.copytree(self.folder, self._pristine)
        first = self._run_undisturbed()
        self.n_changes, self.seconds, self.cpu = first.n_changes, first.seconds, first.cpu
        preload((self.home / "notes" / "modules").read_text().split("\n"))
        self.wanted = results(self.folder / "out")
        if twice:
            self.fresh()
            second = self._run_undisturbed()
            self.seconds, self.cpu = second.seconds, second.cpu
            if problems := self.differences():
                raise RuntimeError(f"two undisturbed runs of {self.world.name} differ: {problems}")
        shutil.copytree(self.folder, self.finished)

    def _run_undisturbed(self) -> Ending:
        ending = self.run()
        if ending.code != 0:
            raise RuntimeError(f"undisturbed run of {self.world.name}: {ending.code} {ending.out} {ending.err[-3000:]}")
        return ending

    def fresh(self, *, finished: bool = False) -> None:
        """The place as it was before the run, or after it."""
        shutil.rmtree(self.folder)
        shutil.copytree(self.finished if finished else self._pristine, self.folder)

    def start(self, fault: Fault | None = None, *, notes: str = "notes", as_nobody: bool = False) -> Child:
        """Begin the command."""
        arguments = self.world.arguments(self.folder)
        return self._child(command(self.world.script, arguments, figures=self.figures), fault, notes, as_nobody)

    def run(self, fault: Fault | None = None, **options: object) -> Ending:
        """Run the command to its end."""
        return self.start(fault, **options).ending()

    def _child(self, function, fault=None, notes="notes", as_nobody=False) -> Child:  # noqa: ANN001
        return Child(function, self.folder / "out", self.home / notes, fault, as_nobody=as_nobody)

    # ------------------------------------------------------------ what must hold

    def partial(self) -> list[str]:
        """Files that stand under a final name and are not whole, and records that speak of such."""
        problems = []
        out = self.folder / "out"
        for path in sorted(path for path in out.rglob("*") if path.is_file()):
            name = path.relative_to(out).as_posix()
            if is_leftover(name) or name.endswith(".lock") or any(fnmatch(path.name, log) for log in LOGS):
                continue
            if path.suffix == ".json":
                try:
                    content = json.loads(path.read_text(encoding="utf-8"))
                except ValueError as error:
                    problems.append(f"partial: {name} ({error})")
                    continue
                if is_record(name):
                    problems += _false_claims(path, content)
            elif self.wanted.get(name) not in (None, hashlib.sha256(path.read_bytes()).hexdigest()):
                problems.append(f"not whole: {name}")
        return problems

    def differences(self) -> list[str]:
        """In what the outputs differ from the undisturbed run's."""
        return differences(results(self.folder / "out"), self.wanted)

    def records(self) -> list[Path]:
        """The run records among the outputs."""
        return [path for path in (self.folder / "out").rglob("*run_metadata*") if path.is_file()]

    def complete(self, trial: Trial, fault: Fault | None = None) -> Trial:
        """Run the command again, undisturbed (but for the clock): it completes, and the result is the undisturbed one.

        What is wrong is noted with the last trial: the one before this run.
        """
        again = self.run(fault)
        if again.code != 0:
            trial.problems.append(f"the next run ended with {again.code}: {again.err[-600:]}")
        trial.problems += self.differences()
        if left := n_leftovers(self.folder / "out"):
            trial.problems.append(f"{left} temporary files are left for good")
        return trial

    def told(self, trial: Trial, ending: Ending, code: int, word: str) -> None:
        """The run ended with this code and one line on stderr that has this word in it."""
        if ending.code != code:
            trial.problems.append(f"exit code {ending.code}, not {code}: {ending.err[-600:]}")
        elif len(ending.error_lines) != 1 or word not in ending.err:
            trial.problems.append(f"not one line with {word!r}: {ending.err[-600:]}")


def _false_claims(record: Path, content: dict) -> list[str]:
    """Outputs that a record declares finished and that are not there as it says."""
    problems = []
    for name, digest in content.get("outputs", {}).items():
        path = record.parent / name
        if not path.is_file():
            problems.append(f"{record.name} declares {name}, which is missing")
        elif hashlib.sha256(path.read_bytes()).hexdigest() != digest:
            problems.append(f"{record.name} declares another {name}")
    return problems


# ---------------------------------------------------------------- killed, interrupted, no space


def _early(random: np.random.Generator) -> float:
    """A share of a run, small ones more often: a resumed run is shorter than a whole one."""
    return float(random.random() ** 2)


def kill(bench: Bench, random: np.random.Generator, kind: int) -> Trial:
    """`kill -9`: at a random time (kind 0), just before a change of a file (1), or amid a write (2)."""
    if kind == 0:
        share = _early(random)
        trial = Trial(bench.world.name, "kill at a time", f"after {share:.2f} of a run")
        child = bench.start()
        child.kill_after(share * bench.seconds)
    else:
        number = int(_early(random) * bench.n_changes)
        fault = Fault(Kind.KILL if kind == 1 else Kind.TEAR, number, float(random.random()))
        what = "before a change" if kind == 1 else "amid a write"
        trial = Trial(bench.world.name, f"kill {what}", f"{number} of {bench.n_changes}")
        child = bench.start(fault)
    ending = child.ending()
    trial.outcome = "killed" if ending.code == -signal.SIGKILL else "finished first"
    if ending.code not in (0, -signal.SIGKILL):
        trial.problems.append(f"ended with {ending.code} before it was killed: {ending.err[-600:]}")
    trial.problems += bench.partial()
    return trial


def interrupt(bench: Bench, random: np.random.Generator, kind: int) -> Trial:
    """Ctrl-C: at a random time (kind 0) or just before a change of a file (1)."""
    if kind == 0:
        share = _early(random)
        trial = Trial(bench.world.name, "Ctrl-C", f"after {share:.2f} of a run")
        child = bench.start()
        child.kill_after(share * bench.seconds, signal.SIGINT)
    else:
        change = int(_early(random) * bench.n_changes)
        trial = Trial(bench.world.name, "Ctrl-C", f"before change {change} of {bench.n_changes}")
        child = bench.start(Fault(Kind.INTERRUPT, change))
    ending = child.ending()
    trial.outcome = "interrupted" if ending.code == 130 else "finished first"
    if ending.code != 0:
        bench.told(trial, ending, 130, "interrupted")
    trial.problems += bench.partial()
    return trial


def fill_disk(bench: Bench, random: np.random.Generator) -> Trial:
    """From a random change of a file on, the disk is full."""
    change = int(_early(random) * bench.n_changes)
    trial = Trial(bench.world.name, "full disk", f"from change {change} of {bench.n_changes}")
    ending = bench.run(Fault(Kind.FULL, change))
    trial.outcome = "refused" if ending.code else "finished first"
    if ending.code != 0:
        bench.told(trial, ending, 2, "No space left")
    trial.problems += bench.partial()
    return trial


def fill_real_disk(bench: Bench) -> Trial:
    """A file system of its own with room for half of the outputs; then it gets more. Needs the right to mount one."""
    bench.fresh()
    out = bench.folder / "out"
    n_bytes = sum(path.stat().st_size for path in (bench.finished / "out").rglob("*") if path.is_file())
    kilobytes = max(8, n_bytes // 2048)
    trial = Trial(bench.world.name, "full disk (tmpfs)", f"{kilobytes} KB for {n_bytes // 1024} KB")
    if os.system(f"mount -t tmpfs -o size={kilobytes}k none '{out}' 2>/dev/null") != 0:
        trial.outcome = "not possible here"
        return trial
    try:
        ending = bench.run()
        trial.outcome = "refused" if ending.code else "finished first"
        if ending.code != 0:
            bench.told(trial, ending, 2, "No space left")
        trial.problems += bench.partial()
        os.system(f"mount -o remount,size=256m '{out}'")
        return bench.complete(trial)
    finally:
        os.system(f"umount -l '{out}'")


def forbid_writing(bench: Bench) -> Trial:
    """The folder may be read, not written: root becomes somebody else for this."""
    trial = Trial(bench.world.name, "read-only folder", "")
    paths = [bench.folder, *bench.folder.rglob("*")]
    modes = [path.stat().st_mode for path in paths]
    for path in paths:
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = _contents(bench.folder)
    try:
        ending = bench.run(as_nobody=os.getuid() == 0)
    finally:
        for path, mode in zip(paths, modes, strict=True):
            path.chmod(mode)
    trial.outcome = "refused" if ending.code else "finished first"
    if ending.code != 0:
        bench.told(trial, ending, 2, "cannot write")
    if _contents(bench.folder) != before:
        trial.problems.append("something was written")
    return trial


def _contents(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


# ---------------------------------------------------------------- two at once, wrong clocks


def run_two(bench: Bench, random: np.random.Generator, *, kill_first: bool) -> Trial:
    """A second run while the first stands still in the middle of its writing; then that is killed, or goes on."""
    change = int(random.integers(bench.n_changes // 4, bench.n_changes * 3 // 4 + 1))
    trial = Trial(bench.world.name, "two runs at once", f"the first one stopped before change {change}")
    first = bench.start(Fault(Kind.PAUSE, change))
    if not first.wait_until_stopped():
        trial.problems.append(f"the first run ended too early: {first.ending().err[-600:]}")
        return trial
    second = bench.run(notes="notes-2")
    trial.outcome = "second refused" if second.code else "both finished"
    if second.code != 0:
        bench.told(trial, second, 2, "another run")
    if kill_first:
        os.kill(first.pid, signal.SIGKILL)
    first.resume()
    ending = first.ending()
    if not kill_first:
        if ending.code != 0:
            trial.problems.append(f"the first run ended with {ending.code}: {ending.err[-600:]}")
        trial.problems += bench.differences()
    return trial


def wrong_clock(bench: Bench, years: int) -> Trial:
    """The clock is years off during the run; afterwards, all files are from the future or the past."""
    bench.fresh()
    trial = Trial(bench.world.name, "clock", f"{years:+d} years")
    bench.complete(trial, Fault(Kind.CLOCK, amount=years * _YEAR))
    for path in [bench.folder, *bench.folder.rglob("*")]:
        os.utime(path, (path.stat().st_mtime + years * _YEAR,) * 2)
    times = _times(bench)
    trial.outcome = "same result"
    if not bench.world.exports:
        bench.complete(trial)
    if bench.world.has_record and _times(bench) != times:
        trial.problems.append("files with a strange date were written again")
    return trial


def _times(bench: Bench) -> dict[str, int]:
    return {name: (bench.folder / "out" / name).stat().st_mtime_ns for name in bench.wanted}


# ---------------------------------------------------------------- damaged files


def damage(bench: Bench, name: str, random: np.random.Generator, *, cut: bool) -> Trial:
    """A file of a finished run, input, output or cache, is cut off or has one bit flipped; the command runs again.

    It refuses the file in one line, or gives the undisturbed result, or (reports) says which file it did without. A
    finished run does not read its caches and logs again, which no record declares: a run that has to begin anew does.
    """
    bench.fresh(finished=True)
    path = bench.folder / name
    content = bytearray(path.read_bytes())
    if cut:
        content = content[: int(random.integers(len(content)))]
    else:
        content[int(random.integers(len(content)))] ^= 1 << int(random.integers(8))
    path.write_bytes(content)
    trial = Trial(bench.world.name, "cut off" if cut else "bit flipped", name)
    if bench.world.exports:
        shutil.rmtree(bench.folder / "out/exported", ignore_errors=True)
    ending = bench.run()
    records = bench.records()
    is_declared = any(path == record.parent / output for record in records
                      for output in json.loads(record.read_text()).get("outputs", {}))  # fmt: skip
    if ending.code == 0 and bench.world.has_record and not is_declared and _only(name, bench.differences()):
        for record in records:
            record.unlink()
        ending = bench.run()
        trial.outcome = "not read, and "
    if ending.code != 0:
        trial.outcome += "refused"
        bench.told(trial, ending, 2, "")
        return trial
    different = bench.differences()
    if not different:
        trial.outcome += "same result"
    elif trial.outcome and _only(name, different):
        trial.outcome += "read without harm"
    elif "/model/" in name and not cut:
        # Weights are not described by any record: altered ones are another model. Half of a file is none.
        trial.outcome = "another model"
    elif path.name in _told_files(bench, ending):
        trial.outcome = "done without, and said so"
    else:
        trial.outcome = "unnoticed"
        trial.problems += different
    return trial


def _only(name: str, different: list[str]) -> bool:
    """True if nothing but the damaged file itself differs."""
    return different == [f"other content: {name.removeprefix('out/')}"]


def _told_files(bench: Bench, ending: Ending) -> str:
    issues = "".join(path.read_text() for path in (bench.folder / "out").rglob("report_issues.csv"))
    manifest = "".join(path.read_text() for path in (bench.folder / "out").rglob("export_manifest.json"))
    return ending.out + ending.err + issues + manifest


def files_to_damage(bench: Bench, random: np.random.Generator, most: int) -> list[str]:
    """Files of a finished run, of as many formats as there are, records and locks left out."""
    names: dict[str, list[str]] = {}
    for path in sorted(bench.finished.rglob("*")):
        name = path.relative_to(bench.finished).as_posix()
        if path.is_file() and path.stat().st_size and not is_record(name) and not is_leftover(name):
            names.setdefault(f"{name.split('/')[0]} {path.suffix}", []).append(name)
    chosen: list[str] = []
    while names and len(chosen) < most:
        for kind in list(names):
            chosen.append(names[kind].pop(int(random.integers(len(names[kind])))))
            if not names[kind]:
                del names[kind]
    return chosen[:most]
