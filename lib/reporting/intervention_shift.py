"""What shifts between two runs that differ in the intervention only: neurons, flips, and high-quality coverage."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lib.cli import UserError, require_dir, rng
from lib.correlation import correlate
from lib.reporting.artifacts import ModelRoot, RunFolder, find_model_roots
from lib.reporting.rules import optional_int
from lib.reporting.scopes import Scope
from lib.reporting.stats import Alternative, bootstrap_mean, sign_test

METRICS = ("flip_any", "c2i", "i2c", "semantic_wrong", "flip_semantic_wrong", "flip_empty", "flip_unparseable")
DIRECTIONS = {
    "flip_any": ("any", "n_eval_baseline_valid", "evaluated rows"),
    "c2i": ("c2i", "n_eval_baseline_correct", "rows with the behaviour before ablation"),
    "i2c": ("i2c", "n_eval_baseline_incorrect", "rows without the behaviour before ablation"),
    "semantic_wrong": ("semantic_wrong", "n_eval_baseline_correct", "rows with the behaviour before ablation"),
}
"""Metric of the coverage file -> (name there, its eligible rows, what those are called)."""
N_BOOTSTRAP = 4000
_KEYS = ["layer_key", "neuron_id"]


@dataclass(frozen=True)
class Side:
    """One of the two runs, with its table of flips per neuron."""

    label: str
    run: RunFolder
    neurons: pd.DataFrame


def load_side(folder: Path, label: str) -> Side:
    """A run from its stats folder.

    Raises:
        UserError: it is not there, or its flip statistics are missing or do not name neurons.
    """
    require_dir(folder, f"the run of {label}", "give a folder stats/<run> that stage 7 has written")
    folder = folder.resolve()
    found = [root for root in find_model_roots(folder.parent) if root.stats_dir == folder.parent]
    root = found[0] if found else ModelRoot("", "", "", folder.parent)
    run = root.run(folder.name)
    reading = run.by_neuron
    if not reading.is_usable or reading.value is None:
        raise UserError(
            f"flip statistics of {label}: {folder / 'flip_stats_by_neuron.csv'}: {reading.reason}; run stage 7 again"
        )
    frame = reading.value.rename(columns={"layer_label": "layer_key"} if "layer_key" not in reading.value else {})
    missing = [name for name in _KEYS if name not in frame]
    if missing and len(frame):
        raise UserError(f"{folder / 'flip_stats_by_neuron.csv'} has no column {', '.join(missing)}; run stage 7 again")
    return Side(label, run, frame.reindex(columns=[*frame.columns, *missing]))


# ---------------------------------------------------------------- neurons


def present_columns(baseline: pd.DataFrame, candidate: pd.DataFrame) -> list[str]:
    """Counts and rates that at least one of the tables has."""
    names = [f"{metric}_{kind}" for metric in METRICS for kind in ("count", "rate")]
    return [name for name in names if name in baseline or name in candidate]


def join_neurons(baseline: pd.DataFrame, candidate: pd.DataFrame) -> pd.DataFrame:
    """One row per neuron of either run; status: overlap, gained (candidate only) or lost (baseline only).

    `delta_*` counts an absent neuron as zero; `paired_delta_*` is empty unless both runs have the neuron.
    """
    columns = present_columns(baseline, candidate)
    parts = []
    for side, frame in (("baseline", baseline), ("candidate", candidate)):
        keys = pd.DataFrame({"layer_key": frame["layer_key"].astype(str), "neuron_id": frame["neuron_id"]})
        values = {
            f"{side}_{name}": pd.to_numeric(frame[name], errors="coerce")
            if name in frame
            else pd.Series(math.nan, index=frame.index)
            for name in ("n_eval", *columns)
        }
        parts.append(keys.assign(**values).drop_duplicates(_KEYS))
    joined = parts[0].merge(parts[1], on=_KEYS, how="outer", indicator=True).sort_values(_KEYS, kind="stable")
    joined.insert(
        2,
        "status",
        joined.pop("_merge").astype(str).map({"both": "overlap", "right_only": "gained", "left_only": "lost"}),
    )
    for name in columns:
        left, right = joined[f"baseline_{name}"], joined[f"candidate_{name}"]
        joined[f"delta_{name}"] = right.fillna(0.0) - left.fillna(0.0)
        joined[f"paired_delta_{name}"] = (right - left).where(joined["status"] == "overlap")
    return joined.reset_index(drop=True)


def neuron_sets(joined: pd.DataFrame) -> dict[str, Any]:
    """How many neurons the runs share."""
    n_overlap, n_gained, n_lost = ((joined["status"] == status).sum() for status in ("overlap", "gained", "lost"))
    union = len(joined)
    return {
        "n_baseline": int(n_overlap + n_lost),
        "n_candidate": int(n_overlap + n_gained),
        "n_overlap": int(n_overlap),
        "n_gained": int(n_gained),
        "n_lost": int(n_lost),
        "jaccard": float(n_overlap / union) if union else None,
    }


def delta_statistics(joined: pd.DataFrame, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """(over shared neurons, over all with absent ones as zero), by metric; "unavailable" without a shared neuron.

    The second has no correlations: between sets that hardly overlap they would be made by the zeros.
    """
    paired: dict[str, Any] = {}
    union: dict[str, Any] = {}
    for metric in METRICS:
        name = f"{metric}_rate"
        if f"delta_{name}" not in joined:
            continue
        both = joined[[f"baseline_{name}", f"candidate_{name}"]].dropna()
        if len(both):
            paired[name] = _deltas(both, seed, name) | _correlations(both)
        else:
            paired[name] = "unavailable: no neuron is in both runs"
        known = joined[[f"baseline_{name}", f"candidate_{name}"]]
        if known.notna().any(axis=None):
            union[name] = _deltas(known.fillna(0.0), seed, f"{name} union")
    return paired, union


def _deltas(pairs: pd.DataFrame, seed: int, label: str) -> dict[str, Any]:
    left, right = (pairs.iloc[:, number].to_numpy(dtype=float) for number in (0, 1))
    delta = right - left
    interval = bootstrap_mean(delta, n_boot=N_BOOTSTRAP, random=rng(seed, "intervention_shift", label))
    return {
        "n": len(delta),
        "baseline_mean": left.mean(),
        "candidate_mean": right.mean(),
        "mean_delta": delta.mean(),
        "median_delta": float(np.median(delta)),
        "mean_abs_delta": np.abs(delta).mean(),
        "max_abs_delta": np.abs(delta).max(),
        "share_higher": (delta > 0).mean(),
        "share_lower": (delta < 0).mean(),
        "share_equal": (delta == 0).mean(),
        "mean_delta_ci95_low": interval.low,
        "mean_delta_ci95_high": interval.high,
        "sign_test_p": sign_test(delta, Alternative.TWO_SIDED),
    }


def _correlations(pairs: pd.DataFrame) -> dict[str, float]:
    found = correlate(pairs.iloc[:, 0], pairs.iloc[:, 1])
    if found is None:
        return {"pearson": math.nan, "spearman": math.nan}
    return {"pearson": found.pearson, "spearman": found.spearman}


# ---------------------------------------------------------------- whole runs


def compare_globals(baseline: RunFolder, candidate: RunFolder) -> dict[str, dict[str, float | None]]:
    """Every number of `flip_stats_global.json`: baseline, candidate, difference, and relative to the baseline."""
    left, right = baseline.flip_global.value or {}, candidate.flip_global.value or {}
    compared = {}
    for name in dict.fromkeys([*left, *right]):
        values = [side.get(name) for side in (left, right)]
        if any(isinstance(value, bool) or not isinstance(value, int | float | None) for value in values):
            continue
        delta = values[1] - values[0] if None not in values else None
        compared[name] = {
            "baseline": values[0],
            "candidate": values[1],
            "delta": delta,
            "relative_delta": delta / values[0] if delta is not None and values[0] else None,
        }
    return compared


def high_quality_rows(side: Side, scope: Scope) -> list[dict[str, Any]]:
    """High-quality neurons and what they flip, one row per kind of flip; missing numbers are None.

    The denominator is the rows of the scope on which the flip can happen.
    """
    coverage, summary = side.run.coverage.value or {}, side.run.summary(scope).value or {}
    block = _scope_block(coverage, scope)
    n_all = optional_int(coverage.get("n_neurons_total"))
    n_all = len(side.neurons) if n_all is None else n_all
    n_high = next(
        (
            count
            for count in (
                optional_int(block.get("n_neurons_high_quality")),
                optional_int(summary.get("n_neurons_quality_ge_threshold")),
            )
            if count is not None
        ),
        None,
    )
    threshold = _threshold(coverage, block, summary, scope)
    rows = []
    for metric, (name, eligible, meaning) in DIRECTIONS.items():
        flips, everyone = block.get(f"flip_{name}") or {}, block.get("all_rule_bearing_in_scope") or {}
        if metric == "semantic_wrong" and not flips:
            continue
        counts = {
            "union_all": everyone.get(f"union_{name}", flips.get("union_all_in_scope", flips.get("union_all"))),
            "union_high": flips.get("union_high"),
            "sum_all": everyone.get(f"sum_{name}", flips.get("sum_all")),
            "sum_high": flips.get("sum_high"),
        }
        denominator = optional_int((block.get("eligible_denominators") or {}).get(eligible))
        if denominator is None:
            denominator = optional_int(flips.get("eligible_baseline_count"))
        all_pct, high_pct = (_percent(counts[key], denominator) for key in ("union_all", "union_high"))
        rows.append(
            {
                "intervention": side.label,
                "metric": metric,
                "identified_neurons": n_all,
                "high_quality_neurons": n_high,
                "high_quality_fraction": n_high / n_all if n_high is not None and n_all else None,
                "quality_metric_label": coverage.get("quality_metric_label") or summary.get("quality_metric_label"),
                "quality_threshold": threshold,
                "score_scope": scope.slug,
                "score_scope_label": scope.label,
                **{key: optional_int(value) for key, value in counts.items()},
                "denominator": denominator,
                "denominator_label": meaning,
                "all_union_pct": all_pct,
                "high_union_pct": high_pct,
                "hq_coverage_share_pct": high_pct,
                "hq_eligible_points_pct": high_pct,
                "hq_union_share_of_all_pct": _percent(counts["union_high"], optional_int(counts["union_all"])),
            }
        )
    return rows


def _scope_block(coverage: dict[str, Any], scope: Scope) -> dict[str, Any]:
    """A scope's part of the coverage file. Files older than such parts speak of the strict scope only."""
    blocks = coverage.get("score_scopes")
    if isinstance(blocks, dict):
        return blocks.get(scope.slug) or {}
    return coverage if scope is Scope.TEST else {}


