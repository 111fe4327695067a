"""Rule metrics of neurons compared between runs: summaries, ECDFs, rank tests. Each neuron is one observation."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from lib.cli import UserError
from lib.reporting.plots import ecdf_grid
from lib.reporting.rules import metric_values
from lib.reporting.session import Session
from lib.reporting.stats import Alternative, finite, fisher_combined, holm, mann_whitney, stars, summary, tail_mean

if TYPE_CHECKING:
    from lib.reporting.artifacts import ModelRoot

PRODUCT = "balanced_accuracy_x_dataset_coverage"
METRICS = ("MCC", "F1", "BalancedAcc", PRODUCT)
Samples = Mapping[str, np.ndarray]
"""Label of a run -> the metric's values, one per neuron; an empty run has none and stays."""


@dataclass(frozen=True)
class BestMode:
    """What makes a run the best of an ECDF panel: `mean`, `median`, or `tail@x`, the share of values >= x."""

    text: str
    score: Callable[[np.ndarray], float]

    @classmethod
    def parse(cls, text: str) -> BestMode:
        """The mode of a `--best_mode`."""
        kind, _, level = text.strip().lower().partition("@")
        if kind in ("mean", "median") and not level:
            return cls(text, np.mean if kind == "mean" else np.median)
        if kind == "tail":
            try:
                limit = float(level or 0.9)
            except ValueError:
                limit = math.nan
            if math.isfinite(limit):
                return cls(text, lambda values: float((values >= limit).mean()))
        raise UserError(f"--best_mode {text!r} is unknown; choose mean, median or tail@<value>, for example tail@0.9")

    def best(self, samples: Samples) -> str | None:
        """The best run's label; the first of equals, None if no run has values."""
        scores = {label: float(self.score(finite(values))) for label, values in samples.items() if len(finite(values))}
        return max(scores, key=lambda label: scores[label]) if scores else None


def add_product(best: pd.DataFrame) -> pd.DataFrame:
    """The rows with the derived metric: balanced accuracy times the share of rows on the rule's larger side."""
    if "dataset_coverage" not in best or "BalancedAcc" not in best:
        return best.assign(**{PRODUCT: np.nan})
    covered = metric_values(best, "dataset_coverage")
    return best.assign(**{PRODUCT: metric_values(best, "BalancedAcc") * np.maximum(covered, 1.0 - covered)})


def samples_of(rules: pd.DataFrame, labels: Sequence[str], metric: str) -> dict[str, np.ndarray]:
    """Values of a metric by run, for every label."""
    values = metric_values(rules, metric)
    owner = rules["stats_label"].to_numpy() if len(rules) else np.array([], dtype=object)
    return {label: finite(values[owner == label]) for label in labels}


def summary_table(rules: pd.DataFrame, labels: Sequence[str]) -> pd.DataFrame:
    """One row per run and metric; an empty run has n = 0."""
    rows = []
    for label in labels:
        for metric in METRICS:
            values = samples_of(rules, [label], metric)[label]
            n = len(values)
            found = summary(values)
            rows.append(
                {
                    "stats_label": label,
                    "metric": metric,
                    "n": n,
                    **{name: found[name] for name in ("mean", "median", "q10", "q50", "q90", "q95")},
                    "p_ge_0.80": float((values >= 0.8).mean()) if n else math.nan,
                    "p_ge_0.90": float((values >= 0.9).mean()) if n else math.nan,
                    "tail_mean_ge_0.90": tail_mean(values, 0.9),
                }
            )
    return pd.DataFrame(rows)


def _median(values: np.ndarray) -> float:
    return float(np.median(values)) if len(values) else math.nan


def pair_tests(rules: pd.DataFrame, labels: Sequence[str]) -> pd.DataFrame:
    """Two-sided rank test of every pair of runs in every metric, each pair once; Holm within a metric."""
    frames = []
    for metric in METRICS:
        samples = samples_of(rules, labels, metric)
        rows = []
        for a, b in combinations(labels, 2):
            test = mann_whitney(samples[a], samples[b])
            medians = _median(samples[a]), _median(samples[b])
            rows.append(
                {
                    "metric": metric,
                    "test": "MWU",
                    "A": a,
                    "B": b,
                    "n_A": len(samples[a]),
                    "n_B": len(samples[b]),
                    "stat": test.statistic,
                    "p": test.p,
                    "median_A": medians[0],
                    "median_B": medians[1],
                    "median_diff": medians[0] - medians[1],
                }
            )
        frames.append(_with_holm(rows, "p", "p_holm_within_metric"))
    columns = [
        "metric",
        "test",
        "A",
        "B",
        "n_A",
        "n_B",
        "stat",
        "p",
        "median_A",
        "median_B",
        "median_diff",
        "p_holm_within_metric",
        "sig",
    ]
    return pd.concat(frames, ignore_index=True).reindex(columns=columns)


def _with_holm(rows: list[dict[str, Any]], column: str, name: str) -> pd.DataFrame:
    adjusted = holm([row[column] for row in rows])
    return pd.DataFrame([row | {name: p, "sig": stars(p)} for row, p in zip(rows, adjusted.tolist(), strict=True)])


