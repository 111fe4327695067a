"""Stage 1: the prompts of a task, the analysed model's greedy answers, and whether each shows the behaviour.

Loads the cache of answers if it was made with these settings, else makes it; then prints (and writes) its statistics.
The flags of the task that --task_module names are listed below; they are recorded, and later stages use them again.
"""

from __future__ import annotations

import argparse

from lib.cli import Report, add_model_arguments, add_task_arguments, stage_main
from lib.task_spec import add_task_settings


def add_arguments(parser: argparse.ArgumentParser, argv: list[str] | None) -> None:
    """Flags of stage 1 and of the task that the command line names."""
    add_model_arguments(parser)
    add_task_arguments(parser)
    add_task_settings(parser, argv)
    group = parser.add_argument_group("files")
    group.add_argument("--prompts_answers_pkl_file", required=True, help="cache of answers: read or written")
    group.add_argument("--stats_json_out", default=None, help="folder for dataset_stats.json")


def run(args: argparse.Namespace, report: Report) -> None:
    """Run the stage."""
    from lib.stages.behaviour import generate_prompts_and_answers

    generate_prompts_and_answers(args, report)


def main(argv: list[str] | None = None) -> int:
    """Parse and run; the flags depend on the task, so the command line is looked at first."""
    return stage_main(lambda parser: add_arguments(parser, argv), run, description=__doc__)(argv)


if __name__ == "__main__":
    raise SystemExit(main())
