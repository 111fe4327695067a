"""Contrastive hierarchical ablation as a search: which candidates, ablated, flip the behaviour?

Groups of candidates are tested together against an oracle. A group whose flip rate is provably below epsilon on both
slices of datapoints is pruned, any other is split; what is left are single candidates. Nothing here knows of models or
files: the oracle answers `groups -> flips`, and may be a model, a pool of workers or a simulation.

All datapoints are looked at in the same order by every group. So if ablating more never flips less, a group that is
pruned would have pruned each of its members alone at the same look: the error of a whole path through the tree is the
error alpha of one test, not its multiple. Where groups cancel, that fails; `lib.search_audit` measures how often.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import NamedTuple, Protocol

import numpy as np

from lib.confidence_bounds import LookPlan, plan_looks, upper_flip_rate
from lib.search_orders import NO_CUT, PLAIN_CUT, Forest

ASSOCIATED, UNRELATED = 0, 1
SIDES = ("associated", "unrelated")
DEFAULT_LOOKS = (8, 24, 40)
_MAX_GROUPS_PER_CALL = 1 << 16


class Oracle(Protocol):
    """Answers which datapoints flip when a group of candidates is ablated."""

    def __call__(self, groups: list[tuple[int, ...]], datapoints: np.ndarray) -> np.ndarray:
        """Flips of each group (candidate indices) on each datapoint, bool [group, datapoint]."""


class Verdict(IntEnum):
    """What became of a tested group."""

    OPEN = 0
    PRUNED = 1
    SPLIT = 2
    SINGLE = 3


class _SliceState(IntEnum):
    """What the looks so far say about one slice."""

    OPEN = 0
    LOW = 1
    HIGH = 2


@dataclass(frozen=True)
class SearchSettings:
    """epsilon: smallest flip rate worth finding. alpha: probability of pruning a group that has it on some slice, half
    for each slice. looks: numbers of datapoints per slice after which a group may be decided early; empty for one look
    at all of them. full_singles: single candidates see every datapoint even when a look prunes them; those that no look
    prunes always do. dense_size: a subtree of at most this many candidates whose groups all proved positive two
    generations long is tested one by one; 0 never.
    """

    epsilon: float = 0.2
    alpha: float = 0.05
    looks: tuple[int, ...] = DEFAULT_LOOKS
    full_singles: bool = False
    dense_size: int = 0

    @property
    def alpha_slice(self) -> float:
        """Error probability on one slice."""
        return self.alpha / 2.0


@dataclass(frozen=True)
class Slices:
    """The datapoints of a search, in the order in which every group looks at them, one array of positions per slice.

    ease: per slice how easily each datapoint flips, up to a common factor, all positive; None if nothing is known. It
    saves evaluations and decides nothing else (see `plan_looks`).
    """

    associated: np.ndarray
    unrelated: np.ndarray
    ease: tuple[np.ndarray, np.ndarray] | None = None

    @property
    def both(self) -> tuple[np.ndarray, np.ndarray]:
        """(associated, unrelated)."""
        return self.associated, self.unrelated


class GroupRecord(NamedTuple):
    """One tested group."""

    members: np.ndarray
    """Candidate indices."""
    depth: int
    verdict: Verdict
    split_strategy: str
    """Why a split group was cut where it was; empty if it was not split."""
    split_sizes: tuple[int, int]
    n_flips: tuple[int, int]
    """Associated, unrelated."""
    n_evaluated: tuple[int, int]
    """Associated, unrelated."""


_COLUMNS = {
    "start": np.int64,
    "end": np.int64,
    "cut": np.int64,
    "sibling": np.int64,
    "depth": np.int32,
    "streak": np.int8,
    "verdict": np.int8,
}
_SLICE_COLUMNS = {"flips": np.int32, "seen": np.int32, "look": np.int8, "state": np.int8}


@dataclass
class _Nodes:
    """Tested groups as columns: one array per property, [node] or [node, slice], grown by doubling."""

    size: int = 0
    columns: dict[str, np.ndarray] = field(
        default_factory=lambda: {
            **{name: np.zeros(1024, dtype=kind) for name, kind in _COLUMNS.items()},
            **{name: np.zeros((1024, 2), dtype=kind) for name, kind in _SLICE_COLUMNS.items()},
        }
    )

    def __getitem__(self, name: str) -> np.ndarray:
        return self.columns[name]

    def add(
        self, start: np.ndarray, end: np.ndarray, depth: np.ndarray | int, streak: np.ndarray | int = 0
    ) -> np.ndarray:
        """Append nodes over the given spans; returns their numbers."""
        numbers = np.arange(self.size, self.size + len(start))
        self.size += len(start)
        capacity = len(self.columns["start"])
        if self.size > capacity:
            grown = max(self.size, 2 * capacity)
            for name, column in self.columns.items():
                room = np.zeros((grown - capacity, *column.shape[1:]), dtype=column.dtype)
                self.columns[name] = np.concatenate([column, room])
        for name, values in (
            ("start", start),
            ("end", end),
            ("depth", depth),
            ("streak", streak),
            ("cut", NO_CUT),
            ("sibling", numbers),
        ):
            self.columns[name][numbers] = values
        return numbers


@dataclass(frozen=True)
class SearchResult:
    """Every tested group of a search, and what it cost."""

    forest: Forest
    settings: SearchSettings
    n_rounds: int
    _nodes: _Nodes

    @property
    def n_tests(self) -> int:
        """Number of groups tested."""
        return self._nodes.size

    @property
    def n_evaluations(self) -> int:
        """Number of (group, datapoint) pairs evaluated."""
        return int(self._nodes["seen"][: self.n_tests].sum())

    def singles(self) -> np.ndarray:
        """Candidates that were tested alone, in preorder."""
        numbers = self._preorder()
        alone = numbers[self._nodes["verdict"][numbers] == Verdict.SINGLE]
        return self.forest.order[self._nodes["start"][alone]]

    def agonists(self) -> np.ndarray:
        """Candidates tested alone whose flip rate may be epsilon or more on some slice, in preorder."""
        numbers = self._preorder()
        alone = numbers[self._nodes["verdict"][numbers] == Verdict.SINGLE]
        bounds = upper_flip_rate(self._nodes["flips"][alone], self._nodes["seen"][alone], self.settings.alpha_slice)
        return self.forest.order[self._nodes["start"][alone[bounds.max(axis=1) >= self.settings.epsilon]]]

    def pruned_members(self) -> np.ndarray:
        """Candidates inside pruned groups, in row order."""
        numbers = np.flatnonzero(self._nodes["verdict"][: self.n_tests] == Verdict.PRUNED)
        edges = np.zeros(self.forest.n_candidates + 1, dtype=np.int64)
        np.add.at(edges, self._nodes["start"][numbers], 1)
        np.add.at(edges, self._nodes["end"][numbers], -1)
        return self.forest.order[np.cumsum(edges[:-1]) > 0]

    def records(self) -> Iterator[GroupRecord]:
        """Tested groups depth-first, first half first, whatever the order in which they were tested."""
        root_of = {int(start): number for number, start in enumerate(self.forest.starts)}
        columns = self._nodes.columns
        middles = _middle(columns["start"], columns["end"], columns["cut"])
        for number in self._preorder().tolist():
            start, end, depth = (int(columns[name][number]) for name in ("start", "end", "depth"))
            root = root_of.get(start) if depth == 0 else None
            verdict = Verdict(int(columns["verdict"][number]))
            middle = int(middles[number])
            strategy = ""
            if verdict is Verdict.SPLIT:
                strategy = PLAIN_CUT if root is None else self.forest.cut_names[root]
            members = self.forest.order[start:end]
            if root is not None:
                members = self.forest.shown.get(root, members)
            yield GroupRecord(
                members,
                depth,
                verdict,
                strategy,
                (middle - start, end - middle),
                tuple(columns["flips"][number].tolist()),
                tuple(columns["seen"][number].tolist()),
            )

    def _preorder(self) -> np.ndarray:
        # Spans are nested: preorder is by start, the longer span first.
        start, end = self._nodes["start"][: self.n_tests], self._nodes["end"][: self.n_tests]
        return np.lexsort((-end, start))


def _middle(start: np.ndarray, end: np.ndarray, cut: np.ndarray) -> np.ndarray:
    """Where a span is split: at its cut, else after the first floor(size / 2) members."""
    return np.where(cut == NO_CUT, start + (end - start) // 2, cut)


def search(forest: Forest, slices: Slices, oracle: Oracle, settings: SearchSettings) -> SearchResult:
    """Search: each round the groups that wait for the same look of the same datapoints go to the oracle together.

    Groups do not depend on each other, so each round takes the look that makes the largest batch, over all trees: large
    batches cost less per evaluation, and (unless `dense_size` asks what became of a sibling) the order of the looks
    changes neither a verdict nor what is evaluated.
    """
    plans = _plan_of(slices, ASSOCIATED, settings), _plan_of(slices, UNRELATED, settings)
    nodes = _Nodes()
    active = nodes.add(forest.starts, forest.ends, 0)
    nodes["cut"][active] = forest.cuts
    n_rounds = 0
    while len(active):
        n_rounds += 1
        numbers, looks = max(
            _same_looks(nodes, active, settings), key=lambda batch: _n_evaluations(slices, plans, *batch)
        )
        _take_look(forest, slices, plans, oracle, nodes, numbers, looks)
        verdicts = _judge(nodes, numbers, plans, settings)
        nodes["verdict"][numbers] = verdicts
        children = _children(nodes, numbers[verdicts == Verdict.SPLIT], settings)
        waiting = np.setdiff1d(active, numbers[verdicts != Verdict.OPEN])
        active = np.concatenate([waiting, children])
    return SearchResult(forest, settings, n_rounds, nodes)


def _plan_of(slices: Slices, side: int, settings: SearchSettings) -> LookPlan:
    """The looks at one slice."""
    ease = None if slices.ease is None else tuple(slices.ease[side].tolist())
    return plan_looks(len(slices.both[side]), settings.looks, settings.epsilon, settings.alpha_slice, ease)


def sweep(
    candidates: Sequence[int] | np.ndarray, slices: Slices, oracle: Oracle, settings: SearchSettings
) -> SearchResult:
    """Test every candidate alone on all datapoints: brute force, and the audit of pruned members."""
    order = np.asarray(candidates, dtype=np.int64)
    places = np.arange(len(order))
    forest = Forest(order, places, places + 1, np.full(len(order), NO_CUT), (PLAIN_CUT,) * len(order), {})
    return search(forest, slices, oracle, replace(settings, looks=()))


_NO_LOOK = -1
_TO_THE_END = 100
"""Added to a look's number: this look and all later ones at once."""


