"""Which datapoints a rule's search and its confirmation use: two disjoint slices, drawn in a fixed order."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lib.artifacts import expecting
from lib.cli import UserError, rng
from lib.confidence_bounds import min_datapoints_to_prune
from lib.group_testing import SIDES, Oracle
from lib.scores_table import ScoresTable
from lib.search_orders import layer_bands
from lib.stages.agonist_inputs import Circuit, SamplingPlan
from lib.text_and_rules import parse_rule

_NOISE_GROUP_SHARES = (1 / 32, 1 / 64)
"""Sizes of noise groups, as shares of the candidates: what is fragile shows in groups as large as those searched."""
_NOISE_GROUPS_PER_SIZE = 4
_EXTRA_PLACES = (1 / 8, None)
"""How many more datapoints than are wanted are asked for their noise, as a share; None: all there are."""
_WEAK_FROM = 1 / 16
"""Share of the candidates, the strongest, that noise groups leave out."""
_LOUD = 0.25
"""A noise group that flips more of the datapoints than this holds an agonist, or is too large to tell anything."""


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
class SliceUse:
    """What the prepared datapoints of one slice are used for, as positions among all prepared datapoints.

    search: the search looks at these, in this order. noise: share of random weak groups that flip each of them.
    confirm: fresh ones. disagreeing: their un-ablated answer no longer has the label of the feature table. noisy: too
    many random weak groups flip them.
    """

    search: np.ndarray
    noise: np.ndarray
    confirm: np.ndarray
    disagreeing: np.ndarray
    noisy: np.ndarray


def pools_of(
    circuit: Circuit, table: ScoresTable, regime: str, plan: SamplingPlan | None, seed: int
) -> tuple[Pool, Pool] | Skipped:
    """The two pools of a circuit within a regime: the plan's rows first, then the rest of the slice, in random order.

    Rows of one slice never stand in for the other's.
    """
    rows = table.subset_rows(regime)
    inside = _inside(circuit, table, rows)
    planned = [rows[:0], rows[:0]]
    if plan is not None:
        entry = plan.entry(circuit)
        if entry is None or entry.get("status") != "ok":
            reason = (entry or {}).get("reason") or (entry or {}).get("status") or "not in the plan"
            return Skipped(f"no datapoints planned: {reason}")
        planned = [np.intersect1d(_planned_rows(entry, side, plan, table), rows) for side in SIDES]
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


def _planned_rows(entry: dict[str, Any], side: str, plan: SamplingPlan, table: ScoresTable) -> np.ndarray:
    """Rows of one side of a plan's entry."""
    index_space = table.subset_rows(plan.baseline_subset)
    if plan.dataset_size != len(index_space):
        raise UserError(
            f"{plan.path} was made for {plan.dataset_size} datapoints, {table.path} has {len(index_space)} "
            f"({plan.baseline_subset}); run stage 4 again"
        )
    with expecting("a sampling plan of stage 4", plan.path):
        positions = np.array([operator.index(index) for index in entry[f"{side}_indices"]], dtype=np.int64)
    if positions.size and not 0 <= positions.min() <= positions.max() < len(index_space):
        raise UserError(f"{plan.path} names datapoints that {table.path} does not have; run stage 4 again")
    return index_space[positions]


def rows_to_prepare(pool: Pool, n_search: int, n_confirm: int) -> np.ndarray:
    """Rows whose baseline is computed: those needed, and some to take the place of others."""
    return pool.rows[: n_search + _n_spare(n_search) + n_confirm]


def _n_spare(n_search: int) -> int:
    return 8 + n_search // 4


def search_pool(agrees: np.ndarray, n_search: int) -> np.ndarray:
    """Places of a slice from which its search datapoints are taken: the first that still answer as recorded.

    agrees: the un-ablated label is the regime's, bool [place].
    """
    return np.flatnonzero(agrees)[: n_search + _n_spare(n_search)]


