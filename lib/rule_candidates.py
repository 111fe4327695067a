"""Candidate literals: conjunctions of tree paths and of surprising pairs, scored, deduplicated, screened."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np

from lib.rule_atoms import Atom, Literal, RankedTable, RuleSet, merged_atoms, quantile_cuts
from lib.rule_conjunctions import Conjunctions, count_rows
from lib.rule_masks import TargetRows, unpack


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
    flat = surprise.ravel()
    # Ties at the last place go to the first in order, as a whole stable sort would have it.
    least = np.partition(flat, -n_best)[-n_best] if len(flat) > n_best else 0.0
    among = np.flatnonzero(flat >= least)
    order = among[np.argsort(-flat[among], kind="stable")][:n_best]
    pairs = []
    for first, second in zip(*np.unravel_index(order, surprise.shape), strict=True):
        if surprise[first, second] > 0:
            a, b = atoms[first], atoms[second]
            pairs += [
                merged_atoms([a._replace(above=x), b._replace(above=y)]) for x in (False, True) for y in (False, True)
            ]
    return pairs


def scored_candidates(
    conjunctions: Conjunctions,
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
    n_true, n_fire, hashes = count_rows(conjunctions.keys, table, target)
    usable = np.flatnonzero((n_fire >= min_rows) & (n_fire <= target.total - min_rows))
    _, first = np.unique(hashes[usable], return_index=True)
    usable = usable[np.sort(first)]
    score = target.mcc(n_true[usable], n_fire[usable])
    best = np.argsort(-np.round(np.abs(score), 12), kind="stable")[:limit]
    index, negated = usable[best], score[best] < 0
    # A single negated condition is simply the opposite condition.
    literals = [
        _opposite(conjunctions.atoms(i)) if against else Literal(conjunctions.atoms(i))
        for i, against in zip(index, negated, strict=True)
    ]
    return CandidateTable(literals, conjunctions.gain_sum[index], conjunctions.gain_max[index], np.zeros(len(index)))


def _opposite(atoms: tuple[Atom, ...]) -> Literal:
    if len(atoms) == 1:
        return Literal((atoms[0]._replace(above=not atoms[0].above),))
    return Literal(atoms, negated=True)


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
