"""Gathering a run's rule files into its `rule_combo_metrics_*` tables, summaries and manifest."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lib.artifacts import file_digest, read_csv, read_json, text_digest, write_csv, write_json
from lib.cli import UserError
from lib.flip_metrics import INTERVAL_METRICS, QualityCut, q_values
from lib.flip_targets import FlipTarget
from lib.neurons import Neuron

MANIFEST_NAME = "rule_combo_metrics_manifest.json"
MANIFEST_SIGNATURE = "rule_combo_metrics_from_raw_v1"
TRAIN, TEST, TEST_SELECTED, ALL_FIT = "train", "test", "test_selected", "all_fit"
SCOPE_MEANING = {
    TEST: "chosen on TRAIN, frozen, scored once on TEST: held out",
    TEST_SELECTED: "chosen and scored on TEST: optimistic, for comparison with published numbers only",
    ALL_FIT: "chosen and scored on all evaluated rows: descriptive",
}
_FILE_PREFIXES = (
    (TRAIN, "rule_combo_train_"),
    (TEST_SELECTED, "rule_combo_test_selected_"),
    (ALL_FIT, "rule_combo_all_fit_"),
    (TEST, "rule_combo_"),
)
_SCORES = (
    "P(target=1|fire)",
    "Precision",
    "R(fire|target=1)",
    "F1",
    "MCC",
    "TPR",
    "TNR",
    "BalancedAcc",
    "Acc",
    "dataset_coverage",
    "n_eval",
    "n_pos",
    "n_neg",
    "n_fire",
    "tp",
    "fp",
    "tn",
    "fn",
    "target_prevalence",
    "rule_fire_rate",
)
_SHORT_NAME = {"P(target=1|fire)": "Precision", "R(fire|target=1)": "Recall", "F1(target=1|fire)": "F1"}
INTERVAL_COLUMNS = {
    f"{_SHORT_NAME.get(name, name)}_{end}": f"{name}_{end}" for name in INTERVAL_METRICS for end in ("low95", "high95")
}
"""Interval columns of the metric tables, and their names in rule files."""
_OUR_SCORES = ("baseline_rule", "baseline_rule_MCC", "MCC_gain", "p_value", "inner_cv_MCC")
_ATOM = re.compile(r"[A-Za-z0-9_.]+\s*(?:<=|>=|==|!=|<|>)\s*[-+0-9.eE]+")
_METRIC_COLUMN = {"mcc": "MCC", "f1": "F1", "balanced_accuracy": "BalancedAcc", "tpr": "TPR", "tnr": "TNR"}


def quality_column(metric: str) -> str:
    """Column of a `--rule_quality_metric`."""
    return _METRIC_COLUMN[metric]


@dataclass(frozen=True)
class RuleRun:
    """Where a run's rule files are: `<rules_dir>/<policy>/<neuron key>/rule_combo_*.csv`."""

    rules_dir: Path
    policy: str
    neurons: tuple[Neuron, ...]

    def files(self) -> Iterator[tuple[Neuron, FlipTarget, str, Path]]:
        """(neuron, target, scope, path) of every rule file of this run's neurons, in order."""
        for neuron in self.neurons:
            for target in FlipTarget:
                for scope, prefix in _FILE_PREFIXES:
                    path = self.rules_dir / self.policy / neuron.key / f"{prefix}{target.column(neuron)}.csv"
                    if path.is_file():
                        yield neuron, target, scope, path


def collect_rules(run: RuleRun, cut: QualityCut) -> pd.DataFrame:
    """One row per rule file: published columns, then ours (intervals, gain, chance, the choice made on TRAIN).

    `chosen_on_train` marks, in every scope, the target whose rule was best on TRAIN: the one a neuron is judged by.
    `q_value` corrects the held-out p-values of those over neurons.
    """
    rows = [
        _metric_row(run, rank, neuron, target, scope, path)
        for rank, neuron in enumerate(run.neurons)
        for _, target, scope, path in RuleRun(run.rules_dir, run.policy, (neuron,)).files()
    ]
    columns = _columns()
    if not rows:
        return pd.DataFrame(columns=columns)
    frame = pd.DataFrame(rows)
    frame["chosen_on_train"] = _chosen_on_train(frame)
    tested = (frame["score_scope"] == TEST) & frame["chosen_on_train"]
    frame["q_value"] = q_values(np.where(tested, frame["p_value"].astype(float), np.nan))
    frame["high_quality"] = is_high_quality(frame, cut)
    frame["badge"] = has_badge(frame, cut)
    return frame[columns]


