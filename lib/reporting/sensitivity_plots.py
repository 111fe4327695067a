"""Figures of stage 11: counts of high-quality neurons over tau and M, and the cost of the search over tau."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from lib.artifacts import save_figure
from lib.reporting.plots import heatmap, line_plot, report_style
from lib.reporting.scopes import Scope
from lib.reporting.session import Session

_AXIS = {"tau": "agonist threshold tau", "M": "circuit size M"}


def write_counts(
    session: Session,
    table: pd.DataFrame,
    factor: str,
    thresholds: Sequence[float],
    scope: Scope,
    stamp: Mapping[str, Any],
) -> None:
    """`plots/count_ge_<t>_vs_<factor>.csv`, and all of them as lines and as a heat map."""
    folder = session.out_dir / "plots"
    lines = []
    for threshold in thresholds:
        name = f"n_quality_ge_{threshold:.2f}"
        counts = pd.DataFrame({factor: table[factor], name: table[name]}).assign(**stamp)
        session.csv(f"plots/count_ge_{threshold:.2f}_vs_{factor}.csv", counts)
        lines.append(
            pd.DataFrame(
                {
                    factor: table[factor],
                    "count": pd.to_numeric(table[name], errors="coerce"),
                    "threshold": f"MCC >= {threshold:.2f}",
                }
            )
        )
    data = pd.concat(lines, ignore_index=True).assign(**stamp)
    session.written += line_plot(
        folder / f"quality_threshold_sensitivity_vs_{factor}",
        data,
        x=factor,
        y="count",
        series="threshold",
        x_label=_AXIS[factor],
        y_label="high-quality neurons",
        title=scope.label,
    )
    counts = data.pivot(index="threshold", columns=factor, values="count")
    counts.columns = [f"{value:g}" for value in counts.columns]
    session.written += heatmap(
        folder / f"quality_threshold_sensitivity_heatmap_{factor}",
        counts,
        x_label=_AXIS[factor],
        y_label="",
        bar_label="high-quality neurons",
    )


def write_budget(session: Session, table: pd.DataFrame, stamp: Mapping[str, Any]) -> Path | None:
    """`plots/cha_budget_vs_tau`: mean group tests per circuit with standard errors; None without any cost."""
    columns = [
        "tau",
        "run_name",
        "cha_budget_n_circuits",
        "cha_budget_mean",
        "cha_budget_sem",
        "cha_budget_pct_of_2N_minus_1_mean",
        "cha_budget_pct_of_N_mean",
    ]
    data = table[columns].assign(**stamp)
    data = data[data["cha_budget_mean"].notna()]
    if data.empty:
        return None
    with report_style():
        figure = Figure(figsize=(6.4, 4.2))
        axes = figure.subplots()
        axes.errorbar(
            data["tau"],
            data["cha_budget_mean"],
            yerr=data["cha_budget_sem"],  # of a single circuit unknown: no bar
            marker="o",
            capsize=4,
            color="#1b5e9c",
        )
        for row in data.itertuples():
            share = row.cha_budget_pct_of_2N_minus_1_mean
            text = f"{row.cha_budget_mean:.0f}" + (f"\n{share:.2g} % of 2N-1" if share == share else "")
            axes.annotate(text, (row.tau, row.cha_budget_mean), textcoords="offset points", xytext=(6, 6), fontsize=7)
        axes.set(xlabel=_AXIS["tau"], ylabel="group tests per circuit (mean, standard error)")
        axes.margins(x=0.15, y=0.2)
        paths = save_figure(session.out_dir / "plots" / "cha_budget_vs_tau", figure, data)
    session.written += paths
    return paths[0]
