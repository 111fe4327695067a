"""Stage 7, step by step: candidates, rows, flips, statistics, rules, summaries."""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lib.artifacts import amend_record, exclusive, read_csv, read_json, write_csv, write_json
from lib.cli import Report, require_dir, require_file, rng
from lib.flip_answer_log import AnswerLog
from lib.flip_candidates import Candidate, Verdict, read_candidates, select_candidates
from lib.flip_diagnostic_plots import write_diagnostics
from lib.flip_diagnostics import diagnose
from lib.flip_fit_pool import fit_all
from lib.flip_measuring import EngineFactory, FlipMeasurement, FlipMeasurer
from lib.flip_rows import EvaluatedRows, Role, RowSampling, assign_roles, choose_rows, group_numbers
from lib.flip_rule_tables import RuleRun, check_manifest
from lib.flip_rules import FitProblem, TargetStatus
from lib.flip_summaries import remove_results, remove_summaries, write_statistics, write_summaries
from lib.flip_table import FlipTable, flip_frame, neuron_statistics, neurons_of_frame, read_flip_table
from lib.scores_table import ScoresTable, load_scores
from lib.stages.flip_model import ModelAccess
from lib.stages.flip_settings import FlipSettings
from lib.stages.flip_telling import run_summary, tell_rules, tell_run
from lib.task_spec import FeatureTaskSpec, resolve_task_spec

ANSWERS_FILE = "ablated_answers.jsonl"
JOINT_FILE = "joint_ablation.json"


