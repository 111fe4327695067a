"""The search on planted oracles: tests against k log2(N/k) + k, work and recall of each mode, a million candidates.

Sparse worlds hold k agonists and silence. The crowded world is as dense as SmolLM2-135M: thousands of weak neurons and
datapoints that flip easily. Work is the share of the evaluations that testing each candidate alone needs; recall is
that of all agonists, and of those that flip at least 20 and 50 % of a slice. Attribution scores are uninformative
(noise) or know the rate up to a factor (hint). `calm` leaves out the datapoints that random weak groups flip.
Prints a table and one line of key=value pairs.
"""

from __future__ import annotations

import argparse
import os
import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402 (threads have to be limited first)

from lib.cli import Report, build_parser, rng  # noqa: E402
from lib.confidence_bounds import upper_flip_rate  # noqa: E402
from lib.group_testing import SearchResult, SearchSettings, Slices, search  # noqa: E402
from lib.search_orders import Forest, attribution_forest, bisect_forest  # noqa: E402
from lib.stages.agonist_slices import noise_groups, noise_rates  # noqa: E402
from tests.lib.planted_oracle import PlantedOracle, crowded_flips, noisy_scores, sparse_flips  # noqa: E402

N_LAYERS = 30
N_POINTS = 64
FULL = Slices(np.arange(N_POINTS), np.arange(N_POINTS, 2 * N_POINTS))
MODES = {
    "bisect fixed_n": ("bisect", SearchSettings(looks=())),
    "bisect looks": ("bisect", SearchSettings()),
    "attribution fixed_n": ("attribution", SearchSettings(looks=())),
    "attribution": ("attribution", SearchSettings()),
    "attribution dense 8": ("attribution", SearchSettings(dense_size=8)),
    "attribution full singles": ("attribution", SearchSettings(full_singles=True)),
    "attribution alpha 0.2": ("attribution", SearchSettings(alpha=0.2)),
}


@dataclass(frozen=True)
class World:
    """A planted oracle with its scores; slices: the datapoints searched on."""

    name: str
    flips: np.ndarray
    scores: np.ndarray
    slices: Slices
    n_agonists: int

    def forest(self, order: str) -> Forest:
        """Trees over the candidates."""
        if order == "attribution":
            return attribution_forest(self.scores)
        layers = np.array_split(np.arange(len(self.scores)), N_LAYERS)
        generators = [rng(0, "layer", number) for number in range(N_LAYERS)]
        return bisect_forest(layers, self.scores, np.ones(N_LAYERS, dtype=bool), generators, sign_split=True)

    def recall(self, found: np.ndarray) -> list[float]:
        """Recall of agonists by the bound, and of those that flip 20 and 50 % of a slice of the search datapoints."""
        counts = np.stack([self.flips[:, points].sum(axis=1) for points in self.slices.both], axis=1)
        sizes = np.array([len(points) for points in self.slices.both])
        bound = upper_flip_rate(counts, sizes, 0.025).max(axis=1)
        rate = (counts / sizes).max(axis=1)
        shares = []
        for truth in (bound >= 0.2, rate >= 0.2, rate >= 0.5):
            true = np.flatnonzero(truth)
            shares.append(float(np.isin(true, found).mean()) if len(true) else 1.0)
        return shares


def calm_world(world: World, n_points: int) -> World:
    """The world on datapoints that random weak groups rarely flip."""
    groups = noise_groups(world.scores, rng(0, "noise"))
    noise = noise_rates(PlantedOracle(world.flips)(groups, np.arange(n_points)))
    calm = np.flatnonzero(noise <= 0.1)
    associated, unrelated = calm[:N_POINTS], calm[N_POINTS : 2 * N_POINTS]
    slices = Slices(associated, unrelated, (noise[associated] + 0.02, noise[unrelated] + 0.02))
    return World(f"{world.name}, calm", world.flips, world.scores, slices, world.n_agonists)


def worlds(quick: bool) -> list[World]:
    """Sparse worlds up to a million candidates, and the crowded one."""
    made = []
    for n in (10_000, 100_000) if quick else (10_000, 100_000, 1_000_000):
        for k in (10, 100):
            flips, _ = sparse_flips(n, k, 2 * N_POINTS, 0)
            scores = rng(0, "scores", n).standard_normal(n)
            made.append(World(f"sparse N={n:,} k={k}", flips, scores, FULL, k))
    for seed in (0,) if quick else (0, 1, 2):
        flips, rate = crowded_flips(17_280, 4 * N_POINTS, seed)
        for name, noise in (("noise", 8.0), ("hint", 1.0)):
            world = World(f"crowded {seed} {name}", flips, noisy_scores(rate, seed, noise), FULL, 0)
            made += [world, calm_world(world, 4 * N_POINTS)]
    return made


def measure(world: World, mode: str) -> tuple[SearchResult, float]:
    """One search and its seconds without the oracle's."""
    order, settings = MODES[mode]
    oracle, waited = PlantedOracle(world.flips), 0.0

    def timed(groups: list[tuple[int, ...]], datapoints: np.ndarray) -> np.ndarray:
        nonlocal waited
        begun = time.perf_counter()
        flips = oracle(groups, datapoints)
        waited += time.perf_counter() - begun
        return flips

    started = time.perf_counter()
    result = search(world.forest(order), world.slices, timed, settings)
    return result, time.perf_counter() - started - waited


def row(world: World, mode: str, result: SearchResult, seconds: float) -> str:
    """One line of the table."""
    n, k = result.forest.n_candidates, world.n_agonists
    ideal = f"{result.n_tests / (k * np.log2(n / k) + k):5.2f}" if k else "    -"
    n_points = sum(map(len, world.slices.both))
    recall = "  ".join(f"{share:5.3f}" for share in world.recall(result.agonists()))
    work = 100 * result.n_evaluations / (n * n_points)
    return f"{world.name:24s} {mode:25s} {result.n_tests:7d} {ideal} {work:7.3f} %  {recall}  {seconds:6.2f} s"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The benchmark's flags."""
    parser.add_argument("--quick", action="store_true", help="without the million and the repeated crowded worlds")


def main(argv: Sequence[str] | None = None) -> int:
    """Run and print."""
    args = build_parser(add_arguments, __doc__).parse_args(argv)
    report = Report(quiet=args.quiet)
    report.line(f"{'world':24s} {'mode':25s}   tests ideal     work    all   >=.2   >=.5  search")
    figures: dict[str, float] = {}
    for world in worlds(args.quick):
        for mode in MODES:
            result, seconds = measure(world, mode)
            report.line(row(world, mode, result, seconds))
            if mode == "attribution" and world.n_agonists:
                figures["slowest_seconds"] = max(seconds, figures.get("slowest_seconds", 0.0))
                ideal = world.n_agonists * (np.log2(len(world.scores) / world.n_agonists) + 1)
                figures["worst_tests_to_ideal"] = max(result.n_tests / ideal, figures.get("worst_tests_to_ideal", 0.0))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    report.line(" ".join([*(f"{key}={value:.2f}" for key, value in figures.items()), f"peak_mb={peak:.0f}"]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
