"""Stage 5: score every write coordinate by its influence on the answers, and keep the strongest as candidates."""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lib.artifacts import StageRecord, exclusive, read_json, read_npz, text_digest, write_json, write_npz
from lib.cli import Report, UserError, rng
from lib.eap.attribution import attribute_writes, check_settings
from lib.eap.circuits import Circuit, CircuitLevel, Layout, ScoreTable, choose_circuit
from lib.eap.edges import attribute_edges
from lib.eap.faithfulness import Keep, evaluate_circuit
from lib.eap.metrics import Metric, TokenAggregation
from lib.eap.order_check import ablation_effects, choose_units, order_report
from lib.eap.pairs import Pair
from lib.eap.scores import AttributionIntervention, AttributionSettings, GradientSite, Method, WriteTable
from lib.interventions import Intervention, ReplacementTable
from lib.modeling_and_ablation import model_identity
from lib.scores_table import ScoresTable, load_scores
from lib.stages.pair_jobs import PairJob, cluster_jobs, plan_jobs, random_jobs
from lib.stages.prompt_space import PromptSpace
from lib.stages.sampling_plan import rule_target
from lib.task_spec import resolve_task_spec
from lib.text_and_rules import load_rules, rule_file_path

_SCORE_SETTINGS = (
    "method",
    "metric",
    "temporal_agg",
    "intervention",
    "decode_only",
    "decode_mode",
    "max_ig_steps",
    "mlp_neurons_only",
    "mlp_grad_site",
    "max_answer_tokens",
    "dtype",
    "points_to_use_for_mean_ablation",
    "seed",
)
_CIRCUIT_SETTINGS = (
    "eval_intervention",
    "circuit_level",
    "circuit_size",
    "absolute_value_attributions",
    "rank_by",
    "include_zero_scores",
    "fallback_to_full_network",
    "check_units",
    "draw_circuits",
)
_SAMPLING_SETTINGS = (
    "task_module",
    "rules_glob",
    "fake_targets",
    "max_n_of_rules_to_analyze",
    "max_pairs_per_circuit",
    "min_pairs_per_circuit",
    "sampling_strategy",
    "pair_similarity_metric",
    "pair_max_target_uses",
    "pairing_space",
    "sentence_model",
    "cluster_by_spectral",
    "cluster_base_subset",
    "global_n_clusters",
    "spectral_space",
    "rep_hook_name",
    "rep_pooling",
    "max_seq_len",
    "spectral_dim",
)
_CHECKED_PAIRS = 8
SCORE_MEANING = (
    "sum over pairs and positions of (replacement - clean value) x gradient of the metric; positive: the replacement "
    "takes the model away from its recorded answer"
)


def run_stage(args: argparse.Namespace, report: Report) -> None:
    """Do every job that is not done yet and write the manifest, or say that it is up to date."""
    check_settings(attribution_settings(args))
    if args.method == Method.INFORMATION_FLOW_ROUTES.value and args.circuit_level != CircuitLevel.EDGE.value:
        raise UserError("--method information-flow-routes scores edges; use it with --circuit_level edge")
    if args.sampling_strategy == "plan" and not args.sampling_plan_path and not args.cluster_by_spectral:
        raise UserError("--sampling_strategy plan needs --sampling_plan_path (a plan of stage 4)")
    record = stage_record(args)
    output_dir = Path(args.output_data_dir)
    if not args.force and record.is_complete():
        report.line(f"stage 5 is up to date: {output_dir}")
        for line in record.summary()["lines"]:
            report.line(line)
        return
    with exclusive(output_dir):
        started = time.time()
        discovery = CircuitDiscovery(args, report)
        outputs, lines = discovery.run()
        for line in lines:
            report.line(line)
        record.finish(outputs, started=started, summary={"lines": lines})


