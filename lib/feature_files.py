"""The files of stage 2: the table, the catalogue, and what happened to every candidate."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lib.artifacts import without_formulas, write_csv, write_json
from lib.feature_filters import FeatureMetrics, Filter, FilterResult, variance_z
from lib.feature_moments import moments
from lib.feature_proposals import Proposals, Rejected
from lib.feature_representation import Origin
from lib.feature_scoring import ScoredFeatures
from lib.feature_split import Split
from lib.task_spec import FeatureTaskSpec


@dataclass(frozen=True)
class FeatureTable:
    """All that stage 2 found."""

    frame: pd.DataFrame
    scored: ScoredFeatures
    columns: list[str]
    """Column name of each candidate."""
    split: Split
    metrics: FeatureMetrics
    filtered: FilterResult
    proposals: Proposals

    @property
    def kept(self) -> np.ndarray:
        """Numbers of the kept candidates."""
        return np.flatnonzero(self.filtered.keep)

    @property
    def in_table(self) -> np.ndarray:
        """Numbers of the candidates with a column in `scores.csv`: the kept ones, and the task's own constant ones.

        That a seed feature is constant says something of the data, not of the feature: it stays where a reader looks
        for it. It is not in `features.json`, so no later stage uses it.
        """
        scored = self.scored
        constant_seeds = [index for index, (filter_, _) in self.filtered.reasons.items()
                          if filter_ is Filter.CONSTANT and scored.features[index].origin is Origin.SEED]
        return np.union1d(self.kept, np.array(constant_seeds, dtype=int))

    @property
    def rejected_proposals(self) -> list[Rejected]:
        """Proposals that were never scored, or failed when they were."""
        failed = [Rejected(feature.label, feature.description, feature.python_src, reason)
                  for feature, reason in self.scored.rejected]
        return self.proposals.rejected + failed


def write_outputs(folder: Path, table: FeatureTable, task: FeatureTaskSpec, *, plots: bool) -> list[Path]:
    """Write everything; the paths, for the run's record."""
    scored, split = table.scored, table.split
    values = pd.DataFrame(scored.values[:, table.in_table], columns=[table.columns[index] for index in table.in_table])
    ending = pd.DataFrame({"is_test": split.is_test, "split": np.where(split.is_test, "test", "train")})
    write_csv(folder / "scores.csv", pd.concat([table.frame, values, ending], axis=1))
    write_json(folder / "features.json", [_entry(table, index) for index in table.kept])
    metrics = metrics_table(table)
    write_csv(folder / "feature_metrics.csv", without_formulas(metrics))
    write_json(folder / "rejected_features.json", [
        *({**_entry(table, index), "filter": filter_.value, "reason": reason}
          for index, (filter_, reason) in sorted(table.filtered.reasons.items())),
        *(rejected.to_json() for rejected in table.rejected_proposals)])
    names = ["scores.csv", "features.json", "feature_metrics.csv", "rejected_features.json"]
    paths = [folder / name for name in names]
    if plots:
        from lib.feature_report import write_report

        paths += write_report(folder, table, metrics, task)
    return paths


def _entry(table: FeatureTable, index: int) -> dict[str, Any]:
    scored = table.scored
    return {**scored.features[index].to_json(), "column": table.columns[index], "backend": scored.backends[index],
            "missing_share": float(scored.missing_share[index])}


def metrics_table(table: FeatureTable) -> pd.DataFrame:
    """One row per candidate, in catalogue order; numbers are of TRAIN."""
    scored, metrics = table.scored, table.metrics
    summary = moments(scored.values[~table.split.is_test])
    reasons = [table.filtered.reasons.get(index) for index in range(len(scored.features))]
    return pd.DataFrame({
        "number": np.arange(len(scored.features)), "column": table.columns,
        "label": [feature.label for feature in scored.features],
        "origin": [feature.origin.value for feature in scored.features], "backend": scored.backends,
        "missing_share": scored.missing_share, "n_distinct": metrics.n_distinct, "mean": summary.mean,
        "variance": summary.variance, "variance_z": variance_z(summary.variance), "auc": metrics.auc,
        "best_auc": metrics.best_auc, "average_precision": metrics.average_precision,
        "ap_above_base": metrics.ap_above_base, "mean_positive": metrics.mean_positive,
        "mean_negative": metrics.mean_negative, "delta_std": metrics.delta_std, "kept": table.filtered.keep,
        "filter": [found[0].value if found else "" for found in reasons],
        "reason": [found[1] if found else "" for found in reasons]})
