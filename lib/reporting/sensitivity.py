"""Stage 11: how results depend on the agonist threshold (tau) and the circuit size (M), one factor at a time."""

from __future__ import annotations

import argparse
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lib.artifacts import atomic_write
from lib.cli import Report, UserError
from lib.reporting.artifacts import REGIMES, ModelRoot, Reading, RunFolder, Status, find_model_roots, open_tree
from lib.reporting.localization import CircuitCost, all_costs
from lib.reporting.naming import sensitivity_parts
from lib.reporting.rules import load_best_rows, metric_values
from lib.reporting.scopes import Scope, parse_scopes
from lib.reporting.sensitivity_plots import write_budget, write_counts
from lib.reporting.session import Session, nothing_found
from lib.reporting.stats import finite, sd
from lib.reporting.tables import Table

FACTORS = ("tau", "M")
_QUALITY_COLUMNS = ("mcc", "quality", "quality_metric", "score")


@dataclass(frozen=True)
class Setting:
    """A run's place in the analysis: M and tau are NaN for runs of other modes, which are listed but not plotted."""

    run: RunFolder
    size: float
    rate: float


# ---------------------------------------------------------------- runs


def find_runs(root: ModelRoot, only: str | None) -> list[RunFolder]:
    """Runs that stage 7 finished."""
    markers = ("rule_metrics_summary.json", "rule_metrics_summary_test.json", "flip_stats_global.json")
    names = [only] if only else root.run_names
    return [root.run(name) for name in names if any((root.run(name).path / marker).is_file() for marker in markers)]


def place_runs(runs: Sequence[RunFolder], args: argparse.Namespace) -> list[Setting]:
    """Every run with the M and tau that its name states, if it is of the baseline's mode.

    A part that the name leaves out is the baseline's. Another run mode has another name without these parts; a run
    whose size is a share has no place either.
    """
    base = sensitivity_parts(args.baseline_run_name).base
    bases = {base, base.replace("-decode_only", "", 1)}
    settings = []
    for run in runs:
        parts = sensitivity_parts(run.run_name)
        # A share is no point of the size's axis: how many units it stands for differs from circuit to circuit.
        if parts.base not in bases or isinstance(parts.circuit_size, float):
            settings.append(Setting(run, math.nan, math.nan))
            continue
        size = args.baseline_M if parts.circuit_size is None else parts.circuit_size
        rate = args.baseline_tau if parts.min_flip_rate is None else parts.min_flip_rate
        settings.append(Setting(run, float(size), float(rate)))
    return settings


def find_baseline(settings: Sequence[Setting], args: argparse.Namespace) -> Setting:
    """The baseline: exact name, the name without `-decode_only`, else the first with M and tau equal to it.

    Raises:
        UserError: there is none.
    """
    for name in (args.baseline_run_name, args.baseline_run_name.replace("-decode_only", "", 1)):
        for setting in settings:
            if setting.run.run_name == name and not math.isnan(setting.size):
                return setting
    for setting in settings:
        if setting.size == args.baseline_M and math.isclose(setting.rate, args.baseline_tau, abs_tol=1e-9):
            return setting
    seen = "; ".join(f"{setting.run.run_name} (M={setting.size:g}, tau={setting.rate:g})" for setting in settings)
    raise UserError(
        f"no baseline run {args.baseline_run_name}, and none with M={args.baseline_M} and "
        f"tau={args.baseline_tau:g}; give --baseline_run_name or --baseline_M. Runs: {seen}"
    )


# ---------------------------------------------------------------- one row per run


