"""How much of the behaviour neurons with good rules account for: unions of flips, on each scope's own rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from lib.flip_metrics import QualityCut
from lib.flip_rule_tables import ALL_FIT, TEST, best_per_neuron, is_high_quality
from lib.flip_table import FlipTable
from lib.flip_targets import FlipTarget
from lib.rule_metrics import permutation_p_value

N_PERMUTATIONS = 1000
_PUBLISHED_NAME = {FlipTarget.ANY: "any", FlipTarget.C2I: "c2i", FlipTarget.I2C: "i2c"}


@dataclass(frozen=True)
class ScopeFlips:
    """Flips on one scope's rows, and which neurons are high quality there: bool [neuron]."""

    scope: str
    table: FlipTable
    is_high: np.ndarray

    def union(self, target: FlipTarget, members: np.ndarray | None = None) -> int:
        """Rows flipped by at least one of the members (all neurons by default)."""
        flips = self.table.flips(target)
        return int((flips if members is None else flips[members]).any(axis=0).sum())

    def total(self, target: FlipTarget, members: np.ndarray | None = None) -> int:
        """Flips summed over the members."""
        flips = self.table.flips(target)
        return int((flips if members is None else flips[members]).sum())

    def n_evaluated(self, members: np.ndarray | None = None) -> int:
        """Rows whose label is known under the ablation of at least one member."""
        known = self.table.matrix.known
        return int((known if members is None else known[members]).any(axis=0).sum())

    def denominators(self, main_metric: str) -> dict[str, Any]:
        """Eligible rows per direction."""
        return {
            "baseline_metric_col": main_metric,
            "n_eval_baseline_valid": len(self.table.rows),
            "n_eval_baseline_correct": int(self.table.baseline.sum()),
            "n_eval_baseline_incorrect": int((~self.table.baseline).sum()),
        }

    def n_eligible(self, target: FlipTarget) -> int:
        """Rows on which this flip can happen."""
        return int(target.eligible(self.table.baseline).sum())


def scope_flips(table: FlipTable, rules: pd.DataFrame, scope: str, cut: QualityCut) -> ScopeFlips:
    """The flips on the rows that score the scope's rules: held-out ones for `test*`, all for `all_fit`."""
    best = best_per_neuron(rules, scope, cut)
    high = set(best.loc[is_high_quality(best, cut), "neuron_key"]) if len(best) else set()
    is_high = np.array([neuron.key in high for neuron in table.neurons], dtype=bool)
    return ScopeFlips(scope, table if scope == ALL_FIT else table.take(table.rows.is_test), is_high)


def union_p_value(scope: ScopeFlips, target: FlipTarget, random: np.random.Generator) -> float:
    """Chance that as many random candidates flip as many rows together; NaN if none or all are high quality."""
    n_high = int(scope.is_high.sum())
    flips = scope.table.flips(target)
    if not 0 < n_high < len(flips):
        return float("nan")
    null = [flips[random.choice(len(flips), n_high, replace=False)].any(axis=0).sum() for _ in range(N_PERMUTATIONS)]
    return float(permutation_p_value(scope.union(target, scope.is_high), np.array(null)))


def coverage_block(scope: ScopeFlips, cut: QualityCut, main_metric: str, random: np.random.Generator) -> dict[str, Any]:
    """`score_scopes.<scope>` of `high_quality_neuron_flip_coverage.json`."""
    n_high, n_all = int(scope.is_high.sum()), len(scope.is_high)
    everyone: dict[str, Any] = {}
    block: dict[str, Any] = {
        "quality_threshold": cut.threshold_of(scope.scope),
        "n_neurons_high_quality": n_high,
        "frac_neurons_high_quality": n_high / n_all if n_all else None,
        "scope_n_rows": len(scope.table.rows),
        "eligible_denominators": scope.denominators(main_metric),
        "all_rule_bearing_in_scope": everyone,
    }
    ratios: dict[str, Any] = {}
    for target, name in _PUBLISHED_NAME.items():
        union_high, sum_high = scope.union(target, scope.is_high), scope.total(target, scope.is_high)
        union_all, sum_all = scope.union(target), scope.total(target)
        everyone |= {f"union_{name}": union_all, f"sum_{name}": sum_all}
        block[f"flip_{name}"] = {"union_high": union_high, "sum_high": sum_high, "union_all_in_scope": union_all}
        ratios[f"prevalence_{name}"] = _ratio(union_high, scope.n_eligible(target))
        ratios[f"prevalence_all_{name}"] = _ratio(union_all, scope.n_eligible(target))
        ratios[f"coverage_share_{name}"] = _ratio(union_high, union_all)
        ratios[f"overlap_{name}"] = _ratio(sum_high, union_high)
        ratios[f"overlap_all_{name}"] = _ratio(sum_all, union_all)
    everyone["n_eval_any"] = scope.n_evaluated()
    block["ratios"] = ratios
    block["p_values"] = {
        f"perm_union_{name}": union_p_value(scope, target, random) for target, name in _PUBLISHED_NAME.items()
    }
    return block


def _ratio(numerator: int, denominator: int) -> dict[str, Any]:
    return {
        "numerator": numerator,
        "denominator": denominator,
        "percent": 100.0 * numerator / denominator if denominator else None,
    }


