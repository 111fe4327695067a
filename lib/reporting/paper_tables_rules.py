"""Tables 1, 2 and 9: high-quality neurons, what they flip, how they thin out over thresholds, and the behaviour."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pandas as pd

from lib.reporting.artifacts import ModelRoot, RunFolder, Status, read_table
from lib.reporting.issues import Issue
from lib.reporting.naming import RunMode, model_label, task_label
from lib.reporting.paper_tables import PaperContext, main_tables_note, read_candidate_json, whole
from lib.reporting.rules import hq_count, metric_values, optional_int
from lib.reporting.scopes import Scope
from lib.reporting.tables import Table

COVERAGE_COLUMNS = {"c2i": "∪(1→0) (elig. %)", "i2c": "∪(0→1) (elig. %)"}
_ELIGIBLE = {"c2i": "n_eval_baseline_correct", "i2c": "n_eval_baseline_incorrect"}
TABLE_2_MODES = (RunMode.SPECTRAL_PLAN, RunMode.SPECTRAL_SPLIT, RunMode.RANDOM_PLAN, RunMode.FAKE_TARGETS)


# ---------------------------------------------------------------- table 1


def table_1(context: PaperContext) -> int:
    """Localized and high-quality neurons of the main run, and the eligible prompts that they flip."""
    rows = [_row_1(context, root) for root in context.main_roots]
    labels = [scope.label for scope in context.scopes]
    columns = [
        "Task",
        "Model",
        "# Loc.",
        *labels,
        *COVERAGE_COLUMNS.values(),
        "llm",
        "run_name",
        "status",
        "coverage_score_scope",
        "coverage_source",
        "min_rule_dataset_coverage",
    ]
    frame = pd.DataFrame(rows, columns=columns)
    for name in ("# Loc.", *labels):
        frame[name] = whole(list(frame[name]))
    context.write(
        Table(
            "table1_main_high_quality_neurons",
            frame,
            _caption_1(context),
            decimals=1,
            shown=tuple(columns[: 3 + len(labels) + 2]),
        )
    )
    return len(frame)


def _caption_1(context: PaperContext) -> str:
    args = context.args
    scopes = "; ".join(f"{scope.label}: {scope.meaning}" for scope in context.scopes)
    who = {"all": "all localized neurons", "hq": "high-quality neurons"}[args.table1_coverage_source]
    return (
        f"Main run: localized neurons (# Loc.) and those with a rule of MCC >= {args.hq_test_threshold:g} "
        f"(ALL-FIT: {args.hq_all_fit_threshold:g}) that covers at least {args.min_rule_dataset_coverage:g} of the "
        f"datapoints. {scopes}. Last columns: percent of eligible prompts flipped by {who}, rows of scope "
        f"{Scope.parse(args.table1_coverage_score_scope).slug}. {main_tables_note(context)}"
    )


def _row_1(context: PaperContext, root: ModelRoot) -> dict[str, Any]:
    args, run = context.args, context.run_of(root, RunMode.SPECTRAL_PLAN)
    coverage = context.session.take(run, run.coverage, "high_quality_neuron_flip_coverage.json")
    totals = context.session.take(run, run.flip_global, "flip_stats_global.json")
    located = optional_int((coverage.value or {}).get("n_neurons_total"))
    if located is None:
        located = optional_int((totals.value or {}).get("n_neurons"))
    readings = {scope: context.best(run, scope) for scope in context.scopes}
    problems = {reading.status.value for reading in (coverage, totals, *readings.values()) if not reading.is_usable}
    row: dict[str, Any] = {
        "Task": task_label(root.task),
        "Model": model_label(root.llm),
        "# Loc.": located,
        "llm": root.llm,
        "run_name": run.run_name,
        "status": "+".join(sorted(problems)) or Status.OK.value,
        "coverage_score_scope": Scope.parse(args.table1_coverage_score_scope).slug,
        "coverage_source": args.table1_coverage_source,
        "min_rule_dataset_coverage": args.min_rule_dataset_coverage,
    }
    for scope, reading in readings.items():
        threshold = args.hq_all_fit_threshold if scope is Scope.ALL_FIT else args.hq_test_threshold
        row[scope.label] = hq_count(reading.value, threshold) if reading.is_usable else None
    for direction, column in COVERAGE_COLUMNS.items():
        row[column] = eligible_percent(
            coverage.value or {}, direction, Scope.parse(args.table1_coverage_score_scope), args.table1_coverage_source
        )
        if coverage.is_usable and math.isnan(row[column]):
            context.session.issues.add(
                Issue(
                    root.task,
                    root.llm,
                    run.run_name,
                    "high_quality_neuron_flip_coverage.json",
                    "missing",
                    f"no {direction} coverage of scope {row['coverage_score_scope']} with eligible rows",
                )
            )
    return row


def eligible_percent(coverage: dict[str, Any], direction: str, scope: Scope, source: str) -> float:
    """Eligible prompts of a scope that the neurons (`all` or `hq`) flip, in percent; NaN if the file does not say.

    The denominator is always the prompts on which this flip can happen: another one would be another number.
    """
    blocks = coverage.get("score_scopes")
    if not isinstance(blocks, dict):
        return _legacy_percent(coverage.get(f"flip_{direction}"), source, scope)
    block = blocks.get(scope.slug) or {}
    denominator = (block.get("eligible_denominators") or {}).get(_ELIGIBLE[direction])
    flips = block.get(f"flip_{direction}") or {}
    if source == "hq":
        numerator = flips.get("union_high")
    else:
        numerator = (block.get("all_rule_bearing_in_scope") or {}).get(
            f"union_{direction}", flips.get("union_all_in_scope")
        )
    return _percent(numerator, denominator)


def _legacy_percent(flips: Any, source: str, scope: Scope) -> float:
    """From files older than scope blocks: all evaluated rows, high quality as judged on TEST."""
    if not isinstance(flips, dict) or (source == "hq" and scope is not Scope.TEST):
        return math.nan
    end = "high" if source == "hq" else "all"
    rate = flips.get(f"eligible_union_rate_{end}")
    if isinstance(rate, int | float):
        return 100.0 * rate
    return _percent(flips.get(f"union_{end}"), flips.get("eligible_baseline_count"))


def _percent(numerator: Any, denominator: Any) -> float:
    if optional_int(numerator) is None or not optional_int(denominator):
        return math.nan
    return 100.0 * numerator / denominator


# ---------------------------------------------------------------- table 2


def table_2(context: PaperContext) -> int:
    """High-quality neurons by run mode, scope and threshold: per run (long), and summed over the models."""
    thresholds = _thresholds(context)
    rows = [
        row
        for root in context.main_roots
        for mode in TABLE_2_MODES
        for scope in context.scopes
        for row in _rows_2(context, context.run_of(root, mode), mode, scope, thresholds)
    ]
    columns = [
        "task",
        "org",
        "model",
        "llm",
        "run_name",
        "Method",
        "score_scope",
        "score_label",
        "scope_available",
        "status",
        "threshold",
        "n_rule_bearing_neurons",
        "min_dataset_coverage",
        "n_high_quality_neurons",
    ]
    long = pd.DataFrame(rows, columns=columns)
    for name in ("n_rule_bearing_neurons", "n_high_quality_neurons"):
        long[name] = whole(list(long[name]))
    context.session.csv("table2_threshold_sweep_per_run_long.csv", long)
    totals = _totals_2(context, long, thresholds)
    _write_totals(context, "table2_threshold_sweep_totals", totals)
    for scope in context.scopes:
        part = totals[totals["score_scope"] == scope.slug].drop(columns="Score scope")
        _write_totals(context, f"table2_threshold_sweep_totals_{scope.slug}", part)
    bearing = totals.rename(columns={"All": "# rule-bearing localized neurons"})
    context.write(
        Table(
            "table2_rule_bearing_yield_totals",
            bearing[["Method", "Score scope", "# rule-bearing localized neurons", "units", "score_scope"]],
            f"Localized neurons with a rule, whatever its MCC. {main_tables_note(context)}",
            shown=("Method", "Score scope", "# rule-bearing localized neurons"),
        )
    )
    return len(long)


def _thresholds(context: PaperContext) -> list[float]:
    return [float(text) for text in context.args.thresholds]


def _rows_2(
    context: PaperContext, run: RunFolder, mode: RunMode, scope: Scope, thresholds: list[float]
) -> list[dict[str, Any]]:
    reading = context.best(run, scope)
    root = run.root
    common = {
        "task": root.task,
        "org": root.org,
        "model": root.model,
        "llm": root.llm,
        "run_name": run.run_name,
        "Method": mode.value,
        "score_scope": scope.slug,
        "score_label": scope.label,
        "scope_available": reading.is_usable,
        "status": reading.status.value,
        "min_dataset_coverage": context.args.min_rule_dataset_coverage,
    }
    n_bearing = int((~pd.isna(metric_values(reading.value))).sum()) if reading.is_usable else None
    return [
        {
            **common,
            "threshold": threshold,
            "n_rule_bearing_neurons": n_bearing,
            "n_high_quality_neurons": hq_count(reading.value, threshold) if reading.is_usable else None,
        }
        for threshold in thresholds
    ]


def _totals_2(context: PaperContext, long: pd.DataFrame, thresholds: list[float]) -> pd.DataFrame:
    """A row per method and scope: sums over the models whose run is there; their number is `units`."""
    rows = []
    for mode in TABLE_2_MODES:
        for scope in context.scopes:
            part = long[(long["Method"] == mode.value) & (long["score_scope"] == scope.slug) & long["scope_available"]]
            if part.empty:
                continue
            first = part[part["threshold"] == thresholds[0]]
            row: dict[str, Any] = {
                "Method": mode.value,
                "Score scope": scope.label,
                "All": int(first["n_rule_bearing_neurons"].sum()),
            }
            for threshold in thresholds:
                counts = part.loc[part["threshold"] == threshold, "n_high_quality_neurons"]
                row[f"t = {threshold:.2f}"] = int(counts.sum())
            rows.append(
                row
                | {
                    "units": len(first),
                    "score_scope": scope.slug,
                    "min_rule_dataset_coverage": context.args.min_rule_dataset_coverage,
                }
            )
    columns = [
        "Method",
        "Score scope",
        "All",
        *(f"t = {threshold:.2f}" for threshold in thresholds),
        "units",
        "score_scope",
        "min_rule_dataset_coverage",
    ]
    return pd.DataFrame(rows, columns=columns)


def _write_totals(context: PaperContext, stem: str, totals: pd.DataFrame) -> None:
    n_units = len(context.main_roots)
    caption = (
        f"Neurons whose rule reaches an MCC of t, summed over the models whose run is there (units, of "
        f"{n_units}); All: with any rule. {main_tables_note(context)}"
    )
    shown = tuple(name for name in totals.columns if name not in ("score_scope", "min_rule_dataset_coverage"))
    context.write(Table(stem, totals, caption, shown=shown))


# ---------------------------------------------------------------- table 9


def table_9(context: PaperContext) -> int:
    """The behaviour's rate before any ablation, all tasks."""
    rows = []
    for root in context.roots:
        metric, rate, source = baseline_rate(root)
        rows.append(
            {
                "Task": task_label(root.task),
                "Model": model_label(root.llm),
                "Metric": metric,
                "Value": "NA" if math.isnan(rate) else f"{100 * rate:.1f}%",
                "rate": rate,
                "llm": root.llm,
                "source": source.name if source else "",
            }
        )
        if source is None:
            context.session.issues.add(
                Issue(
                    root.task,
                    root.llm,
                    "",
                    "feature_report/dataset_stats.json",
                    "missing",
                    "no rate of the behaviour in it, nor in scores.csv",
                )
            )
        else:
            context.session.inputs.add(source)
    frame = pd.DataFrame(rows, columns=["Task", "Model", "Metric", "Value", "rate", "llm", "source"])
    context.write(
        Table(
            "table9_baseline_performance",
            frame,
            "The behaviour before any ablation.",
            shown=("Task", "Model", "Metric", "Value"),
        )
    )
    return len(frame)


