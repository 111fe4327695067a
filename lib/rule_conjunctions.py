"""Conjunctions in bulk: a row of atom keys each, so that ten thousand are merged, told apart and counted at once.

A key is an atom as one number: feature and side in the upper half, the cut in the lower; keys sort as atoms do.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from lib.data_model_for_shap import TreeNodes
from lib.rule_atoms import Atom, Literal, RankedTable
from lib.rule_masks import TargetRows, row_hashes

_CUT_BITS = 32
_NO_ATOM = np.iinfo(np.int64).max
_BLOCK = 4096


def atom_key(atom: Atom) -> int:
    """The atom as a number."""
    return (2 * atom.feature + atom.above) << _CUT_BITS | atom.cut


def atom_of(key: int) -> Atom:
    """The atom a number stands for."""
    side, cut = divmod(int(key), 1 << _CUT_BITS)
    return Atom(side // 2, bool(side % 2), cut)


@dataclass(frozen=True)
class Conjunctions:
    """Distinct conjunctions, short ones first, then in atom order.

    keys: int64 [conjunction, place]: ascending atom keys, then filling. gain_sum, gain_max: [conjunction], split gains
    of the conditions in the first tree path that held them; 0 for those that come from no tree.
    """

    keys: np.ndarray
    gain_sum: np.ndarray
    gain_max: np.ndarray

    @classmethod
    def distinct(cls, keys: np.ndarray, gain_sum: np.ndarray, gain_max: np.ndarray) -> Conjunctions:
        """Merge the bounds of each row of keys [row, place] and keep the first of equal rows."""
        keys = _merged(keys)
        order = np.lexsort((*keys.T[::-1], _lengths(keys)))  # stable: of equal rows the first comes first
        is_new = np.ones(len(order), dtype=bool)
        is_new[1:] = (keys[order[1:]] != keys[order[:-1]]).any(axis=1)
        kept = order[is_new]
        return cls(keys[kept], gain_sum[kept], gain_max[kept])

    def __len__(self) -> int:
        return len(self.keys)

    def atoms(self, index: int) -> tuple[Atom, ...]:
        """Atoms of one conjunction."""
        return tuple(atom_of(key) for key in self.keys[index] if key != _NO_ATOM)

    def including(self, others: Sequence[tuple[Atom, ...]]) -> Conjunctions:
        """These and others that come from no tree."""
        more, zeros = _key_rows(others, self.keys.shape[1]), np.zeros(len(others))
        return self.distinct(
            np.concatenate([self.keys, more]),
            np.concatenate([self.gain_sum, zeros]),
            np.concatenate([self.gain_max, zeros]),
        )


def path_conjunctions(trees: Iterable[TreeNodes], max_conditions: int) -> Conjunctions:
    """Conjunctions of up to `max_conditions` atoms from every path of every tree, leaves and inner nodes alike.

    A path contributes each subset of its conditions, so what a tree had to split on first does not have to stay.
    """
    by_length: dict[int, list[tuple[int, list[int], list[float]]]] = {}
    for number, (keys, gains) in enumerate(path for tree in trees for path in _paths(tree)):
        by_length.setdefault(len(keys), []).append((number, keys, gains))
    numbers, rows, sums, largest = [], [], [], []
    for length, paths in by_length.items():
        path_keys = np.array([keys for _, keys, _ in paths])
        path_gains = np.array([gains for _, _, gains in paths])
        for size in range(min(length, max_conditions)):
            for before in itertools.combinations(range(length - 1), size):
                places = [*before, length - 1]
                filled = np.full((len(paths), max_conditions), _NO_ATOM)
                filled[:, : size + 1] = path_keys[:, places]
                rows.append(filled)
                sums.append(path_gains[:, places].sum(axis=1))
                largest.append(path_gains[:, places].max(axis=1))
                numbers.append(np.array([number for number, _, _ in paths]))
    if not rows:
        return Conjunctions(np.zeros((0, max_conditions), dtype=np.int64), np.zeros(0), np.zeros(0))
    in_path_order = np.argsort(np.concatenate(numbers), kind="stable")
    return Conjunctions.distinct(*(np.concatenate(part)[in_path_order] for part in (rows, sums, largest)))


def _paths(tree: TreeNodes) -> Iterator[tuple[list[int], list[float]]]:
    """The path to every node but the root, as atom keys and the gains of their splits."""
    left, right, feature, cut, gain = (column.tolist() for column in tree)
    stack: list[tuple[int, list[int], list[float]]] = [(0, [], [])]
    while stack:
        node, keys, gains = stack.pop()
        if keys:
            yield keys, gains
        if left[node] >= 0:
            with_gain = [*gains, gain[node]]
            for child, above in ((right[node], True), (left[node], False)):
                stack.append((child, [*keys, atom_key(Atom(feature[node], above, cut[node]))], with_gain))


def _merged(keys: np.ndarray) -> np.ndarray:
    """Each row sorted, with only the tightest bound of each feature and side, [row, place]."""
    keys = np.sort(keys, axis=1)
    for place in range(keys.shape[1] - 1):
        first, second = keys[:, place], keys[:, place + 1]
        same = (first >> _CUT_BITS == second >> _CUT_BITS) & (second != _NO_ATOM)
        above = (first >> _CUT_BITS) % 2 == 1
        # Cuts ascend: the tightest lower bound is the last of its run, the tightest upper bound the first.
        keys[:, place + 1] = np.where(same & ~above, first, second)
        keys[:, place] = np.where(same, _NO_ATOM, first)
    return np.sort(keys, axis=1)


def _lengths(keys: np.ndarray) -> np.ndarray:
    return np.count_nonzero(keys != _NO_ATOM, axis=1)


def _key_rows(conjunctions: Sequence[tuple[Atom, ...]], n_places: int) -> np.ndarray:
    rows = np.full((len(conjunctions), n_places), _NO_ATOM)
    for row, atoms in enumerate(conjunctions):
        rows[row, : len(atoms)] = sorted(atom_key(atom) for atom in atoms)
    return rows


def count_rows(
    keys: np.ndarray, table: RankedTable, target: TargetRows
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(positives covered, rows covered, row hash) of conjunctions [conjunction, place]; complements hash alike."""
    known = np.unique(keys[keys != _NO_ATOM])
    bits = np.concatenate([table.many_bits([atom_of(key) for key in known]), target.all_bits[None]])
    members = np.searchsorted(known, keys)
    n_true, n_fire, hashes = np.zeros(len(keys)), np.zeros(len(keys)), np.zeros(len(keys), dtype=np.uint64)
    block = max(1, min(_BLOCK, (1 << 22) // max(1, bits.shape[1])))
    for start in range(0, len(keys), block):
        rows = slice(start, start + block)
        packed = bits[members[rows, 0]]
        for place in range(1, keys.shape[1]):
            packed &= bits[members[rows, place]]
        n_true[rows], n_fire[rows] = target.counts(packed)
        hashes[rows] = np.minimum(row_hashes(packed), row_hashes(target.all_bits & ~packed))
    return n_true, n_fire, hashes


def literal_counts(
    literals: Sequence[Literal], table: RankedTable, target: TargetRows
) -> tuple[np.ndarray, np.ndarray]:
    """(positives covered, rows covered) of literals, [literal]."""
    longest = max((len(literal.atoms) for literal in literals), default=1)
    n_true, n_fire, _ = count_rows(_key_rows([literal.atoms for literal in literals], longest), table, target)
    negated = np.array([literal.negated for literal in literals], dtype=bool)
    return np.where(negated, target.total_positive - n_true, n_true), np.where(negated, target.total - n_fire, n_fire)


def rarest_condition(literals: Sequence[Literal], table: RankedTable, target: TargetRows) -> np.ndarray:
    """Share of rows that the least common condition of each literal covers by itself, [literal]."""
    atoms = sorted({atom for literal in literals for atom in literal.atoms})
    covered = dict(zip(atoms, literal_counts([Literal((atom,)) for atom in atoms], table, target)[1], strict=True))
    return np.array([min(covered[atom] for atom in literal.atoms) for literal in literals]) / target.total
