"""Writing a run's statistics, rule tables, coverage files and figures. Needs finished files, never a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from lib.artifacts import without_formulas, write_csv, write_json
from lib.cli import rng
from lib.flip_answer_log import AnswerLog
from lib.flip_markdown import RunFacts, write_page
from lib.flip_metrics import QualityCut
from lib.flip_plots import write_coverage_figure, write_flip_bars, write_layer_figure, write_rule_distributions
from lib.flip_quality import coverage_report, layer_report, scope_flips
from lib.flip_report import anchored_rules
from lib.flip_rule_tables import (
    ALL_FIT,
    TEST,
    TEST_SELECTED,
    RuleRun,
    best_per_neuron,
    collect_rules,
    scope_summary,
    write_rule_tables,
)
from lib.flip_table import FlipTable, global_statistics, neuron_statistics
from lib.scores_table import ScoresTable

_SUMMARIES = ("rule_combo_metrics_*", "rule_metrics_*", "high_quality_neuron_flip_coverage*", "anchored_rules.*")
_OTHER_RESULTS = (
    "scores.csv",
    "ablated_answers.jsonl",
    "candidates.csv",
    "neuron_target_status.csv",
    "joint_ablation.json",
    "final_stats_exclusion.json",
    "flip_stats_*",
    "agonist_metric_*",
)


def remove_results(stats_dir: Path) -> None:
    """Remove what an earlier run left in its folder: what this run does not write must not look like its own."""
    _remove(stats_dir, (*_SUMMARIES, *_OTHER_RESULTS))


def remove_summaries(stats_dir: Path) -> None:
    """Remove tables and figures about rules, of scopes that are gone perhaps."""
    _remove(stats_dir, _SUMMARIES)


def _remove(folder: Path, patterns: Sequence[str]) -> None:
    for path in (path for pattern in patterns for path in folder.glob(pattern) if path.is_file()):
        path.unlink()


@dataclass(frozen=True)
class SummaryOptions:
    """What the summaries show. scopes: those that the run emits besides TEST, even where no neuron has a rule."""

    cut: QualityCut
    scopes: tuple[str, ...]
    quantiles: tuple[float, float, float]
    length_cap: int
    topk: int
    stats_dirname: str
    seed: int


def write_statistics(
    stats_dir: Path, table: FlipTable, extra: pd.DataFrame | None, controls: Mapping[str, Any]
) -> list[Path]:
    """`flip_stats_by_neuron.csv`, `flip_stats_global.json` and the bar figure."""
    by_neuron = neuron_statistics(table, extra)
    write_csv(stats_dir / "flip_stats_by_neuron.csv", by_neuron)
    write_json(stats_dir / "flip_stats_global.json", {**global_statistics(table), "controls": controls})
    figure = write_flip_bars(stats_dir, by_neuron, controls.get("random_neurons", {}))
    return [stats_dir / "flip_stats_by_neuron.csv", stats_dir / "flip_stats_global.json", *figure]


def write_summaries(
    stats_dir: Path,
    run: RuleRun,
    table: FlipTable,
    scores: ScoresTable,
    options: SummaryOptions,
    answers: AnswerLog | None,
    controls: Mapping[str, Any],
    joint: Mapping[str, Any] | None,
) -> tuple[list[Path], pd.DataFrame]:
    """Every table, JSON file and figure about the run's rules; also returns the anchored rules, best first.

    `test_selected` and `all_fit` appear only if the run emits them or has such rules. answers, controls, joint: what
    the run stored, None or empty where it did not.
    """
    rules = collect_rules(run, options.cut)
    present = {*rules["score_scope"], *options.scopes}
    scopes = [TEST, *(scope for scope in (TEST_SELECTED, ALL_FIT) if scope in present)]
    written = write_rule_tables(
        stats_dir, run, rules, options.cut, scopes, topk=options.topk, stats_dirname=options.stats_dirname
    )
    for scope in scopes:
        summary = scope_summary(rules, scope, options.cut, options.quantiles)
        names = [f"rule_metrics_summary_{scope}.json", *(["rule_metrics_summary.json"] if scope == TEST else [])]
        for name in names:
            write_json(stats_dir / name, summary)
            written.append(stats_dir / name)
        written += write_rule_distributions(
            stats_dir, best_per_neuron(rules, scope, options.cut), scope, options.length_cap
        )
    flips = [scope_flips(table, rules, scope, options.cut) for scope in scopes]
    coverage = coverage_report(flips, options.cut, scores.primary_target, rng(options.seed, "stage7", "coverage"))
    layers = layer_report(table, flips, options.cut)
    for name, content in (("", coverage), ("_by_layer", layers)):
        write_json(stats_dir / f"high_quality_neuron_flip_coverage{name}.json", content)
        written.append(stats_dir / f"high_quality_neuron_flip_coverage{name}.json")
    written += write_coverage_figure(stats_dir, coverage) + write_layer_figure(stats_dir, layers)
    anchored = anchored_rules(rules, table, scores, options.cut, answers)
    write_csv(stats_dir / "anchored_rules.csv", without_formulas(anchored))
    facts = RunFacts(table, run.policy, options.cut, controls, joint)
    return [*written, stats_dir / "anchored_rules.csv", write_page(stats_dir, anchored, facts)], anchored
