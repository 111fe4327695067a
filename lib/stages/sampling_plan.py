"""Stage 4: choose the datapoints that stand for each rule, and write them down as a sampling plan."""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lib import spectral_analysis as spectral
from lib.artifacts import StageRecord, exclusive, file_digest, write_json
from lib.cli import Report, UserError, rng
from lib.modeling_and_ablation import model_identity
from lib.pairing import Lengths, pair_by_similarity, pairing_report
from lib.scores_table import ScoresTable, load_scores
from lib.task_spec import resolve_task_spec
from lib.text_and_rules import StoredRule, load_rules, rule_file_path

if TYPE_CHECKING:
    from lib.stages.prompt_space import PromptSpace
    from lib.task_spec import FeatureTaskSpec

PLAN_SCHEMA_VERSION = 2
_SETTINGS = (
    "task_module",
    "rules_glob",
    "fake_targets",
    "dtype",
    "use_global_clusters",
    "global_n_clusters",
    "coverage_radius",
    "max_points_per_ablation",
    "min_points_per_ablation",
    "min_points_to_study",
    "seed",
    "baseline_subset",
    "pair_by_similarity_len_matched",
    "pair_len_tolerance",
    "pair_similarity_metric",
    "pair_max_target_uses",
    "pairing_space",
    "sentence_model",
    "compute_cover_stats",
    "stats_sample_size",
    "stats_chunk_size",
    "spectral_space",
    "rep_hook_name",
    "rep_pooling",
    "max_seq_len",
    "spectral_dim",
)


def run_stage(args: argparse.Namespace, report: Report) -> None:
    """Make the plan of one baseline subset, or say that it is up to date."""
    task = resolve_task_spec(args.task_module, args.features_scores_dir)
    target = rule_target(task, args.fake_targets)
    scores_dir, output = Path(args.features_scores_dir), Path(args.output_path)
    record = StageRecord(
        "4_spectral_sample_datapoints",
        {**{name: getattr(args, name) for name in _SETTINGS}, "model": model_identity(args.ai_model)},
        {
            "feature table (stage 2)": scores_dir / "scores.csv",
            "feature catalogue (stage 2)": scores_dir / "features.json",
            "rule file (stage 3)": rule_file_path(args.rules_dir, target, prefix=args.rules_glob),
        },
        output.with_name(f"{output.stem}.run_metadata.json"),
    )
    if not args.force and record.is_complete():
        report.line(f"stage 4 is up to date: {output}")
        for line in record.summary()["lines"]:
            report.line(line)
        return
    started = time.time()
    table = load_scores(scores_dir, task)
    rules = load_rules(args.rules_dir, target, prefix=args.rules_glob)
    with exclusive(output.parent, f".{output.name}.lock"):
        plan = SamplingPlanner(args, table, report).plan(rules)
        write_json(output, plan, indent=4)
        lines = summary_lines(plan)
        for line in lines:
            report.line(line)
        record.finish([output], started=started, summary={"lines": lines})


def rule_target(task: FeatureTaskSpec, fake_targets: bool) -> str:
    """The target whose rules are read: the primary one, or its shuffled control."""
    return task.DEFAULT_TARGETS[0] + ("_fake" if fake_targets else "")


def summary_lines(plan: dict[str, Any]) -> list[str]:
    """The plan in a few lines for the terminal."""
    lines = [
        f"{plan['baseline_subset']}: {plan['dataset_size']} datapoints, {plan['spectral_dim']} principal axes "
        f"({plan['explained_variance']:.0%} of the variance)"
    ]
    for rule in plan["rules"]:
        name = f"  rule {rule['rule_id']}: "
        if rule["status"] == "skipped":
            lines.append(name + f"skipped, {rule['reason']}")
            continue
        text = (
            f"{rule['n_associated_selected']} of {rule['n_associated_available']} associated, "
            f"{rule['n_unrelated_selected']} of {rule['n_unrelated_available']} unrelated"
        )
        if "pairing_meta" in rule:
            text += f", {rule['pairing_meta']['len_matched_count']} pairs of equal length"
        lines.append(name + text + (", fewer than asked for" if rule["fewer_points_than_asked"] else ""))
    return lines


