"""What stage 7's flags say, as the settings of its parts; mistakes are found before any work begins."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from lib.artifacts import StageRecord, text_digest
from lib.cli import UserError, require_dir, require_file
from lib.flip_candidates import BUCKETS_NAME, CandidateFilter, CatastrophicPolicy, discovery_rows
from lib.flip_measuring import MeasureSettings
from lib.flip_metrics import QualityCut
from lib.flip_rows import RowSampling
from lib.flip_rule_tables import ALL_FIT, TEST_SELECTED, quality_column
from lib.flip_rules import FitSettings
from lib.flip_summaries import SummaryOptions
from lib.flip_targets import FlipTarget, MinimumCounts
from lib.scores_table import ScoresTable, sanitize_label
from lib.task_spec import FeatureTaskSpec

STAGE = "7_refine_neuron_anchored_rules"
# Flags that change where things are, or how fast: the same results come out.
_NOT_IN_RESULTS = {
    "ai_model",
    "ai_model_cache_dir",
    "device",
    "batch_size",
    "memory_mb",
    "jobs",
    "force",
    "quiet",
    "dry_run",
    "rules_dir",
    "features_scores_dir",
    "circuit_agonists_path",
    "discovery_plans",
    "spectral_cache_dir",
    "summarize_rule_metrics_only",
    "stats_only",
}


class FlipSettings:
    """The parsed flags, read once."""

    def __init__(self, args: Namespace, task: FeatureTaskSpec, scores: ScoresTable) -> None:
        self.args, self.task, self.scores = args, task, scores
        self.rules_dir = Path(args.rules_dir)
        self.stats_dir = self.rules_dir / "stats" / args.stats_dirname
        self.summary = self._summary()
        self.fit = self._fit()

    @property
    def policy(self) -> str:
        """Folder of rules under the same behaviour, intervention and phase."""
        phase = "prefill_decode"
        if self.args.decode_only:
            phase = "decode_only" if self.args.decode_scope == "answer" else "decode_only_generated"
        return sanitize_label(f"{self.scores.primary_target}_{self.args.intervention}_{phase}")

    @property
    def policy_dir(self) -> Path:
        """Where the neurons' folders are."""
        return self.rules_dir / self.policy

    @property
    def sampling(self) -> RowSampling:
        """How rows are chosen."""
        return RowSampling(self.args.row_sampling)

    @property
    def candidate_filter(self) -> CandidateFilter:
        """Which candidates are analysed."""
        args = self.args
        policy = CatastrophicPolicy(args.catastrophic)
        return CandidateFilter(args.search_epsilon, args.min_confirmed_rate, policy, args.max_neurons)

    @property
    def agonists_path(self) -> Path:
        """Stage 6's output; a `UserError` if there is none."""
        if self.args.circuit_agonists_path is None:
            raise UserError("--circuit_agonists_path is missing: give stage 6's output folder or .zip")
        path = Path(self.args.circuit_agonists_path)
        require = require_file if path.suffix.lower() == ".zip" else require_dir
        return require(path, "agonist neurons", "run stage 6, or correct --circuit_agonists_path")

    @cached_property
    def discovery(self) -> np.ndarray:
        """Rows that stages 5 and 6 used, [row]."""
        agonists = self.agonists_path
        if self.args.discovery_plans is None:
            circuits = agonists.parent / "neural_circuits"
            plans = [*sorted(agonists.parent.glob("*sampling_plan*.json")), *([circuits] if circuits.is_dir() else [])]
        else:
            plans = [Path(path) for path in self.args.discovery_plans]
        return discovery_rows([agonists, *plans], self.scores)

    @cached_property
    def measure(self) -> MeasureSettings:
        """Everything but the prompts that determines answers."""
        from lib.modeling_and_ablation import model_identity

        args = self.args
        return MeasureSettings(
            model=model_identity(args.ai_model),
            dtype=args.dtype,
            intervention=args.intervention,
            points_to_use_for_mean_ablation=args.points_to_use_for_mean_ablation,
            decode_only=args.decode_only,
            decode_scope=args.decode_scope if args.decode_only else "",
            max_new_tokens=self.task.MAX_NEW_TOKENS,
            seed=args.seed,
        )

    @cached_property
    def record(self) -> StageRecord:
        """Decides whether finished output still answers the question."""
        folder, agonists = Path(self.args.features_scores_dir), self.agonists_path
        inputs = {"scores": folder / "scores.csv", "features": folder / "features.json"}
        if agonists.is_dir():
            inputs |= {path.relative_to(agonists).as_posix(): path for path in sorted(agonists.rglob(BUCKETS_NAME))}
        else:
            inputs["agonists"] = agonists
        settings: dict[str, Any] = {
            name: value for name, value in sorted(vars(self.args).items()) if name not in _NOT_IN_RESULTS
        }
        settings |= {"measure": asdict(self.measure), "discovery_rows": text_digest(self.discovery.tolist())}
        settings |= {"task_settings": self.task.settings.to_json()}
        return StageRecord(STAGE, settings, inputs, self.stats_dir / "run_metadata.json")

    def _summary(self) -> SummaryOptions:
        args = self.args
        cut = QualityCut(
            metric=quality_column(args.rule_quality_metric),
            threshold=args.rule_quality_threshold,
            threshold_all_fit=args.rule_quality_threshold_all_fit,
            min_coverage=args.min_rule_dataset_coverage,
        )
        quantiles = parse_quantiles(args.rule_metrics_quantiles)
        emitted = ((TEST_SELECTED, args.emit_test_selected), (ALL_FIT, args.emit_all_fit_rules))
        scopes = tuple(scope for scope, is_emitted in emitted if is_emitted)
        return SummaryOptions(
            cut, scopes, quantiles, args.rule_length_cap, args.rule_metrics_topk, args.stats_dirname, args.seed
        )

    def _fit(self) -> FitSettings:
        args = self.args
        return FitSettings(
            minimum=MinimumCounts(args.min_train_flips, args.min_test_flips),
            targets=parse_targets(args.rule_targets),
            max_conditions=args.max_conditions,
            max_literals=args.max_rules,
            use_shap_in_xgb=args.use_shap_in_xgb,
            use_shap_in_lasso=args.use_shap_in_lasso,
            unique_rows_in_shap=args.only_unique_datapoints_in_shap,
            emit_all_fit=args.emit_all_fit_rules,
            emit_test_selected=args.emit_test_selected,
            n_bootstrap=args.n_bootstrap,
            seed=args.seed,
        )


def parse_targets(text: str | None) -> tuple[str, ...]:
    """`c2i,flip_m5_16` as names of kinds or columns; empty for all."""
    names = tuple(name.strip() for name in (text or "").split(",") if name.strip())
    for name in names:
        if name not in {target.value for target in FlipTarget} and not name.startswith("flip_"):
            raise UserError(f"--rule_targets: {name!r} is neither any, c2i, i2c nor a flip_* column")
    return names


def parse_quantiles(text: str) -> tuple[float, float, float]:
    """`0.1,0.5,0.9` as three ascending shares."""
    try:
        low, middle, high = (float(piece) for piece in text.split(","))
    except ValueError:
        raise UserError(f"--rule_metrics_quantiles {text!r}: give three numbers like 0.1,0.5,0.9") from None
    if not 0 <= low <= middle <= high <= 1:
        raise UserError(f"--rule_metrics_quantiles {text!r}: give three ascending shares between 0 and 1")
    return low, middle, high
