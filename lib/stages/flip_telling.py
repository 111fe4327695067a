"""What stage 7 says at its end: a summary that is stored with the run, and the lines made of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from lib.cli import Report
from lib.flip_measuring import FlipMeasurement
from lib.flip_rules import TargetStatus

N_SHOWN = 5
_RULE_COLUMNS = ["neuron", "direction", "rule", "MCC", "MCC_low95", "MCC_high95", "badge"]


def run_summary(
    measurement: FlipMeasurement, statuses: Sequence[TargetStatus], anchored: pd.DataFrame | None
) -> dict[str, Any]:
    """The run in numbers; `anchored` is None if rules were not gathered."""
    table, controls = measurement.table, measurement.controls
    found = pd.DataFrame(columns=_RULE_COLUMNS) if anchored is None else anchored
    return {
        "n_neurons": len(table.neurons),
        "n_rows": len(table.rows),
        "rows_by_role": table.rows.counts(),
        "no_op": controls["no_op"],
        "baseline": controls["baseline"],
        "random_flip_rate": controls["random_neurons"].get("flip_any_rate"),
        "fits_by_status": dict(sorted(Counter(status.status for status in statuses).items())),
        "n_failed_fits": sum(status.failed for status in statuses),
        "failures": [f"{status.flip_target}: {status.reason}" for status in statuses if status.failed],
        "n_high_quality": int(found["high_quality"].sum()) if "high_quality" in found else 0,
        "n_badges": int(found["badge"].sum()) if "badge" in found else 0,
        "joint": measurement.joint["test"] if measurement.joint else None,
        "best_rules": found.reindex(columns=_RULE_COLUMNS).head(N_SHOWN).to_dict("records"),
    }


def tell_run(summary: Mapping[str, Any], report: Report) -> None:
    """Print a run's summary."""
    line = f"flips of {summary['n_neurons']} neurons on {summary['n_rows']} prompts"
    line += f"; a no-op edit flips {summary['no_op']['n_flips']}"
    if summary["random_flip_rate"] is not None:
        line += f", random neurons {100 * summary['random_flip_rate']:.1f} %"
    report.line(line)
    n_left_out = summary["baseline"]["n_labels_unlike_stage_1"]
    if n_left_out:
        report.line(f"{n_left_out} prompts are left out: their label before ablation is not that of stage 1")
    if summary["fits_by_status"]:
        fits = ", ".join(f"{count} {status}" for status, count in summary["fits_by_status"].items())
        quality = f"{summary['n_high_quality']} neurons of high quality on TEST, {summary['n_badges']} with badge (*)"
        report.line(f"rules: {fits}; {quality}")
    tell_rules(summary["best_rules"], report)
    if summary["joint"]:
        _tell_joint(summary["joint"], report)
    for failure in summary["failures"]:
        report.line(f"failed: {failure}")


def tell_rules(rules: Sequence[Mapping[str, Any]], report: Report) -> None:
    """Print the best rules, one line each."""
    for rule in rules[:N_SHOWN]:
        interval = f"[{_decimal(rule['MCC_low95'])}, {_decimal(rule['MCC_high95'])}]"
        score = f"TEST MCC {_decimal(rule['MCC'])} {interval}{' *' if rule['badge'] else ''}"
        report.line(f"  {rule['neuron']} {rule['direction']} when {rule['rule']}: {score}")


def _tell_joint(joint: Mapping[str, Any], report: Report) -> None:
    parts = []
    for side, change in (("positive", "lost"), ("negative", "gained")):
        random = _share(np.mean(joint[f"share_{side}_{change}_random"]))
        share = _share(joint[f"share_{side}_{change}"])
        parts.append(f"{share} of {joint[f'n_baseline_{side}']} {side}s {change} (random {random})")
    report.line(f"all together, held out: {', '.join(parts)}")


def _share(value: float | None) -> str:
    return "-" if value is None or np.isnan(value) else f"{100 * value:.1f} %"


def _decimal(value: float | None) -> str:
    return "-" if value is None or np.isnan(value) else f"{value:.2f}"
