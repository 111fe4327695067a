"""Stage 2: from labelled answers to one table of features; the hold-out comes first, filters see TRAIN only."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from lib.artifacts import StageRecord, json_text, read_pickle, write_csv, write_json
from lib.cli import Report, UserError, rng
from lib.feature_filters import (
    FeatureMetrics,
    FilterOptions,
    FilterResult,
    feature_metrics,
    filter_features,
    variance_z,
)
from lib.feature_moments import moments
from lib.feature_representation import MISSING_VALUE, VALUE_LIMIT, Feature, assign_columns
from lib.feature_split import Split, split_rows
from lib.stages.behaviour import recorded_task
from lib.task_spec import FeatureTaskSpec, write_task_settings

if TYPE_CHECKING:
    from collections.abc import Mapping

STAGE = "2_generate_features"
OWN_COLUMNS = ("row_id", "is_test", "split")


@dataclass(frozen=True)
class ScoredFeatures:
    """Features with their values on every row."""

    features: list[Feature]
    columns: list[str]
    values: np.ndarray
    """float32 [row, feature], missing replaced by `MISSING_VALUE`"""
    missing_share: np.ndarray
    """[feature] share of rows where the feature does not apply"""
    backends: list[str]
    """What computed each feature."""


def run_stage_2(args: argparse.Namespace, report: Report) -> None:
    """Make `scores.csv`, `features.json` and what explains them, unless matching ones are there."""
    started = time.time()
    folder, cache_path = Path(args.features_scores_dir), Path(args.prompts_answers_pkl_file)
    task = recorded_task(args.task_module, cache_path)
    options = filter_options(args)
    settings = {"task_module": args.task_module, "task_settings": task.settings.to_json(), "seed": args.seed,
                "filters": asdict(options), "train_ratio": args.train_ratio,
                "max_prompts": args.max_number_of_prompts_to_analyze, "missing_value": MISSING_VALUE}
    record = StageRecord(STAGE, settings, {"cache of answers (stage 1)": cache_path}, folder / "run_metadata.json")
    if record.is_complete() and not args.force:
        report.line(f"stage 2 is up to date: {folder}")
        _tell(record.summary(), report)
        return
    cache = read_pickle(cache_path, "cache of answers (stage 1)")
    frame = prepare_rows(task.dataset_from_cache(cache), task, args.max_number_of_prompts_to_analyze, args.seed)
    scored = score_seeds(frame, task, report)
    split = split_rows(scored.values, label_codes(frame, task), _groups(frame, task), args.seed)
    metrics = train_metrics(scored, frame, task, split, args.train_ratio, args.seed)
    result = filter_features(scored.values[~split.is_test], metrics, options)
    outputs = write_outputs(folder, frame, scored, split, metrics, result)
    outputs.append(write_task_settings(folder, args.task_module, task))
    summary = {"n_rows": len(frame), "n_candidates": len(scored.features), "n_features": int(result.keep.sum()),
               "split": split.to_json(), "notes": result.notes}
    record.finish(outputs, started=started, summary=summary)
    _tell(summary, report)


def filter_options(args: argparse.Namespace) -> FilterOptions:
    """The filters that the flags ask for."""
    return FilterOptions(
        drop_high_variance=args.drop_high_mad_variance_features, z_threshold=args.z_thresh,
        drop_low_power=args.drop_low_predictive_power_features, min_auc=args.min_auc, min_delta=args.min_delta,
        min_ap_above_base=args.min_ap_above_base, drop_near_duplicates=args.drop_near_duplicate_features,
        correlation_threshold=args.near_duplicate_features_threshold)


def _tell(summary: Mapping[str, Any], report: Report) -> None:
    split = summary["split"]
    report.line(f"{summary['n_rows']} prompts, {split['n_test']} of them held out ({split['n_clusters']} clusters); "
                f"{summary['n_features']} of {summary['n_candidates']} features kept")
    for note in summary["notes"]:
        report.line(f"note: {note}")


# ---------------------------------------------------------------- rows

def prepare_rows(frame: pd.DataFrame, task: FeatureTaskSpec, max_prompts: int, seed: int) -> pd.DataFrame:
    """The rows of the table: prompts once each, in descending order, `row_id` in front.

    `max_prompts` (0: all) draws at random, keeping the share of each label.

    Raises:
        UserError: nothing is left, or a column that the task promises is absent.
    """
    needed = [task.DEFAULT_INPUT, task.DEFAULT_OUTPUT, *task.DEFAULT_TARGETS]
    absent = [name for name in needed if name not in frame.columns]
    if absent:
        raise UserError(f"the cache of answers gives no column {', '.join(absent)}; was it made by the task "
                        f"{task.NAME}?")
    prompts = frame[task.DEFAULT_INPUT]
    frame = frame[prompts.notna() & (prompts != "")].drop_duplicates(task.DEFAULT_INPUT)
    frame = frame.sort_values(task.DEFAULT_INPUT, ascending=False, kind="stable").reset_index(drop=True)
    if 0 < max_prompts < len(frame):
        labels = label_codes(frame, task)
        order = np.lexsort((rng(seed, "stage2", "max_prompts").random(len(frame)), labels))
        picks = (np.arange(max_prompts) * len(frame)) // max_prompts
        frame = frame.iloc[np.sort(order[picks])].reset_index(drop=True)
    if frame.empty:
        raise UserError("the cache of answers holds no prompts; run stage 1 again")
    frame = frame.rename(columns={name: f"dataset_{name}" for name in OWN_COLUMNS if name in frame.columns})
    for name in frame.columns:
        if frame[name].map(lambda value: isinstance(value, dict | list | tuple)).any():
            frame[name] = frame[name].map(lambda value: json_text(value, indent=None))
    frame.insert(0, "row_id", np.arange(len(frame)))
    return frame


def label_codes(frame: pd.DataFrame, task: FeatureTaskSpec) -> np.ndarray:
    """Primary label of each row as 0, 1, or 2 if unknown, int [row]."""
    labels = frame[task.DEFAULT_TARGETS[0]]
    return np.where(labels.isna(), 2, labels.fillna(False).astype(bool).astype(int))


def _groups(frame: pd.DataFrame, task: FeatureTaskSpec) -> np.ndarray | None:
    return frame[task.GROUP_COLUMN].to_numpy(dtype=str) if task.GROUP_COLUMN else None


# ---------------------------------------------------------------- features

def score_seeds(frame: pd.DataFrame, task: FeatureTaskSpec, report: Report) -> ScoredFeatures:
    """The task's own features on every row. One that fails is a bug of the task and stops the run."""
    features = task.seed_features(frame)
    if not features:
        raise UserError(f"the task {task.NAME} has no seed features; it needs proposed ones")
    values = np.empty((len(frame), len(features)), dtype=np.float32, order="F")
    missing = np.zeros(len(features))
    columns = task.native_columns(frame)
    for index, feature in enumerate(report.progress(features, unit="feature", desc="seed features")):
        values[:, index], missing[index] = finite_values(feature.native(columns))
    names = assign_columns(_labels(features), [*frame.columns, *OWN_COLUMNS])
    return ScoredFeatures(features, names, values, missing, ["native"] * len(features))


