"""Stage 10's second part: per unit a statistic of the neurons' scores, compared in pairs, with a bootstrap interval."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lib.cli import UserError, rng
from lib.reporting.artifacts import ModelRoot, find_model_roots, open_tree
from lib.reporting.experiments import choose_variant, runs_by_mode
from lib.reporting.naming import RunMode, RunName
from lib.reporting.rules import load_best_rows, metric_values
from lib.reporting.scopes import Scope
from lib.reporting.session import Session, nothing_found
from lib.reporting.stats import (
    Alternative,
    bootstrap_paired_difference,
    holm,
    paired_summary,
    sign_flip_test,
    sign_test,
)

_REFERENCE = RunMode.SPECTRAL_PLAN
_OTHERS = (RunMode.SPECTRAL_SPLIT, RunMode.RANDOM_PLAN, RunMode.FAKE_TARGETS)
_UNIT_METRIC = {
    "mean": "mean_score",
    "median": "median_score",
    "prop_ge_threshold": "prop_ge_threshold",
    "n_ge_threshold": "n_ge_threshold",
}
_NEURON_COLUMNS = [
    "score_scope",
    "task",
    "org",
    "model",
    "unit",
    "run_name",
    "method",
    "layer_key",
    "neuron_id",
    "metric_col",
    "score",
]


def sample_statistic(name: str, threshold: float) -> Callable[[np.ndarray], np.ndarray]:
    """A statistic over neurons, [..., neuron] -> [...]."""
    if name == "mean":
        return lambda scores: scores.mean(axis=-1)
    if name == "median":
        return lambda scores: np.median(scores, axis=-1)
    if name == "prop_ge_threshold":
        return lambda scores: (scores >= threshold).mean(axis=-1)
    return lambda scores: (scores >= threshold).sum(axis=-1).astype(float)


def variant_of(rows: pd.DataFrame) -> str | None:
    """The sensitivity parts of the counted runs; None if the counts do not name their runs, or name several."""
    parsed = (RunName.parse(str(text)) for text in rows["run_name"].dropna().unique())
    variants = {name.variant for name in parsed if name is not None}
    return variants.pop() if len(variants) == 1 else None


def neuron_scores(
    roots: list[ModelRoot], variant: str, args: argparse.Namespace, scope: Scope, session: Session
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(one row per neuron, one row per run that could be read) of the compared methods."""
    frames, runs = [], []
    for root in roots:
        for mode, run in runs_by_mode(root, variant).items():
            if mode not in (_REFERENCE, *_OTHERS):
                continue
            best = session.take(run, load_best_rows(run, scope, args.min_rule_dataset_coverage), "rule rows")
            if best.value is None:
                continue
            ident = {
                "score_scope": scope.slug,
                "task": root.task,
                "org": root.org,
                "model": root.model,
                "unit": root.unit,
                "run_name": run.run_name,
                "method": mode.value,
            }
            column = args.metric_col if args.metric_col in best.value or best.value.empty else "MCC"
            values = metric_values(best.value, column)
            runs.append(ident)
            if len(best.value):
                ids = best.value[["layer_key", "neuron_id"]]
                frame = ids.assign(**ident, metric_col=column, score=values)
                frames.append(frame[np.isfinite(values)][_NEURON_COLUMNS])
    neurons = pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=_NEURON_COLUMNS)
    return neurons, pd.DataFrame(runs, columns=_NEURON_COLUMNS[:7])


def unit_metrics(neurons: pd.DataFrame, runs: pd.DataFrame, threshold: float) -> pd.DataFrame:
    """`per_unit_metrics.csv`: per run that could be read; one without neurons has zero of them and no mean."""
    rows = []
    for run in runs.to_dict("records"):
        scores = _scores(neurons, run["unit"], run["method"])
        n = len(scores)
        rows.append(
            {
                **{name: run[name] for name in ("score_scope", "unit", "task", "org", "model", "method")},
                "n_neurons": n,
                "mean_score": float(scores.mean()) if n else np.nan,
                "median_score": float(np.median(scores)) if n else np.nan,
                "prop_ge_threshold": float((scores >= threshold).mean()) if n else np.nan,
                "n_ge_threshold": int((scores >= threshold).sum()),
            }
        )
    return pd.DataFrame(rows)


def _scores(neurons: pd.DataFrame, unit: str, method: str) -> np.ndarray:
    rows = (neurons["unit"] == unit) & (neurons["method"] == method)
    return neurons.loc[rows, "score"].to_numpy(dtype=float)