_RATE_KEYS = {
    "Jailbreak rate": ("jailbreak_rate", "pct_is_jailbroken", "is_jailbroken_rate"),
    "Accuracy": ("accuracy", "pct_is_correct", "is_correct_rate"),
}


def baseline_rate(root: ModelRoot) -> tuple[str, float, Path | None]:
    """(metric, rate in [0, 1] or NaN, file that said so)."""
    families = sorted(_RATE_KEYS, key=lambda name: ("jailbreak" in name.lower()) != ("jailbreak" in root.task))
    if root.path is None:
        return families[0], math.nan, None
    path = root.path / "feature_report" / "dataset_stats.json"
    stats = read_candidate_json(path)
    for metric in families:
        for key in _RATE_KEYS[metric]:
            value = stats.get(key)
            if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 100:
                return metric, value / 100 if value > 1 else float(value), path
    return _rate_of_scores(root.path / "feature_report" / "scores.csv", families)


def _rate_of_scores(path: Path, families: list[str]) -> tuple[str, float, Path | None]:
    header = read_table(path, nrows=0)
    if header.value is None:
        return families[0], math.nan, None
    names = [name for name in header.value.columns if name.startswith("is_") and name != "is_test"]
    known = {"Jailbreak rate": "is_jailbroken", "Accuracy": "is_correct"}
    for metric in families:
        if known[metric] in names:
            return _mean_of(path, known[metric], metric)
    return _mean_of(path, names[0], names[0]) if names else (families[0], math.nan, None)


def _mean_of(path: Path, column: str, metric: str) -> tuple[str, float, Path | None]:
    frame = read_table(path, usecols=[column]).value
    words = frame[column].astype("string").str.strip().str.lower().replace({"true": "1", "false": "0"})
    return metric, float(pd.to_numeric(words, errors="coerce").mean()), path
