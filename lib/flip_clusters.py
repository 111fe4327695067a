"""Clusters of prompts by the analysed model's representation of them, for spectral row sampling."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from lib.cli import Report, rng
from lib.representations import RepresentationSpec, prompt_representations
from lib.scores_table import ScoresTable
from lib.spectral_analysis import k_centre, principal_axes, to_unit_sphere

if TYPE_CHECKING:
    from lib.modeling_and_ablation import LanguageModel


def prompt_clusters(
    args: Namespace, scores: ScoresTable, load: Callable[[], LanguageModel], report: Report
) -> np.ndarray:
    """Number of each row's cluster, [row]: representations, principal axes, unit sphere, k-centre."""
    spec = RepresentationSpec(args.spectral_space, args.rep_hook_name, args.rep_pooling, args.max_seq_len, args.dtype)
    points = prompt_representations(
        args.ai_model, load, scores.prompts, spec, args.spectral_cache_dir, batch_size=args.batch_size, report=report
    )
    axes = principal_axes(points, args.spectral_dim, rng(args.seed, "stage7", "axes"))
    return k_centre(
        to_unit_sphere(points, axes), args.global_n_clusters, rng(args.seed, "stage7", "clusters")
    ).assignment
