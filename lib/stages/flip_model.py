"""Stage 7's access to the analysed model: loaded on first need, shared by representations and the ablation engine."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lib.cli import Report
from lib.flip_measuring import LoadedEngine
from lib.scores_table import ScoresTable

if TYPE_CHECKING:
    from lib.modeling_and_ablation import LanguageModel


class ModelAccess:
    """Makes the engine and the prompt clusters that the flags ask for."""

    def __init__(self, args: Namespace, max_new_tokens: int, cache_dir: Path, report: Report) -> None:
        self._args, self._max_new_tokens, self._cache_dir, self._report = args, max_new_tokens, cache_dir, report

    @cached_property
    def language_model(self) -> LanguageModel:
        """The model."""
        from lib.modeling_and_ablation import load_language_model

        args = self._args
        return load_language_model(
            args.ai_model, device=args.device, dtype=args.dtype, cache_dir=args.ai_model_cache_dir
        )

    def engine(self, prompts: Sequence[str], references: Sequence[str]) -> LoadedEngine:
        """The engine over the evaluated prompts, with replacement values from the reference prompts."""
        from lib.ablation_engine import AblationEngine
        from lib.interventions import DecodeScope, Intervention, build_table

        args = self._args
        table = build_table(
            self.language_model,
            Intervention(args.intervention),
            references,
            max_new_tokens=self._max_new_tokens,
            prompts=prompts,
            seed=args.seed,
            cache_dir=self._cache_dir,
            batch_size=args.batch_size,
        )
        engine = AblationEngine(
            self.language_model,
            prompts,
            table,
            max_new_tokens=self._max_new_tokens,
            decode_only=args.decode_only,
            decode_scope=DecodeScope(args.decode_scope),
            memory_mb=args.memory_mb,
            batch_size=args.batch_size,
            report=self._report,
        )
        return LoadedEngine(engine, self.language_model.d_model)

    def prompt_clusters(self, scores: ScoresTable) -> np.ndarray:
        """Number of each row's cluster, [row]."""
        from lib.flip_clusters import prompt_clusters

        return prompt_clusters(self._args, scores, lambda: self.language_model, self._report)
