"""Flags of stage 6, shared with its validation against brute force. Standard library only: `--help` stays instant."""

from __future__ import annotations

import argparse

from lib.cli import add_model_arguments, add_task_arguments, count, finite, positive_int, positive_share, share


def add_agonist_arguments(parser: argparse.ArgumentParser) -> None:
    """Everything that decides which agonists are found."""
    add_model_arguments(parser)
    # The manifest says which model was attributed; the flag is only needed where it does not.
    parser.set_defaults(ai_model=None)
    add_task_arguments(parser)
    _add_path_arguments(parser)
    _add_datapoint_arguments(parser)
    _add_candidate_arguments(parser)
    add_ablation_arguments(parser, default="zero")
    _add_search_arguments(parser)
    _add_diagnostic_arguments(parser)


def _add_path_arguments(parser: argparse.ArgumentParser) -> None:
    """Where stage 6 reads and writes."""
    group = parser.add_argument_group("paths")
    group.add_argument(
        "--input_data_dir", required=True, help="folder of stage 5's manifest.json and dataset_info.json"
    )
    group.add_argument("--output_data_dir", required=True, help="folder of the outputs")
    group.add_argument("--scores_path", default=None, help="stage 2's scores.csv (default: the one stage 5 used)")
    group.add_argument("--cache_dir", default=None, help="folder to keep replacement values in, for later runs")


def _add_datapoint_arguments(parser: argparse.ArgumentParser) -> None:
    """On which datapoints it tests."""
    group = parser.add_argument_group("datapoints")
    group.add_argument(
        "--baseline_subset",
        choices=["all", "positive", "negative"],
        default="all",
        help="datapoints where the behaviour holds before ablation, where it does not, or both regimes, "
        "each in a folder of its own",
    )
    group.add_argument(
        "--sampling_strategy", choices=["random", "plan"], default="random", help="how a rule's datapoints are chosen"
    )
    group.add_argument("--sampling_plan_path", default=None, help="stage 4's plan, for --sampling_strategy plan")
    group.add_argument("--n_associated", type=positive_int, default=100, help="search datapoints that the rule covers")
    group.add_argument("--n_unrelated", type=positive_int, default=100, help="search datapoints that it does not")
    group.add_argument(
        "--max_noise",
        type=share,
        default=0.1,
        help="replace search datapoints that more than this share of random weak groups flips; 1 keeps all",
    )
    group.add_argument("--n_confirm", type=count, default=64, help="fresh datapoints per slice to confirm agonists on")


def _add_candidate_arguments(parser: argparse.ArgumentParser) -> None:
    """Which neurons it tests."""
    group = parser.add_argument_group("candidates")
    group.add_argument(
        "--max_n_of_rules_to_analyze",
        type=positive_int,
        default=None,
        help="search the first K circuits of stage 5's manifest only",
    )
    group.add_argument("--mlp_neurons_only", action="store_true", help="leave out units of attention heads")
    group.add_argument(
        "--top_k_neurons", type=positive_int, default=None, help="keep the K strongest attributions of each rule"
    )
    group.add_argument(
        "--last_k_layers", type=positive_int, default=None, help="keep MLP units of the last K layers only"
    )
    group.add_argument(
        "--cluster_by_spectral", action="store_true", help="search stage 5's clusters instead of its rules"
    )


def add_ablation_arguments(parser: argparse.ArgumentParser, *, default: str) -> argparse._ArgumentGroup:
    """What ablating a neuron means, in stages 6 and 7; the group, for more flags."""
    group = parser.add_argument_group("intervention")
    group.add_argument(
        "--intervention",
        default=default,
        choices=["zero", "mean", "mean-positional", "mean-donor", "mean-donor-positional", "resample"],
        help="what replaces an ablated activation",
    )
    group.add_argument(
        "--points_to_use_for_mean_ablation", type=positive_int, default=256, help="TRAIN prompts behind it"
    )
    group.add_argument("--decode_only", action="store_true", help="intervene at answer-producing positions only")
    group.add_argument(
        "--decode_scope",
        choices=["answer", "generated"],
        default="answer",
        help="with --decode_only: from the last prompt token, or (as published) from the first generated token",
    )
    group.add_argument("--memory_mb", type=positive_int, default=700, help="working memory of the ablation engine")
    return group


def _add_search_arguments(parser: argparse.ArgumentParser) -> None:
    """How it looks for agonists."""
    group = parser.add_argument_group("search")
    group.add_argument(
        "--fast_ablation", action="store_true", help="search by groups; otherwise test every candidate alone"
    )
    group.add_argument(
        "--search",
        choices=["attribution", "bisect"],
        default="attribution",
        help="one forest over all layers, strongest attribution first, or (published) random halves per layer",
    )
    group.add_argument(
        "--sign_split_first", action="store_true", help="split first by the sign of the attribution score"
    )
    group.add_argument("--search_epsilon", type=positive_share, default=0.2, help="smallest flip rate worth finding")
    group.add_argument("--prune_alpha", type=positive_share, default=0.05, help="chance of pruning a group that has it")
    group.add_argument("--fixed_n", action="store_true", help="test every group on all datapoints (published)")
    group.add_argument(
        "--looks",
        type=positive_int,
        nargs="+",
        default=[8, 24, 40],
        metavar="N",
        help="datapoints per slice after which a group may be decided early",
    )
    group.add_argument(
        "--full_records", action="store_true", help="test single neurons on all datapoints even if pruned"
    )
    group.add_argument(
        "--dense_size",
        type=count,
        default=0,
        help="test subtrees of up to this many candidates one by one where all their groups proved positive",
    )
    group.add_argument(
        "--max_group_size",
        type=positive_int,
        default=None,
        help="largest group to start from (default: 64 in the negative regime, none in the positive one)",
    )
    group.add_argument("--audit_members", type=count, default=32, help="random members of pruned groups to test alone")
    group.add_argument(
        "--min_selectivity",
        type=finite,
        default=None,
        help="keep agonists whose associated flip rate exceeds the unrelated one by at least this",
    )
    group.add_argument(
        "--catastrophic_acc_tol",
        type=share,
        default=1e-12,
        help="share left unflipped by a neuron that still counts as flipping everything",
    )
    group.add_argument(
        "--catastrophic_n_runs", type=positive_int, default=3, help="rules after which such a neuron is decided"
    )


def _add_diagnostic_arguments(parser: argparse.ArgumentParser) -> None:
    """What else it tells of the agonists."""
    group = parser.add_argument_group("diagnostics of agonists")
    for kind, meaning in (
        ("activation", "how large their activations are in their layer"),
        ("margin", "how much of the answer's margin their ablation should take, to first order"),
        ("saliency", "how large their saliencies are in their layer"),
    ):
        group.add_argument(f"--skip_agonist_{kind}_stats", action="store_true", help=f"do not write {meaning}")
    group.add_argument(
        "--agonist_saliency_metrics",
        default="wanda,gradient,activation_x_gradient",
        help="saliencies to write, separated by commas",
    )
