"""Tables of the page as data: typed columns, rows of plain values. The template and the page's script show them alike.

A cell is a text, a `[shown, value]` pair of a number, or a `[shown, value, low, high]` rate with its interval; a number
that does not exist has the value None and is sorted last, whichever way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from lib.reporting.page.texts import count, decimal, is_number, percent, significant, to_float, visible

Cell = str | list[Any]


class Kind(Enum):
    """How the cells of a column are shown and sorted."""

    TEXT = "text"
    """Words of ours."""

    MODEL = "model"
    """Untrusted text (prompt, answer, rule, name): isolated, in a fixed-width face."""

    NUMBER = "number"
    """A number, aligned right."""

    RATE = "rate"
    """A share in [0, 1] with its interval, as text and as a small drawing."""

    NEURON = "neuron"
    """A neuron's name; a button where the row can be opened."""


@dataclass(frozen=True)
class Column:
    """One column: its head, its kind, and what the head means in a sentence."""

    head: str
    kind: Kind = Kind.TEXT
    help: str = ""

    def to_json(self) -> dict[str, str]:
        """What the page's script needs."""
        return {"head": self.head, "kind": self.kind.value}


@dataclass(frozen=True)
class Grid:
    """One table. opens: the rows can be opened, with details kept under the text of the first cell.

    shown: rows in the page itself, for readers without scripts and as the size of a sheet for those with.
    """

    name: str
    caption: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    opens: bool = False
    shown: int = 25
    noun: str = "row"
    sorted_by: str = field(default="")

    @property
    def head_rows(self) -> Sequence[Sequence[Cell]]:
        """The rows of the first sheet."""
        return self.rows[: self.shown]

    @property
    def needs_tools(self) -> bool:
        """Whether there are enough rows to search in."""
        return len(self.rows) > 5 or self.opens

    def to_json(self) -> dict[str, Any]:
        """What the page's script needs."""
        return {
            "columns": [column.to_json() for column in self.columns],
            "rows": [list(row) for row in self.rows],
            "opens": self.opens,
            "shown": self.shown,
            "noun": self.noun,
        }


def number_cell(value: object, digits: int = 2) -> Cell:
    """A decimal number."""
    return [decimal(value, digits), _value(value)]


def count_cell(value: object) -> Cell:
    """A whole number."""
    return [count(value), _value(value)]


def percent_cell(value: object, digits: int = 1) -> Cell:
    """A share in [0, 1]."""
    return [percent(value, digits), _value(value)]


def small_cell(value: object) -> Cell:
    """A p- or q-value."""
    return [significant(value), _value(value)]


def interval_cell(value: object, low: object, high: object) -> Cell:
    """A score with its interval, in decimals."""
    if not is_number(value):
        return ["NA", None]
    if not is_number(low) or not is_number(high):
        return [decimal(value), _value(value)]
    return [f"{decimal(value)} [{decimal(low)}, {decimal(high)}]", *map(_value, (value, low, high))]


def score_cell(row: Mapping[str, object], name: str) -> Cell:
    """A metric of a rule with its interval, from the columns that rule files have for it."""
    return interval_cell(*(to_float(row.get(key)) for key in (name, f"{name}_low95", f"{name}_high95")))


def share_cell(row: Mapping[str, object], name: str) -> Cell:
    """A share in [0, 1] from a rule's row."""
    return percent_cell(to_float(row.get(name)))


def rate_cell(hits: int, n: int, low: float, high: float) -> Cell:
    """Hits of n with the interval of their share."""
    if n <= 0:
        return ["NA", None]
    shown = f"{percent(hits / n)} ({hits:,}/{n:,})"
    return [shown, *map(_value, (hits / n, low, high))]


def model_cell(text: object, limit: int = 400) -> Cell:
    """Untrusted text."""
    return visible(text, limit)


def _value(value: object) -> float | int | None:
    """The number for sorting, short: five decimals are more than any drawing or order of ours needs."""
    if not is_number(value):
        return None
    return int(value) if float(value).is_integer() else float(f"{value:.5g}")
