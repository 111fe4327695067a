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
    """As on SmolLM2-135M: few strong neurons, thousands of weak ones, datapoints that differ in how easily they flip.

    Of 17,280 neurons about 15 flip a fifth of the datapoints and 100 may flip a tenth; random groups of 17, 34, 135
    and 270 flip 5, 8, 18 and 29 % (measured on the model: 5, 6, 15 and 30). Each neuron has a strength and each
    datapoint an ease, normal on the probit scale. Returns (flips [candidate, datapoint], rate [candidate]).
    """
    from scipy.special import ndtr, ndtri

    generator = rng(seed, "crowded", n_candidates)
    rate = np.minimum(0.1, 0.004 * generator.lognormal(-1.5, 1.7, n_candidates))
    parts = ((5, 0.5, 1.0), (6, 0.2, 0.5), (20, 0.08, 0.2))
    counts = [max(1, round(count * n_candidates / 17280)) for count, _, _ in parts]
    chosen = generator.choice(n_candidates, sum(counts), replace=False)
    rate[chosen] = np.concatenate(
        [generator.uniform(low, high, count) for count, (_, low, high) in zip(counts, parts, strict=True)]
    )
    spread = 1.5
    strength = ndtri(rate) * np.sqrt(1 + spread**2)  # so that the mean over datapoints is the rate
    ease = generator.normal(0.0, spread, n_datapoints)
    return generator.random((n_candidates, n_datapoints)) < ndtr(strength[:, None] + ease), rate


def noisy_scores(rate: np.ndarray, seed: int, noise: float) -> np.ndarray:
    """Signed attribution scores: log rates blurred by `noise` standard deviations, random signs, [candidate]."""
    generator = rng(seed, "scores", noise)
    strength = np.exp(np.log(rate + 1e-3) + noise * generator.standard_normal(len(rate)))
    return strength * generator.choice([-1.0, 1.0], len(rate))