def _columns() -> list[str]:
    return [
        "rule_target_dir",
        "layer_key",
        "neuron_id",
        "neuron_key",
        "flip_target",
        "computed_on",
        "score_scope",
        *_SCORES,
        "expression",
        "rule_len_atoms",
        "rule_len_disjuncts",
        "rule_len_max_atoms_in_disjunct",
        "rule_combo_path",
        "source_filename",
        "source_scope_from_filename",
        "neuron_rank",
        "baseline_subset",
        *INTERVAL_COLUMNS,
        *_OUR_SCORES,
        "target_rows",
        "chosen_on_train",
        "q_value",
        "high_quality",
        "badge",
    ]


def _metric_row(run: RuleRun, rank: int, neuron: Neuron, target: FlipTarget, scope: str, path: Path) -> dict[str, Any]:
    # A rule that never fires is written FALSE, which would be read as a truth value.
    stored = read_csv(path, "rule file (stage 7)", dtype={"expression": str}).iloc[0]
    computed_on = scope if scope in (TRAIN, ALL_FIT) else str(stored.get("computed_on", scope))
    row: dict[str, Any] = {
        "rule_target_dir": run.policy,
        "layer_key": neuron.key.rpartition("_")[0],
        "neuron_id": neuron.index,
        "neuron_key": neuron.key,
        "flip_target": target.column(neuron),
        "computed_on": computed_on,
        "score_scope": computed_on,
    }
    row |= {name: stored.get(name, np.nan) for name in (*_SCORES, *_OUR_SCORES)}
    row |= {name: stored.get(stored_name, np.nan) for name, stored_name in INTERVAL_COLUMNS.items()}
    row["F1"] = stored.get("F1(target=1|fire)", np.nan)
    row["Precision"] = stored.get("Precision", row["P(target=1|fire)"])
    expression = str(stored.get("expression", "FALSE"))
    return (
        row
        | rule_lengths(expression)
        | {
            "expression": expression,
            "rule_combo_path": path.as_posix(),
            "source_filename": path.name,
            "source_scope_from_filename": scope,
            "neuron_rank": rank,
            "baseline_subset": "all",
            "target_rows": target.rows_name,
        }
    )


def rule_lengths(expression: str) -> dict[str, int]:
    """Comparisons, disjuncts, and comparisons of the longest disjunct of a rule's text."""
    pieces = [len(_ATOM.findall(piece)) for piece in re.split(r"\s+OR\s+|\|+", expression)]
    return {
        "rule_len_atoms": sum(pieces),
        "rule_len_disjuncts": len(pieces) if sum(pieces) else 0,
        "rule_len_max_atoms_in_disjunct": max(pieces),
    }


def _chosen_on_train(frame: pd.DataFrame) -> np.ndarray:
    """Mask [row] of the target that speaks for its neuron, in every scope; TRAIN alone decides.

    First come targets whose rule beats the rule that only knows the baseline label, then higher cross-validated (in
    older files: plain) MCC. Otherwise a neuron that breaks everything would speak through "it was right before".
    """
    train = frame[frame["score_scope"] == TRAIN]
    score = train["inner_cv_MCC"].astype(float).fillna(train["MCC"].astype(float))
    gains = score > train["baseline_rule_MCC"].astype(float).fillna(0.0)
    order = train.assign(gains=gains, score=score).sort_values(
        ["gains", "score"], ascending=False, kind="stable", na_position="last"
    )
    chosen = set(order.drop_duplicates("neuron_key")["flip_target"])
    return frame["flip_target"].isin(chosen).to_numpy()


