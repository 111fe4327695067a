"""Stage 9: the models of one task side by side, run by run: rules, flips, agonists and what the search cost."""

from __future__ import annotations

import argparse
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from lib.artifacts import save_figure
from lib.cli import Report, UserError
from lib.reporting.artifacts import ModelRoot, RunFolder, Status, block_of, find_model_roots, open_tree
from lib.reporting.issues import Issue
from lib.reporting.localization import agonists, budget, circuit_costs
from lib.reporting.naming import RunName, canonical_order, label_of
from lib.reporting.plots import bar_plot, draw_ecdf, line_plot, report_style
from lib.reporting.rules import DEFAULT_THRESHOLD, load_best_rows, metric_values
from lib.reporting.scopes import Scope, parse_scopes
from lib.reporting.session import Session, nothing_found
from lib.reporting.stats import finite, sd

REGIME = "positive"
_COSTS = (
    "median_n_ablation_groups",
    "mean_n_ablation_groups",
    "n_circuits",
    "n_ablation_groups_total",
    "n_audit_tests",
    "n_candidates",
    "pct_of_N",
    "pct_of_2N_minus_1",
)
SUMMARY_COLUMNS = (
    "model",
    "model_root",
    "run_name",
    "condition_key",
    "condition",
    "variant_kind",
    "n_neurons_with_rules",
    "rule_mcc_median",
    "rule_mcc_mean",
    "union_flip_any_rate",
    "union_c2i_rate",
    "union_i2c_rate",
    "hq_threshold",
    "frac_neurons_hq",
    "hq_flip_any_union_share_of_all",
    "n_tau_agonists",
    "median_abs_acc_gap",
    "frac_eps_selective",
    *_COSTS,
    "min_rule_dataset_coverage",
    "score_scope",
    "status",
    "task",
)
_AGGREGATES = {
    "tau": "n_tau_agonists",
    "mcc": "rule_mcc_median",
    "cost": "median_n_ablation_groups",
    "sel": "median_abs_acc_gap",
    "frac_eps": "frac_eps_selective",
    "frac_hq": "frac_neurons_hq",
}
_CROSS_PLOTS = ("n_tau_agonists", "rule_mcc_median", "median_n_ablation_groups")
_BAR_PLOTS = ("n_tau_agonists", "rule_mcc_median", "median_abs_acc_gap", "frac_eps_selective")


@dataclass(frozen=True)
class RunValues:
    """A run's summary row and the per-neuron values of its distributions."""

    row: dict[str, Any]
    ecdf: dict[str, np.ndarray]


