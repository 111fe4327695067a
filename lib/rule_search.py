"""The best small disjunction for every size: beam search over candidates, then exchange and threshold line searches.

Rules are disjunctions of plain conjunctions: NOT(a & b) would count as one literal but say two things.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from lib.rule_atoms import Atom, Literal, RankedTable, RuleSet, merged_atoms, quantile_cuts, rule_cost
from lib.rule_masks import TargetRows, pack, unpack

_EPSILON = 1e-9
# TRAIN score given up at most when cuts move to the middle of what the rows allow.
CENTRING_LOSS = 0.005


@dataclass(frozen=True)
class SearchLimits:
    """How large rules may be and how hard to look."""

    max_conditions: int = 3
    max_literals: int = 3
    beam_width: int = 48
    bank_cuts: int = 15
    max_polished: int = 20

    @property
    def max_cost(self) -> int:
        """Largest number of conditions and negations of a rule."""
        return self.max_conditions * self.max_literals


@dataclass
class RulePath:
    """The best rule found for each cost up to `max_cost`: (score, literals). Cost 0 is the empty rule, score 0."""

    max_cost: int
    best: dict[int, tuple[float, RuleSet]] = field(default_factory=lambda: {0: (0.0, ())})

    def offer(self, score: float, literals: RuleSet) -> bool:
        """Keep the rule if it beats the best of its cost; of equals, fewer literals, then the first in atom order."""
        cost = rule_cost(literals)
        if cost > self.max_cost:
            return False
        held = self.best.get(cost)
        if (
            held is not None
            and score < held[0] + _EPSILON
            and (score < held[0] - _EPSILON or _order_key(literals) >= _order_key(held[1]))
        ):
            return False
        self.best[cost] = (score, literals)
        return True

    def monotone(self) -> list[tuple[float, RuleSet]]:
        """Best rule of at most each cost, 0..max_cost; a longer one must be strictly better."""
        path = [self.best[0]]
        for cost in range(1, self.max_cost + 1):
            held = self.best.get(cost)
            path.append(held if held is not None and held[0] > path[-1][0] + _EPSILON else path[-1])
        return path


def _order_key(literals: RuleSet) -> tuple:
    return (len(literals), len({atom.feature for literal in literals for atom in literal.atoms}), literals)


class RuleSearch:
    """Search on one table and target."""

    def __init__(self, table: RankedTable, target: TargetRows, limits: SearchLimits) -> None:
        self.table, self.target, self.limits = table, target, limits
        self.atoms, self.bank = _atom_bank(table, target.all_bits, limits.bank_cuts)

    def bits(self, literal: Literal) -> np.ndarray:
        """Rows of a literal, packed [word]."""
        return self.table.literal_bits(literal, self.target.all_bits)

    def union(self, literals: RuleSet) -> np.ndarray:
        """Rows of a disjunction, packed [word]."""
        return (
            np.bitwise_or.reduce([self.bits(literal) for literal in literals], axis=0)
            if literals
            else np.zeros_like(self.target.all_bits)
        )

    def score(self, literals: RuleSet) -> float:
        """MCC of a disjunction."""
        return float(self.target.mcc(*self.target.counts(self.union(literals))))

    def path(self, pool: list[Literal]) -> RulePath:
        """The best rule for each cost."""
        path = RulePath(self.limits.max_cost)
        self._beam(path, pool)
        self._polish_all(path)
        for cost, (_, literals) in list(path.best.items()):
            middle = self.centred(literals)
            path.best[cost] = (self.score(middle), middle)
        return path

    # ------------------------------------------------------------ beam

    def _beam(self, path: RulePath, pool: list[Literal]) -> None:
        """Grow disjunctions literal by literal, keeping the `beam_width` best of each number of literals."""
        if not pool:
            return
        bits = np.stack([self.bits(literal) for literal in pool])
        costs = np.array([literal.cost for literal in pool])
        states: list[tuple[int, ...]] = [()]
        covered = np.zeros((1, bits.shape[1]), dtype=np.uint64)
        for _ in range(self.limits.max_literals):
            unions = covered[:, None, :] | bits[None, :, :]
            scores = self.target.mcc(*self.target.counts(unions))
            self._offer_best(path, states, scores, costs, pool)
            grown: dict[tuple[int, ...], tuple[int, int]] = {}
            # An even mix of few and many conditions: a beam of long literals alone would crowd out short rules.
            for flat in np.argsort(-(scores - 0.002 * costs), axis=None, kind="stable"):
                state, literal = divmod(int(flat), len(pool))
                if literal in states[state]:
                    continue
                grown.setdefault(tuple(sorted((*states[state], literal))), (state, literal))
                if len(grown) >= self.limits.beam_width:
                    break
            states = list(grown)
            covered = np.stack([unions[position] for position in grown.values()]) if grown else covered[:0]
            if not states:
                return

    def _offer_best(
        self, path: RulePath, states: list[tuple[int, ...]], scores: np.ndarray, costs: np.ndarray, pool: list[Literal]
    ) -> None:
        for state, held in enumerate(states):
            for cost in np.unique(costs):
                members = np.flatnonzero(costs == cost)
                best = int(members[np.argmax(scores[state, members])])
                if best not in held:
                    path.offer(float(scores[state, best]), tuple(sorted(pool[i] for i in (*held, best))))

    # ------------------------------------------------------------ exchange and line search

    def _polish_all(self, path: RulePath) -> None:
        """Improve every rule of the path by single changes until none helps; improvements may fall on other sizes."""
        done: set[RuleSet] = set()
        for _ in range(self.limits.max_polished):
            waiting = [cost for cost in sorted(path.best) if cost and path.best[cost][1] not in done]
            # What a smaller rule does as well needs no polish.
            floors = dict(enumerate(score for score, _ in path.monotone()))
            waiting = [cost for cost in waiting if path.best[cost][0] > floors[cost - 1] + _EPSILON]
            if not waiting:
                return
            literals = path.best[waiting[0]][1]
            done.add(literals)
            self._polish(path, literals)

    def _polish(self, path: RulePath, literals: RuleSet) -> None:
        """One round of single changes: thresholds; replaced, dropped and added conditions; a dropped or new literal."""
        for position, literal in enumerate(literals):
            rest = literals[:position] + literals[position + 1 :]
            if rest:
                path.offer(self.score(rest), rest)
            others = self.union(rest)
            for atom in literal.atoms:
                kept = tuple(held for held in literal.atoms if held != atom)
                if kept:
                    self._offer(path, rest, kept)
                self._extend(path, rest, others, kept)
                self._move_cut(path, rest, others, kept, atom)
            if len(literal.atoms) < self.limits.max_conditions:
                self._extend(path, rest, others, literal.atoms)
        if len(literals) < self.limits.max_literals:
            self._extend(path, literals, self.union(literals), ())

    def _offer(self, path: RulePath, rest: RuleSet, atoms: tuple[Atom, ...]) -> None:
        changed = tuple(sorted({*rest, Literal(atoms)}))
        path.offer(self.score(changed), changed)

    def _zone(self, others: np.ndarray, kept: tuple[Atom, ...]) -> np.ndarray:
        """Rows that one more condition decides: the kept conditions hold and no other literal does, packed."""
        return self.bits(Literal(kept)) & ~others

    def _extend(self, path: RulePath, rest: RuleSet, others: np.ndarray, kept: tuple[Atom, ...]) -> None:
        """Add the best atom of the bank to the kept conditions, then move its cut."""
        if not self.atoms:
            return
        base_true, base_fire = self.target.counts(others)
        in_true, in_fire = self.target.counts(self.bank & self._zone(others, kept))
        best = self.atoms[int(np.argmax(self.target.mcc(base_true + in_true, base_fire + in_fire)))]
        atoms = merged_atoms((*kept, best))
        if len(atoms) == len(kept) + 1:
            self._offer(path, rest, atoms)
            self._move_cut(path, rest, others, kept, best)

    def _move_cut(self, path: RulePath, rest: RuleSet, others: np.ndarray, kept: tuple[Atom, ...], atom: Atom) -> None:
        """Put the cut of one condition beside the kept ones where the score is best, among all seen values."""
        moved = merged_atoms((*kept, atom._replace(cut=self.best_cut(others, kept, atom))))
        if len(moved) == len(kept) + 1:
            self._offer(path, rest, moved)

    def refined(self, literals: RuleSet) -> RuleSet:
        """The same conditions with every cut moved to its best place, one after the other, until none gains."""
        score = self.score(literals)
        improved = True
        while improved:
            improved = False
            for position, literal in enumerate(literals):
                others = self.union(literals[:position] + literals[position + 1 :])
                for atom in literal.atoms:
                    kept = tuple(held for held in literals[position].atoms if held[:2] != atom[:2])
                    moved = Literal(merged_atoms((*kept, atom._replace(cut=self.best_cut(others, kept, atom)))))
                    changed = (*literals[:position], moved, *literals[position + 1 :])
                    if self.score(changed) > score + _EPSILON:
                        literals, score, improved = changed, self.score(changed), True
        return literals

    def centred(self, literals: RuleSet) -> RuleSet:
        """The same conditions with every cut in the middle of what the rows allow, at hardly any loss of score."""
        floor = self.score(literals) - CENTRING_LOSS
        for position, literal in enumerate(literals):
            others = self.union(literals[:position] + literals[position + 1 :])
            for atom in literal.atoms:
                kept = tuple(held for held in literals[position].atoms if held[:2] != atom[:2])
                middle = self._cut_counts(others, kept, atom).middle_cut()
                moved = Literal(merged_atoms((*kept, atom._replace(cut=middle))))
                changed = (*literals[:position], moved, *literals[position + 1 :])
                if len(moved.atoms) == len(literal.atoms) and self.score(changed) >= floor:
                    literals = changed
        return literals

    def best_cut(self, others: np.ndarray, kept: tuple[Atom, ...], atom: Atom) -> int:
        """Exact line search over the seen values; of equally good neighbouring cuts, the middle one."""
        counts = self._cut_counts(others, kept, atom)
        base_true, base_fire = self.target.counts(others)
        return _middle_of_best(self.target.mcc(base_true + counts.in_true, base_fire + counts.in_fire))

    def _cut_counts(self, others: np.ndarray, kept: tuple[Atom, ...], atom: Atom) -> CutCounts:
        """What every cut of one condition beside the kept ones would admit, where no other literal holds."""
        rows = np.flatnonzero(unpack(self._zone(others, kept), self.target.n_rows))
        n_values = len(self.table.values[atom.feature])
        ranks = self.table.ranks[atom.feature, rows]
        weight = None if self.target.weight is None else self.target.weight[rows]
        positive = self.target.positive[rows] * (1.0 if weight is None else weight)
        fire = np.cumsum(np.bincount(ranks, weight, n_values)).astype(float)
        true = np.cumsum(np.bincount(ranks, positive, n_values))
        if atom.above:
            return CutCounts(true[-1] - true[:-1], fire[-1] - fire[:-1], true[-1], fire[-1])
        return CutCounts(true[:-1], fire[:-1], true[-1], fire[-1])


class CutCounts(NamedTuple):
    """Rows that a condition decides. in_true, in_fire: positives and rows it admits at each cut, [cut]; totals."""

    in_true: np.ndarray
    in_fire: np.ndarray
    all_true: float
    all_fire: float

    def middle_cut(self) -> int:
        """Median of the cuts, each weighted by the likelihood that it parts two constant shares of positives.

        Where a cut is uncertain the median errs less on new rows than the cut that happens to fit best.
        """
        out_true, out_fire = self.all_true - self.in_true, self.all_fire - self.in_fire
        inside = (self.in_true + 0.5) / (self.in_fire + 1)
        outside = (out_true + 0.5) / (out_fire + 1)
        fit = _log_likelihood(self.in_true, self.in_fire, inside) + _log_likelihood(out_true, out_fire, outside)
        weight = np.cumsum(np.exp(fit - fit.max()))
        return int(np.searchsorted(weight, weight[-1] / 2))


def _log_likelihood(n_true: np.ndarray, n: np.ndarray, share: np.ndarray) -> np.ndarray:
    return n_true * np.log(share) + (n - n_true) * np.log1p(-share)


def _atom_bank(table: RankedTable, all_bits: np.ndarray, n_cuts: int) -> tuple[list[Atom], np.ndarray]:
    """Atoms at quantile cuts of every feature, both sides, and their rows, packed [atom, word]."""
    atoms, bits = [], []
    for feature in range(table.n_features):
        cuts = quantile_cuts(table.ranks[feature], n_cuts)
        below = pack(table.ranks[feature] <= cuts[:, None])
        atoms += [Atom(feature, above, int(cut)) for above in (False, True) for cut in cuts]
        bits += [below, all_bits & ~below]
    return atoms, np.concatenate(bits) if bits else np.zeros((0, len(all_bits)), dtype=np.uint64)


def _middle_of_best(scores: np.ndarray) -> int:
    """Middle of the longest run of (nearly) best positions; the first such run."""
    best = scores >= scores.max() - _EPSILON
    edges = np.flatnonzero(np.diff(np.concatenate([[0], best.astype(np.int8), [0]])))
    starts, ends = edges[::2], edges[1::2]
    longest = int(np.argmax(ends - starts))
    return int((starts[longest] + ends[longest] - 1) // 2)
