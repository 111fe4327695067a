"""The search: what it cost against testing each candidate alone, what its audit says, and the tree of every circuit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lib.reporting.artifacts import REGIMES, block_of
from lib.reporting.localization import Budget, CircuitCost, budget, candidates_by_layer, circuit_costs, circuit_detail
from lib.reporting.page.grids import Cell, Column, Grid, Kind, count_cell, interval_cell, percent_cell
from lib.reporting.page.inputs import PageInputs
from lib.reporting.page.search_tree import SearchTree, levels_grid, search_tree
from lib.reporting.page.texts import is_number, visible

_MAX_CIRCUITS_SHOWN = 64


@dataclass(frozen=True)
class CircuitView:
    """One searched circuit: title, rule, tree (None for brute force), levels."""

    name: str
    title: str
    rule: str
    levels: Grid
    tree: SearchTree | None
    n_audit: int


@dataclass(frozen=True)
class CostBar:
    """One bar of the cost figure: what it counts, how many, as share of the longest."""

    label: str
    value: int
    kind: str


@dataclass(frozen=True)
class SearchSection:
    """costs: one row per circuit and the sums; bars: by regime; circuits: with trees; layers: layer -> candidates."""

    costs: Grid | None
    bars: list[tuple[str, list[CostBar]]]
    circuits: list[CircuitView]
    n_not_shown: int
    total: Budget | None
    candidates: dict[str, int]
    n_agonists: int | None
    is_brute_force: bool


def search_section(inputs: PageInputs) -> SearchSection:
    """The section on CHA."""
    views: list[CircuitView] = []
    rows: list[list[Cell]] = []
    costs: dict[str, list[CircuitCost]] = {}
    layers: dict[str, int] = {}
    for regime in REGIMES:
        entries = inputs.circuits[regime]
        if inputs.run is None or entries is None:
            continue
        found = inputs.take(circuit_costs(inputs.run, regime), f"{regime}_baseline: costs")
        if found is None:
            continue
        costs[regime] = found
        names = {agonist.neuron for agonist in inputs.agonists[regime] or ()}
        for number, (entry, cost) in enumerate(zip(entries, found, strict=True)):
            detail = inputs.take(circuit_detail(inputs.run, regime, entry), f"{regime}_baseline: circuit detail") or {}
            rows.append(_cost_row(regime, entry, cost, detail))
            for layer, n in candidates_by_layer(detail).items():
                layers[layer] = max(layers.get(layer, 0), n)
            if detail and len(views) < _MAX_CIRCUITS_SHOWN:
                views.append(_view(f"tree-{regime}-{number}", regime, entry, search_tree(detail, names)))
    flat = [cost for found in costs.values() for cost in found]
    name = inputs.run.name if inputs.run else None
    return SearchSection(
        costs=_costs_grid(rows, costs) if rows else None,
        bars=[(_regime_name(regime), _bars(budget(found))) for regime, found in costs.items() if found],
        circuits=views,
        n_not_shown=len(flat) - len(views),
        total=budget(flat) if flat else None,
        candidates=layers,
        n_agonists=_n_agonists(inputs),
        is_brute_force=bool(name and not name.choices.fast_anchoring),
    )


def _n_agonists(inputs: PageInputs) -> int | None:
    """Different agonists over the regimes; None where no regime has finished."""
    known = [found for found in inputs.agonists.values() if found is not None]
    return len({agonist.neuron for found in known for agonist in found}) if known else None


def _regime_name(regime: str) -> str:
    return {"positive": "behaviour holds", "negative": "behaviour does not hold"}[regime] + " before ablation"


def _bars(total: Budget) -> list[CostBar]:
    bars = [CostBar("group tests of the search", total.n_groups, "groups")]
    if total.n_candidates and total.n_tree:
        bars.append(CostBar("N: every candidate alone (brute force)", total.n_candidates, "singles"))
        bars.append(CostBar("2N-1: every node of a binary tree", total.n_tree, "tree"))
    return bars


# ---------------------------------------------------------------- the cost table


def _cost_row(regime: str, entry: Mapping[str, Any], cost: CircuitCost, detail: Mapping[str, Any]) -> list[Cell]:
    spent = block_of(entry, "search_cost") or block_of(detail, "search_cost")
    audit = block_of(detail, "audit")
    recall = (audit.get(f"estimated_recall{end}") for end in ("", "_low", "_high"))
    return [
        _regime_name(regime),
        _circuit_name(entry),
        count_cell(cost.n_groups),
        count_cell(cost.n_singles),
        _percent(cost.percent_of_singles),
        count_cell(cost.n_tree),
        _percent(cost.percent_of_tree),
        percent_cell(spent.get("share_of_single_tests"), 2),
        interval_cell(*recall),
    ]


def _percent(value: float) -> Cell:
    return percent_cell(value / 100 if is_number(value) else None, 2)


def _costs_grid(rows: list[list[Cell]], costs: Mapping[str, list[CircuitCost]]) -> Grid:
    for regime, found in costs.items():
        if len(found) > 1:
            total = budget(found)
            rows.append(
                [
                    _regime_name(regime),
                    f"all {len(found)} circuits",
                    count_cell(total.n_groups),
                    count_cell(total.n_candidates),
                    _percent(total.percent_of_singles),
                    count_cell(total.n_tree),
                    _percent(total.percent_of_tree),
                    ["", None],
                    ["", None],
                ]
            )
    columns = [
        Column("regime"),
        Column("circuit", Kind.MODEL),
        Column("group tests", Kind.NUMBER),
        Column("N", Kind.NUMBER, "candidates: the tests of brute force, which tests each alone"),
        Column("tests, % of N", Kind.NUMBER),
        Column("2N-1", Kind.NUMBER, "nodes of a binary tree over the candidates: the most a bisecting search can need"),
        Column("tests, % of 2N-1", Kind.NUMBER),
        Column("evaluations, % of brute force", Kind.NUMBER,
               "group tests times their datapoints, against every candidate alone on every datapoint"),
        Column("estimated recall", Kind.RATE, "from pruned members drawn at random and tested alone, 95 % interval"),
    ]
    return Grid("costs", "Cost of the search against brute force", columns, rows, noun="circuit")


def _circuit_name(entry: Mapping[str, Any]) -> str:
    label = str(entry.get("circuit_label") or "")
    number = entry.get("circuit_id")
    return visible(f"{number}: {label}" if label and label != str(number) else number, 200)


# ---------------------------------------------------------------- circuits


def _view(name: str, regime: str, entry: Mapping[str, Any], tree: SearchTree) -> CircuitView:
    kind = "cluster" if entry.get("cluster_index") is not None else "circuit"
    title = f"{_regime_name(regime)}, {kind} {visible(entry.get('circuit_id'), 20)}"
    return CircuitView(
        name,
        title,
        visible(entry.get("circuit_label") or "", 300),
        levels_grid(f"levels-{name}", f"The search level by level: {title}", tree),
        None if tree.is_flat else tree,
        tree.n_audit,
    )
