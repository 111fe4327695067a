"""Append-only files of lines that survive being killed: each line is a checksum and a JSON object.

Whatever follows the first line that is torn or does not match its checksum is not believed.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lib.cli import UserError


def write_lines(path: Path, lines: Iterable[dict[str, Any]], *, anew: bool) -> None:
    """Append lines, or begin the file with them; they are on disk when this returns.

    Raises:
        UserError: the folder cannot be written or the disk is full. Of the lines, none may be there, or the first few.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb" if anew else "ab") as handle:
            handle.write(b"".join(map(encode_line, lines)))
            handle.flush()
            os.fsync(handle.fileno())
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; check permissions and space") from error


def read_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The lines up to the first that is torn or altered, and the number of bytes they take; ([], 0) without a file."""
    return decode_lines(path.read_bytes() if path.is_file() else b"")


def cut_off(path: Path, n_good: int) -> None:
    """Remove what follows the good bytes, so that appending goes on after a whole line."""
    if path.stat().st_size > n_good:
        os.truncate(path, n_good)


def encode_line(line: dict[str, Any]) -> bytes:
    """The bytes of one line."""
    text = json.dumps(line, ensure_ascii=True, separators=(",", ":")).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def decode_lines(content: bytes) -> tuple[list[dict[str, Any]], int]:
    """Lines up to the first that is torn or altered, and the number of bytes they take."""
    lines, n_good = [], 0
    for raw in content.splitlines(keepends=True):
        checksum, _, text = raw.rstrip(b"\n").partition(b" ")
        if not raw.endswith(b"\n") or checksum != b"%08x" % zlib.crc32(text):
            break
        lines.append(json.loads(text))
        n_good += len(raw)
    return lines, n_good