def coverage_report(
    scopes: Sequence[ScopeFlips], cut: QualityCut, main_metric: str, random: np.random.Generator
) -> dict[str, Any]:
    """`high_quality_neuron_flip_coverage.json`; the top level repeats the first scope."""
    primary = scopes[0]
    blocks = {scope.scope: coverage_block(scope, cut, main_metric, random) for scope in scopes}
    report: dict[str, Any] = {
        "quality_metric": cut.metric.lower(),
        "quality_metric_label": cut.metric,
        "quality_threshold": cut.threshold_of(primary.scope),
        "quality_thresholds_by_scope": {scope.scope: cut.threshold_of(scope.scope) for scope in scopes},
        "min_dataset_coverage": cut.min_coverage,
        "primary_score_scope": primary.scope,
        "available_score_scopes": [scope.scope for scope in scopes],
        "n_neurons_total": len(primary.is_high),
        "n_neurons_high_quality": blocks[primary.scope]["n_neurons_high_quality"],
        "frac_neurons_high_quality": blocks[primary.scope]["frac_neurons_high_quality"],
        "baseline_metric_col": main_metric,
        "eligible_denominators": primary.denominators(main_metric),
    }
    for target, name in _PUBLISHED_NAME.items():
        union_high, union_all = primary.union(target, primary.is_high), primary.union(target)
        report[f"flip_{name}"] = {
            "union_high": union_high,
            "sum_high": primary.total(target, primary.is_high),
            "union_all": union_all,
            "sum_all": primary.total(target),
            "union_share_of_all": union_high / union_all if union_all else None,
            "eligible_baseline_count": primary.n_eligible(target),
            "n_rows_with_any_eval_all": primary.n_evaluated(),
            "n_rows_with_any_eval_high": primary.n_evaluated(primary.is_high) if primary.is_high.any() else 0,
        }
    report["score_scopes"] = blocks
    report["figure_semantics"] = (
        "all counts of a scope are on that scope's rows: held-out rows for test, every evaluated row for all_fit"
    )
    report["scope_pair_diagnostics"] = _pair_diagnostics({scope.scope: scope.is_high for scope in scopes})
    return report


def _pair_diagnostics(is_high: dict[str, np.ndarray]) -> dict[str, Any]:
    held_out, all_fit = is_high.get(TEST), is_high.get(ALL_FIT)
    if held_out is None or all_fit is None:
        return {}
    return {
        "n_hq_both": int((held_out & all_fit).sum()),
        "n_hq_t_only": int((held_out & ~all_fit).sum()),
        "n_hq_f_only": int((all_fit & ~held_out).sum()),
        "same_hq_neuron_set": bool((held_out == all_fit).all()),
    }


def layer_report(table: FlipTable, scopes: Sequence[ScopeFlips], cut: QualityCut) -> dict[str, Any]:
    """`high_quality_neuron_flip_coverage_by_layer.json`.

    `*_union_all` counts all evaluated rows, `*_union_all_<scope>` and `*_union_high_<scope>` that scope's rows; the
    unsuffixed `high` fields repeat the first scope.
    """
    labels = sorted(
        {neuron.layer_label for neuron in table.neurons},
        key=lambda label: next(neuron.sort_key[:3] for neuron in table.neurons if neuron.layer_label == label),
    )
    everything = ScopeFlips("all_rows", table, np.zeros(len(table.neurons), dtype=bool))
    layers = []
    for position, label in enumerate(labels):
        members = np.array([neuron.layer_label == label for neuron in table.neurons])
        first = next(neuron for neuron in table.neurons if neuron.layer_label == label)
        row: dict[str, Any] = {
            "layer_key": first.key.rpartition("_")[0],
            "layer_sort": position,
            "n_neurons_total": int(members.sum()),
            "n_rows_with_any_eval_all": everything.n_evaluated(members),
        }
        row |= {f"flip_{name}_union_all": everything.union(target, members) for target, name in _PUBLISHED_NAME.items()}
        for scope in scopes:
            row |= _layer_scope(scope, members, f"_{scope.scope}")
        row |= {
            key.removesuffix(f"_{scopes[0].scope}"): value
            for key, value in _layer_scope(scopes[0], members, f"_{scopes[0].scope}").items()
            if "_high" in key
        }
        layers.append(row)
    return {
        "quality_metric": cut.metric.lower(),
        "quality_metric_label": cut.metric,
        "quality_threshold": cut.threshold_of(scopes[0].scope),
        "quality_thresholds_by_scope": {scope.scope: cut.threshold_of(scope.scope) for scope in scopes},
        "min_dataset_coverage": cut.min_coverage,
        "primary_score_scope": scopes[0].scope,
        "available_score_scopes": [scope.scope for scope in scopes],
        "scope_n_rows": {scope.scope: len(scope.table.rows) for scope in scopes},
        "n_rows": len(table.rows),
        "layers": layers,
    }


def _layer_scope(scope: ScopeFlips, members: np.ndarray, suffix: str) -> dict[str, int]:
    high = members & scope.is_high
    row = {
        f"n_neurons_high_quality{suffix}": int(high.sum()),
        f"n_rows_with_any_eval_high{suffix}": scope.n_evaluated(high) if high.any() else 0,
    }
    for target, name in _PUBLISHED_NAME.items():
        row[f"flip_{name}_union_high{suffix}"] = scope.union(target, high)
        row[f"flip_{name}_union_all{suffix}"] = scope.union(target, members)
    return row
