"""Figures of stage 3: what the SHAP values say, where the candidates lie, how other learners fare."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
import numpy as np
import pandas as pd

from lib.artifacts import save_figure

if TYPE_CHECKING:
    from lib.ruleshap import RuleTable

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402 (the backend has to be chosen first)

# Names of features and models may hold a $: they are shown, not read as formulas.
plt.rcParams["text.parse_math"] = False

N_SHOWN = 15
BEESWARM_ROWS = 400
_BLUE, _RED, _GREY = "#3b6fb6", "#c8553d", "#9a9a9a"


def plot_shap(
    folder: Path, target: str, values: np.ndarray, features: np.ndarray, names: tuple[str, ...], importance: np.ndarray
) -> list[Path]:
    """Beeswarm and bar plot of the most important features. values, features: [row, feature]."""
    shown = np.argsort(-importance, kind="stable")[:N_SHOWN]
    rows = np.unique(np.linspace(0, len(values) - 1, min(BEESWARM_ROWS, len(values))).astype(int))
    swarm = pd.DataFrame(
        {
            "feature": np.repeat([names[j] for j in shown], len(rows)),
            "value": features[np.ix_(rows, shown)].T.ravel(),
            "shap": values[np.ix_(rows, shown)].T.ravel(),
        }
    )
    figure, axes = plt.subplots(figsize=(7, 0.32 * len(shown) + 1))
    for position, name in enumerate(names[j] for j in shown):
        part = swarm[swarm["feature"] == name]
        rank = part["value"].rank(pct=True)
        axes.scatter(
            part["shap"], position + _spread(part["shap"].to_numpy()), c=rank, cmap="coolwarm", s=5, vmin=0, vmax=1
        )
    axes.axvline(0, color=_GREY, linewidth=0.8)
    _feature_axis(axes, [names[j] for j in shown])
    axes.set_xlabel(f"SHAP value (log-odds of {target}); colour: rank of the feature's value, low to high")
    bars = pd.DataFrame(
        {
            "feature": [names[j] for j in shown],
            "importance": importance[shown],
            "mean_abs_shap": np.abs(values).mean(axis=0)[shown],
        }
    )
    written = save_figure(folder / f"shap_summary_plot_{target}", figure, swarm)
    figure, axes = plt.subplots(figsize=(6, 0.32 * len(shown) + 1))
    axes.barh(np.arange(len(shown)), bars["importance"], color=_GREY, label="mean + standard deviation")
    axes.barh(np.arange(len(shown)), bars["mean_abs_shap"], color=_BLUE, label="mean")
    _feature_axis(axes, bars["feature"].tolist())
    axes.set_xlabel("|SHAP value|")
    axes.legend(frameon=False)
    return written + save_figure(folder / f"shap_bar_plot_{target}", figure, bars)


def _spread(values: np.ndarray, height: float = 0.35, n_bins: int = 40) -> np.ndarray:
    """Vertical offsets so that points of about the same value lie side by side, [point]."""
    span = np.ptp(values)
    bins = (
        np.zeros(len(values), dtype=int) if span == 0 else ((values - values.min()) / span * (n_bins - 1)).astype(int)
    )
    offsets = np.zeros(len(values))
    fullest = max(np.bincount(bins).max(), 1)
    for chosen in np.unique(bins):
        members = np.flatnonzero(bins == chosen)
        offsets[members] = (np.arange(len(members)) - (len(members) - 1) / 2) / fullest * 2 * height
    return offsets


def _feature_axis(axes: plt.Axes, names: list[str]) -> None:
    axes.set_yticks(np.arange(len(names)), names)
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)


def plot_candidates(folder: Path, target: str, rules: RuleTable, chosen: list[int], prevalence: float) -> list[Path]:
    """Coverage against precision of all candidate literals, the selected ones marked."""
    data = pd.DataFrame(
        {
            "rule_expression": [literal.text() for literal in rules.literals],
            "coverage": rules.scores.coverage,
            "precision": rules.scores.precision,
            "mcc": rules.scores.mcc,
            "is_selected": np.isin(np.arange(len(rules)), chosen),
        }
    )
    figure, axes = plt.subplots(figsize=(6, 4))
    points = axes.scatter(data["coverage"], data["precision"], c=data["mcc"], s=10, cmap="viridis")
    marked = data[data["is_selected"]]
    axes.scatter(marked["coverage"], marked["precision"], s=70, facecolors="none", edgecolors=_RED, label="selected")
    axes.axhline(prevalence, color=_GREY, linewidth=0.8, linestyle="--", label="share of all rows")
    axes.set_xlabel("coverage (share of TRAIN rows where the literal holds)")
    axes.set_ylabel(f"precision (share with {target})")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.colorbar(points, ax=axes, label="MCC")
    return save_figure(folder / f"candidates_{target}", figure, data)


def plot_baselines(folder: Path, target: str, comparison: pd.DataFrame) -> list[Path]:
    """Score of each learner with its interval and the number of conditions a reader has to take in."""
    scope = "TEST" if (comparison["scope"] == "test").any() else "TRAIN"
    data = comparison[comparison["scope"] == scope.lower()].reset_index(drop=True)
    figure, axes = plt.subplots(figsize=(6, 0.45 * len(data) + 1))
    error = np.abs(data[["MCC_low95", "MCC_high95"]].to_numpy().T - data["MCC"].to_numpy())
    colours = [_RED if method == "ruleshap" else _BLUE for method in data["method"]]
    axes.barh(np.arange(len(data)), data["MCC"], xerr=error, color=colours, error_kw={"elinewidth": 1})
    _feature_axis(axes, [f"{row.method} ({row.n_conditions} conditions)" for row in data.itertuples()])
    axes.set_xlabel(f"{scope} MCC, with 95 % interval")
    return save_figure(folder / f"baselines_{target}", figure, data)