@dataclass
class ModelComparison:
    """Stage 9 in one scope."""

    args: argparse.Namespace
    session: Session
    scope: Scope
    names: dict[str, str]

    def run_values(self, run: RunFolder) -> RunValues:
        """Everything about one run; what cannot be read is NaN and an issue, what is empty is zero."""
        rules, mcc, status = self._rules(run)
        found, selectivity = self._agonists(run)
        by_neuron = self.session.take(run, run.by_neuron, "flip_stats_by_neuron.csv")
        is_decode_only = run.name is not None and run.name.choices.decode_only
        row = {
            "model": self.names[run.root.llm],
            "model_root": run.root.unit,
            "run_name": run.run_name,
            "condition_key": run.run_name.replace("-decode_only", "", 1),
            "condition": label_of(run.run_name, "stage_9"),
            "variant_kind": "decode-only" if is_decode_only else "full",
            **rules,
            **self._flips(run),
            **found,
            **self._cost(run),
            "score_scope": self.scope.slug,
            "min_rule_dataset_coverage": self.args.min_rule_dataset_coverage,
            "status": status.value,
            "task": run.root.task,
        }
        flips = metric_values(by_neuron.value, "flip_any_rate") if by_neuron.value is not None else np.array([])
        return RunValues(row, {"mcc": mcc, "flipany": finite(flips), "selectivity": selectivity})

    def _rules(self, run: RunFolder) -> tuple[dict[str, Any], np.ndarray, Status]:
        best = self.session.take(run, load_best_rows(run, self.scope, self.args.min_rule_dataset_coverage), "rule rows")
        coverage = self.session.take(run, run.coverage, "high_quality_neuron_flip_coverage.json").value or {}
        threshold = hq_threshold(coverage, self.scope)
        block = block_of(coverage, "score_scopes", self.scope.slug)
        share = union_share(block)
        if best.value is None:
            return {"hq_threshold": threshold, "hq_flip_any_union_share_of_all": share}, np.array([]), best.status
        mcc = finite(metric_values(best.value))
        n = len(mcc)
        return (
            {
                "n_neurons_with_rules": n,
                "rule_mcc_median": float(np.median(mcc)) if n else math.nan,
                "rule_mcc_mean": float(mcc.mean()) if n else math.nan,
                "hq_threshold": threshold,
                "frac_neurons_hq": float((mcc >= threshold).mean()) if n else 0.0,
                "hq_flip_any_union_share_of_all": share,
            },
            mcc,
            best.status,
        )

    def _flips(self, run: RunFolder) -> dict[str, float]:
        flips = self.session.take(run, run.flip_global, "flip_stats_global.json").value or {}
        names = {
            "union_flip_any_rate": "union_flip_any_unique_rate",
            "union_c2i_rate": "union_c2i_unique_rate",
            "union_i2c_rate": "union_i2c_unique_rate",
        }
        rates = {name: _number(flips.get(key)) for name, key in names.items()}
        # A run without neurons has no evaluated row to divide by, and flips nothing.
        return {name: 0.0 if flips.get("n_neurons") == 0 else value for name, value in rates.items()}

    def _agonists(self, run: RunFolder) -> tuple[dict[str, Any], np.ndarray]:
        reading = self.session.take(run, agonists(run, REGIME), f"{REGIME}_baseline/neuron_buckets.json")
        if reading.value is None:
            return {}, np.array([])
        gaps = finite([abs(agonist.accuracy_gap) for agonist in reading.value])
        return {
            "n_tau_agonists": sum(agonist.effect >= self.args.tau for agonist in reading.value),
            "median_abs_acc_gap": float(np.median(gaps)) if len(gaps) else math.nan,
            "frac_eps_selective": float((gaps >= self.args.eps).mean()) if len(gaps) else math.nan,
        }, gaps

    def _cost(self, run: RunFolder) -> dict[str, Any]:
        reading = self.session.take(run, circuit_costs(run, REGIME), f"{REGIME}_baseline/rule_knockout.json")
        if reading.value is None:
            return {}
        groups = [cost.n_groups for cost in reading.value]
        total = budget(reading.value)
        return {
            "median_n_ablation_groups": float(np.median(groups)) if groups else math.nan,
            "mean_n_ablation_groups": float(np.mean(groups)) if groups else math.nan,
            "n_circuits": len(groups),
            "n_ablation_groups_total": total.n_groups,
            "n_audit_tests": total.n_audit,
            "n_candidates": total.n_candidates,
            "pct_of_N": total.percent_of_singles,
            "pct_of_2N_minus_1": total.percent_of_tree,
        }


def hq_threshold(coverage: dict[str, Any], scope: Scope) -> float:
    """The scope's own threshold in a coverage file; the default if the file names none for it."""
    stated = (
        block_of(coverage, "score_scopes", scope.slug).get("quality_threshold"),
        block_of(coverage, "quality_thresholds_by_scope").get(scope.slug),
    )
    for value in map(_number, stated):
        if math.isfinite(value):
            return value
    # The top level repeats one scope; older files do not say which, and had the same threshold for all.
    top = _number(coverage.get("quality_threshold"))
    return (
        top if math.isfinite(top) and coverage.get("primary_score_scope") in (None, scope.slug) else DEFAULT_THRESHOLD
    )


