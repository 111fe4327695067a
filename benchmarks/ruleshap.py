"""RuleSHAP on planted rules, against RuleFit, SkopeRules and a tree: is the rule found, exactly, and how fast?

Prints a table of means over seeds and one line of key=value pairs. `--full_size` adds the size of the whole arithmetic
task (359,401 rows x 86 features).
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import resource
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402 (threads have to be limited first)
import pandas as pd  # noqa: E402

from benchmarks.planted_rules import FAMILIES, Planted, planted  # noqa: E402
from lib.rule_baselines import Baseline, fit_baseline  # noqa: E402
from lib.rule_files import LabelledRows  # noqa: E402
from lib.rule_metrics import rule_scores  # noqa: E402
from lib.ruleshap import RuleSHAP  # noqa: E402

BASELINES = (Baseline.RULEFIT, Baseline.SKOPE, Baseline.TREE)
# RuleFit takes 6 CPU seconds on 2,000 x 40 and minutes on much more.
RULEFIT_CELLS = 2000 * 40
LARGE_CELLS = 20_000 * 200
RULESHAP = "ruleshap"
EXACT_FAMILIES = ("conjunction", "disjunction", "interval")


def measure(case: tuple[str, int, int, float, int, tuple[str, ...]]) -> list[dict]:
    """Learners on one problem; a row each."""
    family, n_rows, n_features, noise, seed, learners = case
    problem = planted(family, n_rows, n_features, noise, seed)
    cell = {"family": family, "rows": n_rows, "features": n_features, "noise": noise, "seed": seed}
    rows = []
    for learner in learners:
        started, cpu = time.perf_counter(), time.process_time()
        found = _ruleshap(problem, seed) if learner == RULESHAP else _baseline(learner, problem, seed)
        spent = {"seconds": time.perf_counter() - started, "cpu": time.process_time() - cpu}
        rows.append(cell | {"learner": learner} | spent | found())
    return rows


def _ruleshap(problem: Planted, seed: int) -> Callable[[], dict]:
    model = RuleSHAP(random_state=seed).fit(problem.features, problem.y, feature_names=problem.names)
    return lambda: {
        "mcc": _test_mcc(model.fires(problem.test_features), problem),
        "exact": problem.is_recovered(model.rule_),
        "literals": model.rule_.n_literals,
        "conditions": model.rule_.n_conditions,
        "rule": model.rule_.display(),
        "planted": problem.rule.display(),
    }


def _baseline(learner: str, problem: Planted, seed: int) -> Callable[[], dict]:
    other = fit_baseline(Baseline(learner), LabelledRows(problem.features, problem.names, problem.y), seed)
    return lambda: {
        "mcc": _test_mcc(other.predict(problem.test_features), problem),
        "literals": other.n_rules,
        "conditions": other.n_conditions,
    }


def _test_mcc(fires: np.ndarray, problem: Planted) -> float:
    return float(rule_scores(fires, problem.test_y).mcc)


def speed(n_rows: int, n_features: int, **options: object) -> tuple[float, float]:
    """(seconds, peak MB) of one fit on a noisy disjunction, in a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_speed, (n_rows, n_features, options))


