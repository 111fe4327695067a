"""One run as one self-contained HTML page: behaviour, rules, agonists, flips, search, costs, controls.

The page needs no network and no other file. Stages that have not run are said on it, not an error.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from lib.cli import Report, finite, positive_int, share, stage_main
from lib.reporting.session import flag


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the page."""
    parser.add_argument("model_root", help="folder of a task and model: data/<task>/<model>")
    parser.add_argument("--run", default=None, help="name of the run, a folder of stats/ (default: the first there)")
    flag(parser, "all_runs", action="store_true", help="a page for every run")
    parser.add_argument("--output", type=Path, default=None, help="file (default: <model root>/report/<run>.html)")
    flag(parser, "max_prompts", type=positive_int, default=20, help="flipped prompts per neuron")
    flag(parser, "hq_threshold", type=finite, default=0.70, help="MCC of a good anchored rule")
    flag(parser, "min_rule_dataset_coverage", type=share, default=0.005, help="rules that cover less do not count")


def run(args: argparse.Namespace, report: Report) -> None:
    """Write the page or pages."""
    from lib.reporting.page.build import open_model, run_names_of, write_page
    from lib.reporting.page.inputs import PageOptions

    if args.all_runs and (args.run or args.output):
        from lib.cli import UserError

        raise UserError("--all_runs writes a page per run: leave out --run and --output")
    root = open_model(Path(args.model_root))
    options = PageOptions(args.max_prompts, args.hq_threshold, args.min_rule_dataset_coverage)
    for name in (run_names_of(root) or [None]) if args.all_runs else [args.run]:
        page = write_page(root, name, args.output, options)
        lacking = f"{page.n_missing} part{'s' * (page.n_missing != 1)} not available, see its last section"
        without = f"; {lacking}" if page.n_missing else ""
        report.line(f"report of {page.run_name or 'an unfinished run'}{without}: {page.path}")


main = stage_main(add_arguments, run, description=__doc__)

if __name__ == "__main__":
    raise SystemExit(main())
