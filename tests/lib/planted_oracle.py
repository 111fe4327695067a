"""Oracles whose truth is known: candidates with planted flips, groups flip what any member flips."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from lib.cli import rng


class PlantedOracle:
    """A group flips the union of its members' datapoints, less those of pairs that cancel.

    flips: bool [candidate, datapoint], or candidate -> datapoints it flips. cancels: pairs of candidates that flip
    nothing of theirs when both are ablated.
    """

    def __init__(
        self,
        flips: np.ndarray | Mapping[int, Iterable[int]],
        *,
        n_candidates: int | None = None,
        n_datapoints: int | None = None,
        cancels: Sequence[tuple[int, int]] = (),
    ) -> None:
        if not isinstance(flips, np.ndarray):
            dense = np.zeros((n_candidates, n_datapoints), dtype=bool)
            for candidate, datapoints in flips.items():
                dense[candidate, list(datapoints)] = True
            flips = dense
        self.n_candidates, self.n_datapoints = flips.shape
        self.packed = np.packbits(flips, axis=1)
        self.cancels = list(cancels)
        self.calls: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
        self.keep_calls = False
        self.n_tests = 0
        self.n_evaluations = 0

    def __call__(self, groups: list[tuple[int, ...]], datapoints: np.ndarray) -> np.ndarray:
        self.n_tests += len(groups)
        self.n_evaluations += len(groups) * len(datapoints)
        if self.keep_calls:
            self.calls += [(group, tuple(int(d) for d in datapoints)) for group in groups]
        groups = [self._effective(group) for group in groups] if self.cancels else groups
        sizes = np.array([len(group) for group in groups])
        flat = np.fromiter(itertools.chain.from_iterable(groups), dtype=np.int64, count=int(sizes.sum()))
        # An empty candidate closes each group, so that groups emptied by cancelling have something to reduce.
        rows = (
            np.concatenate([self.packed, np.zeros((1, self.packed.shape[1]), dtype=np.uint8)])[
                np.insert(flat, np.cumsum(sizes), self.n_candidates)
            ]
            if self.cancels
            else self.packed[flat]
        )
        sizes = sizes + bool(self.cancels)
        union = np.bitwise_or.reduceat(rows, np.cumsum(sizes) - sizes, axis=0)
        return np.unpackbits(union, axis=1, count=self.n_datapoints).astype(bool)[:, datapoints]

    def _effective(self, group: tuple[int, ...]) -> tuple[int, ...]:
        members = set(group)
        silent = {candidate for pair in self.cancels if members.issuperset(pair) for candidate in pair}
        return tuple(candidate for candidate in group if candidate not in silent)


def sparse_flips(
    n_candidates: int, n_agonists: int, n_datapoints: int, seed: int, rates: tuple[float, float] = (0.3, 1.0)
) -> tuple[np.ndarray, np.ndarray]:
    """Few agonists and silence elsewhere: (flips bool [candidate, datapoint], agonists [n_agonists])."""
    generator = rng(seed, "sparse", n_candidates, n_agonists)
    agonists = np.sort(generator.choice(n_candidates, n_agonists, replace=False))
    rate = generator.uniform(*rates, size=(n_agonists, 1))
    flips = np.zeros((n_candidates, n_datapoints), dtype=bool)
    flips[agonists] = generator.random((n_agonists, n_datapoints)) < rate
    return flips, agonists


def crowded_flips(n_candidates: int, n_datapoints: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The density measured on SmolLM2-135M (all MLP writes, mean): many weak neurons, few strong ones.

    Of 17,280 neurons 5 flip at least half of the datapoints, 14 a fifth, 59 a tenth, 2,008 at least one of 32; weak
    flips fall mostly on a few fragile datapoints. Returns (flips [candidate, datapoint], rate [candidate]).
    """
    generator = rng(seed, "crowded", n_candidates)
    scale = n_candidates / 17280
    rate = np.zeros(n_candidates)
    parts = ((5, 0.5, 1.0), (9, 0.2, 0.5), (45, 0.08, 0.2), (2400, 0.0, 0.06))
    counts = [max(1, round(count * scale)) for count, _, _ in parts]
    chosen = generator.choice(n_candidates, sum(counts), replace=False)
    rate[chosen] = np.concatenate(
        [generator.uniform(low, high, count) for count, (_, low, high) in zip(counts, parts, strict=True)]
    )
    fragility = generator.lognormal(0.0, 1.0, n_datapoints)
    fragility /= fragility.mean()
    # On the logit scale, so that strong neurons flip nearly everything and weak ones only what is fragile.
    with np.errstate(divide="ignore"):
        logit = np.log(rate) - np.log1p(-np.minimum(rate, 0.999999))
    chance = 1 / (1 + np.exp(-(logit[:, None] + np.log(fragility))))
    return generator.random((n_candidates, n_datapoints)) < chance, rate


def noisy_scores(rate: np.ndarray, seed: int, noise: float) -> np.ndarray:
    """Signed attribution scores: log rates blurred by `noise` standard deviations, random signs, [candidate]."""
    generator = rng(seed, "scores", noise)
    strength = np.exp(np.log(rate + 1e-3) + noise * generator.standard_normal(len(rate)))
    return strength * generator.choice([-1.0, 1.0], len(rate))
