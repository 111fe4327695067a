"""Reading answers of language models: where an answer ends, and the first number in it."""

from __future__ import annotations

import re

_NUMBER = re.compile(r"-?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?")
_UNFINISHED = re.compile(r"(?:\.|,\d{0,3})?")
"""What may follow a number in a text that goes on and still be part of it."""


def first_line(text: str, ends: str = "\n\r") -> str:
    """The text up to the first of the characters `ends`, leading space apart; minus signs as hyphens."""
    return re.split(f"[{re.escape(ends)}]", text.lstrip(), maxsplit=1)[0].replace("−", "-").rstrip()


def has_ended(text: str, ends: str = "\n\r") -> bool:
    """True if no continuation changes `first_line`."""
    return re.search(f"[{re.escape(ends)}]", text.lstrip()) is not None


def first_number(line: str) -> str | None:
    """The first number of a line, as written but for grouped thousands (`1,234`)."""
    match = _NUMBER.search(line)
    return match[0].replace(",", "") if match else None


def number_has_ended(line: str) -> bool:
    """True if no continuation changes `first_number`."""
    match = _NUMBER.search(line)
    return match is not None and _UNFINISHED.fullmatch(line[match.end():]) is None


def is_number(line: str) -> bool:
    """True if the line is a number and nothing else."""
    return _NUMBER.fullmatch(line) is not None
