"""A feature table in ranks, and comparisons as cuts between ranks.

Working on ranks makes everything invariant under monotone rescaling of a feature; a cut becomes a number again only
when a rule is written down: the midpoint between the two neighbouring seen values.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from lib.rule_masks import pack
from lib.text_and_rules import Condition, Conjunction, Rule

_BLOCK_CELLS = 1 << 22


class Atom(NamedTuple):
    """One comparison in ranks: `rank <= cut`, or `rank > cut` if `above`."""

    feature: int
    above: bool
    cut: int


class Literal(NamedTuple):
    """A conjunction of atoms, or its negation; atoms are sorted, with at most one per feature and side."""

    atoms: tuple[Atom, ...]
    negated: bool = False

    @property
    def cost(self) -> int:
        """What a reader has to keep in mind: the conditions, and the NOT."""
        return len(self.atoms) + self.negated


# A disjunction of literals; those that the search makes are never negated.
RuleSet = tuple[Literal, ...]


def rule_cost(literals: RuleSet) -> int:
    """Number of conditions and negations in all."""
    return sum(literal.cost for literal in literals)


def merged_atoms(atoms: Iterable[Atom]) -> tuple[Atom, ...]:
    """Sorted atoms, only the tightest bound of each feature and side."""
    tightest: dict[tuple[int, bool], Atom] = {}
    for atom in atoms:
        key = atom[:2]
        held = tightest.get(key)
        if held is None or (atom.cut > held.cut) == atom.above:
            tightest[key] = atom
    return tuple(sorted(tightest.values()))


@dataclass(frozen=True)
class RankedTable:
    """Features as dense ranks.

    ranks: int32 [feature, row]; values: the sorted seen values of each feature; names: of the features.
    """

    ranks: np.ndarray
    values: tuple[np.ndarray, ...]
    names: tuple[str, ...]
    _bits: dict[Atom, np.ndarray] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, features: np.ndarray, names: Iterable[str]) -> RankedTable:
        """Rank a matrix [row, feature]."""
        values, ranks = [], np.empty(features.shape[::-1], dtype=np.int32)
        for column in range(features.shape[1]):
            seen, ranks[column] = np.unique(features[:, column], return_inverse=True)
            values.append(seen)
        return cls(ranks, tuple(values), tuple(names))

    @property
    def n_rows(self) -> int:
        """Number of rows."""
        return self.ranks.shape[1]

    @property
    def n_features(self) -> int:
        """Number of features."""
        return self.ranks.shape[0]

    def rows(self, index: np.ndarray) -> RankedTable:
        """Some rows, in the same ranks."""
        return RankedTable(np.ascontiguousarray(self.ranks[:, index]), self.values, self.names)

    def mask(self, atom: Atom) -> np.ndarray:
        """Where the comparison holds, bool [row]."""
        ranks = self.ranks[atom.feature]
        return ranks > atom.cut if atom.above else ranks <= atom.cut

    def bits(self, atom: Atom) -> np.ndarray:
        """The same, packed [word]; kept for the next call."""
        packed = self._bits.get(atom)
        if packed is None:
            packed = self._bits[atom] = pack(self.mask(atom))
        return packed

    def many_bits(self, atoms: Sequence[Atom]) -> np.ndarray:
        """The same for several comparisons, [atom, word]: all new cuts of a feature in one go."""
        new: dict[int, list[Atom]] = {}
        for atom in atoms:
            if atom not in self._bits:
                new.setdefault(atom.feature, []).append(atom)
        for feature, held in new.items():
            for start in range(0, len(held), step := max(1, _BLOCK_CELLS // max(1, self.n_rows))):
                part = held[start : start + step]
                masks = self.ranks[feature] > np.array([atom.cut for atom in part])[:, None]
                masks ^= ~np.array([atom.above for atom in part])[:, None]
                self._bits.update(zip(part, pack(masks), strict=True))
        if not len(atoms):
            return pack(np.zeros((0, self.n_rows), dtype=bool))
        return np.stack([self._bits[atom] for atom in atoms])

    def literal_bits(self, literal: Literal, all_bits: np.ndarray) -> np.ndarray:
        """Rows of a literal, packed [word]; `all_bits` has a 1 for each row."""
        packed = all_bits
        for atom in literal.atoms:
            packed = packed & self.bits(atom)
        return all_bits & ~packed if literal.negated else packed

    def rule_mask(self, literals: RuleSet) -> np.ndarray:
        """Rows of a disjunction, bool [row]."""
        fires = np.zeros(self.n_rows, dtype=bool)
        for literal in literals:
            inside = np.logical_and.reduce([self.mask(atom) for atom in literal.atoms])
            fires |= ~inside if literal.negated else inside
        return fires

    def threshold(self, atom: Atom) -> float:
        """Midpoint between the seen values on both sides of the cut."""
        low, high = self.values[atom.feature][atom.cut : atom.cut + 2]
        middle = low / 2 + high / 2
        return float(middle if low <= middle < high else low)

    def conjunction(self, literal: Literal) -> Conjunction:
        """The literal with names and numbers, lower bound before upper."""
        ordered = sorted(literal.atoms, key=lambda atom: (atom.feature, not atom.above))
        conditions = tuple(
            Condition(self.names[atom.feature], ">" if atom.above else "<=", self.threshold(atom)) for atom in ordered
        )
        return Conjunction(conditions, literal.negated)

    def rule(self, literals: RuleSet) -> Rule:
        """The disjunction with names and numbers."""
        return Rule(tuple(self.conjunction(literal) for literal in literals))


def quantile_cuts(ranks: np.ndarray, n_cuts: int) -> np.ndarray:
    """Up to `n_cuts` cuts of one feature that part the rows evenly; all of them if there are no more. [cut]"""
    counts = np.bincount(ranks)
    seen = np.flatnonzero(counts)
    cuts = seen[:-1]
    if len(cuts) <= n_cuts:
        return cuts
    below = np.cumsum(counts)[cuts]
    wanted = len(ranks) * np.arange(1, n_cuts + 1) / (n_cuts + 1)
    return np.unique(cuts[np.minimum(np.searchsorted(below, wanted), len(cuts) - 1)])
