"""Flags of stage 7. Standard library only: `--help` stays instant."""

from __future__ import annotations

import argparse

from lib.cli import add_model_arguments, add_task_arguments, count, finite, positive_int, share
from lib.spectral_options import add_spectral_arguments
from lib.stages.agonist_options import add_ablation_arguments


def add_flip_arguments(parser: argparse.ArgumentParser) -> None:
    """Everything that stage 7 can be told."""
    add_model_arguments(parser)
    add_task_arguments(parser)
    parser.add_argument("--dry_run", action="store_true", help="say what would be done; load no model, write nothing")
    _add_path_arguments(parser)
    _add_candidate_arguments(parser)
    _add_row_arguments(parser)
    add_spectral_arguments(parser)
    _add_intervention_arguments(parser)
    _add_rule_arguments(parser)
    _add_summary_arguments(parser)


def _add_path_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("paths")
    group.add_argument(
        "--circuit_agonists_path",
        help="folder or .zip with stage 6's neuron_buckets.json (not needed for finished files)",
    )
    group.add_argument("--features_scores_dir", required=True, help="folder of scores.csv and features.json (stage 2)")
    group.add_argument("--rules_dir", default="xai_analyses_results", help="root of all outputs")
    group.add_argument("--stats_dirname", default="", help="name of this run below <rules_dir>/stats")
    group.add_argument(
        "--discovery_plans",
        nargs="*",
        default=None,
        metavar="PATH",
        help="more files or folders that name discovery rows (default: the sampling plans and circuits "
        "beside --circuit_agonists_path)",
    )


def _add_candidate_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("candidates")
    group.add_argument("--search_epsilon", type=share, default=0.2, help="smallest |max_effect| of stage 6")
    group.add_argument(
        "--min_confirmed_rate",
        type=share,
        default=0.0,
        help="smallest flip rate confirmed by stage 6, for neurons that have one",
    )
    group.add_argument(
        "--catastrophic",
        choices=["keep", "drop_confirmed", "drop_all"],
        default="drop_confirmed",
        help="what to do with neurons that flip everything",
    )
    group.add_argument("--max_neurons", type=positive_int, default=None, help="keep this many of the strongest")


def _add_row_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("evaluated rows")
    group.add_argument(
        "--row_sampling",
        choices=["all", "stratified", "spectral"],
        default="all",
        help="all rows, or at most --sampling_max_points: stratified by split and baseline, and with "
        "spectral also spread over clusters of prompts inside each class",
    )
    group.add_argument(
        "--use_spectral_sampling",
        dest="row_sampling",
        action="store_const",
        const="spectral",
        help="the same as --row_sampling spectral",
    )
    group.add_argument("--sampling_max_points", type=positive_int, default=10_000, help="most rows of a sample")
    group.add_argument("--global_n_clusters", type=positive_int, default=64, help="clusters of --row_sampling spectral")
    group.add_argument(
        "--keep_unsampled_rows",
        action="store_true",
        help="keep all rows in scores.csv, flips empty where not evaluated",
    )
    group.add_argument(
        "--group_col",
        default=None,
        help="column (or comma list, compared as an unordered set) whose equal "
        "values mark variants of one prompt, kept on one side; default: the task's own",
    )
    group.add_argument(
        "--exclude_discovery_rows_from_training",
        action="store_true",
        help="choose rules without the rows that stages 5 and 6 used",
    )
    group.add_argument(
        "--exclude_discovery_rows_from_final_stats",
        action="store_true",
        help="leave the rows that stages 5 and 6 used out of flip_stats_*",
    )


def _add_intervention_arguments(parser: argparse.ArgumentParser) -> None:
    group = add_ablation_arguments(parser, default="mean-positional")
    group.add_argument("--n_random_neurons", type=count, default=8, help="random neurons of the same layers")
    group.add_argument("--joint_ablation", action="store_true", help="also ablate all candidates at once")
    group.add_argument("--n_joint_controls", type=positive_int, default=3, help="random groups beside it")


def _add_rule_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("rules")
    group.add_argument("--extract_rules", action="store_true", help="fit rules to the flips")
    group.add_argument("--rule_targets", default=None, help="comma list of kinds (any, c2i, i2c) or full column names")
    group.add_argument("--max_conditions", type=positive_int, default=3, help="conditions per conjunction")
    group.add_argument("--max_rules", type=positive_int, default=3, help="conjunctions per rule")
    group.add_argument("--min_train_flips", type=positive_int, default=20, help="flips (and non-flips) needed on TRAIN")
    group.add_argument("--min_test_flips", type=positive_int, default=10, help="flips (and non-flips) needed on TEST")
    group.add_argument("--use_shap_in_xgb", action="store_true", help="SHAP importance biases the trees' features")
    group.add_argument("--use_shap_in_lasso", action="store_true", help="SHAP importance weights the L1 penalty")
    group.add_argument("--only_unique_datapoints_in_shap", action="store_true", help="drop repeated rows before SHAP")
    group.add_argument(
        "--no_emit_all_fit_rules",
        dest="emit_all_fit_rules",
        action="store_false",
        help="skip the descriptive ALL-FIT rules",
    )
    group.add_argument(
        "--emit_test_selected",
        action="store_true",
        help="also the published score that selects on TEST: optimistic, for comparison only",
    )
    group.add_argument("--n_bootstrap", type=positive_int, default=1000, help="resamples behind each interval")
    group.add_argument("--jobs", type=positive_int, default=2, help="processes that fit rules")


def _add_summary_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("summaries")
    group.add_argument("--summarize_rule_metrics", action="store_true", help="gather the rules into tables and figures")
    group.add_argument(
        "--summarize_rule_metrics_only", action="store_true", help="only that, from files of a finished run"
    )
    group.add_argument(
        "--stats_only",
        action="store_true",
        help="only the flip statistics (and, with --summarize_rule_metrics, the tables), from files of a finished run",
    )
    group.add_argument(
        "--skip_agonist_metric_stats", action="store_true", help="no agonist_metric_* tables from stage 6's summaries"
    )
    group.add_argument(
        "--agonist_metric_topk", type=positive_int, default=30, help="correlations kept per target and scope"
    )
    group.add_argument("--rule_metrics_quantiles", default="0.1,0.5,0.9", help="low, middle, high of the summaries")
    group.add_argument("--rule_length_cap", type=positive_int, default=30, help="longest rule shown in histograms")
    group.add_argument("--rule_metrics_topk", type=positive_int, default=50, help="rows of the _top_<k> tables")
    group.add_argument(
        "--rule_quality_metric",
        choices=["balanced_accuracy", "mcc", "tpr", "tnr", "f1"],
        default="mcc",
        help="ranks rules and decides high quality",
    )
    group.add_argument("--rule_quality_threshold", type=finite, default=0.70, help="high quality on TEST from here")
    group.add_argument("--rule_quality_threshold_all_fit", type=finite, default=0.70, help="and for ALL-FIT")
    group.add_argument(
        "--min_rule_dataset_coverage",
        type=share,
        default=0.005,
        help="smallest share of rows a rule fires on; 0 for none",
    )