def union_share(block: dict[str, Any]) -> float:
    """Of the rows flipped by any neuron in a scope, the share flipped by high-quality ones; NaN if not available."""
    flips, everyone = block_of(block, "flip_any"), block_of(block, "all_rule_bearing_in_scope")
    high, whole = _number(flips.get("union_high")), _number(everyone.get("union_any", flips.get("union_all_in_scope")))
    return high / whole if whole > 0 else math.nan


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def model_names(roots: list[ModelRoot]) -> dict[str, str]:
    """Short names by model; models of equal name keep their organisation."""
    short = [root.model for root in roots]
    return {root.llm: root.model if short.count(root.model) == 1 else root.llm for root in roots}


# ---------------------------------------------------------------- tables


def coverage_table(roots: list[ModelRoot], wanted: list[str], names: dict[str, str]) -> pd.DataFrame:
    """`model_run_coverage.csv`."""
    rows = []
    for root in roots:
        missing = [name for name in wanted if name not in root.run_names]
        rows.append(
            {
                "model": names[root.llm],
                "n_runs_found": len(wanted) - len(missing),
                "n_runs_requested": len(wanted),
                "missing_runs": ";".join(missing),
                "is_complete": not missing,
            }
        )
    return pd.DataFrame(rows)


def aggregate(summary: pd.DataFrame) -> pd.DataFrame:
    """`agg_summary_by_run.csv`: mean and sd (n - 1) over models, per run; runs of both kinds share a condition key."""
    rows = []
    for key, group in summary.groupby("condition_key", sort=False):
        row: dict[str, Any] = {"condition_key": key, "condition": group["condition"].iloc[0], "n_models": len(group)}
        for name, column in _AGGREGATES.items():
            values = finite(pd.to_numeric(group[column], errors="coerce"))
            row |= {f"mean_{name}": float(values.mean()) if len(values) else math.nan, f"std_{name}": sd(values)}
        rows.append(row)
    return pd.DataFrame(rows)


# ---------------------------------------------------------------- figures


def write_figures(
    session: Session, summary: pd.DataFrame, table: pd.DataFrame, ecdfs: dict[str, dict[str, Any]]
) -> None:
    """All plots; those without a value are left out."""
    folder = session.out_dir / "plots"
    stamp = {name: table[name].iloc[0] for name in ("score_scope", "min_rule_dataset_coverage")}
    counts = table.set_index("condition_key")["n_models"]
    labelled = summary.assign(
        run=[
            f"{condition}\n(n={counts[key]})"
            for condition, key in zip(summary["condition"], summary["condition_key"], strict=True)
        ]
    )
    for column in _CROSS_PLOTS:
        data = labelled.assign(value=pd.to_numeric(labelled[column], errors="coerce"))[
            ["run", "model", "value", "score_scope", "min_rule_dataset_coverage"]
        ]
        if data["value"].notna().any():
            session.written += line_plot(
                folder / f"cross_model_{column}",
                data.dropna(),
                x="run",
                y="value",
                series="model",
                x_label="",
                y_label=column,
            )
    for column in _BAR_PLOTS:
        name = next(name for name, value in _AGGREGATES.items() if value == column)
        data = table[["condition", f"mean_{name}", f"std_{name}", "score_scope", "min_rule_dataset_coverage"]].dropna(
            subset=[f"mean_{name}"]
        )
        if len(data):
            session.written += bar_plot(
                folder / f"agg_{column}",
                data,
                name="condition",
                value=f"mean_{name}",
                spread=f"std_{name}",
                y_label=f"{column}, mean over models",
            )
    for key, by_kind in ecdfs.items():
        for kind, series in by_kind.items():
            _write_ecdf(session, folder / f"ecdf_{kind}_{re.sub(r'[^0-9A-Za-z]+', '_', key)}", series, kind, stamp)


_KIND_LABELS = {
    "mcc": "MCC of the neurons' rules",
    "flipany": "flip rate of neurons",
    "selectivity": "|accuracy gap| of agonists",
}


