#!/usr/bin/env python3
"""Stage 9: compare the models of one task, run by run: rules, flips, agonists, and the cost of the search.

Reads finished runs (stages 6 and 7) below a task's folder or in a .zip of it. Agonists and costs are those of the
positive baseline; costs are given as group tests and in percent of N (brute force) and of 2N-1 (a whole tree).
"""

import argparse

from lib.cli import Report, finite, stage_main
from lib.reporting.session import add_report_arguments, flag, writing_to


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of stage 9."""
    flag(parser, "task_dir", required=True, help="a task's folder, data/<task>, or a .zip of it")
    flag(parser, "out_dir", default="results_cross_models", help="folder for the tables and figures")
    group = parser.add_argument_group("comparison")
    flag(group, "tau", type=finite, default=0.2, help="agonists have at least this max_effect")
    flag(group, "eps", type=finite, default=0.2, help="selective agonists have at least this |accuracy gap|")
    flag(group, "runs", default="all", help="all, or a comma list of run names")
    flag(group, "drop_incomplete_models", action="store_true", help="leave out models that lack one of the runs")
    add_report_arguments(parser, scopes="test")


def run(args: argparse.Namespace, report: Report) -> None:
    """Compare the models in every scope that was asked for."""
    from lib.reporting.models import compare_models

    with writing_to(args.out_dir):
        compare_models(args, report)


main = stage_main(add_arguments, run, description=__doc__)

if __name__ == "__main__":
    raise SystemExit(main())
