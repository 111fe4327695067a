"""A circuit's group tests as a tree: which group was tested, what it flipped, and what became of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

from lib.reporting.localization import detail_effects, group_tests
from lib.reporting.page.grids import Cell, Column, Grid, Kind, count_cell
from lib.reporting.page.texts import visible

_ASSOCIATED, _UNRELATED = "associated", "unrelated"


class Fate(IntEnum):
    """What became of a tested group; the page's script knows the numbers."""

    PRUNED = 0
    """Its flip rate is below the threshold on both slices: no member is looked at again."""

    SPLIT = 1
    """It may flip enough: its parts were tested."""

    SILENT = 2
    """A single neuron that flips too little."""

    AGONIST = 3
    """A single neuron that flips enough."""


@dataclass
class Node:
    """One group test. flips: (flips, datapoints) on the associated and the unrelated slice, as far as recorded."""

    members: dict[str, list[Any]]
    size: int
    depth: int
    flips: tuple[int | None, int | None, int | None, int | None]
    is_split: bool
    fate: Fate = Fate.PRUNED
    children: list[Node] = field(default_factory=list)

    @property
    def names(self) -> Iterable[tuple[str, str]]:
        """The members as (layer, index)."""
        return ((layer, str(index)) for layer, indices in self.members.items() for index in indices)

    @property
    def label(self) -> str:
        """The neuron of a single one; else the layers of the group, the first and the last of many."""
        layers = list(self.members)
        if self.size == 1 and len(layers) == 1 and len(self.members[layers[0]]) == 1:
            return visible(f"{layers[0]}:{self.members[layers[0]][0]}", 60)
        ordered = [visible(layer, 30) for layer in sorted(layers, key=_layer_order)]
        if len(ordered) < 2:
            return "".join(ordered)
        return f"{ordered[0]} … {ordered[-1]} ({len(ordered)} layers)"


@dataclass(frozen=True)
class SearchTree:
    """The trees of one circuit, in the order in which their roots were recorded; audit tests are counted apart."""

    roots: list[Node]
    n_audit: int

    @property
    def nodes(self) -> list[Node]:
        """All nodes, parents before children, depth first."""
        found, waiting = [], self.roots[::-1]
        while waiting:
            node = waiting.pop()
            found.append(node)
            waiting.extend(node.children[::-1])
        return found

    @property
    def is_flat(self) -> bool:
        """Whether nothing was ever split: every candidate was tested alone."""
        return not any(node.children for node in self.roots)

    def to_json(self) -> list[list[Any]]:
        """Depth-first records [depth, label, size, four counts, fate] for the page's script."""
        return [[depth, node.label, node.size, *node.flips, int(node.fate)] for depth, node in self._with_depth()]

    def _with_depth(self) -> list[tuple[int, Node]]:
        # The place in the tree, not the recorded depth: a group whose parent is not recorded is a root.
        found: list[tuple[int, Node]] = []
        waiting = [(0, node) for node in self.roots[::-1]]
        while waiting:
            depth, node = waiting.pop()
            found.append((depth, node))
            waiting.extend((depth + 1, child) for child in node.children[::-1])
        return found


def search_tree(detail: Mapping[str, Any], regime_agonists: set[str]) -> SearchTree:
    """The tree of a circuit's detail file, ours or published: a group's parent is the last group, one level up, that
    holds its members. regime_agonists: names of all agonists of the regime, for files that do not list their own."""
    agonists = set(detail_effects(detail)) if isinstance(detail.get("agonists"), list) else regime_agonists
    tests = list(group_tests(detail))
    nodes = [_node(record, groups) for record, groups in tests if not record.get("audit")]
    # A holder is looked up by any one member: groups of one level do not overlap.
    holder: dict[tuple[int, str, str], Node] = {}
    roots: list[Node] = []
    for node in sorted(nodes, key=lambda item: item.depth):
        first = next(iter(node.names), None)
        parent = holder.get((node.depth - 1, *first)) if first is not None else None
        (roots if parent is None else parent.children).append(node)
        for layer, index in node.names:
            holder[(node.depth, layer, index)] = node
    tree = SearchTree(roots, len(tests) - len(nodes))
    for node in tree.nodes:
        node.fate = _fate(node, agonists)
    return tree


def _node(record: Mapping[str, Any], groups: dict[str, list[Any]]) -> Node:
    def counted(side: str) -> tuple[int, int]:
        return _count(record.get(f"k_effect_{side}")), _count(record.get(f"n_{side}_eval"))

    size, depth = record.get("group_size"), record.get("depth")
    return Node(
        groups,
        size if isinstance(size, int) and size > 0 else sum(map(len, groups.values())),
        depth if isinstance(depth, int) and not isinstance(depth, bool) else 0,
        (*counted(_ASSOCIATED), *counted(_UNRELATED)),
        record.get("split") is True,
    )


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _fate(node: Node, agonists: set[str]) -> Fate:
    if node.children or node.is_split:
        return Fate.SPLIT
    if node.size > 1:
        return Fate.PRUNED
    return Fate.AGONIST if node.label in agonists else Fate.SILENT


def levels_grid(name: str, caption: str, tree: SearchTree) -> Grid:
    """The tree in numbers: level by level, what was tested and what became of it."""
    levels: dict[int, Counter] = {}
    largest: Counter = Counter()
    for node in tree.nodes:
        levels.setdefault(node.depth, Counter())[node.fate] += 1
        largest[node.depth] = max(largest[node.depth], node.size)
    rows: list[list[Cell]] = [
        [
            count_cell(depth),
            count_cell(sum(fates.values())),
            count_cell(largest[depth]),
            *(count_cell(fates[fate]) for fate in (Fate.SPLIT, Fate.PRUNED, Fate.SILENT, Fate.AGONIST)),
        ]
        for depth, fates in sorted(levels.items())
    ]
    heads = ("level", "groups tested", "largest group", "split", "pruned", "single, silent", "single, agonist")
    columns = [Column(head, Kind.NUMBER) for head in heads]
    return Grid(name, caption, columns, rows, shown=60, noun="level")


def _layer_order(label: str) -> tuple:
    digits = "".join(character if character.isdigit() else " " for character in label).split()
    return ([int(number) for number in digits], label)
