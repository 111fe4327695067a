"""Figures of stage 7: data frames in, figures out; `save_figure` writes PDF, PNG and the data as CSV."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lib.artifacts import save_figure
from lib.flip_rule_tables import SCOPE_MEANING

MAX_BARS = 50
_LOST, _GAINED, _GREY = "#b2432f", "#2f6fb2", "#9a9a9a"
_SCOPE_STYLE = {
    "test": ("HQ(TEST)", "#2f6fb2", "--"),
    "test_selected": ("HQ-T (optimistic)", "#8a6fb2", "-."),
    "all_fit": ("HQ(ALL-FIT)", "#d08a2e", ":"),
}
_KINDS = ("any", "c2i", "i2c")


def write_flip_bars(stats_dir: Path, statistics: pd.DataFrame, floor: Mapping[str, float]) -> list[Path]:
    """`flip_stats_top<K>`: per neuron the share of evaluated prompts whose label it takes away (left) or gives (right).

    floor: mean rates (`c2i_rate`, `i2c_rate`) of random neurons, drawn as dashed lines. Older files of another K go.
    """
    top = statistics.head(MAX_BARS)
    stem = stats_dir / f"flip_stats_top{len(top)}"
    for stale in stats_dir.glob("flip_stats_top*"):
        stale.unlink()
    figure = Figure(figsize=(7.2, max(3.45, 0.235 * len(top) + 1.25)))
    axes = figure.subplots()
    places = np.arange(len(top))[::-1]
    axes.barh(places, -100 * top["c2i_rate"], color=_LOST, label="behaviour lost")
    axes.barh(places, 100 * top["i2c_rate"], color=_GAINED, label="behaviour gained")
    for sign, name in ((-1, "c2i_rate"), (1, "i2c_rate")):
        if name in floor:
            axes.axvline(sign * 100 * floor[name], color="black", linestyle="--", linewidth=0.8)
    limit = 1.08 * 100 * max(top[["c2i_rate", "i2c_rate"]].to_numpy(dtype=float).max(initial=0.0), 0.01)
    axes.set_xlim(-limit, limit)
    axes.set_yticks(places, top["neuron"], fontsize=7)
    axes.axvline(0, color="black", linewidth=0.6)
    axes.set_xlabel("% of evaluated prompts (dashed: random neurons of the same layers)")
    axes.xaxis.set_major_formatter(lambda value, _: f"{abs(value):g}")
    axes.legend(fontsize=7, frameon=False, loc="lower right")
    return save_figure(stem, figure, top)


def write_rule_distributions(stats_dir: Path, best: pd.DataFrame, scope: str, length_cap: int) -> list[Path]:
    """`rule_metrics_distributions_<scope>`: histograms over the rows that speak for each neuron."""
    figure = Figure(figsize=(9.0, 5.2), layout="constrained")
    grid = figure.subplots(2, 3).ravel()
    for axes, name in zip(grid, ("MCC", "F1", "BalancedAcc", "TPR", "TNR"), strict=False):
        values = best[name].dropna().astype(float).clip(upper=1.0)
        axes.hist(values, bins=np.linspace(min(0.0, values.min()) if len(values) else 0.0, 1.0, 31), color=_GAINED)
        axes.set_xlabel(name)
    lengths = best["rule_len_atoms"].astype(float).clip(upper=length_cap)
    axes = grid[5]
    axes.hist(lengths, bins=np.arange(0, lengths.max() + 2) - 0.5 if len(lengths) else 1, color=_GAINED)
    axes.set_xlabel(f"conditions in the rule (at most {length_cap} shown)")
    for axes in grid:
        axes.set_ylabel("neurons")
        axes.yaxis.get_major_locator().set_params(integer=True)
    figure.suptitle(SCOPE_MEANING[scope], fontsize=9)
    return save_figure(stats_dir / f"rule_metrics_distributions_{scope}", figure, best)


def write_coverage_figure(stats_dir: Path, coverage: Mapping[str, Any]) -> list[Path]:
    """`high_quality_neuron_flip_coverage`: how many neurons have good rules, and how many flips those account for."""
    scopes = coverage["available_score_scopes"]
    figure = Figure(figsize=(9.6, 7.0), layout="constrained")
    grid = figure.subplots(2, 2)
    counts = _count_rows(coverage, scopes)
    _bars(
        grid[0, 0],
        [row["label"] for row in counts],
        [row["value"] for row in counts],
        [_GREY, *(_SCOPE_STYLE[scope][1] for scope in scopes)],
        [row["text"] for row in counts],
    )
    grid[0, 0].set_ylabel("neurons")
    grid[0, 0].yaxis.get_major_locator().set_params(integer=True)
    frames = [pd.DataFrame(counts).assign(panel="neurons", kind="")]
    panels = (
        (grid[0, 1], "prevalence", "% of eligible prompts flipped"),
        (grid[1, 0], "coverage_share", "% of all candidates' flipped prompts"),
        (grid[1, 1], "overlap", "flips per flipped prompt"),
    )
    for axes, name, label in panels:
        frames.append(_ratio_panel(axes, coverage["score_scopes"], scopes, name))
        axes.set_ylabel(label)
    grid[1, 1].axhline(1, color="black", linewidth=0.6)
    return save_figure(stats_dir / "high_quality_neuron_flip_coverage", figure, pd.concat(frames, ignore_index=True))


def _count_rows(coverage: Mapping[str, Any], scopes: Sequence[str]) -> list[dict[str, Any]]:
    total = coverage["n_neurons_total"]
    rows = [{"label": "candidates", "value": total, "text": str(total)}]
    for scope in scopes:
        n_high = coverage["score_scopes"][scope]["n_neurons_high_quality"]
        share = f"\n{100 * n_high / total:.0f} %" if total else ""
        rows.append({"label": _SCOPE_STYLE[scope][0], "value": n_high, "text": f"{n_high}{share}"})
    return rows


def _ratio_panel(axes: Axes, blocks: Mapping[str, Any], scopes: Sequence[str], name: str) -> pd.DataFrame:
    """Grouped bars of one ratio per kind of flip; overlap is a plain quotient, the others are percentages."""
    series = [] if name == "coverage_share" else [("all candidates", _GREY, scopes[0], f"{name}_all")]
    series += [(_SCOPE_STYLE[scope][0], _SCOPE_STYLE[scope][1], scope, name) for scope in scopes]
    width, rows = 0.8 / len(series), []
    for number, (label, colour, scope, key) in enumerate(series):
        for place, kind in enumerate(_KINDS):
            ratio = blocks[scope]["ratios"][f"{key}_{kind}"]
            value = (ratio["percent"] or 0.0) / (100.0 if name == "overlap" else 1.0)
            x = place + (number - (len(series) - 1) / 2) * width
            axes.bar(x, value, width, color=colour, label=label if place == 0 else None)
            axes.annotate(
                f"{value:.3g}\n{ratio['numerator']}/{ratio['denominator']}",
                (x, value),
                ha="center",
                va="bottom",
                fontsize=5,
            )
            rows.append({"panel": name, "kind": kind, "label": label, "value": value, "scope": scope, **ratio})
    axes.set_xticks(range(len(_KINDS)), ["any flip", "behaviour lost", "behaviour gained"], fontsize=8)
    axes.margins(y=0.4)
    highest = max(row["value"] for row in rows)
    axes.set_ylim(0, 1.4 * highest if highest else 1)
    axes.legend(fontsize=6, frameon=False, loc="upper right")
    return pd.DataFrame(rows)


def _bars(
    axes: Axes, labels: Sequence[str], values: Sequence[float], colours: Sequence[str], texts: Sequence[str]
) -> None:
    axes.bar(range(len(labels)), values, color=colours)
    axes.set_xticks(range(len(labels)), labels, fontsize=8)
    for place, (value, text) in enumerate(zip(values, texts, strict=True)):
        axes.annotate(text, (place, value), ha="center", va="bottom", fontsize=7)
    axes.margins(y=0.18)


def write_layer_figure(stats_dir: Path, report: Mapping[str, Any]) -> list[Path]:
    """`high_quality_neuron_flip_coverage_by_layer`: neurons per layer, and the share of prompts that they flip."""
    layers = pd.DataFrame(report["layers"])
    scopes = report["available_score_scopes"]
    figure = Figure(figsize=(max(6.4, 0.42 * len(layers) + 2), 6.4), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    places = np.arange(len(layers))
    width = 0.8 / (1 + len(scopes))
    upper.bar(places - 0.4 + width / 2, layers.get("n_neurons_total", []), width, color=_GREY, label="candidates")
    for number, scope in enumerate(scopes, start=1):
        label, colour, style = _SCOPE_STYLE[scope]
        heights = layers.get(f"n_neurons_high_quality_{scope}", [])
        upper.bar(places - 0.4 + (number + 0.5) * width, heights, width, color=colour, label=label)
        _layer_lines(lower, places, layers, f"high_{scope}", report["scope_n_rows"][scope], style, label)
    _layer_lines(lower, places, layers, "all", report["n_rows"], "-", "candidates")
    upper.set_ylabel("neurons")
    upper.yaxis.get_major_locator().set_params(integer=True)
    lower.set_ylabel("% of the scope's prompts flipped")
    lower.set_xticks(places, layers.get("layer_key", []), rotation=90 if len(layers) > 16 else 0, fontsize=7)
    for axes in (upper, lower) if len(layers) else ():
        axes.legend(fontsize=6, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return save_figure(stats_dir / "high_quality_neuron_flip_coverage_by_layer", figure, layers)


def _layer_lines(
    axes: Axes, places: np.ndarray, layers: pd.DataFrame, suffix: str, n_rows: int, style: str, label: str
) -> None:
    """Two lines per series: behaviour lost (red) and gained (blue)."""
    for kind, colour, word in (("c2i", _LOST, "lost"), ("i2c", _GAINED, "gained")):
        counts = layers.get(f"flip_{kind}_union_{suffix}")
        if counts is not None and n_rows:
            axes.plot(
                places,
                100 * counts / n_rows,
                style,
                color=colour,
                marker="o",
                markersize=3,
                linewidth=1,
                label=f"{label}: {word}",
            )
