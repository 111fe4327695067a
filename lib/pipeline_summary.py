"""The summary at the end of a pipeline run: read from the artifacts, shown on the terminal, written nowhere.

A part whose stage found nothing says so; a part whose file is missing is said to be missing.
"""

from __future__ import annotations

import csv
import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib.artifacts import expecting, read_json
from lib.cli import Report, UserError
from lib.neurons import parse_neuron
from lib.run_names import REGIMES, RunPaths

MAX_RULE_TEXT = 100
MAX_NEURONS = 10
HIGH_QUALITY_MCC = 0.70
REGIME_MEANING = {"positive": "behaviour holds before ablation", "negative": "behaviour does not hold before ablation"}
DIRECTIONS = {"flip_c2i_": "true -> false", "flip_i2c_": "false -> true", "flip_": "either way"}


def print_summary(paths: RunPaths, report: Report) -> None:
    """Print every part; `paths` must be readable from the present working folder."""
    report.heading(f"{paths.task} on {paths.ai_model}")
    for title, part in (("Behaviour", _behaviour), ("Rules of the behaviour", _rules),
                        ("Candidate neurons", _candidates), ("Agonist neurons", _agonists),
                        ("Flips of the agonists", _flips), ("Neuron-anchored rules", _anchored_rules)):
        report.line(f"\n{title}")
        try:
            lines = part(paths)
        except UserError as error:
            lines = [f"not available: {error}"]
        for line in lines:
            report.line(f"  {line}")
    report.line("\nFiles")
    for what, path in (("behaviour, features", paths.features_dir), ("rules", paths.rules_dir),
                       ("tested groups, agonists", paths.agonists_dir), ("flips, anchored rules", paths.stats_dir),
                       ("the best of these, to read", paths.stats_dir / "anchored_rules.md")):
        report.line(f"  {what:<26} {_shown(path)}")


# ---------------------------------------------------------------- the parts

def _behaviour(paths: RunPaths) -> list[str]:
    """Number of prompts, share of each target, and the task's own break-downs."""
    stats = read_json(paths.features_dir / "dataset_stats.json", "behaviour statistics (stage 1)")
    lines = [f"{stats.get('n_examples', 0):,} prompts; " + ", ".join(
        f"{key.removeprefix('pct_')} {_percent(value)}" for key, value in stats.items()
        if key.startswith("pct_") and value is not None)]
    for key, groups in stats.items():
        if "_by_" in key and isinstance(groups, dict) and 0 < len(groups) <= MAX_NEURONS:
            parts = [f"{name} {_percent(_rate_of(group))}" for name, group in groups.items()]
            lines.append(f"{key.replace('_', ' ')}: {', '.join(parts)}")
    return lines


def _rules(paths: RunPaths) -> list[str]:
    """The rule chosen on TRAIN for each target, with its TEST score."""
    lines = []
    for path in sorted(paths.rules_dir.glob("rule_combo_train_*.csv")):
        target = path.stem.removeprefix("rule_combo_train_")
        if target.endswith("_fake") != paths.choices.incorrect_rules:
            continue
        test_path = path.with_name(f"rule_combo_{target}.csv")
        scores = next(iter(_rows(test_path if test_path.is_file() else path)), {})
        scope = "TEST" if test_path.is_file() else "TRAIN"
        expression = scores.get("expression") or "FALSE"
        if expression == "FALSE":
            lines.append(f"{target}: no rule better than chance")
        else:
            lines.append(f"{target}: {_rule_text(expression)}")
            lines.append(f"    {scope} MCC {_number(scores, 'MCC')}, precision {_number(scores, 'P(target=1|fire)')}, "
                         f"recall {_number(scores, 'TPR')}, covers {_percent(_float(scores, 'dataset_coverage'))}")
    return lines or ["none"]


def _candidates(paths: RunPaths) -> list[str]:
    """What was kept for each rule or cluster, and whether the order of the scores is better than chance."""
    path = paths.circuits_dir / "run_metadata.json"
    record = read_json(path, "candidate neurons (stage 5)")
    with expecting("the record of a finished run", path):
        return [line.strip() for line in record["summary"]["lines"]] or ["none"]


def _agonists(paths: RunPaths) -> list[str]:
    """Per regime: how many, by how many group tests, and where."""
    lines = []
    for regime in REGIMES:
        folder = paths.regime_dir(regime)
        found = read_json(folder / "neuron_buckets.json", "agonists (stage 6)").get("non_catastrophic_agonists", {})
        circuits = read_json(folder / "rule_knockout.json", "tested groups (stage 6)")
        lines.append(f"{regime} baseline ({REGIME_MEANING[regime]}): {len(found)} agonists")
        for circuit in circuits:
            lines.append(f"    {'rule' if circuit.get('cluster_index') is None else 'cluster'} "
                         f"{circuit.get('circuit_id')}: {_search_cost(circuit)}")
    return lines


def _search_cost(circuit: dict[str, Any]) -> str:
    """How many groups were tested for one rule or cluster; older files know less."""
    if circuit.get("status") != "ok":
        return f"skipped, {circuit.get('reason')}"
    cost = circuit.get("search_cost")
    if not cost:
        return f"{circuit.get('n_ablation_groups', 0):,} group tests"
    return (f"{cost['n_tests']:,} group tests for {cost['n_candidates']:,} candidates, "
            f"{_percent(cost['share_of_single_tests'])} of the work of testing each alone")