def panel_stars(samples: Samples, mode: BestMode) -> dict[str, str]:
    """`best` for the panel's best run; for each other one the stars of `best is greater`, Holm within the panel."""
    best = mode.best(samples)
    if best is None:
        return {}
    others = [label for label in samples if label != best]
    p = [mann_whitney(samples[best], samples[label], Alternative.GREATER).p for label in others]
    return {best: "best"} | dict(zip(others, map(stars, holm(p).tolist()), strict=True))


def write_ecdf(
    session: Session,
    stem: Path,
    rules: pd.DataFrame,
    labels: Sequence[str],
    mode: BestMode,
    stamp: Mapping[str, Any],
) -> None:
    """The 2x2 grid of ECDFs with stars."""
    panels = {metric: samples_of(rules, labels, metric) for metric in METRICS}
    notes = {metric: panel_stars(samples, mode) for metric, samples in panels.items()}
    session.written += ecdf_grid(session.out_dir / stem, panels, notes, stamp)


def write_leaf(
    session: Session, folder: Path, rules: pd.DataFrame, labels: Sequence[str], mode: BestMode, stamp: Mapping[str, Any]
) -> None:
    """`compare_rule_metrics_distributions_{summary.csv,tests.csv,ecdf.pdf}` of one model."""
    stem = "compare_rule_metrics_distributions"
    session.csv(folder / f"{stem}_summary.csv", summary_table(rules, labels).assign(**stamp))
    session.csv(folder / f"{stem}_tests.csv", pair_tests(rules, labels).assign(**stamp))
    write_ecdf(session, folder / f"{stem}_ecdf", rules, labels, mode, stamp)


# ---------------------------------------------------------------- over the models of a task

Unit = tuple["ModelRoot", pd.DataFrame, list[str]]


def combined_tests(task: str, units: Sequence[Unit]) -> pd.DataFrame:
    """Per metric and pair of runs, the models' two-sided p-values combined by Fisher; Holm within task and metric.

    Fisher's combination has no direction; `n_llm_A_higher` says in how many models A's median is the higher one.
    """
    labels = list(dict.fromkeys(label for _, _, names in units for label in names))
    frames = []
    for metric in METRICS:
        samples = [samples_of(rules, names, metric) for _, rules, names in units]
        rows = [_combined_row(task, metric, a, b, samples) for a, b in combinations(labels, 2)]
        frames.append(_with_holm(rows, "p_fisher", "p_holm_within_task_metric"))
    return pd.concat(frames, ignore_index=True)


def _combined_row(task: str, metric: str, a: str, b: str, samples: Sequence[Samples]) -> dict[str, Any]:
    pairs = [(unit[a], unit[b]) for unit in samples if a in unit and b in unit]
    tested = [(left, right) for left, right in pairs if len(left) and len(right)]
    pooled = [np.concatenate([pair[side] for pair in pairs]) if pairs else np.array([]) for side in (0, 1)]
    medians = _median(pooled[0]), _median(pooled[1])
    return {
        "task": task,
        "metric": metric,
        "test": "MWU+Fisher",
        "A": a,
        "B": b,
        "n_llm": len(tested),
        "n_llm_A_higher": sum(_median(left) > _median(right) for left, right in tested),
        "p_fisher": fisher_combined([mann_whitney(left, right).p for left, right in tested]),
        "median_A_pooled": medians[0],
        "median_B_pooled": medians[1],
        "median_diff_pooled": medians[0] - medians[1],
    }


def write_by_task(
    session: Session, base: Path, units: Sequence[Unit], mode: BestMode, stamp: Mapping[str, Any]
) -> None:
    """Best rows of all models, and per task the pooled summary, ECDFs and combined tests."""
    stem = "compare_rule_metrics_distributions"
    rows = [rules.assign(task=root.task, llm=root.llm) for root, rules, _ in units if len(rules)]
    session.csv(
        base / "rule_metrics_best_per_neuron_all_tasks_all_llms.csv",
        (pd.concat(rows, ignore_index=True) if rows else pd.DataFrame(columns=["task", "llm"])).assign(**stamp),
    )
    tests = []
    for task in sorted({root.task for root, _, _ in units}):
        members = [unit for unit in units if unit[0].task == task]
        labels = list(dict.fromkeys(label for _, _, names in members for label in names))
        filled = [rules for _, rules, _ in members if len(rules)]
        pooled = pd.concat(filled, ignore_index=True) if filled else pd.DataFrame(columns=["stats_label", *METRICS])
        session.csv(
            base / task / f"{stem}_summary_by_task.csv",
            summary_table(pooled, labels).assign(task=task, n_llm=len(members), **stamp),
        )
        write_ecdf(session, base / task / f"{stem}_ecdf_by_task", pooled, labels, mode, stamp)
        tests.append(combined_tests(task, members))
    session.csv(base / f"{stem}_tests_combined_by_task.csv", pd.concat(tests, ignore_index=True).assign(**stamp))