def is_high_quality(frame: pd.DataFrame, cut: QualityCut) -> np.ndarray:
    """Mask [row]: the metric reaches its scope's threshold and the rule covers enough rows."""
    threshold = frame["score_scope"].map(cut.threshold_of).astype(float)
    return (_covering(frame, cut) & (frame[cut.metric].astype(float) >= threshold)).to_numpy()


def has_badge(frame: pd.DataFrame, cut: QualityCut) -> np.ndarray:
    """Mask [row]: high quality on held-out rows, and so beyond sampling error, chance, and the baseline rule."""
    return (
        is_high_quality(frame, cut)
        & (frame["score_scope"] == TEST)
        & frame["chosen_on_train"].astype(bool)
        & (frame["MCC_low95"].astype(float) >= cut.badge_lower_bound)
        & (frame["q_value"] <= cut.badge_q)
        & (frame["MCC_gain"].astype(float) > 0)
    ).to_numpy()


def _covering(frame: pd.DataFrame, cut: QualityCut) -> pd.Series:
    coverage = frame["dataset_coverage"].astype(float)
    return coverage >= cut.min_coverage if cut.min_coverage > 0 else pd.Series(True, index=frame.index)


def best_per_neuron(frame: pd.DataFrame, scope: str, cut: QualityCut) -> pd.DataFrame:
    """The row that speaks for each neuron in a scope, after the coverage floor, in candidate order.

    Held out, it is the target chosen on TRAIN: taking the best of three there would be choosing on TEST. In the
    descriptive scopes it is the best of the three, as published.
    """
    rows = frame[(frame["score_scope"] == scope) & _covering(frame, cut)]
    if scope == TEST:
        rows = rows[rows["chosen_on_train"].astype(bool)]
    ranked = rows.sort_values([cut.metric, "MCC"], ascending=False, kind="stable", na_position="last")
    return ranked.drop_duplicates("neuron_key").sort_values("neuron_rank", kind="stable").reset_index(drop=True)


def write_rule_tables(
    stats_dir: Path,
    run: RuleRun,
    frame: pd.DataFrame,
    cut: QualityCut,
    scopes: Sequence[str],
    *,
    topk: int,
    stats_dirname: str,
) -> list[Path]:
    """All `rule_combo_metrics_*` files. A scope without rows gets tables with a header only: zero is not missing."""
    written: list[Path] = []

    def put(name: str, table: pd.DataFrame) -> None:
        write_csv(stats_dir / name, table)
        written.append(stats_dir / name)

    put("rule_combo_metrics_all_scopes.csv", frame)
    for scope in scopes:
        rows = frame[frame["score_scope"] == scope].sort_values(
            ["neuron_rank", cut.metric, "MCC"], ascending=[True, False, False], kind="stable"
        )
        best = best_per_neuron(frame, scope, cut)
        top = best.sort_values(cut.metric, ascending=False, kind="stable").head(topk)
        tables = {"all": rows, "best_per_neuron": best, f"top_{topk}": top}
        for name, table in tables.items():
            put(f"rule_combo_metrics_{scope}_{name}.csv", table)
            if scope == TEST:
                put(f"rule_combo_metrics_{name}.csv", table)
        if scope == ALL_FIT:
            put("rule_combo_metrics_all_fit.csv", rows)
    write_json(stats_dir / MANIFEST_NAME, _manifest(run, cut, scopes, stats_dirname))
    return [*written, stats_dir / MANIFEST_NAME]


def check_manifest(stats_dir: Path, run: RuleRun) -> None:
    """Refuse rule files that are not those a finished run gathered. Neurons' folders are shared by runs.

    Raises:
        UserError: a rule file of the run's neurons has changed, is gone, or is new since its manifest was written.
    """
    manifest = stats_dir / MANIFEST_NAME
    if not manifest.is_file():
        return
    listed = {
        str(entry["path"]): str(entry["sha256"])
        for entry in read_json(manifest, "manifest of the rules")["raw_rule_combo_files"]
        if Path(entry["path"]).parent.as_posix() in {f"{run.policy}/{neuron.key}" for neuron in run.neurons}
    }
    present = {path.relative_to(run.rules_dir).as_posix(): file_digest(path) for *_, path in run.files()}
    unlike = sorted(name for name in {*listed, *present} if listed.get(name) != present.get(name))
    if unlike:
        raise UserError(
            f"{len(unlike)} rule files below {run.rules_dir / run.policy} are not those of {manifest} ({unlike[0]}): "
            "another run has fitted these neurons since; run stage 7 again without *_only (answers are kept)"
        )


