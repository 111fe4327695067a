#!/usr/bin/env python3
"""Stage 11: how the number of high-quality neurons and the cost of the search depend on tau and on the circuit size M.

Reads one model's runs: the baseline and runs that differ from it in one factor. Costs are of each run's own circuits;
those of a control (fake targets) never count to the run that it controls.
"""

import argparse

from lib.cli import Report, finite, positive_int, share, stage_main
from lib.reporting.session import add_report_arguments, flag, writing_to

MAIN_RUN = "rule_split-spectral_sample-decode_only-agonist_neurons-fast-spectral_anchor"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of stage 11."""
    flag(parser, "stats_root", required=True, help="one model's stats/ folder (or the model's folder, or a .zip)")
    flag(parser, "out_dir", required=True, help="folder for the tables and figures")
    group = parser.add_argument_group("sensitivity")
    flag(
        group,
        "baseline_M",
        type=positive_int,
        default=43008,
        help="circuit size of runs whose name states none; 43008 is "
        "what a budget of 100000 selects in Qwen2-1.5B: 28 layers of 1536",
    )
    flag(group, "baseline_tau", type=share, default=0.2, help="agonist threshold of runs whose name states none")
    flag(group, "baseline_run_name", default=MAIN_RUN, help="the run that the others are compared with")
    flag(
        group,
        "quality_thresholds",
        type=finite,
        nargs="+",
        default=[0.50, 0.60, 0.70, 0.75, 0.80, 0.85],
        help="MCC from which a neuron counts",
    )
    flag(group, "paper_fig_dir", default=None, help="folder for a copy of cha_budget_vs_tau.pdf, below <scope>/")
    add_report_arguments(parser, scopes="test,all_fit")


def run(args: argparse.Namespace, report: Report) -> None:
    """Summarize the runs in every scope that was asked for."""
    from lib.reporting.sensitivity import summarize_sensitivity

    with writing_to(args.out_dir):
        summarize_sensitivity(args, report)


main = stage_main(add_arguments, run, description=__doc__)

if __name__ == "__main__":
    raise SystemExit(main())
