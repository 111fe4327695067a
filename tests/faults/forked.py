"""Commands run in forked children of one process that has imported everything: a trial pays for no imports.

The parent never runs a model or opens a thread, so that forking it is safe; what runs and what goes wrong is in the
children. Children that are still there when a trial ends are killed by their process group.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from tests.faults.disturb import Fault, Watch
from tests.scripts import REPOSITORY, load_script

NOBODY = 65534


@dataclass(frozen=True)
class Ending:
    """How a child ended: its exit code (minus the signal's number if it was killed), its output, file changes."""

    code: int
    out: str
    err: str
    n_changes: int
    seconds: float
    cpu: float
    peak_mb: float

    @property
    def error_lines(self) -> list[str]:
        """Lines on stderr that are no warning."""
        return [line for line in self.err.splitlines() if line.strip() and not line.startswith("WARNING")]


class Child:
    """One forked run of a function that returns an exit code; changes of files below `folder` are watched."""

    def __init__(
        self, function: Callable[[], int], folder: Path, notes: Path, fault: Fault | None = None, *, as_nobody=False
    ) -> None:
        self.notes, self.started = notes, time.monotonic()
        shutil.rmtree(notes, ignore_errors=True)
        notes.mkdir(parents=True)
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            _be_the_child(function, folder, notes, fault, as_nobody)
        with contextlib.suppress(OSError):
            os.setpgid(self.pid, self.pid)

    def kill_after(self, seconds: float, number: int = signal.SIGKILL) -> None:
        """Send a signal after a time (of running the function), unless the child has ended by then."""
        begun = self.notes / "begun"
        while not (begun.exists() and begun.stat().st_size) and not self.has_ended():
            time.sleep(0.001)
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if self.has_ended():
                return
            time.sleep(max(0.0, min(0.002, until - time.monotonic())))
        if not self.has_ended():
            os.kill(self.pid, number)

    def has_ended(self) -> bool:
        """True if it has, or if it has been stopped."""
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None

    def wait_until_stopped(self) -> bool:
        """Wait; True if it was stopped, False if it has ended instead."""
        found = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WSTOPPED | os.WNOWAIT)
        return found.si_code in (os.CLD_STOPPED, getattr(os, "CLD_TRAPPED", -1))

    def resume(self) -> None:
        """Let a stopped child go on."""
        os.kill(self.pid, signal.SIGCONT)

    def ending(self) -> Ending:
        """Wait for the end."""
        _, status, usage = os.wait4(self.pid, 0)
        code = os.waitstatus_to_exitcode(status)
        seconds = time.monotonic() - self.started
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        n_changes = self.notes / "changes"
        return Ending(
            code,
            (self.notes / "out").read_text(errors="replace"),
            (self.notes / "err").read_text(errors="replace"),
            int(n_changes.read_text() or 0) if n_changes.is_file() else 0,
            seconds,
            usage.ru_utime + usage.ru_stime,
            usage.ru_maxrss / 1024,
        )


def _be_the_child(
    function: Callable[[], int], folder: Path, notes: Path, fault: Fault | None, as_nobody: bool
) -> None:
    """The life of a child; does not return."""
    code, watch, changes = 1, Watch(str(folder), fault), None
    try:
        os.setpgid(0, 0)
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(notes / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        changes = os.open(notes / "changes", os.O_WRONLY | os.O_CREAT)
        modules = os.open(notes / "modules", os.O_WRONLY | os.O_CREAT)
        begun = os.open(notes / "begun", os.O_WRONLY | os.O_CREAT)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
        os.chdir(REPOSITORY)
        if as_nobody:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        watch.arm()
        os.write(begun, b"!")
        code = function()
        os.write(modules, "\n".join(sys.modules).encode())
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        if changes is not None:
            os.write(changes, str(watch.n_changes).encode())
        os._exit(code if isinstance(code, int) else 1)


def command(script: str, arguments: list[str], *, figures: bool) -> Callable[[], int]:
    """The run of a script as a function. Without `figures` they are saved undrawn: drawing takes most of a report."""

    def run() -> int:
        if not figures:
            from matplotlib.figure import Figure

            Figure.savefig = save_undrawn
        return load_script(script).main([str(argument) for argument in arguments])

    return run


def save_undrawn(figure: object, handle: IO[bytes], **options: object) -> None:
    """Stands in for `Figure.savefig`."""
    handle.write(b"%PDF-1.4 undrawn" * 64)


def preload(names: list[str]) -> None:
    """Import modules, so that children need not. A module that cannot be imported is left to them."""
    for name in names:
        if name not in sys.modules and not name.startswith(("script_", "__main__")):
            with contextlib.suppress(Exception):
                importlib.import_module(name)
