"""`features.md`: the catalogue to read, with the distribution of each kept feature in both classes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from lib.artifacts import atomic_write, save_figure
from lib.feature_rows import label_codes
from lib.task_spec import FeatureTaskSpec

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from lib.feature_files import FeatureTable

PLOTS_PER_FIGURE = 12
N_COLUMNS = 3
MAX_LEVELS = 12
"""A feature with at most this many values gets a bar per value, others get equal bins between their 1 % quantiles."""


def write_report(folder: Path, table: FeatureTable, metrics: pd.DataFrame, task: FeatureTaskSpec) -> list[Path]:
    """Write `features.md` and its figures; the paths written."""
    paths: list[Path] = []
    figures: list[str] = []
    for number, start in enumerate(range(0, len(table.kept), PLOTS_PER_FIGURE), start=1):
        name = f"feature_distributions_{number:02d}"
        paths += _figure(folder / "figures" / name, table, table.kept[start:start + PLOTS_PER_FIGURE], task)
        figures.append(f"![distributions](figures/{name}.png)")
    report = folder / "features.md"
    with atomic_write(report) as handle:
        handle.write("\n".join(_lines(table, metrics, task, figures)) + "\n")
    return [*paths, report]


def _lines(table: FeatureTable, metrics: pd.DataFrame, task: FeatureTaskSpec, figures: list[str]) -> list[str]:
    n_test = int(table.split.is_test.sum())
    lines = [f"# Features of {task.NAME}", "",
             f"{len(table.frame)} prompts, {n_test} held out. {len(table.kept)} of {len(metrics)} features are kept. "
             f"Numbers are of TRAIN; A: {task.POSITIVE_NAME}, B: {task.NEGATIVE_NAME}. A feature that does not apply "
             "to a prompt counts as 0.", "",
             "| column | meaning | from | mean A | mean B | AUC | not applicable |", "|---|---|---|---|---|---|---|"]
    for index in table.kept:
        row = metrics.iloc[index]
        feature = table.scored.features[index]
        lines.append(f"| `{row['column']}` | {_cell(f'{feature.label}. {feature.description}')} | {row['origin']} | "
                     f"{_number(row['mean_positive'], '.3g')} | {_number(row['mean_negative'], '.3g')} | "
                     f"{_number(row['auc'], '.3f')} | "
                     f"{row['missing_share']:.1%} |")
    lines += ["", *figures, "", "## Dropped", "",
              "No rule uses these. The task's own constant features still have a column in `scores.csv`.", "",
              "| column | filter | reason |", "|---|---|---|"]
    dropped = metrics[~metrics["kept"]].itertuples()
    lines += [f"| `{row.column}` | {row.filter} | {_cell(row.reason)} |" for row in dropped]
    return lines + [f"| {_cell(rejected.label)} | proposal | {_cell(rejected.reason)} |"
                    for rejected in table.rejected_proposals]


def _number(value: float, form: str) -> str:
    """A number, or a dash where there is none (no TRAIN row of that class)."""
    return "-" if np.isnan(value) else format(value, form)


def _cell(text: str) -> str:
    """Text that stays inside a table cell, whatever a model put into it."""
    plain = " ".join(text.split())
    for character in "\\`*_|<>[]":
        plain = plain.replace(character, f"\\{character}")
    return plain


def _figure(stem: Path, table: FeatureTable, numbers: np.ndarray, task: FeatureTaskSpec) -> list[Path]:
    """One figure with a plot per feature, and its data."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    labels = label_codes(table.frame, task)
    train = ~table.split.is_test
    n_rows = -(-len(numbers) // N_COLUMNS)
    figure, axes = plt.subplots(n_rows, N_COLUMNS, figsize=(3.4 * N_COLUMNS, 2.0 * n_rows), squeeze=False,
                                layout="constrained")
    data = []
    for axis, index in zip(axes.flat, numbers, strict=False):
        values = table.scored.values[:, index]
        shares = distribution(values[train & (labels == 1)], values[train & (labels == 0)])
        _plot(axis, shares, table.scored.features[index].label)
        data.append(shares.assign(column=table.columns[index]))
    for axis in axes.flat[len(numbers):]:
        axis.axis("off")
    axes.flat[0].legend([task.POSITIVE_NAME, task.NEGATIVE_NAME], fontsize=6)
    return save_figure(stem, figure, pd.concat(data)[["column", "from", "to", "share_positive", "share_negative"]])


def distribution(positive: np.ndarray, negative: np.ndarray) -> pd.DataFrame:
    """Share of each class per value (`from` equals `to`) or per bin, ascending."""
    both = np.concatenate([positive, negative])
    levels = np.unique(both)
    if len(levels) <= MAX_LEVELS:
        low = high = levels
        counts = [np.array([(values == level).sum() for level in levels]) for values in (positive, negative)]
    else:
        lowest, highest = np.quantile(both, [0.01, 0.99]).tolist()
        edges = np.linspace(lowest, highest, MAX_LEVELS + 1)
        low, high = edges[:-1], edges[1:]
        counts = [np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0] for values in (positive, negative)]
    shares = [count / max(count.sum(), 1) for count in counts]
    return pd.DataFrame({"from": low, "to": high, "share_positive": shares[0], "share_negative": shares[1]})


def _plot(axis: Axes, shares: pd.DataFrame, label: str) -> None:
    places = np.arange(len(shares))
    axis.bar(places - 0.2, shares["share_positive"], 0.4, color="#1b7837")
    axis.bar(places + 0.2, shares["share_negative"], 0.4, color="#9970ab")
    ranges = zip(shares["from"], shares["to"], strict=True)
    names = [f"{low:.3g}" if low == high else f"{low:.3g}+" for low, high in ranges]
    axis.set_xticks(places, names, fontsize=6, rotation=60 if len(names) > 4 else 0)
    axis.tick_params(axis="y", labelsize=6)
    axis.set_title(label if len(label) <= 44 else label[:43] + "…", fontsize=7, parse_math=False)