def _same_looks(
    nodes: _Nodes, active: np.ndarray, settings: SearchSettings
) -> list[tuple[np.ndarray, tuple[int, int]]]:
    """Parts of the active nodes that need the same datapoints next: (nodes, next look on each slice).

    With several looks a group takes one slice at a time, for flips on either are enough to split it.
    """
    looks = nodes["look"][active].astype(np.int64)
    is_open = nodes["state"][active] == _SliceState.OPEN
    alone = nodes["end"][active] - nodes["start"][active] == 1
    to_the_end = alone & (settings.full_singles | (nodes["state"][active] == _SliceState.HIGH).any(axis=1))
    waits = np.stack([looks[:, UNRELATED] < looks[:, ASSOCIATED], looks[:, ASSOCIATED] <= looks[:, UNRELATED]], axis=1)
    waits &= (is_open.all(axis=1) & ~alone)[:, None] & bool(settings.looks)
    looks = np.where(to_the_end[:, None], looks + _TO_THE_END, np.where(is_open & ~waits, looks, _NO_LOOK))
    kinds, members = np.unique(looks, axis=0, return_inverse=True)
    return [(active[members.ravel() == kind], (int(pair[0]), int(pair[1]))) for kind, pair in enumerate(kinds)]


def _n_evaluations(
    slices: Slices, plans: tuple[LookPlan, LookPlan], numbers: np.ndarray, looks: tuple[int, int]
) -> int:
    """(group, datapoint) pairs of a look."""
    sides = zip(slices.both, plans, looks, strict=True)
    return len(numbers) * sum(len(_points_of_look(*side)) for side in sides)