def _write_ecdf(session: Session, stem: Path, series: dict[str, np.ndarray], kind: str, stamp: dict[str, Any]) -> None:
    filled = {model: values for model, values in series.items() if len(values)}
    if not filled:
        return
    with report_style():
        figure = Figure(figsize=(6.4, 4.4))
        axes = figure.subplots()
        data = draw_ecdf(axes, filled, _KIND_LABELS[kind], {model: model for model in filled})
        if legend := axes.get_legend():
            legend.set_title("")
        session.written += save_figure(stem, figure, data.assign(**stamp))


# ---------------------------------------------------------------- the stage


def compare_models(args: argparse.Namespace, report: Report) -> None:
    """Stage 9."""
    scopes = parse_scopes(args.score_scope)
    with open_tree(args.task_dir) as folder:
        roots = find_model_roots(folder)
        if not roots or not any(root.run_names for root in roots):
            raise nothing_found(args.task_dir, "finished runs (stats/<run>)")
        tasks = sorted({root.task for root in roots})
        if len(tasks) > 1:
            raise UserError(f"--task_dir {args.task_dir} holds several tasks ({', '.join(tasks)}); give one of them")
        wanted = requested_runs(roots, args.runs)
        for scope in scopes:
            out_dir = Path(args.out_dir) / (scope.slug if len(scopes) > 1 else "")
            session = Session(out_dir, report, [folder])
            _compare_in(args, session, scope, roots, wanted)
            session.finish("9_compare_models.py", args)


def requested_runs(roots: list[ModelRoot], text: str) -> list[str]:
    """Run names in canonical order: the named ones, or (`all`) every run that some model has.

    Raises:
        UserError: no model has any of the named runs.
    """
    present = {name for root in roots for name in root.run_names if RunName.parse(name) or text.strip() != "all"}
    if text.strip() == "all":
        found = present or {name for root in roots for name in root.run_names}
        return canonical_order(found)
    named = [name.strip() for name in text.split(",") if name.strip()]
    if not present & set(named):
        raise UserError(f"--runs {text}: no model has such a run; there are {', '.join(canonical_order(present))}")
    return canonical_order(named)


def _compare_in(
    args: argparse.Namespace, session: Session, scope: Scope, roots: list[ModelRoot], wanted: list[str]
) -> None:
    names = model_names(roots)
    stamp = {"score_scope": scope.slug, "min_rule_dataset_coverage": args.min_rule_dataset_coverage}
    coverage = coverage_table(roots, wanted, names)
    session.csv("model_run_coverage.csv", coverage.assign(**stamp))
    for root, missing in zip(roots, coverage["missing_runs"], strict=True):
        for name in filter(None, missing.split(";")):
            parsed = RunName.parse(name)
            if args.runs.strip() == "all" and parsed is not None and parsed.variant:
                continue  # sensitivity runs are made for one model, by design
            session.issues.add(Issue(root.task, root.llm, name, "run", Status.MISSING.value, "no such run folder"))
    kept = [
        root
        for root, complete in zip(roots, coverage["is_complete"], strict=True)
        if complete or not args.drop_incomplete_models
    ]
    if not kept:
        raise UserError("no model has every run; leave out --drop_incomplete_models or name fewer --runs")
    comparison = ModelComparison(args, session, scope, names)
    values = [comparison.run_values(root.run(name)) for name in wanted for root in kept if name in root.run_names]
    summary = pd.DataFrame([value.row for value in values]).reindex(columns=list(SUMMARY_COLUMNS))
    table = aggregate(summary).assign(**stamp)
    session.csv("run_summary_by_model.csv", summary)
    session.csv("agg_summary_by_run.csv", table)
    ecdfs: dict[str, dict[str, Any]] = {}
    for value in values:
        for kind, numbers in value.ecdf.items():
            ecdfs.setdefault(value.row["run_name"], {}).setdefault(kind, {})[value.row["model"]] = numbers
    write_figures(session, summary, table, ecdfs)
    session.report.line(f"{len(values)} runs of {len(kept)} model(s), scope {scope.slug} ({scope.meaning})")