def stage_record(args: argparse.Namespace) -> StageRecord:
    """What this run is asked and given."""
    names = (*_SCORE_SETTINGS, *_CIRCUIT_SETTINGS, *_SAMPLING_SETTINGS)
    settings = {**{name: getattr(args, name) for name in names}, "model": model_identity(args.ai_model)}
    scores_dir = Path(args.features_scores_dir)
    inputs = {
        "feature table (stage 2)": scores_dir / "scores.csv",
        "feature catalogue (stage 2)": scores_dir / "features.json",
    }
    if not args.cluster_by_spectral:
        target = rule_target(resolve_task_spec(args.task_module, scores_dir), args.fake_targets)
        inputs["rule file (stage 3)"] = rule_file_path(args.rules_dir, target, prefix=args.rules_glob)
        if args.sampling_strategy == "plan":
            inputs["sampling plan (stage 4)"] = Path(args.sampling_plan_path)
    return StageRecord("5_discover_circuits", settings, inputs, Path(args.output_data_dir) / "run_metadata.json")


def attribution_settings(args: argparse.Namespace) -> AttributionSettings:
    """The flags that decide the scores."""
    return AttributionSettings(
        Method(args.method),
        Metric(args.metric),
        TokenAggregation(args.temporal_agg),
        AttributionIntervention(args.intervention),
        args.decode_only and args.decode_mode != "all",
        args.max_ig_steps,
        not args.mlp_neurons_only,
        GradientSite(args.mlp_grad_site),
    )