def _take_look(
    forest: Forest,
    slices: Slices,
    plans: tuple[LookPlan, LookPlan],
    oracle: Oracle,
    nodes: _Nodes,
    numbers: np.ndarray,
    looks: tuple[int, int],
) -> None:
    """Ask the oracle for one look of these nodes and add up their flips."""
    new_points = [_points_of_look(*side) for side in zip(slices.both, plans, looks, strict=True)]
    datapoints = np.concatenate(new_points)
    n_first = len(new_points[ASSOCIATED])
    for begin in range(0, len(numbers), _MAX_GROUPS_PER_CALL):
        part = numbers[begin : begin + _MAX_GROUPS_PER_CALL]
        spans = zip(nodes["start"][part].tolist(), nodes["end"][part].tolist(), strict=True)
        groups = [tuple(forest.order[start:end].tolist()) for start, end in spans]
        flips = np.asarray(oracle(groups, datapoints), dtype=bool)
        nodes["flips"][part, ASSOCIATED] += flips[:, :n_first].sum(axis=1)
        nodes["flips"][part, UNRELATED] += flips[:, n_first:].sum(axis=1)
    for side, (points, plan, look) in enumerate(zip(new_points, plans, looks, strict=True)):
        nodes["seen"][numbers, side] += len(points)
        if look != _NO_LOOK:
            nodes["look"][numbers, side] = plan.n_looks if look >= _TO_THE_END else look + 1


