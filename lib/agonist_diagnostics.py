"""Do agonists stand out in their layer, by activation, by margin or by saliency? Tables per neuron and datapoint.

Each agonist is compared with all coordinates of its component's layer (of all heads, for attention), by value, at the
position where the ablation begins. Nothing here selects anything: the tables describe agonists that ablation found.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from lib.cli import UserError
from lib.correlation import correlate
from lib.group_testing import SIDES
from lib.neurons import Neuron

DIFFERENCE = "associated_minus_unrelated"
"""Scope of a correlation of differences; the other scopes are the sides."""
SALIENCY_FORMULAS = {
    "wanda": "|activation| x outgoing norm; a write goes out as it is, so the norm is 1",
    "gradient": "|gradient of the margin by the activation|",
    "activation_x_gradient": "|activation x gradient|",
}
"""Saliency metrics and what they are."""
SALIENCY_ALIASES = {
    "grad": "gradient",
    "abs_gradient": "gradient",
    "activation_gradient": "activation_x_gradient",
    "activation*gradient": "activation_x_gradient",
    "actgrad": "activation_x_gradient",
    "act_grad": "activation_x_gradient",
}
RANK_FEATURES = (
    "mean_layer_percentile_rank",
    "median_layer_percentile_rank",
    "mean_layer_zscore",
    "mean_delta_from_layer_mean",
    "top1_rate",
    "top5_rate",
    "top10pct_rate",
)
"""Where a neuron stands in its layer: columns of the summaries, whatever the metric."""
_TOPS = ("top1", "top5", "top10pct")
_EFFECTS = ("max_effect", "accuracy_gap", "abs_max_effect", "abs_accuracy_gap")
_KEYS = ["circuit_id", "unit_key", "layer_label", "unit_id", "split"]
_CORRELATED = (
    "mean_saliency_value",
    "median_saliency_value",
    "mean_activation_value",
    "mean_abs_activation_value",
    "mean_gradient_value",
    "mean_abs_gradient_value",
    *RANK_FEATURES,
)


class LayerValues(NamedTuple):
    """What a neuron and its layer do on the measured datapoints.

    place: the neuron's column among the layer's coordinates. activations, gradients: [datapoint, coordinate].
    replacement, margins: [datapoint].
    """

    place: int
    activations: np.ndarray
    gradients: np.ndarray
    replacement: np.ndarray
    margins: np.ndarray


@dataclass(frozen=True)
class UnitValues:
    """One agonist on its rule's datapoints.

    record: what its test alone said (`max_effect`, `accuracy_gap`, `acc_after_knockout_on_*`).
    """

    circuit_id: int
    neuron: Neuron
    record: Mapping[str, float]
    values: LayerValues


@dataclass(frozen=True)
class Datapoints:
    """The measured datapoints: side of each, its place in that side's sample, its row in the feature table."""

    sides: np.ndarray
    local_index: np.ndarray
    original_idx: np.ndarray


@dataclass(frozen=True)
class DiagnosticTables:
    """One kind of diagnostic: a row per neuron and datapoint, a row per neuron and side, and correlations if any."""

    raw: pd.DataFrame
    summary: pd.DataFrame
    correlations: pd.DataFrame | None = None


def saliency_metrics(text: str) -> tuple[str, ...]:
    """Metrics named by `--agonist_saliency_metrics`, each once, in order.

    Raises:
        UserError: an unknown name.
    """
    names = [name.strip().lower() for name in text.split(",") if name.strip()]
    metrics = tuple(dict.fromkeys(SALIENCY_ALIASES.get(name, name) for name in names))
    unknown = [name for name in metrics if name not in SALIENCY_FORMULAS]
    if unknown or not metrics:
        raise UserError(
            f"--agonist_saliency_metrics {text!r}: no such metric; give some of {', '.join(SALIENCY_FORMULAS)}"
        )
    return metrics


def activation_tables(units: Sequence[UnitValues], points: Datapoints) -> DiagnosticTables:
    """How large each agonist's activation is among its layer."""
    raw = pd.concat([_activation_rows(unit, points) for unit in units], ignore_index=True)
    means = {"activation_value": ("mean", "median"), **_rank_statistics()}
    summary = _summarise(raw, _KEYS, means, extra=("n_compared_activations", "max_effect", "accuracy_gap"))
    summary["compare_pool"] = "all write coordinates of the layer's component"
    return DiagnosticTables(raw, summary)