@dataclass
class CircuitDiscovery:
    """All jobs of one run of stage 5."""

    args: argparse.Namespace
    report: Report

    def __post_init__(self) -> None:
        self.task = resolve_task_spec(self.args.task_module, self.args.features_scores_dir)
        self.table: ScoresTable = load_scores(self.args.features_scores_dir, self.task)
        self.space = PromptSpace(self.args, self.table, self.report)
        self.settings = attribution_settings(self.args)
        self.level = CircuitLevel(self.args.circuit_level)
        self.output_dir = Path(self.args.output_data_dir)
        self.tables: dict[AttributionIntervention, ReplacementTable] = {}

    def run(self) -> tuple[list[Path], list[str]]:
        """Returns (files written or reused, summary lines)."""
        info = self.output_dir / "dataset_info.json"
        manifest_path = self.output_dir / "manifest.json"
        write_json(info, self.dataset_info(), indent=4)
        manifest: list[dict[str, Any]] = []
        outputs, lines = [info, manifest_path], []
        for job in self.jobs():
            entry, files = self.do(job)
            manifest.append(entry)
            outputs += files
            lines.append(summary_line(job, entry))
            # Written after each job: what is finished can be used, and survives whatever happens next.
            write_json(manifest_path, manifest, indent=None)
        return outputs, lines

    def dataset_info(self) -> dict[str, Any]:
        """What stage 6 needs to find the data again."""
        cluster_mode = self.args.cluster_by_spectral
        return {
            "scores_path": self.table.path.as_posix(),
            "prompt_col": self.table.prompt_col,
            "target_col": self.table.primary_target,
            "ai_model": self.args.ai_model,
            "analysis_mode": "spectral_cluster" if cluster_mode else "rule",
            "cluster_base_subset": self.args.cluster_base_subset if cluster_mode else None,
            "task_module": self.args.task_module,
            "features_scores_dir": Path(self.args.features_scores_dir).as_posix(),
        }

    def jobs(self) -> Iterator[PairJob]:
        """The jobs in order, with a progress bar."""
        args = self.args
        if args.cluster_by_spectral:
            jobs = cluster_jobs(self.space, args)
        else:
            target = rule_target(self.task, args.fake_targets)
            rules = load_rules(args.rules_dir, target, prefix=args.rules_glob)
            if args.max_n_of_rules_to_analyze > 0:
                rules = rules[: args.max_n_of_rules_to_analyze]
            if args.sampling_strategy == "plan":
                jobs = plan_jobs(Path(args.sampling_plan_path), rules, self.space, args)
            else:
                jobs = random_jobs(rules, self.space, args)
        return self.report.progress(jobs, unit="job", desc="circuits")

    def do(self, job: PairJob) -> tuple[dict[str, Any], list[Path]]:
        """One job: its manifest entry and its files. A finished job with equal settings and pairs is not repeated."""
        folder = self.output_dir / job.folder
        record = StageRecord("5_discover_circuits/job", self._job_settings(job), {}, folder / "run_metadata.json")
        files = [folder / name for name in ("scores.json", "scores.npz", "eval.json")]
        if job.skip_reason is not None:
            files = [folder / "skipped.json"]
        if self.args.force or not record.is_complete():
            shutil.rmtree(folder, ignore_errors=True)
            if job.skip_reason is not None:
                skipped = {
                    "reason": job.skip_reason,
                    "n_pos": job.n_pos,
                    "n_neg": job.n_neg,
                    "skip_type": "insufficient",
                }
                write_json(files[0], skipped, indent=4)
            else:
                files += self._discover(job, folder)
            record.finish(files)
        return self._manifest_entry(job, folder), [*files, folder / "run_metadata.json"]

    def _job_settings(self, job: PairJob) -> dict[str, Any]:
        """What decides one job's result: not which other rules there are."""
        args = self.args
        frame = self.table.frame
        texts = frame[[self.table.prompt_col, self.table.output_col]]
        pairs = [texts.iloc[rows].to_numpy().tolist() for rows in (job.clean_rows, job.corrupted_rows)]
        reference = texts.iloc[self.reference_rows].to_numpy().tolist()
        return {
            **{name: getattr(args, name) for name in (*_SCORE_SETTINGS, *_CIRCUIT_SETTINGS)},
            "model": model_identity(args.ai_model),
            "label": job.label,
            "skip_reason": job.skip_reason,
            "pairs": text_digest(pairs),
            "reference_rows": text_digest(reference),
        }

    @cached_property
    def reference_rows(self) -> Any:
        """TRAIN rows over which means are taken, as row numbers of scores.csv."""
        rows = self.table.train_rows
        n_rows = min(self.args.points_to_use_for_mean_ablation, len(rows))
        return rng(self.args.seed, "stage5", "means").choice(rows, n_rows, replace=False)

    def replacement_table(self, intervention: AttributionIntervention) -> ReplacementTable | None:
        """Mean values for an intervention that needs them."""
        if intervention in (AttributionIntervention.PATCHING, AttributionIntervention.ZERO):
            return None
        if intervention not in self.tables:
            lm = self.space.language_model
            answered = self.space.answered(self.reference_rows, self.args.max_answer_tokens)
            table = ReplacementTable(
                lm,
                Intervention(intervention.value),
                [list(item.prompt + item.answer) for item in answered],
                cache_dir=Path(self.args.cache_dir),
                batch_size=self.args.batch_size,
            )
            self.tables[intervention] = table
        return self.tables[intervention]

    @cached_property
    def layout(self) -> Layout:
        """Numbering of the model's components."""
        lm = self.space.language_model
        return Layout(lm.n_layers, lm.n_heads, lm.d_model, lm.d_head, lm.is_parallel)

    def pairs(self, job: PairJob) -> list[Pair]:
        """Token ids of a job's pairs."""
        sides = (
            self.space.answered(rows, self.args.max_answer_tokens) for rows in (job.clean_rows, job.corrupted_rows)
        )
        return [Pair(clean, corrupted) for clean, corrupted in zip(*sides, strict=True)]

    def _discover(self, job: PairJob, folder: Path) -> list[Path]:
        """Attribute, choose, evaluate; writes scores.npz, scores.json, eval.json. Returns pictures, if asked for."""
        args, pairs = self.args, self.pairs(job)
        status, reason = "ok", None
        try:
            arrays = self._attribute(job, pairs)
        except (RuntimeError, MemoryError) as error:
            if not args.fallback_to_full_network:
                raise
            status, reason = "full_network_fallback", " ".join(str(error).split())
            arrays = self._equal_scores()
        write_npz(folder / "scores.npz", **arrays)
        circuit = self._circuit(arrays)
        write_json(
            folder / "scores.json",
            {
                **circuit.scalars(),
                **self._provenance(),
                "status": status,
                "fallback_reason": reason,
                "n_pairs": len(pairs),
                "order_check": self._order_check(arrays, pairs, job),
                "top": dict(list(_label_scores(circuit).items())[:20]),
            },
            indent=4,
        )
        write_json(folder / "eval.json", self._evaluation(circuit, pairs, job), indent=4)
        if not args.draw_circuits:
            return []
        from lib.eap.drawing import draw_circuit

        return draw_circuit(folder, ScoreTable.from_arrays(self.layout, arrays), circuit, job.label)

    def _attribute(self, job: PairJob, pairs: list[Pair]) -> dict[str, np.ndarray]:
        """Score arrays of a job, as stored."""
        options = {
            "batch_size": self.args.batch_size,
            "table": self.replacement_table(self.settings.intervention),
            "progress": self.report.progress(range(len(pairs)), unit="pair", desc=f"attribution {job.circuit_id}"),
        }
        lm = self.space.language_model
        if self.level is CircuitLevel.EDGE:
            return attribute_edges(lm, pairs, self.settings, self.layout, **options).arrays()
        whole_writes = self.level is CircuitLevel.NODE
        return attribute_writes(lm, pairs, self.settings, whole_writes=whole_writes, **options).arrays()

    def _equal_scores(self) -> dict[str, np.ndarray]:
        """Score 1 for everything: the explicitly asked-for fallback."""
        lm = self.space.language_model
        if self.level is CircuitLevel.EDGE:
            return {"edges": self.layout.edges().astype(float)}
        n_heads = lm.n_heads if self.settings.with_heads else None
        width = 1 if self.level is CircuitLevel.NODE else lm.d_model
        return WriteTable.filled(1.0, lm.n_layers, n_heads, width, torch.device("cpu")).arrays()

    def _circuit(self, arrays: dict[str, Any]) -> Circuit:
        args = self.args
        return choose_circuit(
            ScoreTable.from_arrays(self.layout, arrays),
            self.level,
            args.circuit_size,
            absolute=args.absolute_value_attributions,
            include_zeros=args.include_zero_scores,
            mlp_only=args.mlp_neurons_only,
            magnitudes=self._magnitudes(arrays),
        )

    def _magnitudes(self, arrays: dict[str, Any]) -> ScoreTable | None:
        """What units are ranked by; None if by score: because that was asked for, or there is nothing else."""
        by_magnitude = self.args.rank_by == "magnitude" and self.args.absolute_value_attributions
        if not by_magnitude or not any(name.endswith("_magnitude") for name in arrays):
            return None
        return ScoreTable.from_arrays(self.layout, arrays, "_magnitude")

    def _order_check(self, arrays: dict[str, Any], pairs: list[Pair], job: PairJob) -> dict[str, Any] | None:
        """Scores against the exact effect of the ablation that follows, on a few units and pairs."""
        args = self.args
        if not args.check_units or self.level is CircuitLevel.EDGE:
            return None
        table = self._magnitudes(arrays) or ScoreTable.from_arrays(self.layout, arrays)
        candidates = np.flatnonzero(table.candidates(self.level, args.mlp_neurons_only))
        generator = rng(args.seed, "stage5", "order check", job.circuit_id)
        chosen = choose_units(table, candidates, args.check_units, generator)
        rows, places = divmod(chosen, table.values.shape[1])
        is_node = self.level is CircuitLevel.NODE
        units = [(self.layout.label(row), None if is_node else int(i)) for row, i in zip(rows, places, strict=True)]
        intervention = AttributionIntervention(args.eval_intervention)
        settings = replace(self.settings, intervention=intervention, metric=Metric.LOG_PROB)
        effects = ablation_effects(
            self.space.language_model,
            pairs[:_CHECKED_PAIRS],
            units,
            settings,
            self.replacement_table(intervention),
            batch_size=_CHECKED_PAIRS,
        )
        return order_report(table.values.ravel()[chosen], effects, generator)

    def _provenance(self) -> dict[str, Any]:
        args = self.args
        return {
            "method": args.method,
            "metric": args.metric,
            "temporal_agg": args.temporal_agg,
            "intervention": args.intervention,
            "decode_only": self.settings.decode_only,
            "ig_alphas": self.settings.alphas,
            "mlp_grad_site": args.mlp_grad_site,
            "score_meaning": SCORE_MEANING,
        }

    def _evaluation(self, circuit: Circuit, pairs: list[Pair], job: PairJob) -> dict[str, Any]:
        args, lm = self.args, self.space.language_model
        intervention = AttributionIntervention(args.eval_intervention)
        mask = torch.from_numpy(circuit.keep_mask()).to(lm.device)
        faithfulness = evaluate_circuit(
            lm,
            pairs,
            self.layout,
            Keep(mask, with_heads=not args.mlp_neurons_only, embedding=True),
            intervention,
            decode_only=self.settings.decode_only,
            batch_size=args.batch_size,
            table=self.replacement_table(intervention),
            of_edges=self.level is CircuitLevel.EDGE,
            progress=self.report.progress(range(len(pairs)), unit="pair", desc=f"faithfulness {job.circuit_id}"),
        )
        return {
            "circuit_edges": circuit.edge_counts(),
            **faithfulness.blocks(),
            "eval_intervention": args.eval_intervention,
            "decode_only": self.settings.decode_only,
        }

    def _manifest_entry(self, job: PairJob, folder: Path) -> dict[str, Any]:
        """The published manifest object of a job, rebuilt from its files."""
        identity = {
            "target": self.table.primary_target,
            "circuit_id": job.circuit_id,
            "circuit_label": job.label,
            "coefficient_sign": job.coefficient_sign,
        }
        if job.members is not None:
            identity |= {"cluster_index": job.circuit_id, "member_original_idx": job.members.tolist()}
        if job.skip_reason is not None:
            return {"status": "skipped", "n_pos": job.n_pos, "n_neg": job.n_neg, "reason": job.skip_reason, **identity}
        stored = read_json(folder / "scores.json", "scores of a finished job")
        circuit = self._circuit(read_npz(folder / "scores.npz", "scores of a finished job"))
        metadata = {**circuit.metadata(), **self._provenance()}
        if stored["status"] == "full_network_fallback":
            metadata |= {"fallback_full_network": True, "fallback_reason": stored["fallback_reason"]}
        evaluation = read_json(folder / "eval.json", "evaluation of a finished job")
        return {
            "status": stored["status"],
            "n_pairs": job.n_pairs,
            "scores_csv": (folder / "scores.json").as_posix(),
            "eval_json": (folder / "eval.json").as_posix(),
            "metadata_topn": metadata,
            "order_check": stored["order_check"],
            "sampling_strategy": job.sampling_strategy,
            "pairing_meta": job.pairing_meta,
            # Rows of scores.csv that the pairs are made of: stage 7 must know what helped to find the neurons.
            "associated_original_idx": job.clean_rows.tolist(),
            "unrelated_original_idx": job.corrupted_rows.tolist(),
            **evaluation,
            **identity,
        }


def _label_scores(circuit: Circuit) -> dict[str, float]:
    metadata = circuit.metadata()
    return metadata[f"{circuit.level.value}_label_score"]


def summary_line(job: PairJob, entry: dict[str, Any]) -> str:
    """One job in one line for the terminal."""
    name = f"  {job.label}" if job.members is not None else f"  rule {job.circuit_id}"
    if entry["status"] == "skipped":
        return f"{name}: skipped, {job.skip_reason}"
    meta = entry["metadata_topn"]
    faithfulness = entry["faithfulness"]["ratio_of_means"]
    text = (
        f"{name}: {job.n_pairs} pairs, {meta['selected_n']} of {meta['num_considered']} {meta['level']}s kept "
        f"({meta['kept_share']:.1%})"
    )
    text += f", faithfulness {faithfulness:.2f}" if faithfulness is not None else ", ablation changes nothing"
    check = entry["order_check"]
    if check is None:
        return text
    agreement = "undefined" if check["spearman"] is None else f"{check['spearman']:.2f}"
    text += f", rank agreement with {check['n_units']} exact ablations {agreement}"
    return text if check["better_than_chance"] else text + " (NO BETTER THAN CHANCE)"
