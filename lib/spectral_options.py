"""Flags of spectral sampling that several stages share. Standard library only: `--help` stays instant."""

from __future__ import annotations

import argparse

from lib.cli import positive_int

BOOLEAN_METRICS = (
    "dice",
    "jaccard",
    "kulczynski1",
    "rogerstanimoto",
    "russellrao",
    "sokalmichener",
    "sokalsneath",
    "yule",
)
"""Distances that see only whether a coordinate is zero."""
METRICS = tuple(
    sorted(
        (
            "braycurtis",
            "canberra",
            "chebyshev",
            "cityblock",
            "correlation",
            "cosine",
            "euclidean",
            "hamming",
            "jensenshannon",
            "mahalanobis",
            "matching",
            "minkowski",
            "seuclidean",
            "sqeuclidean",
            *BOOLEAN_METRICS,
        )
    )
)
DEFAULT_HOOK_NAME = "ln_final.hook_normalized"
DEFAULT_SENTENCE_MODEL = "sentence-transformers/all-MiniLM-L6-v2"


def add_spectral_arguments(parser: argparse.ArgumentParser) -> None:
    """How a prompt becomes a point: representation, pooling, principal axes, cache."""
    group = parser.add_argument_group("spectral space")
    group.add_argument(
        "--spectral_space",
        choices=["hidden", "logits"],
        default="hidden",
        help="hidden: the activation at --rep_hook_name; logits: next-token logits",
    )
    group.add_argument(
        "--rep_hook_name",
        default=DEFAULT_HOOK_NAME,
        help="activation that represents a prompt (hidden space); an unknown name lists the known ones",
    )
    group.add_argument(
        "--rep_pooling",
        choices=["last", "mean"],
        default="mean",
        help="last prompt token, or mean over the prompt's tokens",
    )
    group.add_argument("--max_seq_len", type=positive_int, default=None, help="keep only the last tokens of a prompt")
    group.add_argument("--spectral_dim", type=positive_int, default=16, help="principal axes kept")
    group.add_argument("--spectral_cache_dir", default="cache", help="folder of the spectral_reps_*.npy files")


def add_pairing_arguments(group: argparse._ArgumentGroup) -> None:
    """How an unrelated partner is found for an associated datapoint."""
    group.add_argument(
        "--pair_similarity_metric",
        choices=METRICS,
        default="cosine",
        metavar="METRIC",
        help="distance for pairing: " + ", ".join(METRICS),
    )
    group.add_argument(
        "--pairing_space",
        choices=["representation", "sentence"],
        default="representation",
        help="distances of the analysed model's representations, or of sentence embeddings of the prompts",
    )
    group.add_argument("--sentence_model", default=DEFAULT_SENTENCE_MODEL, help="model of --pairing_space sentence")
    group.add_argument(
        "--pair_max_target_uses",
        type=positive_int,
        default=4,
        help="how many partners one unrelated datapoint may serve, where that gives equal lengths",
    )
