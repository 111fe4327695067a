"""What a GGUF file's header says is looked at before a library believes it: one flipped bit asks for 2**19 layers.

Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3).
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from typing import Any

from lib.cli import UserError

_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MAX_DEPTH = 4
"""Arrays of arrays; files in use have none."""
_MAX_DIMENSIONS = 4
_SIZES = ("embedding_length", "feed_forward_length", "vocab_size", "attention.head_count", "attention.head_count_kv")
"""Settings that no tensor's largest dimension falls short of."""


class _Damaged(Exception):
    """What does not fit."""


class _Header:
    """Reads forward through the mapped file; nothing is read past its end."""

    def __init__(self, content: mmap.mmap) -> None:
        self.content, self.place, self.order = content, 0, "<"

    def number(self, kind: str) -> Any:
        layout = struct.Struct(self.order + kind)
        self.skip(layout.size)
        return layout.unpack_from(self.content, self.place - layout.size)[0]

    def text(self) -> bytes:
        size = self.number("Q")
        self.skip(size)
        return self.content[self.place - size : self.place]

    def skip(self, n_bytes: int) -> None:
        if n_bytes > len(self.content) - self.place:
            raise _Damaged(f"it ends {n_bytes - len(self.content) + self.place} bytes too early")
        self.place += n_bytes

    def value(self, kind: int, depth: int = 0) -> Any:
        """A number or a text; of an array, None: its elements are only gone through."""
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY or depth == _MAX_DEPTH:
            raise _Damaged(f"it has a value of the unknown kind {kind}")
        kind, count = self.number("I"), self.number("Q")
        if kind in _NUMBERS:
            self.skip(count * struct.calcsize(self.order + _NUMBERS[kind]))
            return None
        for _ in range(count):  # each takes eight bytes or more: the end of the file ends it
            self.value(kind, depth + 1)
        return None


def check_gguf(path: Path) -> None:
    """Refuse a file whose header does not fit to its size and its tensors.

    Raises:
        UserError: it is cut off, or a count, a size or a place in it cannot be right.
    """
    try:
        with open(path, "rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as content:
            _check(_Header(content))
    except _Damaged as error:
        raise UserError(f"{path} is not a GGUF model that can be read: {error}; download it again") from None
    except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
        raise UserError(f"{path} is not a GGUF model that can be read: {error}") from None


def _check(header: _Header) -> None:
    header.skip(4)
    if header.content[:4] != b"GGUF":
        raise _Damaged("it does not begin with GGUF")
    version = header.number("I")
    if version & 0xFFFF == 0:  # of a big-endian machine
        header.order, header.place = ">", 4
        version = header.number("I")
    if version not in (2, 3):
        raise _Damaged(f"its version is {version}, not 2 or 3")
    n_tensors, n_settings = header.number("Q"), header.number("Q")
    settings = {}
    for _ in range(n_settings):
        name = header.text()
        settings[name.decode("utf-8", "replace")] = header.value(header.number("I"))
    tensors = [_tensor(header) for _ in range(n_tensors)]
    _check_settings(settings, [shape for shape, _, _ in tensors])
    alignment = settings.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise _Damaged(f"its alignment is {alignment}")
    begin = -(-header.place // alignment) * alignment
    for _, place, n_bytes in tensors:
        if begin + place + n_bytes > len(header.content):
            raise _Damaged(f"a tensor ends {begin + place + n_bytes - len(header.content)} bytes behind its end")


def _tensor(header: _Header) -> tuple[tuple[int, ...], int, int]:
    """Dimensions, place behind the header, bytes."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    header.text()
    n_dimensions = header.number("I")
    if not 0 < n_dimensions <= _MAX_DIMENSIONS:
        raise _Damaged(f"a tensor has {n_dimensions} dimensions")
    shape = tuple(header.number("Q") for _ in range(n_dimensions))
    kind, place = header.number("I"), header.number("Q")
    if kind not in GGMLQuantizationType.__members__.values():
        raise _Damaged(f"a tensor has numbers of the unknown kind {kind}")
    per_block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    n_values = 1
    for size in shape:
        n_values *= size
    return shape, place, -(-n_values // per_block) * block_bytes


def _check_settings(settings: dict[str, Any], shapes: list[tuple[int, ...]]) -> None:
    """A model is built by these before its weights are looked at: larger than the tensors, it would fill the memory."""
    largest = max((size for shape in shapes for size in shape), default=0)
    for name, value in settings.items():
        if not isinstance(value, int):
            continue
        if name.endswith(".block_count") and value > len(shapes):
            raise _Damaged(f"{name} is {value} with {len(shapes)} tensors")
        if name.endswith(tuple(f".{size}" for size in _SIZES)) and value > largest:
            raise _Damaged(f"{name} is {value}, and its largest tensor has {largest}")
