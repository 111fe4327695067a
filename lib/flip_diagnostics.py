"""Do agonists stand out in activation or saliency, and does that go with what they flip?

Stage 6 writes, per rule, how large each agonist's activation and saliency is among its layer, on associated and on
unrelated datapoints. Here those are stacked, joined with the flip statistics, and correlated.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lib.agonist_diagnostics import DIFFERENCE, RANK_FEATURES, SALIENCY_ALIASES, SIDES
from lib.artifacts import read_csv
from lib.correlation import correlate
from lib.neurons import layer_key

KINDS = {"activation": "*_agonist_activation_summary.csv", "saliency": "*_agonist_saliency_summary.csv"}
DISPLAY = {
    "activation": "activation",
    "gradient": "gradient",
    "wanda": "Wanda",
    "activation_x_gradient": "activation x gradient",
}
_ALIASES = SALIENCY_ALIASES | {"gradxactivation": "activation_x_gradient"}
FEATURES = ("mean_metric_value", "median_metric_value", "mean_abs_metric_value", *RANK_FEATURES)
EFFECTS = (
    "max_effect",
    "abs_max_effect",
    "accuracy_gap",
    "abs_accuracy_gap",
    "flip_any_rate",
    "c2i_rate",
    "i2c_rate",
    "flip_any_count",
    "c2i_count",
    "i2c_count",
)
_UNIT = ["circuit_id", "source_parent", "unit_key", "layer_label", "layer_key", "neuron_id", "metric", "metric_display"]
_GLOBAL = (
    "mean_metric_value",
    "mean_abs_metric_value",
    "mean_layer_percentile_rank",
    "median_layer_percentile_rank",
    "mean_layer_zscore",
    "top1_rate",
    "top5_rate",
    "top10pct_rate",
    "max_effect",
    "abs_max_effect",
    "flip_any_rate",
    "c2i_rate",
    "i2c_rate",
)
_FLIP_COLUMNS = [
    "layer_key",
    "neuron_id",
    "n_eval",
    "c2i_count",
    "i2c_count",
    "flip_any_count",
    "c2i_rate",
    "i2c_rate",
    "flip_any_rate",
    "c2i_pct",
    "i2c_pct",
    "flip_any_pct",
]


@dataclass(frozen=True)
class Diagnostics:
    """The tables: one row per (rule, neuron, metric, side); the sides' differences; summaries; correlations."""

    summary: pd.DataFrame
    delta: pd.DataFrame
    by_metric: pd.DataFrame
    correlations: pd.DataFrame


def diagnose(agonists_dir: Path, flip_statistics: pd.DataFrame) -> Diagnostics | None:
    """The tables of a run; None if stage 6 wrote no summaries."""
    pieces = list(_summaries(agonists_dir))
    if not pieces:
        return None
    stacked = pd.concat(pieces, ignore_index=True)
    for name in FEATURES:
        stacked[name] = pd.to_numeric(stacked[name], errors="coerce") if name in stacked else np.nan
    # A neuron of stage 6 that is no candidate here keeps its row, without flips.
    summary = stacked.merge(
        flip_statistics[_FLIP_COLUMNS], on=["layer_key", "neuron_id"], how="left", validate="many_to_one"
    )
    delta = side_differences(summary)
    return Diagnostics(summary, delta, _by_metric(summary), correlations(summary, delta))


def _summaries(folder: Path) -> Iterator[pd.DataFrame]:
    """Stage 6's per-rule tables in common columns."""
    for kind, pattern in KINDS.items():
        for path in sorted(folder.rglob(pattern)):
            frame = read_csv(path, f"{kind} summary (stage 6)")
            frame["source_file"], frame["source_parent"] = path.as_posix(), path.parent.as_posix()
            if kind == "activation":
                frame["metric"] = "activation"
            frame["metric"] = frame["metric"].replace(_ALIASES)
            for statistic in ("mean", "median"):
                frame[f"{statistic}_metric_value"] = frame[f"{statistic}_{kind}_value"]
            absolute = frame.get(f"mean_abs_{kind}_value")
            frame["mean_abs_metric_value"] = frame["mean_metric_value"].abs() if absolute is None else absolute
            frame["neuron_id"] = frame["unit_id"].astype(int)
            frame["layer_key"] = frame["layer_label"].map(layer_key)
            frame["abs_max_effect"], frame["abs_accuracy_gap"] = frame["max_effect"].abs(), frame["accuracy_gap"].abs()
            frame["metric_display"] = frame["metric"].map(DISPLAY).fillna(frame["metric"])
            yield frame


def side_differences(summary: pd.DataFrame) -> pd.DataFrame:
    """Associated beside unrelated, one row per (rule, neuron, metric), with `delta_*` = associated minus unrelated."""
    numbers = [name for name in summary.select_dtypes("number").columns if name not in _UNIT]
    mean = summary.groupby([*_UNIT, "split"], dropna=False)[numbers].mean().reset_index()
    first, second = (mean[mean["split"] == side] for side in SIDES)
    both = first.merge(second, on=_UNIT, suffixes=("_associated", "_unrelated"))
    for name in FEATURES:
        both[f"delta_{name}"] = both[f"{name}_associated"] - both[f"{name}_unrelated"]
    for name in EFFECTS:
        both[name] = both[f"{name}_associated"]
    return both


def _by_metric(summary: pd.DataFrame) -> pd.DataFrame:
    """Distinct units, and mean, median and spread of every quantity, per metric and side."""
    rows = []
    for (metric, display, split), group in summary.groupby(["metric", "metric_display", "split"]):
        row: dict[str, Any] = {"metric": metric, "metric_display": display, "split": split}
        row |= {f"{name}_nunique": group[name].nunique() for name in ("unit_key", "layer_key", "neuron_id")}
        for name in _GLOBAL:
            row |= {f"{name}_{how}": group[name].agg(how) for how in ("mean", "median", "std")}
        rows.append(row | {"n_rows": len(group)})
    return pd.DataFrame(rows)


def correlations(summary: pd.DataFrame, delta: pd.DataFrame) -> pd.DataFrame:
    """Correlation of each feature with each effect, per metric: within a side, and for the difference of the sides.

    Pairs with fewer than 3 finite rows, or a constant column, are left out.
    """
    rows = []
    for metric, display in summary[["metric", "metric_display"]].drop_duplicates().itertuples(index=False):
        tables = [
            (side, summary[(summary["split"] == side) & (summary["metric"] == metric)], "")
            for side in SIDES
        ]
        tables.append((DIFFERENCE, delta[delta["metric"] == metric], "delta_"))
        for (scope, table, prefix), feature, target in product(tables, FEATURES, EFFECTS):
            found = correlate(table[prefix + feature], table[target])
            if found is None:
                continue
            names = {"scope": scope, "metric": metric, "metric_display": display}
            names |= {"feature": prefix + feature, "target": target}
            rows.append({**names, **found._asdict(), "abs_spearman": abs(found.spearman)})
    columns = ["scope", "metric", "metric_display", "feature", "target", "n", "pearson", "spearman", "abs_spearman"]
    order = ["target", "scope", "abs_spearman"]
    return pd.DataFrame(rows, columns=columns).sort_values(order, ascending=[True, True, False], kind="stable")


def headline(found: pd.DataFrame) -> dict[str, Any]:
    """The strongest correlation of each target."""
    best = found.sort_values("abs_spearman", ascending=False, kind="stable").drop_duplicates("target")
    columns = ["metric", "metric_display", "feature", "scope", "n", "spearman", "pearson"]
    return {row["target"]: {name: row[name] for name in columns} for _, row in best.sort_values("target").iterrows()}