def _flips(paths: RunPaths) -> list[str]:
    """Flip rates of the agonists on all evaluated datapoints, layer by layer."""
    neurons = [_Flips.from_row(row) for row in _rows(paths.stats_dir / "flip_stats_by_neuron.csv")]
    if not neurons:
        return ["no agonist was found, so nothing flips"]
    by_layer: dict[str, list[_Flips]] = defaultdict(list)
    for neuron in neurons:
        by_layer[neuron.label].append(neuron)
    lines = ["layer   agonists  mean flip rate  strongest"]
    for label in sorted(by_layer, key=lambda name: parse_neuron(f"{name}:0").sort_key):
        group = by_layer[label]
        best = max(group, key=lambda item: item.rate)
        mean = sum(item.rate for item in group) / len(group)
        lines.append(f"{label:<8}{len(group):>8}{_percent(mean):>16}  {best.name} {_percent(best.rate)} "
                     f"({best.true_to_false} true -> false, {best.false_to_true} false -> true, of {best.n:,})")
    return lines


def _anchored_rules(paths: RunPaths) -> list[str]:
    """The best rule of each neuron by TEST MCC; the rule was chosen on TRAIN only."""
    neurons = list(_rows(paths.stats_dir / "flip_stats_by_neuron.csv"))
    if not neurons:
        return ["no agonist was found, so there is nothing to anchor"]
    path = paths.stats_dir / "rule_combo_metrics_test_best_per_neuron.csv"
    rows = list(_rows(path)) if path.is_file() else []
    if not rows:
        return ["no neuron has a rule that was scored on held-out datapoints"]
    rows.sort(key=lambda row: (-_rank(_float(row, "MCC")), row["neuron_key"]))
    n_good = sum(_rank(_float(row, "MCC")) >= HIGH_QUALITY_MCC for row in rows)
    names = {f"{row['layer_key']}_{row['neuron_id']}": row["neuron"] for row in neurons}
    lines = [f"chosen on TRAIN, scored on TEST: {n_good} of {len(rows)} neurons with MCC >= {HIGH_QUALITY_MCC:.2f}"]
    for row in rows[:MAX_NEURONS]:
        direction = next(text for prefix, text in DIRECTIONS.items() if row["flip_target"].startswith(prefix))
        lines.append(f"{names.get(row['neuron_key'], row['neuron_key'])} flips {direction} when "
                     f"{_rule_text(row['expression'])}")
        lines.append(f"    TEST MCC {_number(row, 'MCC')}, precision {_number(row, 'Precision')}, "
                     f"recall {_number(row, 'TPR')}; flips {_count(row, 'n_pos')} of {_count(row, 'n_eval')} "
                     "held-out datapoints")
    if len(rows) > MAX_NEURONS:
        lines.append(f"... and {len(rows) - MAX_NEURONS} more in {path.name}")
    return lines


@dataclass(frozen=True)
class _Flips:
    """One row of `flip_stats_by_neuron.csv`."""

    label: str
    name: str
    n: int
    true_to_false: int
    false_to_true: int
    rate: float

    @classmethod
    def from_row(cls, row: dict[str, str]) -> _Flips:
        return cls(row["layer_label"], row["neuron"], int(float(row["n_eval"])), int(float(row["c2i_count"])),
                   int(float(row["i2c_count"])), _rank(_float(row, "flip_any_rate")))


# ---------------------------------------------------------------- reading and showing

def _rows(path: Path) -> Iterable[dict[str, str]]:
    """Rows of a CSV file, values as text; `lib.artifacts.read_csv` would load pandas for a handful of rows."""
    try:
        with open(path, encoding="utf-8", newline="") as handle:
            return list(csv.DictReader(handle))
    except FileNotFoundError:
        raise UserError(f"{path} is not there") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read ({error})") from None


def _float(row: dict[str, str], name: str) -> float:
    """A number of a row; NaN if it is empty or absent."""
    try:
        return float(row.get(name) or "nan")
    except ValueError:
        return math.nan


def _rank(value: float) -> float:
    return -math.inf if math.isnan(value) else value


def _number(row: dict[str, str], name: str) -> str:
    value = _float(row, name)
    return "-" if math.isnan(value) else f"{value:.2f}"


def _count(row: dict[str, str], name: str) -> str:
    value = _float(row, name)
    return "-" if math.isnan(value) else f"{int(value):,}"


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %" if math.isfinite(value) else "-"


def _rate_of(group: Any) -> float:
    """The rate in a group of the statistics: a number, or an object with `accuracy` or `rate`."""
    if isinstance(group, dict):
        group = group.get("accuracy", group.get("rate"))
    return float(group) if isinstance(group, int | float) else math.nan


def _rule_text(expression: str) -> str:
    from lib.text_and_rules import parse_rule

    text = parse_rule(expression).display()
    return text if len(text) <= MAX_RULE_TEXT else f"{text[:MAX_RULE_TEXT - 4]} ..."


def _shown(path: Path) -> str:
    """The path from the present working folder, if it is below."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
