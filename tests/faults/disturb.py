"""What goes wrong, and when: a fault that strikes at the n-th change of a file below a folder, or after a time.

File changes are seen through Python's audit events (open for writing, rename, remove, ...) and `os.fsync`, so nothing
in the code under test knows of it. A fault is armed in a forked child, never in the test's own process: audit hooks
cannot be taken off again.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum


class Kind(Enum):
    """What happens."""

    KILL = "kill"
    """`kill -9` just before a change of a file."""

    TEAR = "tear"
    """`kill -9` in the middle of a write: the file is left with a part of the bytes that were to be flushed."""

    INTERRUPT = "interrupt"
    """Ctrl-C just before a change of a file."""

    PAUSE = "pause"
    """Stopped (SIGSTOP) just before a change of a file, until somebody continues it."""

    FULL = "full"
    """From one change on, everything that takes space fails: no space left on device."""

    CLOCK = "clock"
    """The clock is wrong by `amount` seconds, all the time."""


@dataclass(frozen=True)
class Fault:
    """kind, the number of the file change at which it strikes (from 0), and a share (TEAR) or seconds (CLOCK)."""

    kind: Kind
    at_change: int = 0
    amount: float = 0.5


_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_TAKES_SPACE = ("open", "os.mkdir", "fsync")


class Watch:
    """Counts the changes of files below `folder` and lets the fault strike. One for the life of the process."""

    def __init__(self, folder: str, fault: Fault | None) -> None:
        self.prefix = os.path.join(os.path.realpath(folder), "")
        self.fault = fault
        self.n_changes = 0
        self._pid = os.getpid()
        self._is_full = False
        self._flushed: dict[int, int] = {}
        self._fsync = os.fsync

    def arm(self) -> None:
        """Begin to watch this process."""
        if self.fault is not None and self.fault.kind is Kind.CLOCK:
            _shift_clock(self.fault.amount)
        os.fsync = self._on_fsync
        sys.addaudithook(self._on_event)

    def _on_event(self, event: str, args: tuple) -> None:
        if os.getpid() != self._pid:
            return
        if event == "open":
            path, mode, flags = args
            is_change = bool(flags & _WRITING) if isinstance(flags, int) else any(c in (mode or "r") for c in "wax+")
            if is_change and self._is_below(path):
                self._change("open", None)
        elif event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"):
            if self._is_below(args[0]):
                self._change(event, None)

    def _on_fsync(self, descriptor: int) -> None:
        if os.getpid() == self._pid and self._is_below(os.readlink(f"/proc/self/fd/{descriptor}")):
            self._change("fsync", descriptor)
        self._fsync(descriptor)
        status = os.fstat(descriptor)
        self._flushed[status.st_ino] = status.st_size

    def _is_below(self, path: object) -> bool:
        if isinstance(path, bytes):
            path = os.fsdecode(path)
        if not isinstance(path, str | os.PathLike):
            return False
        return os.path.abspath(os.fspath(path)).startswith(self.prefix) and not str(path).endswith(".lock")

    def _change(self, event: str, descriptor: int | None) -> None:
        number, self.n_changes = self.n_changes, self.n_changes + 1
        fault = self.fault
        if fault is None:
            return
        if fault.kind is Kind.FULL:
            self._is_full |= number >= fault.at_change
            if self._is_full and event in _TAKES_SPACE:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        elif fault.kind is Kind.TEAR:
            # The first flush from there on: only a flush has bytes to lose.
            if number >= fault.at_change and descriptor is not None:
                status = os.fstat(descriptor)
                start = self._flushed.get(status.st_ino, 0)
                os.ftruncate(descriptor, start + int((status.st_size - start) * fault.amount))
                os.kill(self._pid, signal.SIGKILL)
        elif number == fault.at_change and fault.kind in _SIGNALS:
            os.kill(self._pid, _SIGNALS[fault.kind])


_SIGNALS = {Kind.KILL: signal.SIGKILL, Kind.INTERRUPT: signal.SIGINT, Kind.PAUSE: signal.SIGSTOP}


def _shift_clock(seconds: float) -> None:
    """All of `time` that tells the date, wrong by so much."""

    def shifted(function: Callable[..., float], amount: float) -> Callable[[], float]:
        return lambda: function() + amount

    def of_now(function: Callable) -> Callable:
        return lambda *args: function(*args) if args and args[0] is not None else function(time.time())

    time.time = shifted(time.time, seconds)
    time.time_ns = shifted(time.time_ns, int(seconds * 1e9))
    time.gmtime, time.localtime = of_now(time.gmtime), of_now(time.localtime)
    with_format = time.strftime
    time.strftime = lambda form, moment=None: with_format(form, time.localtime() if moment is None else moment)
