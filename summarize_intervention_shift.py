#!/usr/bin/env python3
"""What shifts when another replacement is used for ablated neurons: two finished runs of stage 7, neuron by neuron.

Neurons that only one run has count as zero in the deltas, and are left out of the paired ones.
"""

import argparse

from lib.cli import Report, positive_int, stage_main
from lib.reporting.session import flag


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the comparison."""
    flag(parser, "baseline_dir", required=True, help="stats/<run> of the first intervention")
    flag(parser, "candidate_dir", required=True, help="stats/<run> of the second")
    flag(parser, "output_csv", required=True, help="table of all neurons")
    flag(parser, "output_dir", default=None, help="folder of everything else (default: that of the table)")
    flag(parser, "topk", type=positive_int, default=30, help="neurons in the table of the largest changes")
    flag(parser, "baseline_label", default="mean", help="name of the first intervention")
    flag(parser, "candidate_label", default="mean-donor", help="name of the second")
    flag(parser, "task_name", default=None, help="task, for the report (default: from the path)")
    flag(parser, "model_name", default=None, help="model, for the report (default: from the path)")
    flag(parser, "hq_score_scope", default="all_fit", help="test, all_fit or, on request, test_selected")
    flag(parser, "allow_missing_hq_coverage", action="store_true", help="leave out coverage that a run does not state")
    flag(parser, "no_plots", action="store_true", help="tables and report only")
    flag(parser, "strict", action="store_true", help="missing or broken inputs are an error (exit 2), not a note")


def run(args: argparse.Namespace, report: Report) -> None:
    """Compare the two runs."""
    from lib.reporting.intervention_shift_files import summarize

    summarize(args, report)


main = stage_main(add_arguments, run, description=__doc__)

if __name__ == "__main__":
    raise SystemExit(main())
