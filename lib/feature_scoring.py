"""Features on every row, as one float32 matrix: seeds natively on whole columns, proposed ones in the sandbox."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from lib.artifacts import plain
from lib.cli import Report, UserError
from lib.feature_representation import MISSING_VALUE, VALUE_LIMIT, Feature
from lib.feature_sandbox import Row, SandboxChain

if TYPE_CHECKING:
    import pandas as pd

    from lib.task_spec import FeatureTaskSpec

N_TRIED_ROWS = 50
"""TRAIN rows on which a proposal is tried as soon as it comes, so that the next question can say what was wrong."""


@dataclass(frozen=True)
class ScoredFeatures:
    """Features with their values on every row."""

    features: list[Feature]
    values: np.ndarray
    """float32 [row, feature], missing replaced by `MISSING_VALUE`"""
    missing_share: np.ndarray
    """[feature] share of rows where the feature does not apply or failed"""
    backends: list[str]
    """What computed each feature."""
    rejected: list[tuple[Feature, str]] = field(default_factory=list)
    """Features that could not be computed, and why."""

    def joined(self, other: ScoredFeatures) -> ScoredFeatures:
        """Both sets, this one first."""
        return ScoredFeatures(self.features + other.features, np.hstack([self.values, other.values]),
                              np.concatenate([self.missing_share, other.missing_share]),
                              self.backends + other.backends, self.rejected + other.rejected)


def finite_values(raw: np.ndarray) -> tuple[np.ndarray, float]:
    """Values [row] as they enter the table, and the share of rows where there was none.

    NaN and infinities count as not applicable; large magnitudes are clipped.
    """
    raw = np.asarray(raw, dtype=np.float64)
    known = np.isfinite(raw)
    clipped = np.clip(np.where(known, raw, MISSING_VALUE), -VALUE_LIMIT, VALUE_LIMIT)
    return clipped, float(1 - known.mean())


def score_seeds(frame: pd.DataFrame, task: FeatureTaskSpec, report: Report) -> ScoredFeatures:
    """The task's own features on every row. One that fails is a bug of the task and stops the run."""
    features = task.seed_features(frame)
    values = np.empty((len(frame), len(features)), dtype=np.float32, order="F")
    missing = np.zeros(len(features))
    columns = task.native_columns(frame) if features else {}
    for index, feature in enumerate(report.progress(features, unit="feature", desc="seed features")):
        if feature.native is None:
            raise UserError(f"the seed feature {feature.label!r} of the task {task.NAME} has no native function")
        values[:, index], missing[index] = finite_values(feature.native(columns))
    return ScoredFeatures(features, values, missing, ["native"] * len(features))


def sandbox_rows(frame: pd.DataFrame, task: FeatureTaskSpec) -> list[Row]:
    """What feature functions get: each row's prompt and `info`, plain values only."""
    return [(row[task.DEFAULT_INPUT], plain(task.parse_prompt_row(row))) for row in frame.to_dict("records")]


def score_proposals(features: Sequence[Feature], rows: Sequence[Row], sandbox: SandboxChain, n_workers: int,
                    report: Report) -> ScoredFeatures:
    """Proposed features on every row; those that fail on the whole table are set aside."""
    kept: list[Feature] = []
    columns: list[np.ndarray] = []
    missing: list[float] = []
    backends: list[str] = []
    rejected: list[tuple[Feature, str]] = []
    with ThreadPoolExecutor(n_workers) as pool:
        results = pool.map(lambda feature: sandbox.evaluate(feature.python_src, rows), features)
        bar = report.progress(results, total=len(features), unit="feature", desc="proposed features")
        for feature, result in zip(features, bar, strict=True):
            if result.rejection is not None:
                rejected.append((feature, result.rejection))
                continue
            values, share = finite_values(result.values)
            kept.append(feature)
            columns.append(values.astype(np.float32))
            missing.append(share)
            backends.append(result.backend.value)
    matrix = np.stack(columns, axis=1) if columns else np.empty((len(rows), 0), dtype=np.float32)
    return ScoredFeatures(kept, matrix, np.array(missing), backends, rejected)
