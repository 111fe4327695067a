"""Stage 7, step by step: candidates, rows, flips, statistics, rules, summaries."""

from __future__ import annotations

import time
from argparse import Namespace
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lib.artifacts import StageRecord, exclusive, read_json, text_digest, write_csv, write_json
from lib.cli import Report, UserError, require_dir, require_file, rng
from lib.flip_answer_log import AnswerLog
from lib.flip_candidates import (
    BUCKETS_NAME,
    Candidate,
    CandidateFilter,
    CatastrophicPolicy,
    Verdict,
    discovery_rows,
    read_candidates,
    select_candidates,
)
from lib.flip_fit_pool import fit_all
from lib.flip_measuring import EngineFactory, FlipMeasurement, FlipMeasurer, MeasureSettings
from lib.flip_metrics import QualityCut
from lib.flip_rows import EvaluatedRows, Role, RowSampling, assign_roles, choose_rows, group_numbers
from lib.flip_rule_tables import RuleRun, quality_column
from lib.flip_rules import FitProblem, FitSettings, TargetStatus
from lib.flip_summaries import SummaryOptions, write_statistics, write_summaries
from lib.flip_table import FlipTable, flip_frame, neurons_of_frame, read_flip_table
from lib.flip_targets import FlipTarget, MinimumCounts
from lib.scores_table import ScoresTable, load_scores, sanitize_label
from lib.stages.flip_model import ModelAccess
from lib.task_spec import FeatureTaskSpec, resolve_task_spec

STAGE = "7_refine_neuron_anchored_rules"
ANSWERS_FILE = "ablated_answers.jsonl"
# Flags that change where things are, or how fast: the same answers come out.
_NOT_IN_RESULTS = {
    "ai_model",
    "ai_model_cache_dir",
    "device",
    "batch_size",
    "memory_mb",
    "jobs",
    "force",
    "quiet",
    "rules_dir",
    "features_scores_dir",
    "circuit_agonists_path",
    "discovery_plans",
    "spectral_cache_dir",
    "summarize_rule_metrics_only",
    "stats_only",
}


