"""The prompts of a table as seen by the analysed model: vectors, token counts, and points on the unit sphere."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from lib import spectral_analysis as spectral
from lib.cli import Report
from lib.eap.pairs import AnsweredPrompt, sequences
from lib.modeling_and_ablation import LanguageModel, load_language_model
from lib.pairing import Lengths
from lib.representations import RepresentationSpec, RowView, prompt_representations
from lib.scores_table import ScoresTable
from lib.sentence_embeddings import sentence_embeddings


@dataclass
class PromptSpace:
    """Everything is computed on first use. args: flags of `add_model_arguments` and `add_spectral_arguments`."""

    args: argparse.Namespace
    table: ScoresTable
    report: Report

    @cached_property
    def language_model(self) -> LanguageModel:
        """The analysed model; cached representations need none."""
        args = self.args
        cache_dir = args.ai_model_cache_dir
        return load_language_model(args.ai_model, device=args.device, dtype=args.dtype, cache_dir=cache_dir)

    @cached_property
    def vectors(self) -> np.ndarray:
        """Representation of every row of the table, [row, width]: one computation serves all subsets and stages."""
        args = self.args
        spec = RepresentationSpec(
            args.spectral_space, args.rep_hook_name, args.rep_pooling, args.max_seq_len, args.dtype
        )
        return prompt_representations(
            args.ai_model,
            lambda: self.language_model,
            self.table.prompts,
            spec,
            args.spectral_cache_dir,
            batch_size=args.batch_size,
            report=self.report,
        )

    def view(self, rows: np.ndarray) -> RowView:
        """Representations of some rows, without a copy in memory."""
        return RowView(self.vectors, rows)

    def pairing_view(self, rows: np.ndarray) -> RowView:
        """Vectors of some rows among which partners are sought, by `--pairing_space`."""
        return RowView(self._sentences, rows) if self.args.pairing_space == "sentence" else self.view(rows)

    @cached_property
    def _sentences(self) -> np.ndarray:
        args = self.args
        return sentence_embeddings(
            args.sentence_model,
            self.table.prompts,
            args.spectral_cache_dir,
            batch_size=args.batch_size,
            device=args.device,
        )

    def points(self, rows: np.ndarray, generator: np.random.Generator) -> tuple[np.ndarray, spectral.PrincipalAxes]:
        """Rows on the unit sphere of their own principal axes: ([row, component], the axes)."""
        own = self.view(rows)
        axes = spectral.principal_axes(own, self.args.spectral_dim, generator)
        return spectral.to_unit_sphere(own, axes), axes

    def answered(self, rows: np.ndarray, max_answer_tokens: int | None = None) -> list[AnsweredPrompt]:
        """Token ids of the prompts and recorded answers of some rows."""
        frame = self.table.frame.iloc[rows]
        prompts, answers = frame[self.table.prompt_col].tolist(), frame[self.table.output_col].tolist()
        return sequences(self.language_model, prompts, answers, max_answer_tokens)

    def lengths(self, rows: np.ndarray) -> Lengths:
        """Token counts of some rows' prompts and recorded answers."""
        answered = self.answered(rows)
        return Lengths(
            np.array([len(item.prompt) for item in answered]), np.array([len(item.answer) for item in answered])
        )
