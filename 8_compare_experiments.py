#!/usr/bin/env python3
"""Stage 8: compare run modes: high-quality neurons and flips over thresholds, distributions of rule metrics, tests.

Reads finished runs (stage 7) below a folder or in a .zip and writes tables and figures per model, and per task over the
models that have every run. A run that found nothing counts as zero; one that is missing leaves its model out.
"""

import argparse

from lib.cli import Report, finite, stage_main
from lib.reporting.session import add_report_arguments, flag, writing_to


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of stage 8."""
    flag(parser, "stats_path", required=True, help="a stats/ folder, a model's, a task's or data/, or a .zip of one")
    flag(parser, "out_dir", required=True, help="folder for the tables and figures")
    group = parser.add_argument_group("comparison")
    choices = ["mcc", "f1", "balanced_accuracy", "tpr", "tnr"]
    flag(group, "rule_quality_metric", choices=choices, default="mcc", help="metric that is swept")
    flag(group, "thr_min", type=finite, default=0.70, help="lowest threshold")
    flag(group, "thr_max", type=finite, default=0.99, help="highest threshold")
    flag(group, "thr_step", type=finite, default=0.01, help="distance of thresholds")
    flag(
        group, "best_mode", default="tail@0.9", help="what makes a run the best of a panel: mean, median, tail@<value>"
    )
    flag(group, "run_name_regex", default=None, help="only runs whose name this matches somewhere")
    flag(
        group,
        "variant",
        default=None,
        help="compare the runs of these sensitivity parts (M2000, tau0.3, main); by "
        "default those at the main settings, else the commonest",
    )
    flag(group, "rule_length_cap", type=int, default=30, help="accepted for older command lines; changes nothing")
    add_report_arguments(parser, scopes="test")


def run(args: argparse.Namespace, report: Report) -> None:
    """Compare the runs in every scope that was asked for."""
    from lib.reporting.experiments import compare_experiments

    with writing_to(args.out_dir):
        compare_experiments(args, report)


main = stage_main(add_arguments, run, description=__doc__)

if __name__ == "__main__":
    raise SystemExit(main())
