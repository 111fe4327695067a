"""Pickles that hold built-in containers and scalars only: nothing in them can name, build or call anything.

A pickle is a program for a small machine. Before it is run, its instructions are walked through: only those that make
containers, texts and numbers are let through, and none may ask for more memory than the file has bytes for.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from typing import Any

_ALLOWED = frozenset(
    "PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT SHORT_BINBYTES BINBYTES "
    "SHORT_BINUNICODE BINUNICODE BINUNICODE8 EMPTY_LIST APPEND APPENDS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 "
    "EMPTY_DICT SETITEM SETITEMS EMPTY_SET ADDITEMS FROZENSET BINGET LONG_BINGET BINPUT LONG_BINPUT MEMOIZE".split()
)
_LENGTH_BYTES = {pickletools.TAKEN_FROM_ARGUMENT1: 1, pickletools.TAKEN_FROM_ARGUMENT4: 4,
                 pickletools.TAKEN_FROM_ARGUMENT4U: 4, pickletools.TAKEN_FROM_ARGUMENT8U: 8}  # fmt: skip
_STOP, _LONG_BINPUT = pickle.STOP[0], pickle.LONG_BINPUT[0]


def _argument_sizes() -> dict[int, int]:
    """Bytes that follow each allowed instruction; -n where n bytes tell how many more follow."""
    sizes = {}
    for instruction in pickletools.opcodes:
        if instruction.name in _ALLOWED:
            size = instruction.arg.n if instruction.arg else 0
            sizes[ord(instruction.code)] = size if size >= 0 else -_LENGTH_BYTES[size]
    return sizes


_SIZES = _argument_sizes()
_NAMES = {ord(instruction.code): instruction.name for instruction in pickletools.opcodes}


def check_instructions(content: bytes) -> None:
    """Walk through a pickle without running it.

    Raises:
        pickle.UnpicklingError: an instruction is not allowed, or the end is missing.
    """
    position, end = 0, len(content)
    while position < end:
        code = content[position]
        size = _SIZES.get(code)
        if size is None:
            name = _NAMES.get(code, f"byte {code}")
            raise pickle.UnpicklingError(f"it holds {name}, and only plain containers, texts and numbers are allowed")
        if code == _STOP:
            return
        position += 1
        if code == _LONG_BINPUT and int.from_bytes(content[position : position + 4], "little") > end:
            # The table of remembered values grows to the number given here: a few bytes could ask for 64 GB.
            raise pickle.UnpicklingError("it remembers more values than it can hold")
        position += size if size >= 0 else -size + int.from_bytes(content[position : position - size], "little")
    raise pickle.UnpicklingError("it is cut off")


class _PlainUnpickler(pickle.Unpickler):
    """The second lock: were an instruction overlooked, no class or function could be named."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it holds a persistent reference")


def load_plain(content: bytes) -> Any:
    """The value of a plain pickle.

    Raises:
        pickle.UnpicklingError: it is not one; whatever its bytes are, no other error is raised and nothing is run.
    """
    check_instructions(content)
    try:
        return _PlainUnpickler(io.BytesIO(content)).load()
    except (pickle.UnpicklingError, MemoryError, RecursionError, EOFError, ValueError, TypeError, LookupError,
            AttributeError, OverflowError) as error:  # fmt: skip
        raise pickle.UnpicklingError(" ".join(str(error).split()) or type(error).__name__) from None
