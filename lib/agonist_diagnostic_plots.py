"""Figures of stage 6's diagnostics: where each agonist stands in its layer, side by side for both slices."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

SIDE_COLOURS = {"associated": "#b2432f", "unrelated": "#9a9a9a"}
_QUANTITY = {
    "activation": ("mean_layer_percentile_rank", "mean percentile of the activation in its layer"),
    "margin": ("mean_predicted_margin_drop", "predicted drop of the answer's margin"),
    "saliency": ("mean_layer_percentile_rank", "mean percentile of the saliency in its layer"),
}
_N_SHOWN = 30


def draw(kind: str, summary: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """Dots per agonist (strongest first, at most 30) and side; a panel per saliency metric. Returns the data too."""
    value, label = _QUANTITY[kind]
    if "metric" not in summary:
        summary = summary.assign(metric=kind)
    strongest = summary.groupby("unit_key")["max_effect"].max().sort_values(ascending=False, kind="stable")
    units = strongest.index[:_N_SHOWN].tolist()
    data = summary[summary["unit_key"].isin(units)][["metric", "unit_key", "split", "max_effect", value]]
    metrics = list(dict.fromkeys(data["metric"]))
    figure = Figure(figsize=(2.6 + 2.6 * len(metrics), 1.2 + 0.22 * len(units)), layout="constrained")
    for axes, metric in zip(np.atleast_1d(figure.subplots(1, len(metrics), sharey=True)), metrics, strict=True):
        for side, colour in SIDE_COLOURS.items():
            own = data[(data["metric"] == metric) & (data["split"] == side)]
            places = [units.index(unit) for unit in own["unit_key"]]
            axes.scatter(own[value], places, s=22, color=colour, label=side, zorder=3)
        axes.set_yticks(range(len(units)), units, fontsize=7)
        axes.set_ylim(len(units) - 0.5, -0.5)
        axes.grid(axis="x", linewidth=0.4, color="#dddddd")
        axes.set_xlabel(label, fontsize=7)
        axes.tick_params(axis="x", labelsize=7)
        if len(metrics) > 1:
            axes.set_title(metric, fontsize=8)
        if kind == "margin":
            axes.axvline(0.0, linewidth=0.8, color="#555555")
        else:
            axes.set_xlim(0.0, 1.02)
    figure.get_axes()[0].legend(fontsize=7, frameon=False)
    return figure, data
