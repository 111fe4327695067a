"""TEST against ALL-FIT: how many neurons have a good rule by either, and how far the two scores of a neuron differ."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median

from lib.reporting.page.charts import Scatter, scope_scatter
from lib.reporting.page.grids import Cell, Column, Grid, Kind, count_cell, number_cell
from lib.reporting.page.neuron_tables import held_out_pairs
from lib.reporting.page.neurons import Neurons, scores_of
from lib.reporting.scopes import DEFAULT_SCOPES, Scope

THRESHOLDS = (0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9)
_NAMES = {Scope.TEST: "TEST", Scope.ALL_FIT: "ALL-FIT"}


@dataclass(frozen=True)
class ScopesSection:
    """counts: neurons by scope and threshold. gap: median of ALL-FIT minus TEST, over neurons with both."""

    counts: Grid | None
    scatter: Scatter | None
    gap: float | None
    n_both: int


def scopes_section(neurons: Neurons) -> ScopesSection:
    """Both scopes side by side."""
    threshold = neurons.inputs.options.hq_threshold
    pairs = held_out_pairs(neurons)
    return ScopesSection(
        counts=_counts(neurons),
        scatter=scope_scatter(pairs, threshold) if pairs else None,
        gap=median(all_fit - test for _, test, all_fit in pairs) if pairs else None,
        n_both=len(pairs),
    )


def _counts(neurons: Neurons) -> Grid | None:
    cuts = sorted({*THRESHOLDS, neurons.inputs.options.hq_threshold})
    rows: list[list[Cell]] = []
    for scope in DEFAULT_SCOPES:
        if neurons.inputs.rules(scope) is None:
            continue
        values = [value for value in scores_of(neurons.best[scope].values(), "MCC") if value == value]
        rows.append(
            [
                f"{_NAMES[scope]}: {scope.meaning}",
                count_cell(len(values)),
                number_cell(median(values) if values else None),
                *(count_cell(sum(value >= cut for value in values)) for cut in cuts),
            ]
        )
    if not rows:
        return None
    columns = [
        Column("scope"),
        Column("neurons with a rule", Kind.NUMBER, "after the coverage floor"),
        Column("median MCC", Kind.NUMBER),
        *(Column(f"MCC ≥ {cut:g}", Kind.NUMBER) for cut in cuts),
    ]
    return Grid("scopes", "Neurons whose rule reaches a threshold, by scope", columns, rows, noun="scope")