def noise_groups(
    scores: np.ndarray, generator: np.random.Generator, layers: np.ndarray | None = None
) -> list[tuple[int, ...]]:
    """Random groups of candidates, of several sizes, without the strongest and without the first third of the layers.

    Late layers tell as much as early ones, and an ablation there costs less. scores: attribution [candidate]. layers:
    layer number [candidate]; None if all are alike.
    """
    n = len(scores)
    weak = np.argsort(-np.abs(scores), kind="stable")[int(_WEAK_FROM * n) :]
    bands = np.zeros(n, dtype=np.int64) if layers is None else layer_bands(layers)
    late = weak[bands[weak] > 0] if (bands[weak] > 0).any() else weak
    sizes = sorted({max(1, int(share * n)) for share in _NOISE_GROUP_SHARES}) * _NOISE_GROUPS_PER_SIZE
    draws = (generator.choice(late, min(size, len(late)), replace=False) for size in sizes)
    return list(dict.fromkeys(tuple(np.sort(draw).tolist()) for draw in draws))


def noise_rates(flips: np.ndarray) -> np.ndarray:
    """Share of noise groups that flip each datapoint, [datapoint]; flips [group, datapoint].

    A datapoint that hangs by a hair flips under nearly any group: it tells no candidate from another, and a few such
    datapoints keep every group from being pruned. A group that flips many of the datapoints is not counted.
    """
    quiet = flips[flips.mean(axis=1) <= _LOUD]
    return quiet.mean(axis=0) if len(quiet) else np.zeros(flips.shape[1])


def noise_of_slices(
    oracle: Oracle,
    groups: list[tuple[int, ...]],
    slices: Sequence[np.ndarray],
    n_wanted: Sequence[int],
    max_noise: float,
) -> list[np.ndarray]:
    """Noise of each slice's first datapoints, as many as it takes for `n_wanted` calm ones: [datapoint] per slice."""
    flips = [np.zeros((len(groups), 0), dtype=bool) for _ in slices]
    noise = [np.zeros(0) for _ in slices]
    for extra in _EXTRA_PLACES:
        new = []
        for points, rates, n in zip(slices, noise, n_wanted, strict=True):
            end = len(points) if extra is None else n + int(extra * n)
            new.append(points[len(rates) : end if (rates <= max_noise).sum() < n else len(rates)])
        if not sum(map(len, new)):
            break
        found = np.asarray(oracle(groups, np.concatenate(new)), dtype=bool)
        parts = np.split(found, [len(new[0])], axis=1)
        flips = [np.concatenate(pair, axis=1) for pair in zip(flips, parts, strict=True)]
        noise = np.split(noise_rates(np.concatenate(flips, axis=1)), [flips[0].shape[1]])
    return noise


def assign_slice(
    start: int,
    agrees: np.ndarray,
    pool: np.ndarray,
    noise: np.ndarray,
    *,
    max_noise: float,
    n_search: int,
    n_confirm: int,
    n_needed: int,
) -> SliceUse:
    """Give a slice's places to search and, behind the last of those, to confirmation.

    start: position of the slice's first place. pool, noise: places from which search datapoints are taken, and their
    noise, [pool]. Where fewer than `n_needed` are calm, noisy ones are used like the others. Confirmation datapoints
    are taken as they come: what they say holds for the slice, noisy ones included.
    """
    calm = noise <= max_noise
    usable = np.flatnonzero(calm if calm.sum() >= n_needed else np.ones(len(pool), dtype=bool))[:n_search]
    search = pool[usable]
    last = search[-1] if len(search) else -1
    good = np.flatnonzero(agrees)
    confirm = good[good > last][:n_confirm]
    passed = pool[pool <= last]
    disagreeing = np.flatnonzero(~agrees[: max(last, *confirm[-1:], -1) + 1])
    noisy = np.setdiff1d(passed, search)
    return SliceUse(start + search, noise[usable], start + confirm, start + disagreeing, start + noisy)


def too_few(n_rows: tuple[int, int], epsilon: float, alpha_slice: float) -> Skipped | None:
    """A reason to skip if some slice is too small to prune anything."""
    needed = min_datapoints_to_prune(epsilon, alpha_slice)
    for side, n in zip(SIDES, n_rows, strict=True):
        if n < needed:
            return Skipped(f"only {n} {side} datapoints; fewer than {needed} cannot bound a flip rate below {epsilon}")
    return None
