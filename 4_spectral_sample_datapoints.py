"""Stage 4: choose, for each rule, datapoints that cover the cases where it holds and where it does not.

Prompts become points (a representation of the analysed model, principal axes, unit sphere). Samples spread over the
k-centre clusters of all points and over each cluster; with pairing, every associated datapoint gets a similar
unrelated one of equal length. A datapoint never changes sides: a rule with few datapoints is studied with few (and
marked), or skipped with a reason.
"""

from __future__ import annotations

import argparse

from lib.cli import Report, add_model_arguments, add_task_arguments, count, finite, positive_int, stage_main
from lib.spectral_options import add_pairing_arguments, add_spectral_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--features_scores_dir", required=True, help="stage 2's folder with scores.csv and features.json"
    )
    parser.add_argument("--rules_dir", required=True, help="stage 3's folder with the rule files")
    parser.add_argument(
        "--rules_glob", default="optimal_rule_set", help="first part of the rule file's name: <this>_<target>.csv"
    )
    parser.add_argument("--fake_targets", action="store_true", help="read the rules of the shuffled control target")
    parser.add_argument("--output_path", required=True, help="the plan to write (JSON)")
    parser.add_argument(
        "--baseline_subset",
        choices=["all", "positive", "negative"],
        default="all",
        help="datapoints to sample from: all, or those where the behaviour holds (or not) before ablation",
    )
    add_model_arguments(parser)
    add_task_arguments(parser)
    add_spectral_arguments(parser)
    _add_sampling_arguments(parser.add_argument_group("sampling"))
    _add_pairing_arguments(parser.add_argument_group("pairing"))
    _add_statistics_arguments(parser.add_argument_group("statistics"))


def _add_sampling_arguments(sampling: argparse._ArgumentGroup) -> None:
    sampling.add_argument(
        "--use_global_clusters",
        action="store_true",
        help="sample by quotas from k-centre clusters of all points; without it, farthest-first per rule",
    )
    sampling.add_argument("--global_n_clusters", type=positive_int, default=256, help="number of those clusters")
    sampling.add_argument(
        "--coverage_radius",
        type=finite,
        default=0.5,
        help="a point within this distance (0 to 2) of a chosen one is covered: reported, and without "
        "global clusters the sample ends once all are",
    )
    sampling.add_argument(
        "--max_points_per_ablation", type=positive_int, default=512, help="most datapoints per side of a rule"
    )
    sampling.add_argument(
        "--min_points_per_ablation",
        type=positive_int,
        default=32,
        help="datapoints wanted per side; rules with fewer are marked",
    )
    sampling.add_argument(
        "--min_points_to_study", type=positive_int, default=8, help="rules with fewer per side are skipped"
    )


def _add_pairing_arguments(pairing: argparse._ArgumentGroup) -> None:
    pairing.add_argument(
        "--pair_by_similarity_len_matched",
        action="store_true",
        help="choose the unrelated side as similar partners of the associated one, of equal length",
    )
    pairing.add_argument("--pair_len_tolerance", type=count, default=0, help="tokens that paired lengths may differ by")
    add_pairing_arguments(pairing)


def _add_statistics_arguments(stats: argparse._ArgumentGroup) -> None:
    stats.add_argument(
        "--compute_cover_stats", action="store_true", help="report how well each sample covers its group"
    )
    stats.add_argument(
        "--stats_sample_size", type=int, default=200_000, help="most points for quantiles; 0 or less: all"
    )
    stats.add_argument(
        "--stats_chunk_size", type=positive_int, default=8192, help="points per step of the nearest-centre pass"
    )


def run(args: argparse.Namespace, report: Report) -> None:
    from lib.stages.sampling_plan import run_stage

    run_stage(args, report)


main = stage_main(add_arguments, run, description=__doc__)

if __name__ == "__main__":
    raise SystemExit(main())
