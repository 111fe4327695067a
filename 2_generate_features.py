"""Stage 2: describe every prompt by features, hold out a fifth of the rows, keep the features that help.

Features are judged on TRAIN rows only. A feature that does not apply to a prompt counts as 0 there.
"""

from __future__ import annotations

import argparse

from lib.cli import Report, add_task_arguments, count, finite, positive_int, stage_main


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of stage 2."""
    add_task_arguments(parser)
    files = parser.add_argument_group("files")
    files.add_argument("--prompts_answers_pkl_file", "-i", required=True,
                       help="cache of answers of stage 1: the .pkl, or its copy in plain text (.jsonl)")
    files.add_argument("--features_scores_dir", "--out_dir", "-o", default="feature_report",
                       help="folder of the results")
    files.add_argument("--max_number_of_prompts_to_analyze", "--max_prompts", type=count, default=0,
                       help="draw this many prompts at random, same share of each label; 0: all")
    files.add_argument("--cache_dir", "-c", default="./cache", help="folder of the cache of model calls")
    files.add_argument("--no_plots", action="store_true", help="no features.md with its figures")
    add_proposal_arguments(parser.add_argument_group("proposed features"))
    add_filter_arguments(parser.add_argument_group("filters, on TRAIN"))


def add_proposal_arguments(group: argparse._ArgumentGroup) -> None:
    """Which chat model proposes features, and how it is asked."""
    group.add_argument("--no_llm_feature_generation", "--no_llm", dest="no_llm", action="store_true",
                       help="only the task's own features")
    group.add_argument("--ai_model", "-m", default="gemma3:27b",
                       help="chat model: <provider>:<model> with ollama, openai, groq or local, or an Ollama name")
    group.add_argument("--base_url", default="", help="server of the model, e.g. any OpenAI-compatible one")
    group.add_argument("--temperature", "-T", type=finite, default=0.3, help="sampling temperature")
    group.add_argument("--n_features", "-n", type=positive_int, default=16, help="features asked for per round")
    group.add_argument("--feature_extraction_steps", "--rounds", "-R", type=positive_int, default=10,
                       help="rounds that give features")
    group.add_argument("--num_correct_example_prompts", type=positive_int, default=32,
                       help="prompts of the positive class shown per round")
    group.add_argument("--num_incorrect_example_prompts", type=positive_int, default=32,
                       help="prompts of the negative class shown per round")
    group.add_argument("--number_of_existing_features_to_show_for_diversity", type=count, default=20,
                       help="earlier proposals shown per round, to get others")
    group.add_argument("--feature_sandbox", choices=["auto", "monty", "wasm"], default="auto",
                       help="what runs proposed functions; auto: monty, and wasm for what needs complete Python")


def add_filter_arguments(group: argparse._ArgumentGroup) -> None:
    """Which features are dropped."""
    group.add_argument("--drop_high_mad_variance_features", "--drop_high_mad", action="store_true",
                       help="drop features with far more variance than the others")
    group.add_argument("--z_thresh", type=finite, default=10.0,
                       help="largest robust z-score of the log variance under --drop_high_mad_variance_features")
    group.add_argument("--drop_low_predictive_power_features", "--filter_by_metrics", action="store_true",
                       help="drop features that reach none of the three thresholds below")
    group.add_argument("--min_auc", type=finite, default=0.0, help="AUC in the better direction; 0: not used")
    group.add_argument("--min_delta", type=finite, default=0.2,
                       help="difference of the class means in standard deviations; 0: not used")
    group.add_argument("--min_ap_above_base", type=finite, default=-1.0,
                       help="average precision above the share of positives; -1: not used")
    group.add_argument("--train_ratio", "-t", type=finite, default=1.0,
                       help="share of the TRAIN rows on which the three are measured; 0 or 1: all")
    group.add_argument("--drop_near_duplicate_features", "--drop_near_dups", action="store_true",
                       help="drop features correlated with an earlier one that is kept")
    group.add_argument("--near_duplicate_features_threshold", "--dup_corr_thresh", type=finite, default=0.9999,
                       help="correlation (without sign) from which two features are duplicates; lower drops more")


def run(args: argparse.Namespace, report: Report) -> None:
    """Run the stage."""
    from lib.feature_extraction_runner import run_stage_2

    run_stage_2(args, report)


main = stage_main(add_arguments, run, description=__doc__)

if __name__ == "__main__":
    raise SystemExit(main())
