"""Stage 8: run modes compared over thresholds of rule quality, per model and over the models of a task."""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lib.cli import Report, UserError
from lib.reporting.artifacts import ModelRoot, RunFolder, Status, find_model_roots, open_tree
from lib.reporting.distributions import BestMode, add_product, write_by_task, write_leaf
from lib.reporting.issues import Issue
from lib.reporting.naming import RunMode, RunName
from lib.reporting.plots import line_plot
from lib.reporting.rules import METRIC_COLUMNS, load_best_rows, metric_values, neuron_keys
from lib.reporting.scopes import Scope, parse_scopes
from lib.reporting.session import Session, nothing_found
from lib.reporting.stats import sd, threshold_grid

DIRECTIONS = ("c2i", "i2c")
SWEEP_COLUMNS = (
    "stats_dirname",
    "stats_label",
    "threshold",
    "rule_quality_metric",
    "metric_col",
    "n_high_quality_neurons",
    "union_c2i_pct",
    "union_i2c_pct",
    "union_c2i_count",
    "union_i2c_count",
    "eval_c2i_rows",
    "eval_i2c_rows",
    "scores_rows",
    "score_scope",
    "min_rule_dataset_coverage",
    "status",
)
_LEAF_PLOTS = {
    "n_high_quality_neurons": ("plot_high_quality_neurons", "high-quality neurons"),
    "union_c2i_pct": ("plot_union_flip_c2i_pct", "% of evaluated rows flipped to wrong"),
    "union_i2c_pct": ("plot_union_flip_i2c_pct", "% of evaluated rows flipped to right"),
}
_TASK_PLOTS = {
    "n_high_quality_neurons": ("plot_high_quality_neurons_by_task", "high-quality neurons"),
    "union_c2i_pct": ("plot_union_flip_c2i_pct_by_task", "% of evaluated rows flipped to wrong"),
    "union_i2c_pct": ("plot_union_flip_i2c_pct_by_task", "% of evaluated rows flipped to right"),
    "net_acc_pp": ("plot_net_accuracy_change_pp_by_task", "net accuracy change (percentage points)"),
}


# ---------------------------------------------------------------- which runs are compared


def choose_variant(roots: Iterable[ModelRoot], wanted: str | None, report: Report) -> str:
    """The sensitivity parts of the compared runs: `wanted`, else those at the main settings, else the commonest.

    Runs of different circuit sizes or rates are no run modes of one comparison.
    """
    counts = Counter(
        name.variant
        for root in roots
        for text in root.run_names
        if (name := RunName.parse(text)) is not None and name.mode is not None
    )
    if wanted is not None:
        wanted = "" if wanted == "main" else wanted
        if wanted not in counts:
            present = ", ".join(variant or "main" for variant in sorted(counts)) or "none"
            raise UserError(f"--variant {wanted or 'main'}: no run of it; there are {present}")
        return wanted
    if "" in counts or not counts:
        return ""
    variant = min(counts, key=lambda name: (-counts[name], name))
    report.line(f"no run at the main settings; comparing the runs of variant {variant}")
    return variant


def runs_by_mode(root: ModelRoot, variant: str, pattern: str | None = None) -> dict[RunMode, RunFolder]:
    """A model's run of each mode in canonical order; decode-only first where both forms are there."""
    import re

    found: dict[RunMode, RunFolder] = {}
    for text in root.run_names:
        name = RunName.parse(text)
        if name is None or name.mode is None or name.variant != variant:
            continue
        if pattern is not None and not re.search(pattern, text):
            continue
        if name.mode not in found or name.choices.decode_only:
            found[name.mode] = root.run(text)
    return {mode: found[mode] for mode in RunMode if mode in found}


# ---------------------------------------------------------------- one run over the thresholds


@dataclass(frozen=True)
class Flips:
    """Flips of some neurons in one direction. known, flipped: [row, neuron]; known_anywhere: [row], of all neurons."""

    known: np.ndarray
    flipped: np.ndarray
    known_anywhere: np.ndarray

    def union(self, members: np.ndarray) -> tuple[int, int]:
        """(rows flipped by some member, rows known for some member); without members, the run's evaluated rows."""
        if not members.any():
            return 0, int(self.known_anywhere.sum())
        return int(self.flipped[:, members].any(axis=1).sum()), int(self.known[:, members].any(axis=1).sum())


