"""Zip files from strangers: no member leads outside, none is larger than it says, nothing fills disk or memory.

Standard library only.
"""

from __future__ import annotations

import contextlib
import lzma
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

from lib.cli import UserError

MAX_UNPACKED_BYTES = 200 * 1024**3
MAX_MEMBERS = 1_000_000
MAX_RATIO = 200
"""Unpacked to packed size of a whole archive from which it counts as a bomb; tables and JSON reach 20 or 30."""
_SMALL_BYTES = 1024**3
"""Below this unpacked size no ratio is looked at."""
READ_ERRORS = (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, RuntimeError, ValueError, KeyError,
               zlib.error, lzma.LZMAError, struct.error)  # fmt: skip
"""What reading a broken archive raises, whatever its bytes."""


@contextlib.contextmanager
def open_zip(path: Path) -> Iterator[zipfile.ZipFile]:
    """The archive, its members checked; an error in it is a `UserError` also while the caller reads.

    Raises:
        UserError: it is broken, has a member that would land outside or is a link, or is a bomb.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            check_members(path, archive.infolist())
            yield archive
    except READ_ERRORS as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} cannot be read as a zip file ({reason}); download it again") from error


def check_members(path: Path, members: Iterable[zipfile.ZipInfo]) -> None:
    """Refuse members that lead outside, links, and bombs. What a member says of its size, reading it never exceeds.

    Raises:
        UserError: see above.
    """
    n_members = unpacked = packed = 0
    for info in members:
        pieces = PurePosixPath(info.filename.replace("\\", "/"))
        if pieces.is_absolute() or ".." in pieces.parts or any(":" in part for part in pieces.parts[:1]):
            raise UserError(f"{path}: member {info.filename!r} leads outside the archive; nothing was read")
        if stat.S_ISLNK(info.external_attr >> 16):
            raise UserError(f"{path}: member {info.filename!r} is a link; nothing was read")
        n_members, unpacked, packed = n_members + 1, unpacked + info.file_size, packed + info.compress_size
    if n_members > MAX_MEMBERS:
        raise UserError(f"{path} has {n_members:,} members; nothing was read")
    if unpacked > MAX_UNPACKED_BYTES:
        raise UserError(f"{path} would unpack to more than {MAX_UNPACKED_BYTES >> 30} GB; unpack it yourself")
    if unpacked > max(_SMALL_BYTES, MAX_RATIO * packed):
        raise UserError(f"{path} would unpack to {unpacked // max(packed, 1)} times its size; nothing was read")
