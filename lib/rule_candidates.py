"""Candidate literals: the conjunctions along the paths of boosted trees, shortened, scored, deduplicated, screened."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from lib.data_model_for_shap import TreeNodes
from lib.rule_atoms import Atom, Literal, RankedTable, RuleSet, merged_atoms, quantile_cuts
from lib.rule_masks import TargetRows, row_hashes, unpack

_BLOCK = 4096


@dataclass(frozen=True)
class CandidateTable:
    """Literals with what is known of them; all arrays are [candidate].

    gain_sum, gain_max: split gains of the literal's conditions in the first tree path that held them, 0 for literals
    that come from no tree. coefficient: of the L1 step, 0 if the literal did not enter it or was dropped by it.
    """

    literals: list[Literal]
    gain_sum: np.ndarray
    gain_max: np.ndarray
    coefficient: np.ndarray

    def __len__(self) -> int:
        return len(self.literals)

    def including(self, literals: RuleSet) -> CandidateTable:
        """These candidates and the literals that are not among them: those whose cuts the search has moved.

        A moved literal takes what is known of the first candidate with the same features and sides, or zeros.
        """
        new = [literal for literal in literals if literal not in self.literals]
        shapes: dict[object, int] = {}
        for index, literal in enumerate(self.literals):
            shapes.setdefault(_shape(literal), index)
        origin = [shapes.get(_shape(literal)) for literal in new]
        columns = (
            np.append(column, [0.0 if index is None else column[index] for index in origin])
            for column in (self.gain_sum, self.gain_max, self.coefficient)
        )
        return CandidateTable(self.literals + new, *columns)


def _shape(literal: Literal) -> object:
    return literal.negated, tuple(atom[:2] for atom in literal.atoms)


def path_conjunctions(trees: Iterable[TreeNodes], max_conditions: int) -> dict[tuple[Atom, ...], tuple[float, float]]:
    """Conjunctions of up to `max_conditions` atoms from every path of every tree, leaves and inner nodes alike.

    A path contributes each subset of its conditions, so what a tree had to split on first does not have to stay. Maps
    atoms to (sum, maximum) of their split gains, first occurrence.
    """
    found: dict[tuple[Atom, ...], tuple[float, float]] = {}
    for tree in trees:
        for path in _paths(tree):
            *before, last = path
            for size in range(min(len(before), max_conditions - 1) + 1):
                for chosen in itertools.combinations(before, size):
                    atoms = merged_atoms([atom for atom, _ in (*chosen, last)])
                    gains = [gain for _, gain in (*chosen, last)]
                    found.setdefault(atoms, (sum(gains), max(gains)))
    return found


def _paths(tree: TreeNodes) -> Iterator[list[tuple[Atom, float]]]:
    """The path to every node but the root, as (atom, gain of the split) pairs."""
    stack: list[tuple[int, list[tuple[Atom, float]]]] = [(0, [])]
    while stack:
        node, path = stack.pop()
        if path:
            yield path
        if tree.left[node] >= 0:
            feature, cut, gain = int(tree.feature[node]), int(tree.cut[node]), float(tree.gain[node])
            stack.append((int(tree.right[node]), [*path, (Atom(feature, True, cut), gain)]))
            stack.append((int(tree.left[node]), [*path, (Atom(feature, False, cut), gain)]))


def pair_conjunctions(table: RankedTable, target: TargetRows, *, n_cuts: int, n_best: int) -> list[tuple[Atom, ...]]:
    """Pairs of cuts on two features that say most together beyond what each says alone.

    Greedy trees miss features that matter only jointly (exclusive or). All pairs of a few quantile cuts are counted by
    one matrix product; the surprise of a pair is its covariance with the target given the sums of its four quadrants.
    """
    atoms = [
        Atom(feature, False, int(cut))
        for feature in range(table.n_features)
        for cut in quantile_cuts(table.ranks[feature], n_cuts)
    ]
    if len(atoms) < 2 or target.total <= 0:
        return []
    below = np.stack([table.mask(atom) for atom in atoms]).astype(np.float32)
    weight = np.ones(target.n_rows) if target.weight is None else target.weight
    share = (weight / target.total).astype(np.float32)
    centred = below - (below @ share)[:, None]
    residual = (target.positive - target.total_positive / target.total).astype(np.float32) * share
    joint = (centred * residual) @ centred.T
    spread = np.sqrt(np.maximum((centred**2) @ share, 1e-12))
    surprise = np.abs(joint) / np.outer(spread, spread)
    owner = np.array([atom.feature for atom in atoms])
    surprise[owner[:, None] >= owner[None, :]] = 0.0
    order = np.argsort(-surprise, axis=None, kind="stable")[:n_best]
    pairs = []
    for first, second in zip(*np.unravel_index(order, surprise.shape), strict=True):
        if surprise[first, second] > 0:
            a, b = atoms[first], atoms[second]
            pairs += [
                merged_atoms([a._replace(above=x), b._replace(above=y)]) for x in (False, True) for y in (False, True)
            ]
    return pairs


def scored_candidates(
    conjunctions: dict[tuple[Atom, ...], tuple[float, float]],
    table: RankedTable,
    target: TargetRows,
    *,
    min_rows: float,
    limit: int,
) -> CandidateTable:
    """The best `limit` literals by |MCC|, one per set of rows, oriented to speak for the target.

    A conjunction that speaks against it becomes its negation. Literals that cover fewer than `min_rows` rows, or all
    but fewer, are dropped. Of literals with the same rows the shortest stays, then the first in atom order.
    """
    ordered = sorted(conjunctions, key=lambda atoms: (len(atoms), atoms))
    n_true, n_fire, hashes = _count_all(ordered, table, target)
    usable = np.flatnonzero((n_fire >= min_rows) & (n_fire <= target.total - min_rows))
    _, first = np.unique(hashes[usable], return_index=True)
    usable = usable[np.sort(first)]
    score = target.mcc(n_true[usable], n_fire[usable])
    best = np.argsort(-np.round(np.abs(score), 12), kind="stable")[:limit]
    index, negated = usable[best], score[best] < 0
    # A single negated condition is simply the opposite condition.
    literals = [
        _opposite(ordered[i]) if against else Literal(ordered[i]) for i, against in zip(index, negated, strict=True)
    ]
    gains = np.array([conjunctions[ordered[i]] for i in index]).reshape(-1, 2)
    return CandidateTable(literals, gains[:, 0], gains[:, 1], np.zeros(len(index)))


def _opposite(atoms: tuple[Atom, ...]) -> Literal:
    if len(atoms) == 1:
        return Literal((atoms[0]._replace(above=not atoms[0].above),))
    return Literal(atoms, negated=True)


def _count_all(
    ordered: list[tuple[Atom, ...]], table: RankedTable, target: TargetRows
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(positives covered, rows covered, row hash) of conjunctions, in blocks; a complement has the same hash."""
    position: dict[Atom, int] = {}
    for atoms in ordered:
        for atom in atoms:
            position.setdefault(atom, len(position))
    bits = np.stack([table.bits(atom) for atom in position] + [target.all_bits])
    longest = max(map(len, ordered), default=1)
    members = np.full((len(ordered), longest), len(position))
    for row, atoms in enumerate(ordered):
        members[row, : len(atoms)] = [position[atom] for atom in atoms]
    n_true, n_fire, hashes = np.zeros(len(ordered)), np.zeros(len(ordered)), np.zeros(len(ordered), dtype=np.uint64)
    block = max(1, min(_BLOCK, (1 << 22) // max(1, bits.shape[1])))
    for start in range(0, len(ordered), block):
        rows = slice(start, start + block)
        packed = bits[members[rows, 0]]
        for column in range(1, longest):
            packed &= bits[members[rows, column]]
        n_true[rows], n_fire[rows] = target.counts(packed)
        hashes[rows] = np.minimum(row_hashes(packed), row_hashes(target.all_bits & ~packed))
    return n_true, n_fire, hashes


def l1_coefficients(
    candidates: CandidateTable,
    table: RankedTable,
    target: TargetRows,
    *,
    weights: np.ndarray | None,
    n_best: int,
    max_rows: int,
) -> np.ndarray:
    """Largest |coefficient| of each candidate along the path of an L1-penalised linear fit, [candidate].

    weights: SHAP importance of each feature, sum 1; a literal's penalty is divided by the mean weight of its features,
    which is done by scaling its column. Only the `n_best` first candidates enter, on up to `max_rows` evenly spread
    rows.
    """
    coefficient = np.zeros(len(candidates))
    entered = candidates.literals[:n_best]
    rows = np.unique(np.linspace(0, target.n_rows - 1, min(max_rows, target.n_rows)).astype(int))
    y = target.positive[rows].astype(float)
    if len(entered) < 2 or y.std() == 0:
        return coefficient
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import lasso_path

    bits = np.stack([table.literal_bits(literal, target.all_bits) for literal in entered])
    design = unpack(bits, target.n_rows)[:, rows].T.astype(float)
    scale = np.ones(len(entered))
    if weights is not None:
        scale = np.array([weights[sorted({atom.feature for atom in literal.atoms})].mean() for literal in entered])
        scale /= scale.max()
    weight = np.ones(len(rows)) if target.weight is None else target.weight[rows]
    root = np.sqrt(weight / weight.mean())[:, None]
    design = (design - np.average(design, axis=0, weights=weight)) * scale * root
    y = (y - np.average(y, weights=weight)) * root[:, 0]
    design = np.asfortranarray(design)
    with warnings.catch_warnings():
        # The path only ranks candidates: it need not converge to the last digit.
        warnings.simplefilter("ignore", ConvergenceWarning)
        alphas = np.abs(design.T @ y).max() / len(y) * np.geomspace(1, 0.02, 12)
        _, path, _ = lasso_path(design, y, alphas=alphas, precompute=True, tol=1e-2, max_iter=200)
    coefficient[: len(entered)] = np.abs(path).max(axis=1) * scale
    return coefficient