def read_flips(frame: pd.DataFrame, keys: Sequence[str], direction: str) -> Flips:
    """Flips of the neurons `keys` from the flip columns of a `scores.csv`; a neuron without column is unknown."""
    prefix = f"flip_{direction}_"
    known = np.zeros((len(frame), len(keys)), dtype=bool)
    flipped = np.zeros_like(known)
    anywhere = np.zeros(len(frame), dtype=bool)
    places = {f"{prefix}{key}": number for number, key in enumerate(keys)}
    for name in (str(name) for name in frame.columns if str(name).startswith(prefix)):
        values = _truth(frame[name])
        anywhere |= np.isfinite(values)
        if name in places:
            known[:, places[name]] = np.isfinite(values)
            flipped[:, places[name]] = np.isfinite(values) & (values != 0)
    return Flips(known, flipped, anywhere)


def _truth(column: pd.Series) -> np.ndarray:
    """A yes/no column as numbers [row]: non-zero is yes, NaN unknown."""
    if pd.api.types.is_bool_dtype(column.dtype) or pd.api.types.is_numeric_dtype(column.dtype):
        return column.to_numpy(dtype=float, na_value=np.nan)
    words = column.astype("string").str.strip().str.lower().replace({"true": "1", "false": "0"})
    return pd.to_numeric(words, errors="coerce").to_numpy(dtype=float, na_value=np.nan)


def sweep(best: pd.DataFrame, metric_column: str, thresholds: np.ndarray, scores: pd.DataFrame | None) -> pd.DataFrame:
    """HQ neurons and their union of flips at each threshold; without `scores`, the flip columns are NA."""
    values = metric_values(best, metric_column)
    keys = neuron_keys(best)
    flips = {name: read_flips(scores, keys, name) for name in DIRECTIONS} if scores is not None else {}
    rows = []
    for threshold in thresholds:
        members = values >= threshold
        row: dict[str, Any] = {"threshold": float(threshold), "n_high_quality_neurons": int(members.sum())}
        for name in DIRECTIONS:
            count, n_eval = flips[name].union(members) if flips else (None, None)
            row |= {
                f"union_{name}_count": count,
                f"eval_{name}_rows": n_eval,
                f"union_{name}_pct": _share(count, n_eval, bool(members.any())),
            }
        rows.append(row | {"scores_rows": None if scores is None else len(scores)})
    return pd.DataFrame(rows)


def _share(count: int | None, n_eval: int | None, has_members: bool) -> float:
    """Percent of the evaluated rows: no neuron flips 0 % even of nothing; neurons without evaluated row are unknown."""
    if count is None or n_eval is None:
        return math.nan
    if not n_eval:
        return math.nan if has_members else 0.0
    return 100.0 * count / n_eval


# ---------------------------------------------------------------- one scope of the whole comparison


