"""Fetching a file once: with a timeout, a few attempts, a check of the content, and never half a file in its place."""

from __future__ import annotations

import time
import urllib.error
import urllib.request
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path

from lib.artifacts import atomic_write
from lib.cli import UserError

TIMEOUT_SECONDS = 30.0
ATTEMPTS = 3
BACKOFF_SECONDS = 1.0
MAX_BYTES = 256 * 1024 * 1024


def download(url: str, target: Path, *, what: str, hint: str, check: Callable[[bytes], None]) -> Path:
    """The file at `target`, fetched from `url` unless it is there with content that passes `check`.

    check: raises `UserError` on wrong content. hint: what to do without network access.

    Raises:
        UserError: the last attempt failed, or gave wrong content.
    """
    if target.is_file() and _passes(target.read_bytes(), check):
        return target
    problem = ""
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(BACKOFF_SECONDS * 2 ** (attempt - 1))
        try:
            content = _fetch(url)
            check(content)
        except (OSError, HTTPException, UserError, UnicodeDecodeError) as error:
            problem = " ".join(str(error).split()) or type(error).__name__
            continue
        with atomic_write(target, "wb") as handle:
            handle.write(content)
        return target
    raise UserError(f"{what} cannot be downloaded from {url} ({problem}); {hint}")


def _fetch(url: str) -> bytes:
    """The content; a shorter one than announced, or a larger one than sensible, is an error."""
    deadline = time.monotonic() + 10 * TIMEOUT_SECONDS
    with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as response:
        announced = response.headers.get("Content-Length")
        pieces, size = [], 0
        while piece := response.read(1 << 20):
            pieces.append(piece)
            size += len(piece)
            if size > MAX_BYTES:
                raise OSError(f"more than {MAX_BYTES} bytes")
            if time.monotonic() > deadline:
                raise OSError("too slow")
    if announced is not None and size < int(announced):
        raise OSError(f"only {size} of {announced} bytes came")
    return b"".join(pieces)


def _passes(content: bytes, check: Callable[[bytes], None]) -> bool:
    try:
        check(content)
    except (UserError, UnicodeDecodeError):
        return False
    return True
