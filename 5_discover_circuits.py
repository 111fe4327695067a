"""Stage 5: score every coordinate of every write by its influence on the model's answers, rule by rule.

Pairs of prompts, one on which the rule holds and one on which it does not, are contrasted by gradient attribution; the
strongest units become the candidates of stage 6. Scores are signed sums over pairs: positive means that moving the
coordinate to its replacement takes the model away from the answer it gave.
"""

from __future__ import annotations

import argparse

from lib.cli import Report, add_model_arguments, add_task_arguments, count, positive_int, size_or_share, stage_main
from lib.spectral_options import add_pairing_arguments, add_spectral_arguments

INTERVENTIONS = ("patching", "zero", "mean", "mean-positional")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--features_scores_dir", required=True, help="stage 2's folder with scores.csv")
    parser.add_argument("--rules_dir", required=True, help="stage 3's folder with the rule files")
    parser.add_argument("--rules_glob", default="optimal_rule_set", help="rule file: <this>_<target>.csv")
    parser.add_argument("--fake_targets", action="store_true", help="read the rules of the shuffled control target")
    parser.add_argument("--output_data_dir", default="neural_circuit_discovery_results", help="folder to write")
    parser.add_argument("--cache_dir", "-c", default="cache", help="folder for mean activations")
    parser.add_argument("--max_n_of_rules_to_analyze", type=int, default=-1, help="first n rules; 0 or less: all")
    add_model_arguments(parser, default_batch_size=8)
    add_task_arguments(parser)
    _add_attribution_arguments(parser)
    _add_circuit_arguments(parser)
    _add_sampling_arguments(parser)
    add_spectral_arguments(parser)


def _add_attribution_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("attribution")
    methods = ["EAP", "EAP-IG-inputs", "EAP-IG-activations", "clean-corrupted", "information-flow-routes", "exact"]
    group.add_argument("--method", choices=methods, default="EAP-IG-inputs", help="how effects are estimated")
    group.add_argument(
        "--metric",
        choices=["log-prob", "logit-diff", "kl"],
        default="log-prob",
        help="what is attributed: log-probability of the recorded answer, its logit against the "
        "corrupted side's answer, or divergence from the clean run",
    )
    group.add_argument(
        "--temporal_agg",
        choices=["mean", "none", "max", "min"],
        default="mean",
        help="how the metric at an answer's tokens is combined; none: their sum",
    )
    group.add_argument("--max_answer_tokens", type=positive_int, default=16, help="answer tokens that count")
    group.add_argument("--stop_regex", default=None, help="accepted for published commands; answers end where recorded")
    group.add_argument(
        "--intervention", choices=INTERVENTIONS, default="patching", help="what a coordinate would be replaced by"
    )
    group.add_argument("--max_ig_steps", type=positive_int, default=3, help="midpoints of the integration path")
    group.add_argument(
        "--mlp_grad_site",
        choices=["mlp_out", "mlp_in"],
        default="mlp_out",
        help="where the gradient of an MLP write is taken; mlp_in gives the published scores",
    )
    group.add_argument(
        "--decode_only", action="store_true", help="replace only at the positions that produce the answer"
    )
    group.add_argument(
        "--decode_mode",
        choices=["after_prompt", "span", "auto", "all"],
        default="after_prompt",
        help="which positions --decode_only means: the first three are one and the same here, all is every position",
    )
    group.add_argument("--mlp_neurons_only", action="store_true", help="MLP writes only; nothing is computed for heads")
    group.add_argument(
        "--points_to_use_for_mean_ablation",
        type=positive_int,
        default=512,
        help="TRAIN prompts over which means are taken",
    )


def _add_circuit_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("circuit")
    group.add_argument("--circuit_level", choices=["neuron", "node", "edge"], default="node", help="what a unit is")
    group.add_argument(
        "--circuit_size",
        type=size_or_share,
        default=20,
        help="units to keep: a number, or a share of all candidates (0.05)",
    )
    group.add_argument(
        "--absolute_value_attributions",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="rank by absolute score (stored scores stay signed)",
    )
    group.add_argument(
        "--rank_by",
        choices=["magnitude", "score"],
        default="magnitude",
        help="rank units by the sum over pairs of |score|, where pushes up and down add up, or (published) by the "
        "|signed sum|, where they cancel",
    )
    group.add_argument("--include_zero_scores", action="store_true", help="units with score 0 may be kept")
    group.add_argument(
        "--eval_intervention",
        choices=INTERVENTIONS,
        default="mean-positional",
        help="ablation of everything outside the circuit when its faithfulness is measured",
    )
    group.add_argument(
        "--draw_circuits",
        action="store_true",
        help="a map of layers by components for each job, and its graph (rendered where Graphviz is installed)",
    )
    group.add_argument(
        "--check_units",
        type=count,
        default=24,
        help="units that are really ablated to see whether the order of scores is better than chance; 0: none",
    )
    group.add_argument(
        "--fallback_to_full_network",
        action="store_true",
        help="if an attribution fails, keep every unit with score 1 instead of stopping",
    )


def _add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("pairs")
    group.add_argument(
        "--sampling_strategy", choices=["random", "plan"], default="random", help="where pairs come from"
    )
    group.add_argument("--sampling_plan_path", default=None, help="stage 4's plan for the subset all")
    group.add_argument("--max_pairs_per_circuit", type=positive_int, default=512, help="most pairs per job")
    group.add_argument("--min_pairs_per_circuit", type=positive_int, default=8, help="jobs with fewer are skipped")
    add_pairing_arguments(group)
    group.add_argument("--cluster_by_spectral", action="store_true", help="one job per spectral cluster, not per rule")
    group.add_argument(
        "--cluster_base_subset",
        choices=["all", "positive", "negative"],
        default="all",
        help="datapoints that are clustered",
    )
    group.add_argument("--global_n_clusters", type=positive_int, default=32, help="number of clusters")


def run(args: argparse.Namespace, report: Report) -> None:
    from lib.stages.circuit_discovery import run_stage

    run_stage(args, report)


main = stage_main(add_arguments, run, description=__doc__)

if __name__ == "__main__":
    raise SystemExit(main())
