"""Which datapoints a rule's search, its confirmation and its spares use: two disjoint pools, drawn in a fixed order."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lib.cli import UserError, rng
from lib.confidence_bounds import min_datapoints_to_prune
from lib.scores_table import ScoresTable
from lib.stages.agonist_inputs import Circuit, SamplingPlan
from lib.text_and_rules import parse_rule

SIDES = ("associated", "unrelated")


@dataclass(frozen=True)
class Pool:
    """Rows of one slice (`original_idx`) in the order in which they are used; the first `n_planned` are the plan's."""

    rows: np.ndarray
    n_planned: int


@dataclass(frozen=True)
class Skipped:
    """Why a rule is not searched."""

    reason: str


@dataclass(frozen=True)
class SliceRows:
    """Rows (`original_idx`) of one slice: searched on, kept fresh for confirmation, and dropped.

    rejected: rows whose un-ablated answer no longer has the label of the feature table.
    """

    search: np.ndarray
    confirm: np.ndarray
    rejected: np.ndarray


def pools_of(
    circuit: Circuit, table: ScoresTable, regime: str, plan: SamplingPlan | None, seed: int
) -> tuple[Pool, Pool] | Skipped:
    """The two pools of a circuit within a regime: the plan's rows first, then the rest of the slice, in random order.

    Rows of one slice never stand in for the other's.
    """
    rows = table.subset_rows(regime)
    inside = _inside(circuit, table, rows)
    planned: tuple[np.ndarray, np.ndarray] = (rows[:0], rows[:0])
    if plan is not None:
        entry = plan.entry(circuit)
        if entry is None or entry.get("status") != "ok":
            reason = (entry or {}).get("reason") or (entry or {}).get("status") or "not in the plan"
            return Skipped(f"no datapoints planned: {reason}")
        planned = tuple(np.intersect1d(_planned_rows(entry, side, plan, table), rows) for side in SIDES)
    pools = []
    for side, own, chosen in zip(SIDES, (rows[inside], rows[~inside]), planned, strict=True):
        generator = rng(seed, "stage6", regime, circuit.target, circuit.circuit_id, side)
        others = np.setdiff1d(own, np.concatenate(planned))
        pools.append(Pool(np.concatenate([generator.permutation(chosen), generator.permutation(others)]), len(chosen)))
    return pools[0], pools[1]


def _inside(circuit: Circuit, table: ScoresTable, rows: np.ndarray) -> np.ndarray:
    """Which rows the circuit is about, bool [row]."""
    if circuit.cluster_rows is not None:
        return np.isin(rows, circuit.cluster_rows)
    covered = parse_rule(circuit.label).covers(table.frame.iloc[rows])
    return covered if circuit.direction in (None, "positive") else ~covered


def _planned_rows(entry: dict, side: str, plan: SamplingPlan, table: ScoresTable) -> np.ndarray:
    """Rows of one side of a plan's entry."""
    index_space = table.subset_rows(plan.baseline_subset)
    if plan.dataset_size != len(index_space):
        raise UserError(
            f"{plan.path} was made for {plan.dataset_size} datapoints, {table.path} has {len(index_space)} "
            f"({plan.baseline_subset}); run stage 4 again"
        )
    positions = np.asarray(entry[f"{side}_indices"], dtype=np.int64)
    if positions.size and not 0 <= positions.min() <= positions.max() < len(index_space):
        raise UserError(f"{plan.path} names datapoints that {table.path} does not have; run stage 4 again")
    return index_space[positions]


def rows_to_prepare(pool: Pool, n_search: int, n_confirm: int) -> np.ndarray:
    """Rows whose baseline is computed: those needed, and some to replace the ones that no longer answer as recorded."""
    return pool.rows[: n_search + n_confirm + 8 + n_search // 8]


def assign_rows(prepared: np.ndarray, agrees: np.ndarray, n_search: int, n_confirm: int) -> SliceRows:
    """Give prepared rows (in order) to search, then to confirmation; rows that disagree with stage 1 are rejected.

    agrees: the un-ablated label is the regime's, bool [row].
    """
    good = prepared[agrees]
    n_used = min(len(good), n_search + n_confirm)
    last = np.flatnonzero(agrees)[n_used - 1] + 1 if n_used else len(prepared)
    rejected = prepared[:last][~agrees[:last]]
    return SliceRows(good[:n_search], good[n_search:n_used], rejected)


def too_few(n_rows: tuple[int, int], epsilon: float, alpha_slice: float) -> Skipped | None:
    """A reason to skip if some slice is too small to prune anything."""
    needed = min_datapoints_to_prune(epsilon, alpha_slice)
    for side, n in zip(SIDES, n_rows, strict=True):
        if n < needed:
            return Skipped(f"only {n} {side} datapoints; fewer than {needed} cannot bound a flip rate below {epsilon}")
    return None