@dataclass
class Comparison:
    """Stage 8 in one scope: sweeps and best rows of every run that could be read."""

    args: argparse.Namespace
    session: Session
    scope: Scope
    variant: str
    thresholds: np.ndarray

    @property
    def metric_column(self) -> str:
        """Column that is swept."""
        return METRIC_COLUMNS[self.args.rule_quality_metric]

    @property
    def stamp(self) -> dict[str, Any]:
        """What every table says of its rules."""
        return {"score_scope": self.scope.slug, "min_rule_dataset_coverage": self.args.min_rule_dataset_coverage}

    def load(self, root: ModelRoot) -> tuple[pd.DataFrame, pd.DataFrame, list[str]]:
        """(sweep rows, best rule rows, labels of the runs that could be read) of a model."""
        sweeps, rules, labels = [], [], []
        for mode, run in runs_by_mode(root, self.variant, self.args.run_name_regex).items():
            best = self.session.take(
                run, load_best_rows(run, self.scope, self.args.min_rule_dataset_coverage), "rule rows"
            )
            if not best.is_usable or best.value is None:
                continue
            if len(best.value) and self.metric_column not in best.value:
                self._note(run, f"no column {self.metric_column}")
                continue
            scores = self.session.take(
                run, run.scores(lambda name: name.startswith(("flip_c2i_", "flip_i2c_"))), "scores.csv"
            )
            ident = {"stats_dirname": run.run_name, "stats_label": mode.stage_8_label}
            known = {
                "score_scope": self.scope.slug,
                "status": best.status.value,
                "min_rule_dataset_coverage": self.args.min_rule_dataset_coverage,
            }
            table = sweep(best.value, self.metric_column, self.thresholds, scores.value if scores.is_usable else None)
            metric = {"rule_quality_metric": self.args.rule_quality_metric, "metric_col": self.metric_column}
            sweeps.append(table.assign(**ident, **metric, **known)[list(SWEEP_COLUMNS)])
            rules.append(add_product(best.value).assign(**ident, **known))
            labels.append(mode.stage_8_label)
        filled = [frame for frame in rules if len(frame)]
        return (
            pd.concat(sweeps, ignore_index=True) if sweeps else pd.DataFrame(columns=list(SWEEP_COLUMNS)),
            pd.concat(filled, ignore_index=True)
            if filled
            else add_product(pd.DataFrame()).assign(stats_dirname=[], stats_label=[], score_scope=[]),
            labels,
        )

    def _note(self, run: RunFolder, message: str) -> None:
        self.session.issues.add(
            Issue(run.root.task, run.root.llm, run.run_name, "rule rows", Status.INVALID.value, message)
        )

    def write_leaf(
        self,
        folder: Path,
        root: ModelRoot,
        table: pd.DataFrame,
        rules: pd.DataFrame,
        labels: list[str],
    ) -> None:
        """The files of one model."""
        session = self.session
        session.csv(folder / "threshold_sweep_summary.csv", table)
        for column, (stem, y_label) in _LEAF_PLOTS.items():
            session.written += line_plot(
                session.out_dir / folder / stem,
                table,
                x="threshold",
                y=column,
                series="stats_label",
                x_label=f"{self.metric_column} threshold",
                y_label=y_label,
                title=f"{root.unit}: {self.scope.label}",
            )
        write_leaf(session, folder, rules, labels, BestMode.parse(self.args.best_mode), self.stamp)

    def write_tasks(self, loaded: dict[str, tuple[ModelRoot, pd.DataFrame, pd.DataFrame, list[str]]]) -> None:
        """The files over the models of each task; only models with every run of their task take part."""
        coverage = self._coverage(loaded)
        base = Path("aggregated_by_task")
        self.session.csv(base / "threshold_sweep_coverage.csv", coverage)
        self.session.csv(base / "rule_metrics_coverage.csv", coverage)
        complete = coverage.loc[coverage["is_complete"], ["task", "llm"]].itertuples(index=False)
        units = [loaded[f"{row.task}/{row.llm}"] for row in complete]
        tables = [
            table.assign(
                task=root.task,
                llm=root.llm,
                net_acc_pp=table["union_i2c_pct"].astype(float) - table["union_c2i_pct"].astype(float),
            )
            for root, table, _, _ in units
        ]
        everything = pd.concat(tables, ignore_index=True)
        self.session.csv(base / "threshold_sweep_all_tasks_all_llms.csv", everything)
        for task, table in everything.groupby("task", sort=True):
            self.session.csv(base / str(task) / "threshold_sweep_all_llms.csv", table)
            self._plot_task(base / str(task), str(task), table)
        write_by_task(
            self.session,
            base,
            [(root, rules, labels) for root, _, rules, labels in units],
            BestMode.parse(self.args.best_mode),
            self.stamp,
        )

    def _coverage(self, loaded: dict[str, tuple[ModelRoot, pd.DataFrame, pd.DataFrame, list[str]]]) -> pd.DataFrame:
        """Runs found per model and the most found in its task; a run that found nothing is found."""
        rows = [{"task": root.task, "llm": root.llm, "n_runs": len(labels)} for root, _, _, labels in loaded.values()]
        frame = pd.DataFrame(rows)
        frame["max_runs_for_task"] = frame.groupby("task")["n_runs"].transform("max")
        frame["is_complete"] = (frame["n_runs"] == frame["max_runs_for_task"]) & (frame["n_runs"] > 0)
        for row in frame[~frame["is_complete"]].itertuples():
            self.session.issues.add(
                Issue(
                    str(row.task),
                    str(row.llm),
                    "",
                    "runs",
                    Status.MISSING.value,
                    f"{row.n_runs} of {row.max_runs_for_task} runs; left out of the aggregates",
                )
            )
        return frame.assign(score_scope=self.scope.slug, min_rule_dataset_coverage=self.args.min_rule_dataset_coverage)

    def _plot_task(self, folder: Path, task: str, table: pd.DataFrame) -> None:
        for column, (stem, y_label) in _TASK_PLOTS.items():
            curve = mean_and_band(table, column).assign(**self.stamp)
            self.session.written += line_plot(
                self.session.out_dir / folder / stem,
                curve,
                x="threshold",
                y="mean",
                low="low",
                high="high",
                series="stats_label",
                x_label=f"{self.metric_column} threshold",
                y_label=y_label,
                title=f"{task}: {self.scope.label}, mean of {table['llm'].nunique()} model(s)",
            )


