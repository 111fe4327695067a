#!/usr/bin/env python3
"""Stage 7: measure what each agonist neuron flips, and anchor rules to it that hold on unseen prompts.

Every neuron of stage 6 is ablated alone on the evaluated prompts. For each kind of flip a rule over the features is
chosen on TRAIN, frozen, and scored once on TEST; ALL-FIT rules (chosen and scored on all rows) describe, they do not
predict. Finished parts are kept: a second run returns at once, and changes of thresholds never need the model.
"""

import argparse

from lib.cli import Report, stage_main
from lib.stages.flip_options import add_flip_arguments


def run(args: argparse.Namespace, report: Report) -> int:
    """Run the stage; non-zero if a fit failed."""
    from lib.stages.flip_anchoring import FlipAnchoring

    return FlipAnchoring(args, report).run()


main = stage_main(add_flip_arguments, run, description=__doc__)

if __name__ == "__main__":
    raise SystemExit(main())