def _threshold(coverage: dict, block: dict, summary: dict, scope: Scope) -> float | None:
    """The scope's own threshold; that of the file's top level only if it speaks of no other scope."""
    by_scope = coverage.get("quality_thresholds_by_scope") or {}
    candidates = [block.get("quality_threshold"), by_scope.get(scope.slug), summary.get("quality_threshold")]
    if not by_scope and not isinstance(coverage.get("score_scopes"), dict):
        candidates.append(coverage.get("quality_threshold"))
    return next((float(value) for value in candidates if isinstance(value, int | float)), None)


def _percent(part: Any, whole: int | None) -> float | None:
    return 100.0 * part / whole if optional_int(part) is not None and whole else None


def layer_rows(side: Side, scope: Scope) -> list[dict[str, Any]]:
    """Neurons and flips by layer, in percent of the same eligible rows as in `high_quality_rows`."""
    content = side.run.coverage_by_layer.value or {}
    layers = content.get("layers") if isinstance(content.get("layers"), list) else []
    eligible = {row["metric"]: row["denominator"] for row in high_quality_rows(side, scope)}
    rows = []
    for layer in layers:
        row: dict[str, Any] = {
            "intervention": side.label,
            "layer_key": layer.get("layer_key"),
            "layer_sort": layer.get("layer_sort"),
            "score_scope": scope.slug,
            "identified_neurons": layer.get("n_neurons_total"),
            "high_quality_neurons": _of_scope(layer, "n_neurons_high_quality", scope),
        }
        for metric in ("flip_any", "c2i", "i2c"):
            name = DIRECTIONS[metric][0]
            union_all = layer.get(f"flip_{name}_union_all_{scope.slug}")
            if union_all is None and scope is Scope.ALL_FIT:
                # Published files count all evaluated rows, which are this scope's.
                union_all = layer.get(f"flip_{name}_union_all")
            union_high = _of_scope(layer, f"flip_{name}_union_high", scope)
            row |= {
                f"{metric}_union_all": union_all,
                f"{metric}_union_high": union_high,
                f"{metric}_denominator": eligible.get(metric),
                f"{metric}_all_union_pct": _percent(union_all, eligible.get(metric)),
                f"{metric}_high_union_pct": _percent(union_high, eligible.get(metric)),
            }
        rows.append(row)
    return rows


def _of_scope(layer: dict[str, Any], name: str, scope: Scope) -> Any:
    """A field of a scope; without any suffix only in files that know no scope."""
    if f"{name}_{scope.slug}" in layer:
        return layer[f"{name}_{scope.slug}"]
    knows_scopes = any(key.startswith(f"{name}_") for key in layer)
    return layer.get(name) if scope is Scope.TEST and not knows_scopes else None
