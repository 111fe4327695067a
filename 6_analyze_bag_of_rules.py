#!/usr/bin/env python3
"""Stage 6: find the neurons whose ablation flips the behaviour (contrastive hierarchical ablation).

For each rule, groups of stage 5's candidate neurons are ablated together on datapoints that the rule covers
(associated) and on others (unrelated). Groups that provably flip few are pruned, the others split down to single
neurons, which are then measured on fresh datapoints. Without --fast_ablation every candidate is tested alone. Every
group test is logged: a run that was killed goes on where it stopped, and a finished one returns at once.
"""

import argparse

from lib.cli import Report, stage_main
from lib.stages.agonist_options import add_agonist_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of stage 6."""
    add_agonist_arguments(parser)
    parser.add_argument(
        "--dry_run", action="store_true", help="say what would be searched; load no model, write nothing"
    )


def run(args: argparse.Namespace, report: Report) -> None:
    """Search every regime that was asked for."""
    from lib.stages.agonist_search import run_stage

    run_stage(args, report)


main = stage_main(add_arguments, run, description=__doc__)

if __name__ == "__main__":
    raise SystemExit(main())