class FlipAnchoring:
    """One run of the stage. `make_engine` replaces the real model in tests."""

    def __init__(self, args: Namespace, report: Report, make_engine: EngineFactory | None = None) -> None:
        self.args, self.report = args, report
        self.rules_dir = Path(args.rules_dir)
        self.stats_dir = self.rules_dir / "stats" / args.stats_dirname
        self.task: FeatureTaskSpec = resolve_task_spec(args.task_module, args.features_scores_dir)
        self.scores: ScoresTable = load_scores(args.features_scores_dir, self.task)
        self.model = ModelAccess(args, self.task.MAX_NEW_TOKENS, self.rules_dir / "replacement_scores_cache", report)
        self._make_engine = make_engine or self.model.engine
        self.summary_options = self._summary_options()
        self.fit_settings = self._fit_settings()
        self._written: list[Path] = []

    def run(self) -> int:
        """Exit code: 0, or 1 if a rule could not be fitted."""
        if self.args.stats_only or self.args.summarize_rule_metrics_only:
            return self._run_on_finished_files()
        started = time.time()
        if self.args.circuit_agonists_path is None:
            raise UserError("--circuit_agonists_path is missing: give stage 6's output folder or .zip")
        if self.record.is_complete() and not self.args.force:
            self.report.line(f"stage 7 is up to date: {self.stats_dir}")
            self._print(self.record.summary())
            return 0
        with exclusive(self.stats_dir):
            summary = self._run_all()
            failed = summary["n_failed_fits"]
            if not failed:
                self.record.finish(self._written, started=started, summary=summary)
        self._print(summary)
        return 1 if failed else 0

    # ------------------------------------------------------------ what the flags say

    @cached_property
    def policy(self) -> str:
        """Folder of rules under the same behaviour, intervention and phase."""
        phase = "prefill_decode"
        if self.args.decode_only:
            phase = "decode_only" if self.args.decode_scope == "answer" else "decode_only_generated"
        return sanitize_label(f"{self.scores.primary_target}_{self.args.intervention}_{phase}")

    @cached_property
    def cut(self) -> QualityCut:
        """When a rule is of high quality."""
        args = self.args
        return QualityCut(
            quality_column(args.rule_quality_metric),
            args.rule_quality_threshold,
            args.rule_quality_threshold_all_fit,
            args.min_rule_dataset_coverage,
        )

    def _summary_options(self) -> SummaryOptions:
        """What summaries show."""
        return SummaryOptions(
            self.cut,
            parse_quantiles(self.args.rule_metrics_quantiles),
            self.args.rule_length_cap,
            self.args.rule_metrics_topk,
            self.args.stats_dirname,
            self.args.seed,
        )

    @cached_property
    def measure_settings(self) -> MeasureSettings:
        """Everything but the prompts that determines answers."""
        from lib.modeling_and_ablation import model_identity

        args = self.args
        return MeasureSettings(
            model_identity(args.ai_model),
            args.dtype,
            args.intervention,
            args.points_to_use_for_mean_ablation,
            args.decode_only,
            args.decode_scope if args.decode_only else "",
            self.task.MAX_NEW_TOKENS,
            args.seed,
        )

    def _fit_settings(self) -> FitSettings:
        """How rules are fitted."""
        args = self.args
        targets = tuple(name.strip() for name in (args.rule_targets or "").split(",") if name.strip())
        for name in targets:
            if name not in {target.value for target in FlipTarget} and not name.startswith("flip_"):
                raise UserError(f"--rule_targets: {name!r} is neither any, c2i, i2c nor a flip_* column")
        return FitSettings(
            MinimumCounts(args.min_train_flips, args.min_test_flips),
            targets,
            args.max_conditions,
            args.max_rules,
            args.use_shap_in_xgb,
            args.use_shap_in_lasso,
            args.only_unique_datapoints_in_shap,
            args.emit_all_fit_rules,
            args.emit_test_selected,
            args.n_bootstrap,
            args.seed,
        )

    @cached_property
    def record(self) -> StageRecord:
        """Decides whether finished output still answers the question."""
        folder = Path(self.args.features_scores_dir)
        agonists = Path(self.args.circuit_agonists_path)
        inputs = {"scores": folder / "scores.csv", "features": folder / "features.json"}
        if agonists.is_dir():
            inputs |= {path.relative_to(agonists).as_posix(): path for path in sorted(agonists.rglob(BUCKETS_NAME))}
        elif agonists.is_file():
            inputs["agonists"] = agonists
        settings = {name: value for name, value in sorted(vars(self.args).items()) if name not in _NOT_IN_RESULTS}
        return StageRecord(
            STAGE,
            {
                **settings,
                "measure": asdict(self.measure_settings),
                "discovery_rows": text_digest(self.discovery.tolist()),
            },
            inputs,
            self.stats_dir / "run_metadata.json",
        )

    # ------------------------------------------------------------ steps

    def _run_all(self) -> dict[str, Any]:
        kept = self._candidates()
        rows = self._rows()
        measurement = self._measure([candidate for candidate, _ in kept], rows)
        table = measurement.table
        answers = measurement.log.extract(
            self.stats_dir / ANSWERS_FILE, [(neuron,) for neuron in table.neurons], measurement.positions
        )
        self._written.append(self.stats_dir / ANSWERS_FILE)
        self._write_table(table)
        self._write_statistics(table, measurement.controls, candidate_columns(kept))
        if measurement.joint is not None:
            write_json(self.stats_dir / "joint_ablation.json", measurement.joint)
            self._written.append(self.stats_dir / "joint_ablation.json")
        statuses = self._fit(table) if self.args.extract_rules else []
        anchored = self._summarize(table, answers) if self.args.summarize_rule_metrics else None
        return self._summary(table, measurement, statuses, anchored)

    def _candidates(self) -> list[tuple[Candidate, Verdict]]:
        """The kept candidates; `candidates.csv` says of each one read whether it was kept, and if not, why."""
        args = self.args
        wanted = CandidateFilter(
            args.search_epsilon, args.min_confirmed_rate, CatastrophicPolicy(args.catastrophic), args.max_neurons
        )
        judged = select_candidates(read_candidates(args.circuit_agonists_path), wanted)
        rows = [{**candidate.to_json(), "verdict": verdict.value} for candidate, verdict in judged]
        self._put_csv("candidates.csv", pd.DataFrame(rows) if rows else pd.DataFrame(columns=["neuron", "verdict"]))
        kept = [item for item in judged if item[1] is Verdict.KEPT]
        self.report.line(f"{len(kept)} of {len(judged)} neurons of stage 6 are analysed")
        return kept

    @cached_property
    def discovery(self) -> np.ndarray:
        """Rows that stages 5 and 6 used, [row]."""
        agonists = Path(self.args.circuit_agonists_path)
        require = require_dir if agonists.suffix.lower() != ".zip" else require_file
        require(agonists, "agonist neurons", "run stage 6, or correct --circuit_agonists_path")
        if self.args.discovery_plans is None:
            plans = [
                *sorted(agonists.parent.glob("*sampling_plan*.json")),
                *(path for path in [agonists.parent / "neural_circuits"] if path.is_dir()),
            ]
        else:
            plans = [Path(path) for path in self.args.discovery_plans]
        return discovery_rows([agonists, *plans], self.scores)

    def _rows(self) -> EvaluatedRows:
        args = self.args
        group_col = args.group_col or self.task.GROUP_COLUMN
        groups = group_numbers(self.scores, group_col) if group_col else None
        roles = assign_roles(self.scores, self.discovery, groups, rng(args.seed, "stage7", "groups"))
        sampling = RowSampling(args.row_sampling)
        needs_clusters = sampling is RowSampling.SPECTRAL and args.sampling_max_points < len(self.scores)
        rows = choose_rows(
            self.scores,
            roles,
            max_points=None if sampling is RowSampling.ALL else args.sampling_max_points,
            random=rng(args.seed, "stage7", "rows"),
            clusters=self.model.prompt_clusters(self.scores) if needs_clusters else None,
        )
        counts = ", ".join(f"{count} {name}" for name, count in rows.counts().items() if count)
        self.report.line(f"{len(rows)} of {len(self.scores)} prompts are evaluated: {counts}")
        return rows

    def _measure(self, candidates: list[Candidate], rows: EvaluatedRows) -> FlipMeasurement:
        args = self.args
        measurer = FlipMeasurer(
            self.scores,
            rows,
            self.task,
            self.measure_settings,
            self.rules_dir / self.policy / "ablation_cache",
            self._make_engine,
            self.report,
        )
        return measurer.run(
            [candidate.neuron for candidate in candidates],
            n_random=args.n_random_neurons,
            n_joint_controls=args.n_joint_controls if args.joint_ablation else 0,
        )

    def _write_table(self, table: FlipTable) -> None:
        frame = flip_frame(
            table,
            self.scores.frame,
            len(self.scores),
            keep_unsampled=self.args.keep_unsampled_rows,
            sampled=self.args.row_sampling == RowSampling.SPECTRAL.value,
        )
        self._put_csv("scores.csv", frame)

    def _write_statistics(self, table: FlipTable, controls: dict[str, Any], extra: pd.DataFrame | None) -> None:
        if self.args.exclude_discovery_rows_from_final_stats:
            is_discovery = table.rows.has_role(Role.DISCOVERY)
            write_json(
                self.stats_dir / "final_stats_exclusion.json",
                {
                    "exclude_discovery_rows_from_final_stats": True,
                    "n_discovery_original_rows_found": len(self.discovery),
                    "n_rows_excluded_from_scores_out": int(is_discovery.sum()),
                    "n_rows_remaining_for_final_stats": int((~is_discovery).sum()),
                },
            )
            self._written.append(self.stats_dir / "final_stats_exclusion.json")
            table = table.take(~is_discovery)
        self._written += write_statistics(self.stats_dir, table, extra, controls)

    def _fit(self, table: FlipTable) -> list[TargetStatus]:
        rows = table.rows
        problem = FitProblem(
            self.scores.features(rows.rows),
            tuple(self.scores.feature_names),
            table.baseline,
            rows.is_fit(with_discovery=not self.args.exclude_discovery_rows_from_training),
            rows.is_test,
        )
        statuses = fit_all(
            problem,
            table.neurons,
            table.matrix.flips,
            table.matrix.known,
            self.fit_settings,
            self.rules_dir / self.policy,
            jobs=self.args.jobs,
            force=self.args.force,
            progress=lambda units: self.report.progress(units, total=len(table.neurons), unit="neuron", desc="rules"),
        )
        columns = list(TargetStatus.__dataclass_fields__)
        self._put_csv(
            "neuron_target_status.csv", pd.DataFrame([asdict(status) for status in statuses], columns=columns)
        )
        return statuses

    def _summarize(self, table: FlipTable, answers: AnswerLog | None) -> pd.DataFrame:
        run = RuleRun(self.rules_dir, self.policy, table.neurons)
        self._written += [path for *_, path in run.files()]
        written, anchored = write_summaries(self.stats_dir, run, table, self.scores, self.summary_options, answers)
        self._written += written
        return anchored

    def _put_csv(self, name: str, frame: pd.DataFrame) -> None:
        write_csv(self.stats_dir / name, frame)
        self._written.append(self.stats_dir / name)

    # ------------------------------------------------------------ finished files

    def _run_on_finished_files(self) -> int:
        """Statistics and summaries from a run's `scores.csv` (ours or a published one), without a model."""
        path = require_file(self.stats_dir / "scores.csv", "flip table", "run stage 7 without --stats_only first")
        neurons = neurons_of_frame(pd.read_csv(path, nrows=0).columns)
        table = read_flip_table(path, neurons, self.scores.primary_target)
        with exclusive(self.stats_dir):
            if self.args.stats_only:
                stats_path = self.stats_dir / "flip_stats_global.json"
                controls = (
                    (read_json(stats_path, "flip statistics").get("controls") or {}) if stats_path.is_file() else {}
                )
                self._write_statistics(table, controls, None)
                self.report.line(
                    f"flip statistics of {len(neurons)} neurons: {self.stats_dir / 'flip_stats_by_neuron.csv'}"
                )
            if self.args.summarize_rule_metrics or self.args.summarize_rule_metrics_only:
                require_dir(
                    self.rules_dir / self.policy,
                    "rules of this behaviour, intervention and phase",
                    "give the --intervention and --decode_only of the finished run",
                )
                answers_path = self.stats_dir / ANSWERS_FILE
                anchored = self._summarize(table, AnswerLog.read(answers_path) if answers_path.is_file() else None)
                self._print_rules(anchored.to_dict("records"))
        return 0

    # ------------------------------------------------------------ telling

    def _summary(
        self,
        table: FlipTable,
        measurement: FlipMeasurement,
        statuses: list[TargetStatus],
        anchored: pd.DataFrame | None,
    ) -> dict[str, Any]:
        counts = pd.Series([status.status for status in statuses], dtype=str).value_counts().sort_index().to_dict()
        columns = ["neuron", "direction", "rule", "MCC", "MCC_low95", "MCC_high95", "badge"]
        rules = [] if anchored is None else anchored.reindex(columns=columns).head(5).to_dict("records")
        return {
            "n_neurons": len(table.neurons),
            "n_rows": len(table.rows),
            "rows_by_role": table.rows.counts(),
            "controls": {key: value for key, value in measurement.controls.items() if key != "random_neurons"},
            "random_flip_rate": measurement.controls["random_neurons"].get("flip_any_rate"),
            "fits_by_status": counts,
            "n_failed_fits": sum(status.failed for status in statuses),
            "failures": [f"{status.flip_target}: {status.reason}" for status in statuses if status.failed],
            "n_badges": 0 if anchored is None or "badge" not in anchored else int(anchored["badge"].sum()),
            "n_high_quality": 0
            if anchored is None or "high_quality" not in anchored
            else int(anchored["high_quality"].sum()),
            "joint": measurement.joint["test"] if measurement.joint else None,
            "best_rules": rules,
        }

    def _print(self, summary: dict[str, Any]) -> None:
        report = self.report
        report.line(
            f"flips of {summary['n_neurons']} neurons on {summary['n_rows']} prompts; no-op edit "
            f"{summary['controls']['no_op']['n_flips']} flips, random neurons flip "
            f"{100 * (summary['random_flip_rate'] or 0):.1f} %"
        )
        if summary["fits_by_status"]:
            report.line(
                "rules: "
                + ", ".join(f"{count} {status}" for status, count in summary["fits_by_status"].items())
                + f"; {summary['n_high_quality']} neurons of high quality on TEST, {summary['n_badges']} with badge"
            )
        self._print_rules(summary["best_rules"])
        if summary["joint"]:
            joint = summary["joint"]
            report.line(
                f"all together, held out: {_share(joint['share_positive_lost'])} of {joint['n_baseline_positive']} "
                f"positives lost (random {_share(np.mean(joint['share_positive_lost_random']))}), "
                f"{_share(joint['share_negative_gained'])} of {joint['n_baseline_negative']} negatives gained "
                f"(random {_share(np.mean(joint['share_negative_gained_random']))})"
            )
        for failure in summary["failures"]:
            report.line(f"failed: {failure}")
        report.line(f"tables and figures: {self.stats_dir}")

    def _print_rules(self, rules: list[dict[str, Any]]) -> None:
        for rule in rules[:5]:
            self.report.line(
                f"  {rule['neuron']} {rule['direction']} when {rule['rule']}: TEST MCC {_decimal(rule['MCC'])} "
                f"[{_decimal(rule['MCC_low95'])}, {_decimal(rule['MCC_high95'])}]{' *' if rule['badge'] else ''}"
            )


def candidate_columns(kept: list[tuple[Candidate, Verdict]]) -> pd.DataFrame | None:
    """What stage 6 says about each neuron, for the statistics table."""
    if not kept:
        return None
    return pd.DataFrame([candidate.to_json() for candidate, _ in kept]).drop(columns=["layer_label", "neuron_id"])


def parse_quantiles(text: str) -> tuple[float, float, float]:
    """`0.1,0.5,0.9` as three ascending shares."""
    try:
        low, middle, high = (float(piece) for piece in text.split(","))
    except ValueError:
        raise UserError(f"--rule_metrics_quantiles {text!r}: give three numbers like 0.1,0.5,0.9") from None
    if not 0 <= low <= middle <= high <= 1:
        raise UserError(f"--rule_metrics_quantiles {text!r}: give three ascending shares between 0 and 1")
    return low, middle, high


def _share(value: float | None) -> str:
    return "-" if value is None or np.isnan(value) else f"{100 * value:.1f} %"


def _decimal(value: float | None) -> str:
    return "-" if value is None or np.isnan(value) else f"{value:.2f}"
