"""Figures as geometry: where marks, ticks and labels go. The template draws them as SVG in the page's own colours.

Marks of one class are one path of dots, so that thousands of neurons stay a few kilobytes. No drawing library: the
page needs no fonts or colours of its own, follows the reader's light or dark setting, and equal data give equal bytes.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lib.reporting.page.neurons import NeuronFacts

_LABEL = re.compile(r"[am]\d{1,5}", re.ASCII)

RATE_EDGES = (0.02, 0.05, 0.1, 0.2, 0.4)
"""Edges of the classes of flip rates; six classes, from hardly any flip to two in five and more."""
_MAP_WIDTH, _MAP_LEFT, _MAP_PLOT, _MAP_TOP = 960.0, 52.0, 700.0, 8.0
_SCATTER, _SCATTER_LEFT, _SCATTER_TOP = 340.0, 48.0, 12.0
_LOW, _HIGH = -0.25, 1.0


@dataclass(frozen=True)
class Tick:
    """A label on an axis."""

    at: float
    text: str


@dataclass(frozen=True)
class Marks:
    """Dots of one class: what they stand for, how many, their path."""

    css: str
    text: str
    n: int
    path: str


@dataclass(frozen=True)
class LayerBar:
    """One row of the map: label, place, agonists and candidates in it, length of the agonists' bar."""

    label: str
    y: float
    n_agonists: int
    n_candidates: int | None
    length: float


@dataclass(frozen=True)
class NeuronMap:
    """Layers (rows) by coordinates (columns). points: (neuron, x, y) of every dot, for the page's script."""

    width: float
    height: float
    left: float
    right: float
    bottom: float
    row_height: float
    rows: list[LayerBar]
    ticks: list[Tick]
    classes: list[Marks]
    points: list[list[object]]


def neuron_map(facts: Sequence[NeuronFacts], candidates: Mapping[str, int], width: int | None) -> NeuronMap | None:
    """The map of agonists. candidates: component label -> how many were searched; width: coordinates per component."""
    if not facts:
        return None
    layers = _rows(facts, candidates)
    row_height = 15.0 if len(layers) <= 40 else 600.0 / len(layers)
    place = {label: _MAP_TOP + (number + 0.5) * row_height for number, label in enumerate(layers)}
    n_columns = max([width or 0, *(item.neuron.index + 1 for item in facts)])
    dots: dict[int, list[str]] = {}
    points: list[list[object]] = []
    for item in facts:
        x = round(_MAP_LEFT + (item.neuron.index + 0.5) / n_columns * _MAP_PLOT, 1)
        y = round(place[_row_label(item)], 1)
        dots.setdefault(rate_class(item.rate), []).append(f"M{x:g} {y:g}h0")
        points.append([str(item.neuron), x, y])
    agonists = Counter(_row_label(item) for item in facts)
    most = max(agonists.values())
    searched: Counter = Counter()
    for label, n in candidates.items():
        searched[_component_row(label)] += n
    bottom = _MAP_TOP + len(layers) * row_height
    return NeuronMap(
        _MAP_WIDTH,
        bottom + 40,
        _MAP_LEFT,
        _MAP_LEFT + _MAP_PLOT,
        bottom,
        row_height,
        [
            LayerBar(label, place[label], agonists[label], searched.get(label), round(110 * agonists[label] / most, 1))
            for label in layers
        ],
        [Tick(round(_MAP_LEFT + value / n_columns * _MAP_PLOT, 1), f"{value:,}") for value in _round_ticks(n_columns)],
        [
            Marks(f"q{number}", text, len(dots.get(number, ())), "".join(dots.get(number, ())))
            for number, text in enumerate(rate_class_names())
        ],
        points,
    )


def rate_class(rate: float) -> int:
    """Class of a flip rate: the number of edges at or below it; unknown rates are in the lowest."""
    return sum(rate >= edge for edge in RATE_EDGES)


def rate_class_names() -> list[str]:
    """What the classes mean, in percent."""
    shown = [f"{100 * edge:g}" for edge in RATE_EDGES]
    middle = [f"{low} to {high} %" for low, high in zip(shown, shown[1:], strict=False)]
    return [f"below {shown[0]} %", *middle, f"{shown[-1]} % and more"]


def _component_row(label: str) -> str:
    """Row of a component: heads of one layer share a row."""
    return label.partition(".")[0]


def _row_label(item: NeuronFacts) -> str:
    return _component_row(item.neuron.layer_label)


def _rows(facts: Sequence[NeuronFacts], candidates: Mapping[str, int]) -> list[str]:
    """Row labels from the first layer to the last, without gaps, attention before the MLP that reads it."""
    seen = {_row_label(item) for item in facts} | {_component_row(label) for label in candidates}
    known = {label for label in seen if _LABEL.fullmatch(label)}
    kinds = sorted({label[0] for label in known})
    last = max(int(label[1:]) for label in known)
    # A file may name any layer: more rows than any model has layers are not drawn without need.
    if last >= 512:
        return sorted(known, key=lambda label: (int(label[1:]), label))
    return [f"{kind}{layer}" for layer in range(last + 1) for kind in kinds]


def _round_ticks(n: int) -> list[int]:
    step = 10 ** math.floor(math.log10(max(n, 1)))
    step = next((part for part in (step // 5, step // 2, step, 2 * step) if part and n / part <= 8), step)
    return list(range(0, n + 1, max(1, step)))


@dataclass(frozen=True)
class Scatter:
    """MCC on TEST (up) against ALL-FIT (right), one dot per neuron."""

    size: float
    width: float
    height: float
    left: float
    top: float
    ticks: list[Tick]
    threshold_x: float
    threshold_y: float
    threshold: str
    classes: list[Marks]
    points: list[list[object]]


def scope_scatter(pairs: Sequence[tuple[str, float, float]], threshold: float) -> Scatter:
    """pairs: (neuron, MCC on TEST, MCC in ALL-FIT)."""
    holds: list[str] = []
    others: list[str] = []
    points: list[list[object]] = []
    for name, test, all_fit in pairs:
        x, y = _across(all_fit), _up(test)
        (holds if test >= threshold else others).append(f"M{x:g} {y:g}h0")
        points.append([name, x, y])
    ticks = [value / 100 for value in range(-25, 101, 25)]
    return Scatter(
        _SCATTER,
        _SCATTER_LEFT + _SCATTER + 16,
        _SCATTER_TOP + _SCATTER + 44,
        _SCATTER_LEFT,
        _SCATTER_TOP,
        [Tick(round(_SCATTER * (value - _LOW) / (_HIGH - _LOW), 1), f"{value:g}") for value in ticks],
        _across(threshold),
        _up(threshold),
        f"{threshold:g}",
        [
            Marks("q1", f"below {threshold:g} on TEST", len(others), "".join(others)),
            Marks("q5", f"{threshold:g} or more on TEST", len(holds), "".join(holds)),
        ],
        points,
    )


def _across(value: float) -> float:
    return round(_SCATTER_LEFT + _SCATTER * _share(value), 1)


def _up(value: float) -> float:
    return round(_SCATTER_TOP + _SCATTER * (1 - _share(value)), 1)


def _share(value: float) -> float:
    return min(1.0, max(0.0, (value - _LOW) / (_HIGH - _LOW)))
