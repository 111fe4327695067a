#!/usr/bin/env python3
"""Brute force as a judge: how many of the agonists does each search mode of stage 6 find, and at what cost?

For each rule and regime every candidate is tested alone; then each mode searches the same candidates on the same
datapoints with a log of its own. Prints and saves (validate_recall.csv, .json): candidates, tests, evaluations,
seconds, agonists, and the recall of all agonists and of those that flip at least 10, 20 and 50 % of a slice. Takes the
flags of stage 6; a killed run goes on with the brute force where it stopped.
"""

import argparse

from lib.cli import Report, positive_int, stage_main
from lib.stages.agonist_options import add_agonist_arguments

_MODES = [
    "bisect_fixed_n",
    "bisect",
    "attribution_fixed_n",
    "attribution",
    "attribution_alpha_0.2",
    "attribution_alpha_0.5",
]
_QUICK_CANDIDATES = 100


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of stage 6, and which part of its work to validate."""
    add_agonist_arguments(parser)
    group = parser.add_argument_group("validation")
    group.add_argument("--modes", nargs="+", choices=_MODES, default=_MODES, metavar="MODE", help="modes to judge")
    group.add_argument("--n_candidates", type=positive_int, default=2000, help="random candidates of each rule")
    group.add_argument(
        "--screen",
        type=int,
        default=0,
        metavar="N",
        help="brute force tests every candidate on the first N datapoints per slice, and on the others only those that "
        "flip one of these; of neurons that flip 20 %% of 64, N = 24 overlooks one in a thousand (default: on all)",
    )
    group.add_argument("--max_rules", type=positive_int, default=2, help="first rules of the manifest")
    group.add_argument(
        "--quick", action="store_true", help=f"{_QUICK_CANDIDATES} candidates of one rule, two modes: under two minutes"
    )


def run(args: argparse.Namespace, report: Report) -> None:
    """Validate on every rule and regime that was asked for."""
    from lib.stages.recall_validation import validate

    if args.quick:
        args.n_candidates, args.max_rules = min(args.n_candidates, _QUICK_CANDIDATES), 1
        args.modes = ["bisect_fixed_n", "attribution"]
    validate(args, report)


main = stage_main(add_arguments, run, description=__doc__)

if __name__ == "__main__":
    raise SystemExit(main())