def _points_of_look(points: np.ndarray, plan: LookPlan, look: int) -> np.ndarray:
    """Datapoints of a slice that a look adds."""
    if look == _NO_LOOK:
        return points[:0]
    first = look % _TO_THE_END
    begin = plan.n_seen[first - 1] if first else 0
    return points[begin:] if look >= _TO_THE_END else points[begin : plan.n_seen[first]]


def _judge(nodes: _Nodes, active: np.ndarray, plans: tuple[LookPlan, LookPlan], settings: SearchSettings) -> np.ndarray:
    """Verdict of each active node after its look, [node]; updates what is known of its slices."""
    at_end = np.ones(len(active), dtype=bool)
    for side, plan in enumerate(plans):
        look = nodes["look"][active, side].astype(np.int64)
        flips = nodes["flips"][active, side]
        state = nodes["state"][active, side]
        low = (look > 0) & (flips <= np.asarray(plan.prune_at_most)[look - 1])
        high = (look > 0) & (flips >= np.asarray(plan.split_from)[look - 1])
        found = np.where(low, _SliceState.LOW, np.where(high, _SliceState.HIGH, _SliceState.OPEN))
        nodes["state"][active, side] = np.where(state == _SliceState.OPEN, found, state)
        at_end &= look == plan.n_looks
    states = nodes["state"][active]
    is_low, is_high = (states == _SliceState.LOW).all(axis=1), (states == _SliceState.HIGH).any(axis=1)
    alone = nodes["end"][active] - nodes["start"][active] == 1
    verdicts = np.where(is_low, Verdict.PRUNED, np.where(is_high, Verdict.SPLIT, Verdict.OPEN))
    return np.where(alone, np.where(is_low | at_end, Verdict.SINGLE, Verdict.OPEN), verdicts)


def _children(nodes: _Nodes, parents: np.ndarray, settings: SearchSettings) -> np.ndarray:
    """Halves of split nodes, or all members of a subtree that proved dense; returns the new nodes."""
    start, end = nodes["start"][parents], nodes["end"][parents]
    sibling = nodes["sibling"][parents]
    # A node whose sibling was split too continues the streak of its ancestors; a root is its own sibling.
    both_split = (sibling != parents) & (nodes["verdict"][sibling] == Verdict.SPLIT)
    streak = np.where(both_split, np.minimum(nodes["streak"][parents] + 1, 100), 0)
    dense = (end - start <= settings.dense_size) & (streak >= 2)
    middle = _middle(start, end, nodes["cut"][parents])[~dense]
    depth = nodes["depth"][parents] + 1
    starts, ends = np.stack([start[~dense], middle], axis=1), np.stack([middle, end[~dense]], axis=1)
    halves = nodes.add(starts.ravel(), ends.ravel(), np.repeat(depth[~dense], 2), np.repeat(streak[~dense], 2))
    nodes["sibling"][halves] = halves.reshape(-1, 2)[:, ::-1].ravel()
    sizes = end[dense] - start[dense]
    within = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    places = np.repeat(start[dense], sizes) + within
    members = nodes.add(places, places + 1, np.repeat(depth[dense], sizes))
    return np.concatenate([halves, members])
