"""Figures about activation and saliency of agonists (`agonist_metric_*`)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from lib.agonist_diagnostic_plots import SIDE_COLOURS
from lib.agonist_diagnostics import DIFFERENCE
from lib.artifacts import save_figure, write_csv, write_json
from lib.flip_diagnostics import Diagnostics, headline

_HEATMAP = ("mean_metric_value", "mean_layer_percentile_rank", "mean_layer_zscore", "top1_rate", "top10pct_rate")
_HEATMAP_TARGETS = ("flip_any_rate", "abs_max_effect", "c2i_rate", "i2c_rate", "accuracy_gap")


def write_diagnostics(stats_dir: Path, tables: Diagnostics, topk: int) -> list[Path]:
    """All `agonist_metric_*` tables and figures."""
    best = tables.correlations.groupby(["target", "scope"], sort=False).head(topk)
    frames = {
        "summary": tables.summary,
        "delta_by_unit": tables.delta,
        "global_summary": tables.by_metric,
        "correlations": tables.correlations,
        "best_correlations": best,
    }
    written = []
    for name, frame in frames.items():
        written.append(stats_dir / f"agonist_metric_{name}.csv")
        write_csv(written[-1], frame)
    report = {
        "n_rows": len(tables.summary),
        "n_delta_rows": len(tables.delta),
        "metrics": sorted(tables.summary["metric"].unique()),
        "targets_available": sorted(tables.correlations["target"].unique()),
        "headline_best_correlations": headline(tables.correlations),
        "files": [path.name for path in written],
        "notes": "correlations over few neurons are not corrected for their number: read them as hints",
    }
    write_json(stats_dir / "agonist_metric_stats.json", report)
    written.append(stats_dir / "agonist_metric_stats.json")
    for name, draw in (
        ("percentile_boxplot", _percentiles),
        ("top_rates", _top_rates),
        ("correlation_heatmap", _heatmap),
        ("ablation_scatter", _scatter),
    ):
        figure, data = draw(tables)
        written += save_figure(stats_dir / f"agonist_metric_{name}", figure, data)
    return written


def _percentiles(tables: Diagnostics) -> tuple[Figure, pd.DataFrame]:
    """Rank of the agonists among their layer: a box per metric and side."""
    data = tables.summary[["metric_display", "split", "mean_layer_percentile_rank"]]
    metrics = sorted(data["metric_display"].unique())
    figure = Figure(figsize=(2.2 + 1.3 * len(metrics), 3.6), layout="constrained")
    axes = figure.subplots()
    for number, (side, colour) in enumerate(SIDE_COLOURS.items()):
        values = [
            data.loc[
                (data["metric_display"] == metric) & (data["split"] == side), "mean_layer_percentile_rank"
            ].dropna()
            for metric in metrics
        ]
        boxes = axes.boxplot(
            values, positions=np.arange(len(metrics)) + 0.36 * number - 0.18, widths=0.3, patch_artist=True
        )
        for box in boxes["boxes"]:
            box.set_facecolor(colour)
        axes.plot([], [], color=colour, linewidth=6, label=side)
    axes.set_xticks(range(len(metrics)), metrics)
    axes.set_ylim(0, 1.02)
    axes.set_ylabel("mean percentile rank in the layer")
    axes.legend(fontsize=7, frameon=False)
    return figure, data


def _top_rates(tables: Diagnostics) -> tuple[Figure, pd.DataFrame]:
    """How often agonists are among the largest of their layer."""
    rates = ["top1_rate", "top5_rate", "top10pct_rate"]
    data = tables.summary.groupby(["metric_display", "split"])[rates].mean().reset_index()
    figure = Figure(figsize=(2.2 + 1.6 * data["metric_display"].nunique(), 3.4), layout="constrained")
    axes = figure.subplots()
    labels = [f"{row.metric_display}\n{row.split}" for row in data.itertuples()]
    for number, (rate, colour) in enumerate(zip(rates, ("#2f6fb2", "#8a6fb2", "#d08a2e"), strict=True)):
        axes.bar(np.arange(len(data)) + 0.27 * (number - 1), data[rate], 0.25, color=colour, label=rate)
    axes.set_xticks(range(len(labels)), labels, fontsize=7)
    axes.set_ylabel("mean share of datapoints")
    axes.legend(fontsize=7, frameon=False)
    return figure, data


def _heatmap(tables: Diagnostics) -> tuple[Figure, pd.DataFrame]:
    """Spearman correlation of five differences with the first effect that varies."""
    found = tables.correlations[tables.correlations["scope"] == DIFFERENCE]
    target = next((name for name in _HEATMAP_TARGETS if name in set(found["target"])), _HEATMAP_TARGETS[0])
    data = found[(found["target"] == target) & found["feature"].isin([f"delta_{name}" for name in _HEATMAP])]
    grid = data.pivot_table(index="metric_display", columns="feature", values="spearman").reindex(
        columns=[f"delta_{name}" for name in _HEATMAP]
    )
    figure = Figure(figsize=(6.4, 1.8 + 0.5 * max(len(grid), 1)), layout="constrained")
    axes = figure.subplots()
    if len(grid):
        image = axes.imshow(grid.to_numpy(dtype=float), vmin=-1, vmax=1, cmap="RdBu_r", aspect="auto")
        figure.colorbar(image, ax=axes, label=f"Spearman with {target}")
    axes.set_yticks(range(len(grid)), grid.index)
    axes.set_xticks(
        range(len(_HEATMAP)), [name.replace("_", " ") for name in _HEATMAP], rotation=30, ha="right", fontsize=7
    )
    return figure, data


def _scatter(tables: Diagnostics) -> tuple[Figure, pd.DataFrame]:
    """Difference of percentile ranks against the effect of ablation."""
    target = "flip_any_rate" if tables.delta["flip_any_rate"].notna().sum() >= 3 else "abs_max_effect"
    data = tables.delta[["unit_key", "metric_display", "delta_mean_layer_percentile_rank", target]]
    figure = Figure(figsize=(5.6, 3.8), layout="constrained")
    axes = figure.subplots()
    for metric, group in data.groupby("metric_display"):
        axes.scatter(group["delta_mean_layer_percentile_rank"], group[target], s=18, alpha=0.7, label=metric)
    axes.set_xlabel("percentile rank, associated minus unrelated")
    axes.set_ylabel(target)
    axes.legend(fontsize=7, frameon=False)
    return figure, data