def mean_and_band(table: pd.DataFrame, column: str) -> pd.DataFrame:
    """Mean over models and 1.96 standard errors around it, per run and threshold; no band for one model."""
    rows = []
    for (label, threshold), group in table.groupby(["stats_label", "threshold"], sort=False):
        values = group[column].astype(float).dropna().to_numpy()
        mean = float(values.mean()) if len(values) else math.nan
        half = 1.96 * sd(values) / math.sqrt(len(values)) if len(values) else math.nan
        rows.append(
            {
                "stats_label": label,
                "threshold": threshold,
                "mean": mean,
                "low": mean - half,
                "high": mean + half,
                "n_models": len(values),
            }
        )
    return pd.DataFrame(rows)


def compare_experiments(args: argparse.Namespace, report: Report) -> None:
    """Stage 8."""
    BestMode.parse(args.best_mode)
    try:
        thresholds = threshold_grid(args.thr_min, args.thr_max, args.thr_step)
    except ValueError as error:
        raise UserError(f"{error}; give --thr_min <= --thr_max and --thr_step > 0") from None
    scopes = parse_scopes(args.score_scope)
    with open_tree(args.stats_path) as folder:
        roots = find_model_roots(folder)
        if not roots:
            raise nothing_found(args.stats_path, "finished runs (stats/<run>)")
        variant = choose_variant(roots, args.variant, report)
        roots = [root for root in roots if runs_by_mode(root, variant, args.run_name_regex)]
        if not roots:
            raise nothing_found(args.stats_path, "runs of the five modes that match --run_name_regex")
        for scope in scopes:
            out_dir = Path(args.out_dir) / (scope.slug if len(scopes) > 1 else "")
            session = Session(out_dir, report, [folder])
            _compare_in(Comparison(args, session, scope, variant, thresholds), roots, folder)
            session.finish("8_compare_experiments.py", args)


def _compare_in(comparison: Comparison, roots: list[ModelRoot], folder: Path) -> None:
    loaded = {root.unit: (root, *comparison.load(root)) for root in comparison.session.report.progress(roots)}
    if not any(labels for *_, labels in loaded.values()):
        comparison.session.issues.tell(comparison.session.report, comparison.session.out_dir)
        raise UserError(f"no run has rule rows of scope {comparison.scope.slug}; run stage 7, or choose another scope")
    is_single = len(roots) == 1 and roots[0].stats_dir.parents[2] in (folder.absolute(), *folder.absolute().parents)
    for root, table, rules, labels in loaded.values():
        if labels:
            place = Path() if is_single else Path(root.task, *root.llm.split("/"), "leaf_stats_dir_outputs")
            comparison.write_leaf(place, root, table, rules, labels)
    comparison.write_tasks(loaded)
    n_runs = sum(len(labels) for *_, labels in loaded.values())
    comparison.session.report.line(
        f"{n_runs} runs of {len(roots)} model(s), scope {comparison.scope.slug} ({comparison.scope.meaning})"
    )
