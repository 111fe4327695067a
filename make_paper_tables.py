#!/usr/bin/env python3
"""The paper's tables, from finished or downloaded results: Tables 1, 2, 3 and 9 to 13, as CSV, Markdown and LaTeX.

Zero results count as zero. What is missing or broken is left empty (NA) and named in report_issues.csv; --strict makes
it an error. Nothing is read from outside of --data_root.
"""

import argparse

from lib.cli import Report, finite, positive_int, share, stage_main
from lib.reporting.session import flag, writing_to


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the tables."""
    flag(parser, "data_root", default="./data", help="folder of results, or a .zip of it")
    flag(parser, "out_dir", default="./paper_tables", help="where the tables go")
    flag(parser, "which", default="all_supported", help="comma list of table1, table2, table3, table9 ... table13")
    flag(parser, "tasks", default="", help="only these tasks (list)")
    flag(parser, "models", default="", help="only these models (list)")
    flag(
        parser,
        "variant",
        default=None,
        help="runs of these sensitivity parts (M2000, tau0.3, main); by default "
        "those at the main settings, else the commonest",
    )
    flag(parser, "include_hans_in_main_tables", action="store_true", help="HANS in Tables 1 to 3 and 12 too")
    flag(parser, "strict", action="store_true", help="missing or broken inputs are an error (exit 2), not a note")
    flag(parser, "notes_only", action="store_true", help="only say which tables are not made here")
    _add_rule_arguments(parser.add_argument_group("Tables 1 and 2"))
    _add_search_arguments(parser.add_argument_group("Tables 3 and 10 to 13"))


def _add_rule_arguments(group: argparse._ArgumentGroup) -> None:
    flag(
        group,
        "score_scopes",
        default="test,all_fit",
        help="comma list of test (held out), all_fit (descriptive) "
        "and, on request, test_selected (chosen on TEST: optimistic)",
    )
    flag(group, "hq_test_threshold", type=finite, default=0.70, help="MCC of a high-quality neuron on TEST")
    flag(group, "hq_all_fit_threshold", type=finite, default=0.70, help="and for ALL-FIT")
    flag(group, "min_rule_dataset_coverage", type=share, default=0.005, help="rules that cover less do not count")
    flag(group, "thresholds", type=_numbers, default="0.7,0.75,0.8,0.85,0.9", help="thresholds of Table 2")
    flag(group, "table1_coverage_source", choices=["all", "hq"], default="all", help="neurons whose flips are counted")
    flag(group, "table1_coverage_score_scope", default="all_fit", help="rows on which they are counted")


def _add_search_arguments(group: argparse._ArgumentGroup) -> None:
    flag(group, "tau", type=finite, default=0.2, help="smallest effect of an agonist in Table 13")
    flag(group, "table3_bins", default="0.2,0.3,0.5,1.0", help="edges of effect bins; the last bin is closed")
    flag(group, "table3_scope", choices=["all", "selected"], default="all", help="all models, or the one named next")
    flag(group, "table3_task", default="arithmetic", help="with --table3_scope selected")
    flag(group, "table3_model", default=None, help="with --table3_scope selected (default: Qwen2-7B if there)")
    for number, n in (("10", 50), ("11", 10)):
        flag(group, f"table{number}_task", default="arithmetic", help="task shown")
        flag(group, f"table{number}_model", default=None, help="model shown (default: Qwen2-7B if there)")
        flag(group, f"table{number}_topn", type=positive_int, default=n, help="how many neurons")
    flag(group, "cha_rank_metric", choices=["c2i", "i2c", "flip_any"], default="c2i", help="flips that rank neurons")
    flag(group, "table13_task_a", default="arithmetic", help="first task")
    flag(group, "table13_task_b", default="bon_jailbreaking", help="second task")
    flag(group, "table13_model", default=None, help="model of both (default: Qwen2-7B if there)")
    flag(
        group,
        "table13_baseline_scope",
        choices=["both", "positive", "negative", "selected"],
        default="both",
        help="baseline regimes whose agonists are joined; selected: that of --baseline_subset",
    )
    flag(
        group,
        "baseline_subset",
        choices=["positive_baseline", "negative_baseline"],
        default="positive_baseline",
        help="for --table13_baseline_scope selected",
    )


def _numbers(text: str) -> list[str]:
    """argparse type: a comma list of numbers, kept as text."""
    words = [word for word in text.replace(" ", ",").split(",") if word]
    for word in words:
        float(word)
    if not words:
        raise argparse.ArgumentTypeError("give at least one threshold")
    return words


def run(args: argparse.Namespace, report: Report) -> None:
    """Make the tables."""
    from lib.reporting.paper_tables import make_tables

    with writing_to(args.out_dir):
        make_tables(args, report)


main = stage_main(add_arguments, run, description=__doc__)

if __name__ == "__main__":
    raise SystemExit(main())