def summary_row(
    setting: Setting, scope: Scope, thresholds: Sequence[float], floor: float, session: Session
) -> dict[str, Any]:
    """A run's row of `sensitivity_summary.csv`."""
    run = setting.run
    flips = session.take(run, run.flip_global, "flip_stats_global.json").value or {}
    best = session.take(run, load_best_rows(run, scope, floor), "rule rows")
    stored = run.summary(scope)
    if best.status is not Status.EMPTY:  # a run without rules may have no summary of them
        session.take(run, stored, f"rule_metrics_summary_{scope.slug}.json")
    content = stored.value or {}
    row: dict[str, Any] = {
        "run_name": run.run_name,
        "run_dir": run.run_name,
        "M": setting.size,
        "tau": setting.rate,
        "score_scope": scope.slug,
        "score_scope_label": scope.label,
        "score_scope_available": best.is_usable,
        "n_neurons_with_rules": content.get("n_neurons_with_rules"),
        "quality_threshold_from_json": content.get("quality_threshold"),
        "n_neurons_quality_ge_threshold_from_json": content.get("n_neurons_quality_ge_threshold"),
        "MCC_median": _nested(content, "MCC", "median"),
        "MCC_max": _nested(content, "MCC", "max"),
        "BalancedAcc_median": _nested(content, "BalancedAcc", "median"),
        "dataset_coverage_median": _nested(content, "dataset_coverage", "median"),
        "union_flip_any_unique_rate": flips.get("union_flip_any_unique_rate"),
        "scope_available": best.is_usable,
    }
    row |= _quality_counts(best, thresholds)
    row |= _cost_columns(run, session)
    return row | {"status": best.status.value, "min_rule_dataset_coverage": floor}


def _nested(content: dict[str, Any], key: str, name: str) -> Any:
    block = content.get(key)
    return block.get(name) if isinstance(block, dict) else None


def quality_values(best: pd.DataFrame) -> np.ndarray:
    """Quality of each neuron's rule: the first column of a known name, or one that starts with `mcc`."""
    names = {str(name).lower(): str(name) for name in best.columns}
    found = next((names[name] for name in _QUALITY_COLUMNS if name in names), None)
    found = found or next((names[name] for name in names if name.startswith("mcc")), "MCC")
    return finite(metric_values(best, found))