def margin_tables(units: Sequence[UnitValues], points: Datapoints) -> DiagnosticTables:
    """To first order, how much of the answer's margin each agonist's ablation takes away."""
    frames = []
    for unit in units:
        values = unit.values
        activation, gradient = values.activations[:, values.place], values.gradients[:, values.place]
        delta = values.replacement - activation
        frame = _identity(unit, points)
        frame["hook_position"] = "first position of the intervention"
        frame["prompt_margin"] = values.margins
        frame["activation_value"], frame["gradient_value"] = activation, gradient
        frame["baseline_value"], frame["delta_to_baseline"] = values.replacement, delta
        frame["predicted_margin_shift"] = gradient * delta
        frame["predicted_margin_drop"] = -gradient * delta
        frame["is_positive_margin_drop"] = frame["predicted_margin_drop"] > 0
        frames.append(_with_effects(frame, unit))
    raw = pd.concat(frames, ignore_index=True)
    quantities = ("prompt_margin", "gradient_value", "predicted_margin_shift", "predicted_margin_drop")
    means: dict[str, tuple[str, ...]] = dict.fromkeys(quantities, ("mean", "median"))
    summary = _summarise(raw, _KEYS, means, extra=("max_effect", "accuracy_gap"))
    rate = raw.groupby(_KEYS, sort=False)["is_positive_margin_drop"].mean()
    summary["positive_margin_drop_rate"] = rate.to_numpy()
    return DiagnosticTables(raw, summary)


def saliency_tables(units: Sequence[UnitValues], points: Datapoints, metrics: Sequence[str]) -> DiagnosticTables:
    """How large each agonist's saliency is among its layer, by each metric, and whether that goes with its effect."""
    raw = pd.concat(
        [_saliency_rows(unit, points, metric) for unit, metric in product(units, metrics)], ignore_index=True
    )
    means = {
        "saliency_value": ("mean", "median"),
        "activation_value": ("mean",),
        "abs_activation_value": ("mean",),
        "gradient_value": ("mean",),
        "abs_gradient_value": ("mean",),
        **_rank_statistics(),
    }
    summary = _summarise(raw, [*_KEYS, "metric"], means, extra=("n_compared_units", *_EFFECTS))
    summary.insert(summary.columns.get_loc("metric") + 1, "metric_formula", summary["metric"].map(SALIENCY_FORMULAS))
    summary["gradient_objective"] = "logit of the un-ablated answer token minus the best other logit"
    return DiagnosticTables(raw, summary, saliency_correlations(summary))


def saliency_correlations(summary: pd.DataFrame) -> pd.DataFrame:
    """Correlation of each summary feature with each effect, per metric, within a side and for the sides' difference.

    Left out where there are fewer than 3 finite pairs or a constant column.
    """
    rows = []
    for metric, own in summary.groupby("metric", sort=False):
        unit = ["circuit_id", "unit_key"]
        sides = {side: own[own["split"] == side].set_index(unit) for side in SIDES}
        both = sides[SIDES[0]].index.intersection(sides[SIDES[1]].index)
        first, second = (sides[side].loc[both] for side in SIDES)
        features = list(_CORRELATED)
        difference = (first[features] - second[features]).join(first[list(_EFFECTS)])
        scopes = {**sides, DIFFERENCE: difference}
        for (scope, table), feature, target in product(scopes.items(), features, _EFFECTS):
            found = correlate(table[feature], table[target])
            if found is not None:
                rows.append({"scope": scope, "metric": metric, "feature": feature, "target": target, **found._asdict()})
    return pd.DataFrame(rows, columns=["scope", "metric", "feature", "target", "n", "pearson", "spearman"])


def describe(tables: DiagnosticTables, value: str) -> dict[str, Any]:
    """The JSON form of a kind's summary: its rows, and the mean of each number over neurons, by side (and metric)."""
    groups = ["metric", "split"] if "metric" in tables.summary else ["split"]
    numbers = [name for name in tables.summary.select_dtypes("number") if name not in ("circuit_id", "unit_id")]
    aggregate = tables.summary.groupby(groups, sort=False)[numbers].mean().reset_index()
    block: dict[str, Any] = {
        "n_agonists": int(tables.summary["unit_key"].nunique()),
        "measurement_position": "first position of the intervention",
        "summary_rows": tables.summary.to_dict("records"),
        "aggregate_stats": aggregate.to_dict("records"),
        "question_answer": _verdict(aggregate, value),
    }
    if "metric" in tables.summary:
        block["metrics"] = list(tables.summary["metric"].unique())
    if tables.correlations is not None:
        block["correlation_rows"] = tables.correlations.to_dict("records")
        block["correlation_note"] = "over few neurons and not corrected for their number: hints, not findings"
    return block


