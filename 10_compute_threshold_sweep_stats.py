#!/usr/bin/env python3
"""Stage 10: compare the main method with each control in pairs over units (a unit is a task and a model).

Reads Table 2's long CSV or stage 8's all-tasks CSV: totals, exact sign and sign-flip tests of the counts at the primary
threshold and of the area over thresholds, Holm over the three comparisons. With --data-root also the neurons' scores,
with a bootstrap over units and neurons. Without --out_dir it only prints.
"""

import argparse

from lib.cli import Report, count, finite, positive_int, stage_main
from lib.reporting.session import add_report_arguments, flag, writing_to


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of stage 10."""
    flag(parser, "csv", required=True, help="table2_threshold_sweep_per_run_long.csv, or stage 8's all-tasks CSV")
    flag(parser, "out_dir", default=None, help="folder for the tables; none: print only")
    group = parser.add_argument_group("comparison")
    flag(group, "metric", default="n_high_quality_neurons", help="column of counts")
    flag(
        group,
        "thresholds",
        type=finite,
        nargs="+",
        default=[0.70, 0.75, 0.80, 0.85, 0.90],
        help="grid of the totals and of the area",
    )
    flag(group, "primary_threshold", type=finite, default=0.70, help="primary endpoint of test and test_selected")
    flag(group, "primary_threshold_all_fit", type=finite, default=0.70, help="primary endpoint of all_fit")
    flag(group, "alt", choices=["two-sided", "greater", "less"], default="greater", help="alternative for A - B")
    flag(group, "tasks", default="arithmetic,bon_jailbreaking,jailbreaking", help="comma list; empty: all")
    sample = parser.add_argument_group("neurons' scores")
    flag(sample, "data_root", default=None, help="folder or .zip of the finished runs; switches this part on")
    flag(sample, "metric_col", default="MCC", help="column of the rule rows")
    choices = ["mean", "median", "prop_ge_threshold", "n_ge_threshold"]
    flag(sample, "sample_stat", choices=choices, default="mean", help="statistic of a unit's neurons")
    flag(sample, "sample_size", type=count, default=0, help="neurons drawn per method and unit; 0: the fewer of both")
    flag(sample, "n_boot", type=positive_int, default=10000, help="bootstrap draws")
    flag(sample, "skip_sample_stats", action="store_true", help="leave this part out")
    add_report_arguments(parser, scopes="test,all_fit")


def run(args: argparse.Namespace, report: Report) -> None:
    """Compare the methods in every scope that was asked for."""
    from lib.reporting.paired import compute_threshold_statistics

    with writing_to(args.out_dir):
        compute_threshold_statistics(args, report)


main = stage_main(add_arguments, run, description=__doc__)

if __name__ == "__main__":
    raise SystemExit(main())