def _quality_counts(best: Reading[pd.DataFrame], thresholds: Sequence[float]) -> dict[str, Any]:
    """Neurons at or above each threshold: 0 for a run without rules, None for one that cannot be read."""
    if best.value is None:
        return {f"n_quality_ge_{threshold:.2f}": None for threshold in thresholds} | {
            "n_quality_total_from_csv": None,
            "quality_max_from_csv": None,
            "quality_median_from_csv": None,
        }
    values = quality_values(best.value)
    return {f"n_quality_ge_{threshold:.2f}": int((values >= threshold).sum()) for threshold in thresholds} | {
        "n_quality_total_from_csv": len(values),
        "quality_max_from_csv": float(values.max()) if len(values) else math.nan,
        "quality_median_from_csv": float(np.median(values)) if len(values) else math.nan,
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """`total, mean, sd, sem, ci95, q25, q75, min, max` of costs; NaN where there is none."""
    x = finite(values)
    if not len(x):
        return dict.fromkeys(("total", "mean", "sd", "sem", "ci95", "q25", "q75", "min", "max"), math.nan)
    sem = sd(x) / math.sqrt(len(x))
    low, high = np.quantile(x, [0.25, 0.75])
    return {
        "total": float(x.sum()),
        "mean": float(x.mean()),
        "sd": sd(x),
        "sem": sem,
        "ci95": 1.96 * sem,
        "q25": float(low),
        "q75": float(high),
        "min": float(x.min()),
        "max": float(x.max()),
    }


def cost_columns(costs: Sequence[CircuitCost], prefix: str) -> dict[str, Any]:
    """Group tests of the circuits, and each in percent of its own N and 2N-1."""
    columns: dict[str, Any] = {f"{prefix}n_circuits": len(costs)}
    columns |= {f"{prefix}{key}": value for key, value in spread([cost.n_groups for cost in costs]).items()}
    shares = {
        "pct_of_2N_minus_1": [cost.percent_of_tree for cost in costs],
        "pct_of_N": [cost.percent_of_singles for cost in costs],
    }
    for name, values in shares.items():
        found = spread(values)
        del found["total"]
        columns |= {f"{prefix}{name}_{key}": value for key, value in found.items()}
    candidates = [cost.n_candidates for cost in costs if cost.n_candidates]
    return columns | {f"{prefix}n_candidates_mean": float(np.mean(candidates)) if candidates else math.nan}


def _cost_columns(run: RunFolder, session: Session) -> dict[str, Any]:
    """Costs over both regimes, then per regime. Only the run's own folders count, never those of its control."""
    readings = all_costs(run)
    for regime, reading in readings.items():
        session.take(run, reading, f"{regime}_baseline/rule_knockout.json")
    known = {regime: reading.value for regime, reading in readings.items() if reading.value is not None}
    every = [cost for costs in known.values() for cost in costs]
    columns = cost_columns(every, "cha_budget_")
    for regime in REGIMES:
        columns |= cost_columns(known.get(regime, []), f"cha_budget_{regime}_")
    return columns


# ---------------------------------------------------------------- series


def series(summary: pd.DataFrame, baseline: Setting, factor: str) -> pd.DataFrame:
    """Runs that differ from the baseline in one factor only, the baseline among them, by the factor's value."""
    other, value = ("M", baseline.size) if factor == "tau" else ("tau", baseline.rate)
    rows = summary[summary["M"].notna() & np.isclose(summary[other].astype(float), value, atol=1e-9)]
    # Both forms of a name may be there; the baseline's own form goes first.
    is_baseline = rows["run_name"] == baseline.run.run_name
    rows = rows.assign(_first=~is_baseline).sort_values([factor, "_first"], kind="stable").drop(columns="_first")
    return rows.drop_duplicates(factor).reset_index(drop=True)


def compact(summary: pd.DataFrame, baseline: Setting, thresholds: Sequence[float]) -> pd.DataFrame:
    """Absolute changes of the counts from the baseline's, over the other runs of each series."""
    rows = []
    for factor in FACTORS:
        table = series(summary, baseline, factor)
        is_baseline = table["run_name"] == baseline.run.run_name
        for threshold in thresholds:
            counts = pd.to_numeric(table[f"n_quality_ge_{threshold:.2f}"], errors="coerce")
            reference = counts[is_baseline]
            start = float(reference.iloc[0]) if len(reference) else math.nan
            changes = finite((counts[~is_baseline] - start).abs())
            rows.append(
                {
                    "factor": factor,
                    "threshold": f"{threshold:.2f}",
                    "baseline_count": start,
                    "median_abs_change": float(np.median(changes)) if len(changes) else math.nan,
                    "max_abs_change": float(changes.max()) if len(changes) else math.nan,
                    "n_other_runs": len(changes),
                }
            )
    return pd.DataFrame(rows)


# ---------------------------------------------------------------- the stage


def summarize_sensitivity(args: argparse.Namespace, report: Report) -> None:
    """Stage 11."""
    scopes = parse_scopes(args.score_scope)
    thresholds = sorted(set(args.quality_thresholds))
    with open_tree(args.stats_root) as folder:
        root, only = _one_root(folder, args.stats_root)
        settings = place_runs(find_runs(root, only), args)
        if not settings:
            raise nothing_found(args.stats_root, "finished runs (stats/<run>)")
        baseline = find_baseline(settings, args)
        parts = []
        for scope in scopes:
            out_dir = Path(args.out_dir) / (scope.slug if len(scopes) > 1 else "")
            session = Session(out_dir, report, [root.path or root.stats_dir, folder])
            parts.append(_summarize_scope(args, session, scope, settings, baseline, thresholds))
            session.finish("11_summarize_sensitivity_analysis.py", args)
    if len(scopes) > 1:
        _write_all_scopes(Path(args.out_dir), parts, scopes, baseline, thresholds, report)


def _one_root(folder: Path, given: str) -> tuple[ModelRoot, str | None]:
    """The one model below the folder; with a run's own folder, its model and that run only."""
    if any((folder / name).is_file() for name in ("rule_metrics_summary.json", "flip_stats_global.json")):
        folder = folder.absolute()
        roots = [root for root in find_model_roots(folder.parent) if root.stats_dir == folder.parent]
        return roots[0], folder.name
    roots = find_model_roots(folder)
    if not roots:
        raise nothing_found(given, "finished runs (stats/<run>)")
    if len(roots) > 1:
        raise UserError(
            f"--stats_root {given} holds several models ({', '.join(root.unit for root in roots)}); "
            "give the folder of one"
        )
    return roots[0], None


def _summarize_scope(
    args: argparse.Namespace,
    session: Session,
    scope: Scope,
    settings: Sequence[Setting],
    baseline: Setting,
    thresholds: Sequence[float],
) -> tuple[pd.DataFrame, pd.DataFrame]:
    floor = args.min_rule_dataset_coverage
    summary = pd.DataFrame([summary_row(setting, scope, thresholds, floor, session) for setting in settings])
    session.csv("sensitivity_summary.csv", summary)
    stamp = {"score_scope": scope.slug, "min_rule_dataset_coverage": floor}
    changes = compact(summary, baseline, thresholds).assign(**stamp)
    session.csv("plots/quality_threshold_sensitivity_compact.csv", changes)
    for factor in FACTORS:
        write_counts(session, series(summary, baseline, factor), factor, thresholds, scope, stamp)
    budget_path = write_budget(session, series(summary, baseline, "tau"), stamp)
    if args.paper_fig_dir and budget_path is not None:
        place = Path(args.paper_fig_dir) / scope.slug
        place.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(budget_path, place / "cha_budget_vs_tau.pdf")
    _write_readme(session.out_dir, baseline, thresholds, [scope], session)
    _tell(session.report, summary, changes, baseline, scope)
    return summary, changes


def _tell(report: Report, summary: pd.DataFrame, changes: pd.DataFrame, baseline: Setting, scope: Scope) -> None:
    report.heading(f"{scope.label}: {scope.meaning}")
    report.line(f"baseline {baseline.run.run_name}: M = {baseline.size:g}, tau = {baseline.rate:g}")
    found = summary.loc[summary["run_name"] == baseline.run.run_name, "cha_budget_n_candidates_mean"].iloc[0]
    if math.isfinite(found) and round(found) != baseline.size:
        report.line(f"note: its circuits hold {found:g} candidates on average, --baseline_M says {baseline.size:g}")
    shown = ("factor", "threshold", "baseline_count", "median_abs_change", "max_abs_change", "n_other_runs")
    report.line(Table("compact", changes, "Change of the counts from the baseline's", shown=shown).markdown())


def _write_readme(
    out_dir: Path, baseline: Setting, thresholds: Sequence[float], scopes: Sequence[Scope], session: Session | None
) -> None:
    lines = [
        "# Sensitivity of the number of high-quality neurons",
        "",
        f"Baseline: `{baseline.run.run_name}` (M = {baseline.size:g}, tau = {baseline.rate:g}).",
        f"Quality thresholds: {', '.join(f'{threshold:.2f}' for threshold in thresholds)}.",
        "",
        *(f"- {scope.label} (`{scope.slug}`): {scope.meaning}" for scope in scopes),
        "",
        "Each series varies one factor; changes are of the other runs against the baseline, which is not among "
        "them. Costs are of each run's own circuits, in group tests and in percent of N (every candidate alone) "
        "and of 2N-1 (a whole binary tree).",
        "",
    ]
    if session is not None:
        lines += ["Files:", *sorted({f"- `{path.relative_to(out_dir).as_posix()}`" for path in session.written})]
    with atomic_write(out_dir / "README_quality_threshold_sensitivity.md") as handle:
        handle.write("\n".join(lines).rstrip() + "\n")


def _write_all_scopes(
    out_dir: Path,
    parts: Sequence[tuple[pd.DataFrame, pd.DataFrame]],
    scopes: Sequence[Scope],
    baseline: Setting,
    thresholds: Sequence[float],
    report: Report,
) -> None:
    session = Session(out_dir, report)
    session.csv("sensitivity_summary_all_scopes.csv", pd.concat([summary for summary, _ in parts], ignore_index=True))
    session.csv(
        "quality_threshold_sensitivity_compact_all_scopes.csv",
        pd.concat([changes for _, changes in parts], ignore_index=True),
    )
    _write_readme(out_dir, baseline, thresholds, scopes, session)
