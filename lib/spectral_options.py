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
