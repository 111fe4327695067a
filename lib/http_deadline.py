"""A bound on how long the body of an HTTP reply may take.

The timeouts of `httpx`, which the chat clients build on, count from one read to the next: a server that sends a byte
now and then would hold a call for ever.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any


def deadline_hooks(seconds: float) -> dict[str, list[Callable[[Any], None]]]:
    """`event_hooks` of a client: each reply's body must be complete `seconds` after its headers, else `ReadTimeout`."""
    def bound(response: Any) -> None:
        # Some SDKs build on `httpx`, some on its successor; each accepts only streams of its own kind.
        library = sys.modules[type(response).__module__.partition(".")[0]]
        response.stream = _bounded_stream_class(library)(response.stream, seconds)

    return {"response": [bound]}


@functools.cache
def _bounded_stream_class(library: ModuleType) -> type:
    class BoundedStream(library.SyncByteStream):  # type: ignore[misc, name-defined]  # known at run time only
        """A reply's bytes, until the deadline."""

        def __init__(self, stream: Any, seconds: float) -> None:
            self._stream = stream
            self._seconds = seconds
            self._deadline = time.monotonic() + seconds

        def __iter__(self) -> Iterator[bytes]:
            for chunk in self._stream:
                if time.monotonic() > self._deadline:
                    raise library.ReadTimeout(f"the reply was not complete after {self._seconds:g} s")
                yield chunk

        def close(self) -> None:
            self._stream.close()

    return BoundedStream