def finite_values(raw: np.ndarray) -> tuple[np.ndarray, float]:
    """Values [row] as they enter the table, and the share of rows where there was none.

    NaN and infinities count as not applicable; large magnitudes are clipped.
    """
    raw = np.asarray(raw, dtype=np.float64)
    known = np.isfinite(raw)
    return np.where(known, np.clip(raw, -VALUE_LIMIT, VALUE_LIMIT, where=known, out=np.zeros_like(raw)),
                    MISSING_VALUE), float(1 - known.mean())


def train_metrics(scored: ScoredFeatures, frame: pd.DataFrame, task: FeatureTaskSpec, split: Split, train_ratio: float,
                  seed: int) -> FeatureMetrics:
    """Metrics on the labelled TRAIN rows, or on a random `train_ratio` of them (0 or at least 1: all)."""
    labels = label_codes(frame, task)
    rows = np.flatnonzero(~split.is_test & (labels < 2))
    if 0 < train_ratio < 1:
        order = np.lexsort((rng(seed, "stage2", "train_ratio").random(len(rows)), labels[rows]))
        n_picked = max(1, round(train_ratio * len(rows)))
        rows = np.sort(rows[order[(np.arange(n_picked) * len(rows)) // n_picked]])
    return feature_metrics(scored.values[rows], labels[rows] == 1)


# ---------------------------------------------------------------- files

def write_outputs(folder: Path, frame: pd.DataFrame, scored: ScoredFeatures, split: Split, metrics: FeatureMetrics,
                  result: FilterResult) -> list[Path]:
    """Write the table, the catalogue, and why each feature is in or out."""
    kept = np.flatnonzero(result.keep)
    table = pd.DataFrame(scored.values[:, kept], columns=[scored.columns[index] for index in kept])
    ending = pd.DataFrame({"is_test": split.is_test, "split": np.where(split.is_test, "test", "train")})
    write_csv(folder / "scores.csv", pd.concat([frame, table, ending], axis=1))
    write_json(folder / "features.json", [_entry(scored, index) for index in kept])
    write_csv(folder / "feature_metrics.csv", _metrics_table(scored, split, metrics, result))
    write_json(folder / "rejected_features.json", [
        {**_entry(scored, index), "filter": result.reasons[index][0].value, "reason": result.reasons[index][1]}
        for index in sorted(result.reasons)])
    return [folder / name for name in ("scores.csv", "features.json", "feature_metrics.csv", "rejected_features.json")]


def _entry(scored: ScoredFeatures, index: int) -> dict[str, Any]:
    return {**scored.features[index].to_json(), "column": scored.columns[index], "backend": scored.backends[index],
            "missing_share": scored.missing_share[index]}


def _metrics_table(scored: ScoredFeatures, split: Split, metrics: FeatureMetrics, result: FilterResult) -> pd.DataFrame:
    """One row per candidate, in catalogue order; numbers are of TRAIN."""
    summary = moments(scored.values[~split.is_test])
    return pd.DataFrame({
        "number": np.arange(len(scored.features)), "column": scored.columns, "label": _labels(scored.features),
        "origin": [feature.origin.value for feature in scored.features], "backend": scored.backends,
        "missing_share": scored.missing_share, "n_distinct": metrics.n_distinct, "mean": summary.mean,
        "variance": summary.variance, "variance_z": variance_z(summary.variance), "auc": metrics.auc,
        "best_auc": metrics.best_auc, "average_precision": metrics.average_precision,
        "ap_above_base": metrics.ap_above_base, "mean_positive": metrics.mean_positive,
        "mean_negative": metrics.mean_negative, "delta_std": metrics.delta_std, "kept": result.keep,
        "filter": [_reason(result, index)[0] for index in range(len(scored.features))],
        "reason": [_reason(result, index)[1] for index in range(len(scored.features))]})


def _labels(features: Sequence[Feature]) -> list[str]:
    return [feature.label for feature in features]


def _reason(result: FilterResult, index: int) -> tuple[str, str]:
    if index not in result.reasons:
        return "", ""
    filter_, text = result.reasons[index]
    return filter_.value, text