def _speed(n_rows: int, n_features: int, options: dict) -> tuple[float, float]:
    problem = planted("disjunction", n_rows, n_features, 0.05, 0)
    # Imports of scikit-learn's and XGBoost's parts are not the fit's.
    RuleSHAP(**options).fit(problem.features[:200], problem.y[:200])
    started = time.perf_counter()
    RuleSHAP(**options).fit(problem.features, problem.y)
    return time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Run, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="2,000 x 40 without and with 5 %% noise, 3 seeds")
    parser.add_argument("--seeds", type=int, default=10, help="problems per cell")
    parser.add_argument("--rows", type=int, nargs="*", default=[2000, 20000])
    parser.add_argument("--features", type=int, nargs="*", default=[40, 200])
    parser.add_argument("--noise", type=float, nargs="*", default=[0.0, 0.05, 0.1])
    parser.add_argument("--families", nargs="*", default=list(FAMILIES), choices=list(FAMILIES))
    parser.add_argument("--no_baselines", action="store_true", help="RuleSHAP only")
    parser.add_argument("--rulefit_seeds", type=int, default=1, help="problems per 2,000 x 40 cell that RuleFit sees")
    parser.add_argument("--large_seeds", type=int, default=3, help="problems per larger cell that baselines see")
    parser.add_argument("--no_speed", action="store_true", help="end after the table: one of several pieces")
    parser.add_argument("--full_size", action="store_true", help="also time 359,401 rows x 86 features")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--csv", default=None, help="keep each problem's rows here; it is not run again")
    args = parser.parse_args()
    if args.quick:
        args.seeds, args.rows, args.features, args.noise = 3, [2000], [40], [0.0, 0.05]
    results = pd.read_csv(args.csv) if args.csv and Path(args.csv).is_file() else pd.DataFrame()
    cells = [
        cell
        for cell in itertools.product(args.families, args.rows, args.features, args.noise, range(args.seeds))
        if cell[3] in _noise_levels(cell[1] * cell[2], args.noise)
    ]
    cases = [(*cell, _learners(cell, args, results)) for cell in cells]
    with multiprocessing.get_context("spawn").Pool(args.jobs) as pool:
        for rows in pool.imap(measure, [case for case in cases if case[-1]]):
            results = pd.concat([results, pd.DataFrame(rows)], ignore_index=True)
            if args.csv:
                # After each problem: a long run can be watched, interrupted and continued.
                results.to_csv(args.csv, index=False)
    keys = ["family", "rows", "features", "noise", "learner"]
    means = results.groupby(keys, sort=False)[["exact", "mcc", "literals", "conditions", "seconds", "cpu"]].agg(
        lambda column: column.astype(float).mean()
    )
    print(means.round(3).to_string(na_rep="-"))
    if args.no_speed:
        print(f"problems={len(results[results['learner'] == 'ruleshap'])}")
        return
    seconds, megabytes = speed(2000, 40)
    stage7, _ = speed(1000, 86, use_shap_in_xgb=False, use_shap_in_lasso=False)
    line = {
        "exact_noise_free": _exact(results, 0.0),
        "exact_noise5": _exact(results, 0.05),
        "seconds_2000x40": f"{seconds:.2f}",
        "mb_2000x40": f"{megabytes:.0f}",
        "seconds_stage7": f"{stage7:.2f}",
    }
    if args.full_size:
        seconds, megabytes = speed(359_401, 86)
        line |= {"seconds_full": f"{seconds:.0f}", "mb_full": f"{megabytes:.0f}"}
    if not args.no_baselines:
        line["beats_best_baseline"] = _beats(results)
    print(" ".join(f"{key}={value}" for key, value in line.items()))


def _noise_levels(n_cells: int, levels: list[float]) -> list[float]:
    """All levels on the small tables, the first two on larger ones, the second on the largest: for time."""
    if n_cells <= RULEFIT_CELLS or len(levels) == 1:
        return levels
    return levels[:2] if n_cells < LARGE_CELLS else levels[1:2]


def _learners(cell: tuple, args: argparse.Namespace, results: pd.DataFrame) -> tuple[str, ...]:
    """Which learners have yet to see a problem; the dear ones see only the first seeds of a cell."""
    _, n_rows, n_features, _, seed = cell
    is_small = n_rows * n_features <= RULEFIT_CELLS
    seeds = {RULESHAP: args.seeds}
    if not args.no_baselines:
        seeds |= dict.fromkeys((each.value for each in BASELINES), args.seeds if is_small else args.large_seeds)
        seeds[Baseline.RULEFIT.value] = args.rulefit_seeds if is_small else 0
    done: set[str] = set()
    if not results.empty:
        same = (results[["family", "rows", "features", "noise", "seed"]] == list(cell)).all(axis=1)
        done = set(results["learner"][same])
    return tuple(learner for learner, n in seeds.items() if seed < n and learner not in done)


def _exact(results: pd.DataFrame, noise: float) -> str:
    """Share of exactly recovered rules at a noise level, over the families the promise is about."""
    rows = results[
        (results["learner"] == "ruleshap") & (results["noise"] == noise) & results["family"].isin(EXACT_FAMILIES)
    ]
    return f"{rows['exact'].astype(float).mean():.3f}" if len(rows) else "-"


def _beats(results: pd.DataFrame) -> str:
    """Whether RuleSHAP's mean TEST MCC is at least the best baseline's in every family, on the problems both did."""
    worse = []
    for family, rows in results.groupby("family", sort=False):
        table = rows.pivot_table(index=["rows", "features", "noise", "seed"], columns="learner", values="mcc")
        for learner in table.columns.drop("ruleshap"):
            both = table[["ruleshap", learner]].dropna()
            if both["ruleshap"].mean() < both[learner].mean():
                worse.append(f"{family}:{learner}:{both[learner].mean() - both['ruleshap'].mean():.4f}")
    return "true" if not worse else "false(" + ",".join(worse) + ")"


if __name__ == "__main__":
    main()