@dataclass
class SamplingPlanner:
    """Samples every rule of one baseline subset. All numbers of points are positions in `rows`.

    args: the stage's flags. table: stage 2's table.
    """

    args: argparse.Namespace
    table: ScoresTable
    report: Report

    @cached_property
    def rows(self) -> np.ndarray:
        """Rows of scores.csv that the plan is about, [point]."""
        return self.table.subset_rows(self.args.baseline_subset)

    @cached_property
    def space(self) -> PromptSpace:
        """The prompts as the model sees them."""
        from lib.stages.prompt_space import PromptSpace

        return PromptSpace(self.args, self.table, self.report)

    @cached_property
    def lengths(self) -> Lengths:
        """Token counts of each point's prompt and recorded answer."""
        return self.space.lengths(self.rows)

    def plan(self, rules: list[StoredRule]) -> dict[str, Any]:
        """The plan as written to disk."""
        args = self.args
        if len(self.rows) < 2:
            raise UserError(
                f"{self.table.path} has {len(self.rows)} TRAIN rows in the subset {args.baseline_subset!r}; "
                "a sample needs at least 2"
            )
        self.points, axes = self.space.points(self.rows, rng(args.seed, "stage4", args.baseline_subset, "axes"))
        self.clusters = None
        if args.use_global_clusters:
            self.clusters = spectral.k_centre(
                self.points, args.global_n_clusters, rng(args.seed, "stage4", args.baseline_subset, "clusters")
            )
        frame = self.table.frame.iloc[self.rows]
        entries = [
            self._plan_rule(rule, rule.mask(frame))
            for rule in self.report.progress(rules, unit="rule", desc="sampling")
        ]
        return {**self._header(axes), "rules": entries, **self._cluster_block()}

    def _header(self, axes: spectral.PrincipalAxes) -> dict[str, Any]:
        args = self.args
        return {
            "schema_version": PLAN_SCHEMA_VERSION,
            "scores_path": self.table.path.as_posix(),
            "scores_sha256": file_digest(self.table.path),
            "prompt_col": self.table.prompt_col,
            "baseline_subset": args.baseline_subset,
            "ai_model": args.ai_model,
            "ai_model_cache_dir": args.ai_model_cache_dir,
            "spectral_space": args.spectral_space,
            "rep_hook_name": args.rep_hook_name,
            "rep_pooling": args.rep_pooling,
            "max_seq_len": args.max_seq_len,
            "spectral_dim": args.spectral_dim,
            "coverage_radius": args.coverage_radius,
            "min_points_per_ablation": args.min_points_per_ablation,
            "max_points_per_ablation": self._max_points,
            "seed": args.seed,
            "explained_variance": float(axes.explained_variance_ratio.sum()),
            "principal_axes_method": "exact" if axes.is_exact else "randomised",
            "pairing": {
                "max_pairs_per_rule": self._max_points,
                "len_tolerance": args.pair_len_tolerance,
                "method": "minimum_cost_assignment",
                "metric": args.pair_similarity_metric,
                "space": args.pairing_space,
                "max_target_uses": args.pair_max_target_uses,
            },
            "stats": {
                "compute_cover_stats": args.compute_cover_stats,
                "stats_sample_size": args.stats_sample_size,
                "stats_chunk_size": args.stats_chunk_size,
            },
            "dataset_size": len(self.rows),
        }

    def _cluster_block(self) -> dict[str, Any]:
        if self.clusters is None:
            return {}
        clusters = self.clusters
        return {
            "global_clusters": {
                "method": "kcenter_farthest_first",
                "n_clusters": len(clusters.centres),
                "center_indices": clusters.centres,
                "achieved_cover_radius_l2": clusters.distances.max(),
                "mean_nn_radius_l2": clusters.distances.mean(),
                "cluster_sizes": np.bincount(clusters.assignment, minlength=len(clusters.centres)),
            }
        }

    @property
    def _max_points(self) -> int:
        return max(self.args.max_points_per_ablation, self.args.min_points_per_ablation)

    def _plan_rule(self, rule: StoredRule, mask: np.ndarray) -> dict[str, Any]:
        associated, unrelated = np.flatnonzero(mask), np.flatnonzero(~mask)
        entry: dict[str, Any] = {
            "rule_id": rule.rule_id,
            "rule": rule.text,
            "rule_direction": rule.direction,
            "rule_target": self.table.primary_target,
            "status": "ok",
            "n_associated_available": len(associated),
            "n_unrelated_available": len(unrelated),
        }
        n = min(self._max_points, len(associated), len(unrelated))
        if n < max(self.args.min_points_to_study, 1):
            side = "associated" if len(associated) <= len(unrelated) else "unrelated"
            reason = (
                f"only {n} {side} datapoints, fewer than --min_points_to_study {self.args.min_points_to_study}"
                if n
                else f"no {side} datapoints"
            )
            return {
                **entry,
                "status": "skipped",
                "reason": reason,
                "n_associated_selected": 0,
                "n_unrelated_selected": 0,
                "associated_indices": [],
                "unrelated_indices": [],
            }
        chosen, entry["associated_cover"] = self._cover(rule, "associated", associated, n)
        if self.args.pair_by_similarity_len_matched:
            partners, entry["pairing_meta"] = self._partners(chosen, unrelated)
        else:
            partners, entry["unrelated_cover"] = self._cover(rule, "unrelated", unrelated, len(chosen))
            if len(partners) < len(chosen):
                chosen = chosen[: len(partners)]
        return {
            **entry,
            **self._selected(chosen, partners),
            "pair_stats": {"euclidean_dist": self._pair_distances(chosen, partners)},
        }

    def _selected(self, chosen: np.ndarray, partners: np.ndarray) -> dict[str, Any]:
        return {
            "fewer_points_than_asked": len(chosen) < self.args.min_points_per_ablation,
            "n_associated_selected": len(chosen),
            "n_unrelated_selected": len(partners),
            "associated_indices": chosen,
            "unrelated_indices": partners,
            "associated_original_idx": self.rows[chosen],
            "unrelated_original_idx": self.rows[partners],
        }

    def _cover(self, rule: StoredRule, side: str, group: np.ndarray, n: int) -> tuple[np.ndarray, dict[str, Any]]:
        """A covering sample of one side, with its `*_cover` block."""
        chosen, meta = self._cluster_cover(group, n) if self.clusters is not None else self._greedy_cover(group, n)
        if not self.args.compute_cover_stats:
            return chosen, {
                "greedy_meta": meta,
                "stats": {"status": "skipped", "reason": "--compute_cover_stats is off"},
            }
        args, stream = self.args, rng(self.args.seed, "stage4", self.args.baseline_subset, rule.rule_id, side)
        stats = spectral.cover_statistics(
            self.points,
            group,
            chosen,
            args.coverage_radius,
            sample_size=args.stats_sample_size,
            chunk=args.stats_chunk_size,
            generator=stream,
        )
        stats["covering_radius"] = stats["dist_to_nearest_center"]["max"]
        if self.clusters is not None:
            other = spectral.one_per_cluster_then_random(self.points, group, self.clusters, len(chosen), stream)
            _, distance = spectral.nearest_centre(self.points[group], self.points[other], args.stats_chunk_size)
            stats["covering_radius_one_per_cluster_then_random"] = distance.max()
        return chosen, {"greedy_meta": meta, "stats": stats}

    def _cluster_cover(self, group: np.ndarray, n: int) -> tuple[np.ndarray, dict[str, Any]]:
        cover = spectral.cover_by_clusters(self.points, group, self.clusters, n)
        if cover.strategy == "all":
            return cover.chosen, {"status": "all", "n_selected": len(cover.chosen)}
        return cover.chosen, {
            "status": "ok",
            "n_selected": len(cover.chosen),
            "n_group": len(group),
            "n_clusters_in_group": cover.n_clusters_in_group,
            "strategy": cover.strategy,
        }

    def _greedy_cover(self, group: np.ndarray, n: int) -> tuple[np.ndarray, dict[str, Any]]:
        """Farthest-first in the whole group until `--coverage_radius` is reached (and the minimum of points)."""
        own = self.points[group]
        n_before_stop = min(n, self.args.min_points_per_ablation)
        start, stop_radius = spectral.most_central(own), self.args.coverage_radius
        order, radius = spectral.farthest_first(own, n, start, stop_radius=stop_radius, n_before_stop=n_before_stop)
        needed, _ = spectral.farthest_first(own, n, start, stop_radius=stop_radius)
        if len(order) == len(group):
            reason = "all_points_selected"
        elif len(order) < n:
            reason = "min_points_filled" if len(order) == n_before_stop else "radius_satisfied"
        else:
            reason = "max_points_reached"
        return group[order], {
            "n_available": len(group),
            "radius": self.args.coverage_radius,
            "max_points": n,
            "min_points": self.args.min_points_per_ablation,
            "stopped_reason": reason,
            "farthest_dist_when_stopped": radius,
            "n_selected_before_min_fill": len(needed),
        }

    def _partners(self, chosen: np.ndarray, unrelated: np.ndarray) -> tuple[np.ndarray, dict[str, Any]]:
        """An unrelated datapoint for each chosen one, with the `pairing_meta` block."""
        args, lengths = self.args, self.lengths
        pairing = pair_by_similarity(
            self.space.pairing_view(self.rows[chosen]),
            self.space.pairing_view(self.rows[unrelated]),
            lengths.take(chosen),
            lengths.take(unrelated),
            metric=args.pair_similarity_metric,
            length_tolerance=args.pair_len_tolerance,
            max_target_uses=args.pair_max_target_uses,
        )
        partners = unrelated[pairing.targets]
        meta = pairing_report(
            pairing,
            chosen,
            partners,
            lengths.take(chosen),
            lengths.take(partners),
            metric=args.pair_similarity_metric,
            length_tolerance=args.pair_len_tolerance,
            max_target_uses=args.pair_max_target_uses,
            n_targets=len(unrelated),
        )
        return partners, meta

    def _pair_distances(self, chosen: np.ndarray, partners: np.ndarray) -> dict[str, Any]:
        left, right = (self.space.view(self.rows[side])[:].astype(np.float64) for side in (chosen, partners))
        distances = np.linalg.norm(left - right, axis=1)
        return spectral.summarise(distances, 0, rng(self.args.seed, "stage4", "pair distances"))
