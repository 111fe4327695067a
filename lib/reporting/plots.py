"""Figures of the reports, in one style: PDF and PNG, with the data as CSV; same content, same bytes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lib.artifacts import save_figure
from lib.reporting.naming import RunMode

_MODE_COLOURS = ("#1b5e9c", "#4fa3d1", "#b2432f", "#7a9a3b", "#555555")
_OTHER_COLOURS = ("#8a6fb2", "#d08a2e", "#3b8f8a", "#c26fa0", "#9a8f3b", "#6b7d93")
_MARKERS = "osD^vPX*<>"
_STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.linestyle": "--",
    "grid.alpha": 0.5,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "axes.axisbelow": True,
    # Names of runs and models may hold a $: they are shown, not read as formulas.
    "text.parse_math": False,
}
WIDE = (10.5, 6.0)


@contextlib.contextmanager
def report_style() -> Iterator[None]:
    """The style of every figure, restored afterwards."""
    with rc_context(_STYLE):
        yield


def label_colours(labels: Sequence[str]) -> dict[str, str]:
    """A colour per display label: the mode's, or one of the others."""
    colours: dict[str, str] = {}
    others = 0
    for label in labels:
        mode = RunMode.from_label(label)
        colour = _MODE_COLOURS[mode.order] if mode else None
        if colour is None or colour in colours.values():
            colour, others = _OTHER_COLOURS[others % len(_OTHER_COLOURS)], others + 1
        colours[label] = colour
    return colours


def line_plot(
    stem: Path,
    data: pd.DataFrame,
    *,
    x: str,
    y: str,
    series: str,
    x_label: str,
    y_label: str,
    low: str | None = None,
    high: str | None = None,
    title: str = "",
) -> list[Path]:
    """Lines of `y` over `x`, one per value of `series` in order of appearance; with `low` and `high`, a band."""
    with report_style():
        figure = Figure(figsize=WIDE)
        axes = figure.subplots()
        labels = list(dict.fromkeys(data[series]))
        colours = label_colours(labels)
        names = None if pd.api.types.is_numeric_dtype(data[x]) else list(dict.fromkeys(data[x]))
        for number, label in enumerate(labels):
            rows = data[data[series] == label]
            if names is None:
                rows = rows.sort_values(x)
                places = rows[x]
            else:
                # A name without a value is a gap, not a line across it.
                rows = rows.groupby(x)[y].mean().reindex(names).reset_index()
                places = pd.Series(range(len(names)))
            axes.plot(
                places,
                rows[y],
                marker=_MARKERS[number % len(_MARKERS)],
                markersize=4,
                label=label,
                color=colours[label],
            )
            if low and high and rows[low].notna().any():
                axes.fill_between(places, rows[low], rows[high], alpha=0.18, color=colours[label], linewidth=0)
        if names is not None:
            axes.set_xticks(range(len(names)), [_wrap(str(name), 18) for name in names], fontsize=7)
        axes.set(xlabel=x_label, ylabel=y_label, title=title)
        if labels:
            axes.legend()
        return save_figure(stem, figure, data)


def bar_plot(stem: Path, data: pd.DataFrame, *, name: str, value: str, spread: str | None, y_label: str) -> list[Path]:
    """One bar per row with its spread as error bar."""
    with report_style():
        figure = Figure(figsize=WIDE)
        axes = figure.subplots()
        places = np.arange(len(data))
        colours = label_colours(list(data[name]))
        errors = data[spread].fillna(0.0) if spread else None
        axes.bar(places, data[value], yerr=errors, capsize=4, color=[colours[label] for label in data[name]])
        axes.set_xticks(places, [_wrap(str(label)) for label in data[name]])
        axes.set_ylabel(y_label)
        return save_figure(stem, figure, data)


def _wrap(text: str, width: int = 22) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(text, width)) or text


def ecdf_points(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Steps of an empirical distribution function: sorted values and the share at or below each."""
    x = np.sort(values[np.isfinite(values)])
    return x, np.arange(1, len(x) + 1) / max(len(x), 1)


def draw_ecdf(
    axes: Axes,
    series: Mapping[str, np.ndarray],
    x_label: str,
    notes: Mapping[str, str] | None = None,
) -> pd.DataFrame:
    """ECDF curves into a panel, with a small legend of notes beside the line colours; the data behind it."""
    colours = label_colours(list(series))
    frames = []
    for label, values in series.items():
        x, share = ecdf_points(np.asarray(values, dtype=float))
        text = (notes or {}).get(label) or "_nolegend_"
        axes.step(np.r_[x[:1], x], np.r_[0.0, share] if len(x) else [], where="post", color=colours[label], label=text)
        frames.append(pd.DataFrame({"panel": x_label, "series": label, "value": x, "ecdf": share}))
    axes.set(xlabel=x_label, ylabel="ECDF", ylim=(0, 1.02))
    if notes and any(notes.get(label) for label in series):
        axes.legend(title="sig vs best", fontsize=7, title_fontsize=7, loc="upper left")
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()


def ecdf_grid(
    stem: Path,
    panels: Mapping[str, Mapping[str, np.ndarray]],
    notes: Mapping[str, Mapping[str, str]] | None = None,
    stamp: Mapping[str, object] | None = None,
) -> list[Path]:
    """ECDF panels in two columns, with one legend of all series below them. stamp: constant columns of the data."""
    n_rows = -(-len(panels) // 2)
    labels = list(dict.fromkeys(label for series in panels.values() for label in series))
    with report_style():
        figure = Figure(figsize=(7.8, 3.5 * n_rows + 0.25 * len(labels)), layout="constrained")
        grid = np.atleast_1d(figure.subplots(n_rows, 2)).ravel()
        data = [
            draw_ecdf(axes, series, name, (notes or {}).get(name))
            for axes, (name, series) in zip(grid, panels.items(), strict=False)
        ]
        for axes in grid[len(panels) :]:
            axes.set_axis_off()
        colours = label_colours(labels)
        handles = [grid[0].plot([], [], color=colours[label])[0] for label in labels]
        # Outside the panels: the layout makes room for it, so it covers none of them.
        figure.legend(handles, labels, loc="outside lower center", ncols=1)
        points = pd.concat(data, ignore_index=True) if data else pd.DataFrame()
        return save_figure(stem, figure, points.assign(**(stamp or {})))


def heatmap(stem: Path, counts: pd.DataFrame, *, x_label: str, y_label: str, bar_label: str) -> list[Path]:
    """A matrix [row label, column label] as colours with its numbers written in."""
    with report_style():
        figure = Figure(figsize=(1.6 + 0.9 * max(len(counts.columns), 3), 1.6 + 0.5 * max(len(counts), 3)))
        axes = figure.subplots()
        values = counts.to_numpy(dtype=float)
        image = axes.imshow(values, aspect="auto", cmap="viridis")
        axes.grid(visible=False)
        axes.set_xticks(range(len(counts.columns)), [str(name) for name in counts.columns])
        axes.set_yticks(range(len(counts)), [str(name) for name in counts.index])
        middle = np.nanmean([np.nanmin(values), np.nanmax(values)]) if np.isfinite(values).any() else 0.0
        for row, column in zip(*np.nonzero(np.isfinite(values)), strict=True):
            shade = "black" if values[row, column] > middle else "white"
            axes.text(column, row, f"{values[row, column]:g}", ha="center", va="center", color=shade, fontsize=8)
        axes.set(xlabel=x_label, ylabel=y_label)
        figure.colorbar(image, label=bar_label)
        return save_figure(stem, figure, counts.reset_index())