def sampled_comparisons(
    neurons: pd.DataFrame, units: pd.DataFrame, args: argparse.Namespace, scope: Scope, threshold: float
) -> pd.DataFrame:
    """`sampled_pairwise_comparisons.csv`: tests on the unit statistic, bootstrap over units and neurons."""
    metric, alternative, rows = _UNIT_METRIC[args.sample_stat], Alternative(args.alt), []
    wide = units.pivot(index="unit", columns="method", values=metric)
    for other in _OTHERS:
        if _REFERENCE.value not in wide or other.value not in wide:
            differences: Mapping[str, float] = {}
        else:
            differences = (wide[_REFERENCE.value] - wide[other.value]).dropna().to_dict()
        d = np.array(list(differences.values()), dtype=float)
        random = rng(args.seed, "stage10", scope.slug, "sample", other.value)
        flip = sign_flip_test(d, alternative, random)
        interval = bootstrap_paired_difference(
            [(_scores(neurons, unit, _REFERENCE.value), _scores(neurons, unit, other.value)) for unit in differences],
            sample_statistic(args.sample_stat, threshold),
            sample_size=args.sample_size,
            n_boot=args.n_boot,
            random=random,
        )
        row: dict[str, Any] = {
            "score_scope": scope.slug,
            "A_method": _REFERENCE.value,
            "B_method": other.value,
            "sample_stat": args.sample_stat,
            "unit_metric_for_exact_test": metric,
            "sample_size_per_method_per_unit": args.sample_size or "min_pair",
            **paired_summary(d)._asdict(),
            "sign_p": sign_test(d, alternative),
            "signflip_p": flip.p,
            "signflip_mode": flip.mode,
            "bootstrap_mean_diff": interval.mean,
            "bootstrap_ci95_lo": interval.low,
            "bootstrap_ci95_hi": interval.high,
            "n_boot": args.n_boot,
            "alternative": args.alt,
        }
        rows.append(row)
    frame = pd.DataFrame(rows)
    for name in ("sign_p", "signflip_p"):
        frame[f"{name}_holm"] = holm(frame[name])
    return frame


def write_sample_statistics(
    args: argparse.Namespace, scope: Scope, session: Session, counted: pd.DataFrame, *, is_written: bool
) -> None:
    """Read the neurons of the runs that `counted` speaks of below `--data-root`, compare, write and print."""
    units = {(row.task, row.llm) for row in counted[["task", "llm"]].itertuples(index=False)}
    threshold = args.primary_threshold_all_fit if scope is Scope.ALL_FIT else args.primary_threshold
    with open_tree(args.data_root) as folder:
        session.bases.append(Path(folder))
        found = find_model_roots(folder)
        roots = [root for root in found if units & {(root.task, root.llm), (root.task, root.model)}]
        if not roots:
            raise nothing_found(args.data_root, "finished runs of the tasks and models in --csv")
        variant = variant_of(counted)
        variant = choose_variant(roots, None, session.report) if variant is None else variant
        neurons, runs = neuron_scores(roots, variant, args, scope, session)
    if runs.empty:
        raise UserError(f"no run below {args.data_root} has rule rows of scope {scope.slug}; run stage 7 again")
    metrics = unit_metrics(neurons, runs, threshold)
    result = sampled_comparisons(neurons, metrics, args, scope, threshold)
    stamp = {"min_rule_dataset_coverage": args.min_rule_dataset_coverage}
    if is_written:
        session.csv("per_neuron_scores.csv", neurons.assign(**stamp))
        session.csv("per_unit_metrics.csv", metrics.assign(**stamp))
        session.csv("sampled_pairwise_comparisons.csv", result.assign(**stamp))
    session.report.line(f"neurons' {args.metric_col}, {args.sample_stat} per unit, A - B {args.alt}:")
    for row in result.itertuples(index=False):
        if not row.n_pairs:
            session.report.line(f"  B = {row.B_method}: no unit has neurons of both methods")
            continue
        session.report.line(
            f"  B = {row.B_method}: {row.n_pairs} pairs, mean difference {row.mean_diff:.3g} (bootstrap "
            f"{row.bootstrap_ci95_lo:.3g} to {row.bootstrap_ci95_hi:.3g}), sign-flip p "
            f"{row.signflip_p:.3g} (Holm {row.signflip_p_holm:.3g})"
        )