def _manifest(run: RuleRun, cut: QualityCut, scopes: Sequence[str], stats_dirname: str) -> dict[str, Any]:
    records = [
        {"path": path.relative_to(run.rules_dir).as_posix(), "size": path.stat().st_size, "sha256": file_digest(path)}
        for *_, path in run.files()
    ]
    return {
        "signature": MANIFEST_SIGNATURE,
        "raw_rule_combo_digest": text_digest(records),
        "n_raw_rule_combo_files": len(records),
        "raw_rule_combo_files": records,
        "generator": "7_refine_neuron_anchored_rules.py",
        "stats_dirname": stats_dirname,
        "policy": run.policy,
        "quality_metric": cut.metric,
        "min_dataset_coverage_used_for_best_rows": cut.min_coverage,
        "score_scopes_written": list(scopes),
        "score_scope_meaning": {scope: SCOPE_MEANING[scope] for scope in scopes},
    }


def scope_summary(frame: pd.DataFrame, scope: str, cut: QualityCut, quantiles: Sequence[float]) -> dict[str, Any]:
    """`rule_metrics_summary_<scope>.json`."""
    rows = frame[frame["score_scope"] == scope]
    best = best_per_neuron(frame, scope, cut)
    n_high = int(is_high_quality(best, cut).sum()) if len(best) else 0
    metric = next(name for name, column in _METRIC_COLUMN.items() if column == cut.metric)
    summary: dict[str, Any] = {
        "score_scope": scope,
        "score_scope_meaning": SCOPE_MEANING[scope],
        "n_rule_combo_files": int(_covering(rows, cut).sum()),
        "n_rule_combo_files_all_scopes_before_coverage_filter": len(frame),
        "n_rule_combo_files_all_scopes_after_coverage_filter": int(_covering(frame, cut).sum()),
        "min_dataset_coverage": cut.min_coverage,
        "n_rule_combo_files_removed_by_coverage_filter": int((~_covering(rows, cut)).sum()),
        "n_neurons_with_rules": len(best),
        "quality_metric": metric,
        "quality_metric_label": cut.metric,
        "quality_threshold": cut.threshold_of(scope),
        "n_neurons_quality_ge_threshold": n_high,
        "frac_neurons_quality_ge_threshold": n_high / len(best) if len(best) else None,
        "n_neurons_with_badge": int(has_badge(best, cut).sum()) if scope == TEST and len(best) else 0,
        "quantiles": list(quantiles),
    }
    for name in (
        "MCC",
        "F1",
        "TPR",
        "TNR",
        "BalancedAcc",
        "rule_len_atoms",
        "dataset_coverage",
        "n_eval",
        "n_pos",
        "n_neg",
        "n_fire",
        "target_prevalence",
        "rule_fire_rate",
        "MCC_gain",
    ):
        summary[name] = _distribution(best[name].astype(float).to_numpy(), quantiles)
    return summary


def _distribution(values: np.ndarray, quantiles: Sequence[float]) -> dict[str, Any]:
    finite = values[np.isfinite(values)]
    if not finite.size:
        return {"n": 0, **dict.fromkeys(("mean", "median", "q_lo", "q_med", "q_hi", "min", "max"))}
    low, middle, high = np.quantile(finite, quantiles)
    return {
        "n": int(finite.size),
        "mean": float(finite.mean()),
        "median": float(np.median(finite)),
        "q_lo": float(low),
        "q_med": float(middle),
        "q_hi": float(high),
        "min": float(finite.min()),
        "max": float(finite.max()),
    }
