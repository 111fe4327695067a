"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from lib.cli import UserError


@contextlib.contextmanager
def atomic_write(path: str | Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a temporary file beside `path`; on success it is flushed to disk and renamed, on failure removed.

    Text is UTF-8 with "\\n" line ends. Parent folders are created.

    Raises:
        UserError: the folder cannot be written or the disk is full.
    """
    path = Path(path)
    text = "b" not in mode
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = _temporary_file(path)
        with open(descriptor, mode, encoding="utf-8" if text else None, newline="\n" if text else None) as handle:
            try:
                os.fchmod(descriptor, 0o666 & ~_UMASK)
                yield handle
                handle.flush()
                os.fsync(descriptor)
                os.replace(temporary, path)
            except BaseException:
                # Before it is closed: the lock still says whose it is.
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(temporary)
                raise
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; check the folder's permissions and free space"
        ) from error


def _temporary_file(path: Path) -> tuple[int, str]:
    """(descriptor, name) of an empty file beside `path` that nobody else writes.

    Its name follows from that of `path` and the writer holds a lock on it, which ends with the process: what a killed
    writer has left is used by the next one. If somebody is writing now, another name is taken.
    """
    import fcntl

    name = str(path.with_name(f".{path.name}.tmp"))
    with contextlib.suppress(OSError):
        descriptor = os.open(name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Between opening and locking, an earlier writer may have renamed this very file to its final name.
            # And what somebody else has put there under this name, or linked from elsewhere, is not ours to fill.
            status = os.fstat(descriptor)
            is_ours = stat.S_ISREG(status.st_mode) and status.st_uid == os.getuid() and status.st_nlink == 1
            if is_ours and os.path.samestat(status, os.stat(name, follow_symlinks=False)):
                os.ftruncate(descriptor, 0)
                return descriptor, name
        except OSError:
            os.close(descriptor)
            raise
        os.close(descriptor)
    return tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


# Asked once, before any thread runs: asking means setting it to 0 for a moment.
_UMASK = _umask()
