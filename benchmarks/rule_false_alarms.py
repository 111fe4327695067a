"""How often RuleSHAP reports a rule of pure noise: labels that have nothing to do with the features.

A rule is reported if its p-value is at most alpha (0.01), so at most one run in a hundred may report one. Prints, per
cell, the share of runs with a rule and the shares of p-values up to 1, 5 and 20 %, and one line of key=value pairs.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402 (threads have to be limited first)
import pandas as pd  # noqa: E402
from scipy.stats import binomtest  # noqa: E402

from benchmarks.planted_rules import table  # noqa: E402
from lib.cli import rng  # noqa: E402
from lib.ruleshap import RuleSHAP  # noqa: E402


def measure(case: tuple[int, int, float, int, int]) -> dict:
    """One fit to random labels."""
    n_rows, n_features, share, n_repeats, seed = case
    random = rng(seed, "noise", n_rows, n_features, share)
    features = table(random, n_rows, n_features)
    y = random.permutation(np.arange(n_rows) < round(share * n_rows))
    started = time.process_time()
    model = RuleSHAP(random_state=seed, n_repeats=n_repeats).fit(features, y)
    return {
        "rows": n_rows,
        "features": n_features,
        "positives": share,
        "repeats": n_repeats,
        "seed": seed,
        "p": model.validation_.p_value,
        "has_rule": bool(model.rule_.literals),
        "cpu": time.process_time() - started,
    }


def main() -> None:
    """Run, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="200 rows x 16 features, 10 runs a cell")
    parser.add_argument("--seeds", type=int, default=50, help="runs per cell")
    parser.add_argument("--rows", type=int, nargs="*", default=[200, 1000])
    parser.add_argument("--features", type=int, nargs="*", default=[16])
    parser.add_argument("--positives", type=float, nargs="*", default=[0.1, 0.5])
    parser.add_argument("--repeats", type=int, nargs="*", default=[1, 3], help="repeats of the inner folds")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    args = parser.parse_args()
    if args.quick:
        args.seeds, args.rows = 10, [200]
    cases = itertools.product(args.rows, args.features, args.positives, args.repeats, range(args.seeds))
    with multiprocessing.get_context("spawn").Pool(args.jobs) as pool:
        results = pd.DataFrame(pool.imap(measure, cases))
    cells = results.groupby(["rows", "features", "positives", "repeats"])
    summary = cells["p"].agg(
        runs="size", **{f"p <= {level}": lambda p, level=level: (p <= level).mean() for level in (0.01, 0.05, 0.2)}
    )
    print(summary.assign(with_rule=cells["has_rule"].mean(), cpu=cells["cpu"].mean()).round(3).to_string())
    alarms = int(results["has_rule"].sum())
    upper = binomtest(alarms, len(results)).proportion_ci(0.95, method="exact").high
    print(
        f"runs={len(results)} false_alarms={alarms} share={alarms / len(results):.4f} upper95={upper:.4f} "
        f"p_up_to_0.05={np.mean(results['p'] <= 0.05):.3f} p_up_to_0.2={np.mean(results['p'] <= 0.2):.3f}"
    )


if __name__ == "__main__":
    main()
