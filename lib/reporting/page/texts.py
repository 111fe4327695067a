"""Texts and numbers as the page shows them. Prompts, answers and names are untrusted: nothing in them stays invisible.

Escaping is not done here: templates escape everything, and data for the page's script is text, never markup.
"""

from __future__ import annotations

import math
import os
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from numbers import Real
from typing import TypeGuard

MAX_TEXT = 600
_KEPT_CONTROLS = "\n\t"
# Control and format characters (bidi overrides, zero-width ones), lone surrogates, private and unassigned characters,
# line and paragraph separators.
_SHOWN_BY_CODE = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
# Letters and marks that Unicode calls default ignorable: fillers, joiners, variation selectors.
_IGNORABLE = {0x034F, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x180B, 0x180C, 0x180D, 0x180F, 0x3164, 0xFFA0} | {
    *range(0xFE00, 0xFE10),
    *range(0xE0100, 0xE01F0),
}
_MIN_PREFIX = 4


def visible(text: object, limit: int = MAX_TEXT) -> str:
    """The text with every invisible or reordering character by its code, `⟨U+202E⟩`, and cut to about `limit`.

    A long text keeps its beginning and its end, and says how much is left out between them.
    """
    shown = str(text).replace("\r\n", "\n")
    if len(shown) > limit:
        head, tail = limit * 2 // 3, limit // 3
        left_out = len(shown) - head - tail
        return f"{_coded(shown[:head])} … {left_out:,} characters left out … {_coded(shown[-tail:])}"
    return _coded(shown)


def _coded(text: str) -> str:
    if text.isascii() and text.isprintable():
        return text
    return "".join(map(_shown_character, text))


@lru_cache(maxsize=4096)
def _shown_character(character: str) -> str:
    if character in _KEPT_CONTROLS:
        return character
    hidden = unicodedata.category(character) in _SHOWN_BY_CODE or ord(character) in _IGNORABLE
    return f"⟨U+{ord(character):04X}⟩" if hidden else character


def shared_prefix(texts: Sequence[str]) -> str:
    """What all texts begin with, up to a white space: the worked examples in front of every prompt. "" if too little.

    Never a whole text: something is left of each.
    """
    if len(texts) < 2:
        return ""
    prefix = os.path.commonprefix([min(texts), max(texts)])
    shortest = min(map(len, texts))
    ends = [place + 1 for place, character in enumerate(prefix) if character.isspace() and place + 1 < shortest]
    return prefix[: ends[-1]] if ends and ends[-1] >= _MIN_PREFIX else ""


# ---------------------------------------------------------------- numbers


def is_number(value: object) -> TypeGuard[float]:
    """Whether there is a finite number to show."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def decimal(value: object, digits: int = 2) -> str:
    """A number with fixed decimals; `NA` for none."""
    return f"{value:.{digits}f}" if is_number(value) else "NA"


def percent(value: object, digits: int = 1) -> str:
    """A share in [0, 1] in percent; `NA` for none."""
    return f"{100 * value:.{digits}f} %" if is_number(value) else "NA"


def count(value: object) -> str:
    """A whole number with thousands separators; `NA` for none."""
    return f"{int(value):,}" if is_number(value) else "NA"


def significant(value: object) -> str:
    """A small probability with two significant digits; `NA` for none."""
    return f"{value:.2g}" if is_number(value) else "NA"


def plural(number: int, noun: str) -> str:
    """`1 neuron`, `1,204 neurons`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def to_float(value: object) -> float:
    """A number from a table or JSON; NaN where there is none."""
    try:
        number = float(value)  # type: ignore[arg-type]  # what float does not take is caught
    except (TypeError, ValueError, OverflowError):
        return math.nan
    return number if math.isfinite(number) else math.nan