class FlipAnchoring:
    """One run of the stage. `make_engine` replaces the real model in tests."""

    def __init__(self, args: Namespace, report: Report, make_engine: EngineFactory | None = None) -> None:
        self.args, self.report = args, report
        self.task: FeatureTaskSpec = resolve_task_spec(args.task_module, args.features_scores_dir)
        self.scores: ScoresTable = load_scores(args.features_scores_dir, self.task)
        self.settings = FlipSettings(args, self.task, self.scores)
        self.stats_dir = self.settings.stats_dir
        cache_dir = self.settings.rules_dir / "replacement_scores_cache"
        self.model = ModelAccess(args, self.task.MAX_NEW_TOKENS, cache_dir, report)
        self._make_engine = make_engine or self.model.engine
        self._written: list[Path] = []

    def run(self) -> int:
        """Exit code: 0, or 1 if a rule could not be fitted."""
        if self.args.stats_only or self.args.summarize_rule_metrics_only:
            return self._run_on_finished_files()
        started = time.time()
        record = self.settings.record
        if self.args.dry_run:
            return self._describe()
        if record.is_complete() and not self.args.force:
            self.report.line(f"stage 7 is up to date: {self.stats_dir}")
            tell_run(record.summary(), self.report)
            return 0
        with exclusive(self.stats_dir):
            summary = self._run_all()
            if not summary["n_failed_fits"]:
                record.finish(self._written, started=started, summary=summary)
        tell_run(summary, self.report)
        self.report.line(f"tables and figures: {self.stats_dir}")
        return 1 if summary["n_failed_fits"] else 0

    def _run_all(self) -> dict[str, Any]:
        kept = [candidate for candidate, verdict in self._judged if verdict is Verdict.KEPT]
        self.report.line(f"{len(kept)} of {len(self._judged)} neurons of stage 6 are analysed")
        measurement = self._measurer().run(
            [candidate.neuron for candidate in kept],
            n_random=self.args.n_random_neurons,
            n_joint_controls=self.args.n_joint_controls if self.args.joint_ablation else 0,
        )
        remove_results(self.stats_dir)
        self._write_candidates()
        table = measurement.table
        answers = self._store_answers(measurement)
        frame = flip_frame(
            table,
            self.scores.frame,
            len(self.scores),
            keep_unsampled=self.args.keep_unsampled_rows,
            sampled=self.settings.sampling is RowSampling.SPECTRAL,
        )
        self._put_csv("scores.csv", frame)
        self._write_statistics(table, measurement.controls, _candidate_columns(kept))
        if measurement.joint is not None:
            self._put_json(JOINT_FILE, measurement.joint)
        statuses = self._fit(table) if self.args.extract_rules else []
        facts = measurement.controls, measurement.joint
        anchored = self._summarize(table, answers, *facts) if self.args.summarize_rule_metrics else None
        return run_summary(measurement, statuses, anchored)

    # ------------------------------------------------------------ candidates and rows

    @cached_property
    def _judged(self) -> list[tuple[Candidate, Verdict]]:
        """Every neuron of stage 6, strongest first, with its verdict."""
        return select_candidates(read_candidates(self.settings.agonists_path), self.settings.candidate_filter)

    def _write_candidates(self) -> None:
        """`candidates.csv`: of each neuron read whether it is analysed, and if not, why."""
        rows = [{**candidate.to_json(), "verdict": verdict.value} for candidate, verdict in self._judged]
        self._put_csv("candidates.csv", pd.DataFrame(rows, columns=None if rows else ["neuron", "verdict"]))

    @cached_property
    def _groups(self) -> np.ndarray | None:
        """Numbers that variants of one prompt share, [row of the scores table]; None if there are no variants."""
        own_col = self.task.GROUP_COLUMN if self.task.GROUP_COLUMN in self.scores.frame else None
        group_col = self.args.group_col or own_col
        return group_numbers(self.scores, group_col) if group_col else None

    def _rows(self) -> EvaluatedRows:
        """The evaluated rows and what each may be used for."""
        args, settings = self.args, self.settings
        roles = assign_roles(self.scores, settings.discovery, self._groups, rng(args.seed, "stage7", "groups"))
        is_small = args.sampling_max_points >= len(self.scores)
        spectral = settings.sampling is RowSampling.SPECTRAL and not is_small
        rows = choose_rows(
            self.scores,
            roles,
            max_points=None if settings.sampling is RowSampling.ALL else args.sampling_max_points,
            random=rng(args.seed, "stage7", "rows"),
            clusters=self.model.prompt_clusters(self.scores) if spectral else None,
        )
        counts = ", ".join(f"{count} {name}" for name, count in rows.counts().items() if count)
        self.report.line(f"{len(rows)} of {len(self.scores)} prompts are evaluated: {counts}")
        return rows

    # ------------------------------------------------------------ flips

    def _measurer(self) -> FlipMeasurer:
        cache_dir = self.settings.policy_dir / "ablation_cache"
        return FlipMeasurer(
            self.scores, self._rows(), self.task, self.settings.measure, cache_dir, self._make_engine, self.report
        )

    def _describe(self) -> int:
        """`--dry_run`: what would be done; no model is loaded, nothing is written."""
        kept = [candidate.neuron for candidate, verdict in self._judged if verdict is Verdict.KEPT]
        measurer = self._measurer()
        n_groups, n_missing = measurer.planned(
            kept, self.args.n_random_neurons, self.args.n_joint_controls if self.args.joint_ablation else 0
        )
        n_rows = measurer.log.n_rows
        report = self.report
        report.line(f"{len(kept)} of {len(self._judged)} neurons would be analysed")
        report.line(f"flips: {n_groups} ablations x {n_rows} prompts; {n_missing * n_rows} answers are not stored yet")
        report.line(f"answers on disk: at least {n_groups * (n_rows // 6 + 40)} bytes, plus the changed texts")
        if self.args.extract_rules:
            scopes = 1 + self.args.emit_all_fit_rules
            report.line(
                f"rules: at most {3 * scopes * len(kept)} fits, about a second each, in {self.args.jobs} processes"
            )
        return 0

    def _store_answers(self, measurement: FlipMeasurement) -> AnswerLog:
        """The run's own copy of the answers: of its neurons, on the rows of its table."""
        groups = [(neuron,) for neuron in measurement.table.neurons]
        self._written.append(self.stats_dir / ANSWERS_FILE)
        return measurement.log.extract(self.stats_dir / ANSWERS_FILE, groups, measurement.positions)

    def _write_statistics(self, table: FlipTable, controls: dict[str, Any], extra: pd.DataFrame | None) -> None:
        if self.args.exclude_discovery_rows_from_final_stats:
            is_discovery = table.rows.has_role(Role.DISCOVERY)
            exclusion = {
                "exclude_discovery_rows_from_final_stats": True,
                "n_discovery_original_rows_found": int(is_discovery.sum()),
                "n_rows_excluded_from_scores_out": int(is_discovery.sum()),
                "n_rows_remaining_for_final_stats": int((~is_discovery).sum()),
            }
            self._put_json("final_stats_exclusion.json", exclusion)
            table = table.take(~is_discovery)
        self._written += write_statistics(self.stats_dir, table, extra, controls)
        self._write_diagnostics(table)

    def _write_diagnostics(self, table: FlipTable) -> None:
        """`agonist_metric_*`, where stage 6 has measured activation or saliency."""
        agonists = self.args.circuit_agonists_path
        if self.args.skip_agonist_metric_stats or agonists is None or not Path(agonists).is_dir():
            return
        tables = diagnose(Path(agonists), neuron_statistics(table))
        if tables is not None:
            self._written += write_diagnostics(self.stats_dir, tables, self.args.agonist_metric_topk)

    # ------------------------------------------------------------ rules

    def _fit(self, table: FlipTable) -> list[TargetStatus]:
        rows = table.rows
        problem = FitProblem(
            features=self.scores.features(rows.rows),
            feature_names=tuple(self.scores.feature_names),
            baseline=table.baseline,
            is_fit=rows.is_fit(with_discovery=not self.args.exclude_discovery_rows_from_training),
            is_test=rows.is_test,
            groups=None if self._groups is None else self._groups[rows.rows],
        )
        statuses = fit_all(
            problem,
            table.neurons,
            table.matrix.flips,
            table.matrix.known,
            self.settings.fit,
            self.settings.policy_dir,
            jobs=self.args.jobs,
            force=self.args.force,
            progress=lambda units: self.report.progress(units, total=len(table.neurons), unit="neuron", desc="rules"),
        )
        columns = [field.name for field in fields(TargetStatus)]
        self._put_csv("neuron_target_status.csv", pd.DataFrame(map(asdict, statuses), columns=columns))
        return statuses

    def _summarize(
        self, table: FlipTable, answers: AnswerLog | None, controls: dict[str, Any], joint: dict[str, Any] | None
    ) -> pd.DataFrame:
        run = RuleRun(self.settings.rules_dir, self.settings.policy, table.neurons)
        remove_summaries(self.stats_dir)
        self._written += [path for *_, path in run.files()]
        options = self.settings.summary
        written, anchored = write_summaries(self.stats_dir, run, table, self.scores, options, answers, controls, joint)
        self._written += written
        return anchored

    def _put_csv(self, name: str, frame: pd.DataFrame) -> None:
        write_csv(self.stats_dir / name, frame)
        self._written.append(self.stats_dir / name)

    def _put_json(self, name: str, value: dict[str, Any]) -> None:
        write_json(self.stats_dir / name, value)
        self._written.append(self.stats_dir / name)

    # ------------------------------------------------------------ finished files

    def _run_on_finished_files(self) -> int:
        """Statistics and summaries from a run's `scores.csv` (ours or a published one), without a model."""
        path = require_file(self.stats_dir / "scores.csv", "flip table", "run stage 7 without --stats_only first")
        neurons = neurons_of_frame(read_csv(path, "flip table", nrows=0).columns)
        table = read_flip_table(path, neurons, self.scores.primary_target)
        with exclusive(self.stats_dir):
            if self.args.stats_only:
                self._write_statistics(table, self._stored_controls(), self._stored_candidates())
                self.report.line(f"flip statistics of {len(neurons)} neurons: {self.stats_dir}")
            if self.args.summarize_rule_metrics or self.args.summarize_rule_metrics_only:
                hint = "give the --intervention and --decode_only of the finished run"
                require_dir(self.settings.policy_dir, "rules of this behaviour, intervention and phase", hint)
                check_manifest(self.stats_dir, RuleRun(self.settings.rules_dir, self.settings.policy, tuple(neurons)))
                answers_path, joint_path = self.stats_dir / ANSWERS_FILE, self.stats_dir / JOINT_FILE
                answers = AnswerLog.read(answers_path) if answers_path.is_file() else None
                joint = read_json(joint_path, "joint ablation") if joint_path.is_file() else None
                anchored = self._summarize(table, answers, self._stored_controls(), joint)
                tell_rules(anchored.to_dict("records"), self.report)
            amend_record(self.stats_dir / "run_metadata.json", self._written)
        return 0

    def _stored_controls(self) -> dict[str, Any]:
        """Controls of the finished run; a published one has none."""
        path = self.stats_dir / "flip_stats_global.json"
        return (read_json(path, "flip statistics").get("controls") or {}) if path.is_file() else {}

    def _stored_candidates(self) -> pd.DataFrame | None:
        """What stage 6 said of the finished run's neurons; a published run does not keep it."""
        path = self.stats_dir / "candidates.csv"
        if not path.is_file():
            return None
        frame = read_csv(path, "candidates", keep_default_na=True)
        kept = frame[frame["verdict"] == Verdict.KEPT.value]
        return kept.drop(columns=["layer_label", "neuron_id", "verdict"]) if len(kept) else None


def _candidate_columns(kept: Sequence[Candidate]) -> pd.DataFrame | None:
    """What stage 6 says about each neuron, for the statistics table."""
    if not kept:
        return None
    return pd.DataFrame([candidate.to_json() for candidate in kept]).drop(columns=["layer_label", "neuron_id"])