def _verdict(aggregate: pd.DataFrame, value: str) -> list[str]:
    """What the means say, one sentence per side (and metric)."""
    lines = []
    for row in aggregate.to_dict("records"):
        where = f"{row['metric']}, {row['split']}" if "metric" in row else row["split"]
        if value == "margin":
            share = row["positive_margin_drop_rate"]
            lines.append(
                f"{where}: ablation is predicted to lower the margin by {row['mean_predicted_margin_drop']:.3g} on "
                f"average, on {share:.0%} of the datapoints"
            )
        else:
            lines.append(
                f"{where}: agonists are the largest of their layer on {row['top1_rate']:.0%} of the datapoints, in the "
                f"top tenth on {row['top10pct_rate']:.0%}; mean percentile {row['mean_layer_percentile_rank']:.2f}"
            )
    return lines


# ---------------------------------------------------------------- rows


def _identity(unit: UnitValues, points: Datapoints) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "circuit_id": unit.circuit_id,
            "unit_key": str(unit.neuron),
            "layer_label": unit.neuron.layer_label,
            "unit_id": unit.neuron.index,
            "split": points.sides,
            "example_local_index": points.local_index,
            "original_idx": points.original_idx,
        }
    )


def _with_effects(frame: pd.DataFrame, unit: UnitValues) -> pd.DataFrame:
    effect, gap = float(unit.record["max_effect"]), float(unit.record["accuracy_gap"])
    frame["max_effect"], frame["accuracy_gap"] = effect, gap
    frame["abs_max_effect"], frame["abs_accuracy_gap"] = abs(effect), abs(gap)
    for side in SIDES:
        frame[f"acc_after_knockout_on_{side}"] = unit.record[f"acc_after_knockout_on_{side}"]
    return frame


def _activation_rows(unit: UnitValues, points: Datapoints) -> pd.DataFrame:
    frame = _identity(unit, points)
    values, place = unit.values.activations, unit.values.place
    frame["activation_value"] = values[:, place]
    return _with_effects(_with_ranks(frame, values, place, "n_compared_activations"), unit)


def _saliency_rows(unit: UnitValues, points: Datapoints, metric: str) -> pd.DataFrame:
    place, activations, gradients = unit.values[:3]
    factors = {"wanda": [activations], "gradient": [gradients], "activation_x_gradient": [activations, gradients]}
    values = np.abs(np.prod(factors[metric], axis=0))
    frame = _identity(unit, points)
    frame["metric"] = metric
    frame["saliency_value"] = values[:, place]
    for name, source in (("activation", activations), ("gradient", gradients)):
        frame[f"{name}_value"] = source[:, place]
        frame[f"abs_{name}_value"] = np.abs(source[:, place])
    return _with_effects(_with_ranks(frame, values, place, "n_compared_units"), unit)


def _with_ranks(frame: pd.DataFrame, values: np.ndarray, place: int, count_name: str) -> pd.DataFrame:
    """Adds where column `place` of `values` [datapoint, coordinate] stands in its row."""
    own, n = values[:, place], values.shape[1]
    greater = (values > own[:, None]).sum(axis=1)
    spread = np.maximum(values.std(axis=1), 1e-8)
    frame["layer_percentile_rank"] = 1.0 - greater / n
    frame["layer_zscore"] = (own - values.mean(axis=1)) / spread
    frame["delta_from_layer_mean"] = own - values.mean(axis=1)
    frame[count_name] = n
    frame["is_top1"] = greater == 0
    frame["is_top5"] = greater < min(5, n)
    frame["is_top10pct"] = greater < int(np.ceil(0.1 * n))
    return frame


def _rank_statistics() -> dict[str, tuple[str, ...]]:
    return {"layer_percentile_rank": ("mean", "median"), "layer_zscore": ("mean",), "delta_from_layer_mean": ("mean",)}


def _summarise(
    raw: pd.DataFrame, keys: list[str], statistics: Mapping[str, Iterable[str]], extra: Sequence[str]
) -> pd.DataFrame:
    """One row per neuron and side: number of datapoints, means and medians, shares of datapoints at the top."""
    groups = raw.groupby(keys, sort=False)
    columns: dict[str, pd.Series] = {"n_examples": groups.size()}
    columns |= {name: groups[name].first() for name in extra}
    for name, how in _pairs(statistics):
        columns[f"{how}_{name}"] = groups[name].agg(how)
    if "is_top1" in raw:
        columns |= {f"{top}_rate": groups[f"is_{top}"].mean() for top in _TOPS}
    return pd.DataFrame(columns).reset_index()


def _pairs(statistics: Mapping[str, Iterable[str]]) -> Iterator[tuple[str, str]]:
    return ((name, how) for name, hows in statistics.items() for how in hows)
