"""Tables with a planted rule: the truth is known, so a learner can be right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from lib.cli import rng
from lib.text_and_rules import Condition, Conjunction, Rule

N_TEST = 5000
# With noisy labels no learner can place a cut exactly: a cut is right if at most this share of rows lies between.
CUT_TOLERANCE = 0.01


@dataclass(frozen=True)
class Planted:
    """A problem. features, y: TRAIN, [row, feature] and bool [row], labels noisy; test_*: fresh rows, same noise."""

    family: str
    noise: float
    features: np.ndarray
    y: np.ndarray
    test_features: np.ndarray
    test_y: np.ndarray
    names: tuple[str, ...]
    rule: Rule

    def is_recovered(self, found: Rule) -> bool:
        """Whether a rule is the planted one up to threshold gaps.

        The same literals on the same features in the same directions; each cut between the same seen values, or, with
        noisy labels, at most `CUT_TOLERANCE` of the rows away.
        """
        truth, found = _by_shape(self.rule), _by_shape(found.simplified())
        if [shape for shape, _ in truth] != [shape for shape, _ in found]:
            return False
        columns = dict(zip(self.names, self.features.T, strict=True))
        allowed = CUT_TOLERANCE if self.noise else 0.0
        if not self.noise and not np.array_equal(_rule_of(truth).covers(columns), _rule_of(found).covers(columns)):
            return False
        pairs = [
            (a, b)
            for (_, left), (_, right) in zip(truth, found, strict=True)
            for a, b in zip(_sorted(left), _sorted(right), strict=True)
        ]
        return not self.noise or all(
            np.mean((columns[a.feature] <= a.threshold) != (columns[a.feature] <= b.threshold)) <= allowed
            for a, b in pairs
        )


def _sorted(literal: Conjunction) -> list[Condition]:
    return sorted(literal.conditions, key=lambda condition: (condition.feature, condition.operator))


def _by_shape(rule: Rule) -> list[tuple[tuple, Conjunction]]:
    return sorted(
        (
            ((literal.negated, tuple((c.feature, c.operator) for c in _sorted(literal))), literal)
            for literal in rule.literals
        ),
        key=lambda pair: pair[0],
    )


def _rule_of(shaped: list[tuple[tuple, Conjunction]]) -> Rule:
    return Rule(tuple(literal for _, literal in shaped))


def table(random: np.random.Generator, n_rows: int, n_features: int) -> np.ndarray:
    """Three quarters uniform numbers, an eighth 0/1, an eighth digits 0 to 9; [row, feature]."""
    features = random.random((n_rows, n_features))
    n_binary = n_digits = n_features // 8
    features[:, -n_binary - n_digits : -n_digits] = np.round(features[:, -n_binary - n_digits : -n_digits])
    features[:, -n_digits:] = np.floor(10 * features[:, -n_digits:])
    return features


def _bound(random: np.random.Generator, column: np.ndarray, feature: int, share: float) -> Condition:
    """A one-sided condition on a uniform feature that covers about `share` of the rows."""
    if random.random() < 0.5:
        return Condition(f"f{feature}", "<=", float(np.quantile(column, share)))
    return Condition(f"f{feature}", ">", float(np.quantile(column, 1 - share)))


def _conjunction(random: np.random.Generator, features: np.ndarray, chosen: np.ndarray, coverage: float) -> Conjunction:
    share = coverage ** (1 / len(chosen))
    return Conjunction(tuple(_bound(random, features[:, j], j, share) for j in chosen))


def _n_uniform(features: np.ndarray) -> int:
    return features.shape[1] - 2 * (features.shape[1] // 8)


def conjunction(random: np.random.Generator, features: np.ndarray) -> Rule:
    """Two or three conditions that cover 15 to 30 % of the rows."""
    chosen = random.choice(_n_uniform(features), random.integers(2, 4), replace=False)
    return Rule((_conjunction(random, features, chosen, random.uniform(0.15, 0.3)),))


def disjunction(random: np.random.Generator, features: np.ndarray) -> Rule:
    """Two conjunctions of two conditions on four features, each covering 12 to 25 %."""
    chosen = random.choice(_n_uniform(features), 4, replace=False)
    return Rule(
        tuple(_conjunction(random, features, part, random.uniform(0.12, 0.25)) for part in (chosen[:2], chosen[2:]))
    )


def interval(random: np.random.Generator, features: np.ndarray) -> Rule:
    """One feature between two bounds, 20 to 40 % of the rows; in half the problems with a condition on another."""
    first, second = random.choice(_n_uniform(features), 2, replace=False)
    width, low = random.uniform(0.2, 0.4), random.uniform(0.1, 0.5)
    bounds = np.quantile(features[:, first], [low, low + width])
    conditions = [Condition(f"f{first}", ">", float(bounds[0])), Condition(f"f{first}", "<=", float(bounds[1]))]
    if random.random() < 0.5:
        conditions.append(_bound(random, features[:, second], second, 0.6))
    return Rule((Conjunction(tuple(conditions)),))


def exclusive_or(random: np.random.Generator, features: np.ndarray) -> Rule:
    """Exactly one of two 0/1 features: neither says anything alone."""
    n_binary = features.shape[1] // 8
    a, b = np.sort(random.choice(np.arange(_n_uniform(features), _n_uniform(features) + n_binary), 2, replace=False))
    return Rule(
        (
            Conjunction((Condition(f"f{a}", "<=", 0.5), Condition(f"f{b}", ">", 0.5))),
            Conjunction((Condition(f"f{a}", ">", 0.5), Condition(f"f{b}", "<=", 0.5))),
        )
    )


def rare(random: np.random.Generator, features: np.ndarray) -> Rule:
    """Two conditions that cover 2 % of the rows."""
    chosen = random.choice(_n_uniform(features), 2, replace=False)
    return Rule((_conjunction(random, features, chosen, 0.02),))


FAMILIES: dict[str, Callable[[np.random.Generator, np.ndarray], Rule]] = {
    "conjunction": conjunction,
    "disjunction": disjunction,
    "interval": interval,
    "xor": exclusive_or,
    "rare": rare,
    "scales": conjunction,
}


def planted(family: str, n_rows: int, n_features: int, noise: float, seed: int) -> Planted:
    """A problem of a family; in `rare`, `noise` is relative to the 2 % of positives, else to all rows."""
    random = rng(seed, "planted", family, n_rows, n_features)
    features = table(random, n_rows + N_TEST, n_features)
    if family == "scales":
        # Monotone changes of scale, from millionths to millions, some with heavy tails.
        powers = random.uniform(-6, 6, n_features)
        heavy = random.random(n_features) < 0.5
        features = np.where(heavy, np.exp(4 * features), features) * 10**powers
    rule = FAMILIES[family](random, features)
    names = tuple(f"f{j}" for j in range(n_features))
    clean = rule.covers(dict(zip(names, features.T, strict=True)))
    y = clean ^ (random.random(len(clean)) < (noise * 0.04 if family == "rare" else noise))
    train, test = slice(0, n_rows), slice(n_rows, None)
    return Planted(family, noise, features[train], y[train], features[test], y[test], names, rule)
