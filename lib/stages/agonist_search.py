"""Stage 6 as a whole: for each baseline regime, the agonists of each rule, in files."""

from __future__ import annotations

import itertools
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lib.agonist_files import Buckets, rule_file, write_rule_file, write_rule_knockout
from lib.artifacts import StageRecord, exclusive, text_digest
from lib.cli import Report, UserError, require_file, rng
from lib.group_test_log import GroupTestLog
from lib.group_testing import SearchSettings
from lib.scores_table import ScoresTable, load_scores
from lib.search_orders import SearchOrder
from lib.stages.agonist_inputs import (
    Circuit,
    DatasetInfo,
    SamplingPlan,
    read_circuits,
    read_dataset_info,
    read_plan,
    regimes_to_run,
)
from lib.stages.agonist_oracle import Evidence, FlipAnswers, LoggedOracle
from lib.stages.agonist_rule import Agonist, RuleFindings, RuleOptions, RuleSearch
from lib.stages.agonist_slices import Skipped, SliceRows, assign_rows, pools_of, rows_to_prepare, too_few
from lib.task_spec import FeatureTaskSpec, resolve_task_spec

if TYPE_CHECKING:
    from lib.stages.agonist_model import AgonistModel

LOG_NAME = "group_tests.jsonl"
# Flags that say where, how fast or how loudly; all others change the result and are part of the fingerprint.
_NO_RESULT = {
    "input_data_dir",
    "output_data_dir",
    "scores_path",
    "sampling_plan_path",
    "ai_model",
    "ai_model_cache_dir",
    "cache_dir",
    "device",
    "batch_size",
    "memory_mb",
    "force",
    "quiet",
    "dry_run",
    "baseline_subset",
}

MakeAnswers = Callable[[np.ndarray], FlipAnswers]
"""Answers for datapoints given as rows of the table (`original_idx`)."""


@dataclass(frozen=True)
class Inputs:
    """What both regimes share."""

    args: Namespace
    info: DatasetInfo
    table: ScoresTable
    task: FeatureTaskSpec
    circuits: list[Circuit]
    plan: SamplingPlan | None
    files: dict[str, Path]


def run_stage(args: Namespace, report: Report) -> None:
    """Run stage 6 for the regimes that the flags ask for; finished ones are only summarised."""
    inputs = read_inputs(args)
    model: AgonistModel | None = None
    for regime, folder in regimes_to_run(args, inputs.plan):
        record = stage_record(inputs, regime, folder)
        if args.dry_run:
            _describe(inputs, regime, report)
            continue
        report.heading(f"{regime} baseline")
        if record.is_complete() and not args.force:
            report.line(f"stage 6 is up to date: {folder}")
        else:
            from lib.stages.agonist_model import AgonistModel

            model = model or AgonistModel(args, inputs, report)
            with exclusive(folder):
                RegimeRun(inputs, regime, folder, record, report).run(model.answers_for(regime), model.identity(regime))
        for line in record.summary().get("lines", []):
            report.line(line)


def read_inputs(args: Namespace) -> Inputs:
    """Check the flags, and read and check everything that stages 2, 4 and 5 wrote."""
    if not args.search_epsilon < 1.0:
        raise UserError(f"--search_epsilon {args.search_epsilon:g} is no flip rate; give one below 1")
    if not 0.0 < args.prune_alpha < 1.0:
        raise UserError(f"--prune_alpha {args.prune_alpha:g} is no probability; give one between 0 and 1")
    folder = Path(args.input_data_dir)
    manifest = require_file(
        folder / "manifest.json", "stage 5's manifest.json", "run stage 5, or mend --input_data_dir"
    )
    info = read_dataset_info(folder, args)
    task = resolve_task_spec(args.task_module, info.scores_path.parent)
    files = {"manifest": manifest, "scores": info.scores_path, "features": info.scores_path.parent / "features.json"}
    plan = None
    if args.sampling_strategy == "plan":
        if not args.sampling_plan_path:
            raise UserError("--sampling_strategy plan needs --sampling_plan_path")
        files["plan"] = require_file(
            args.sampling_plan_path, "sampling plan", "run stage 4, or mend --sampling_plan_path"
        )
        plan = read_plan(files["plan"])
    elif args.sampling_plan_path:
        raise UserError("--sampling_plan_path is used with --sampling_strategy plan only; give both or neither")
    return Inputs(
        args, info, load_scores(info.scores_path.parent, task), task, read_circuits(manifest, args), plan, files
    )


def stage_record(inputs: Inputs, regime: str, folder: Path) -> StageRecord:
    """What decides the results of one regime."""
    from lib.modeling_and_ablation import model_identity

    settings = {key: value for key, value in vars(inputs.args).items() if key not in _NO_RESULT}
    settings |= {
        "model": model_identity(inputs.info.ai_model),
        "task": inputs.task.settings.to_json(),
        "baseline_subset": regime,
    }
    return StageRecord("6", settings, inputs.files, folder / "run_metadata.json")


def rule_options(args: Namespace) -> RuleOptions:
    """The flags that matter inside a rule."""
    looks = () if args.fixed_n or not args.fast_ablation else tuple(args.looks)
    settings = SearchSettings(
        args.search_epsilon, args.prune_alpha, looks, args.full_records or args.fixed_n, args.dense_size
    )
    return RuleOptions(
        settings,
        SearchOrder(args.search),
        args.fast_ablation,
        args.sign_split_first,
        args.audit_members,
        args.min_selectivity,
        args.catastrophic_acc_tol,
        args.seed,
    )


def _describe(inputs: Inputs, regime: str, report: Report) -> None:
    """What a run would do, without loading a model."""
    args = inputs.args
    report.heading(f"{regime} baseline (dry run)")
    for circuit in inputs.circuits:
        pools = pools_of(circuit, inputs.table, regime, inputs.plan, args.seed)
        n = len(circuit.neurons)
        if isinstance(pools, Skipped):
            report.line(f"{circuit.name}: would be skipped, {pools.reason}")
            continue
        sizes = [
            min(len(pool.rows), wanted)
            for pool, wanted in zip(pools, (args.n_associated, args.n_unrelated), strict=True)
        ]
        report.line(
            f"{circuit.name}: {n} candidates in {len(circuit.layers)} components, {sizes[0]} associated and {sizes[1]} "
            f"unrelated datapoints; testing each candidate alone is {n * sum(sizes)} answers, the search needs fewer"
        )


class RegimeRun:
    """One baseline regime: its rules, one after the other, and its files."""

    def __init__(self, inputs: Inputs, regime: str, folder: Path, record: StageRecord, report: Report) -> None:
        self.inputs, self.regime, self.folder, self.record, self.report = inputs, regime, folder, record, report
        self.args, self.options = inputs.args, rule_options(inputs.args)
        self.buckets = Buckets(inputs.args.catastrophic_n_runs)
        self.outputs: list[Path] = []
        self.lines: list[str] = []

    def run(self, make_answers: MakeAnswers, test_identity: dict[str, Any]) -> None:
        """Analyse every rule and write all files.

        test_identity: what decides the outcome of a group test; the log of another one is not used.
        """
        started = time.time()
        log_path = self.folder / LOG_NAME
        if self.args.force:
            log_path.unlink(missing_ok=True)
        log = GroupTestLog(log_path, text_digest(test_identity))
        self._say(f"{len(self.inputs.circuits)} rules" + (f", {len(log)} group tests in the log" if len(log) else ""))
        rules = [self._rule(circuit, make_answers, log) for circuit in self.inputs.circuits]
        self.outputs.append(write_rule_knockout(self.folder, rules))
        self.outputs += self.buckets.write(self.folder)
        summary = {
            "lines": self.lines,
            "n_agonists": len(self.buckets.agonists),
            "n_rules": len(rules),
            "n_skipped": sum(rule["status"] == "skipped" for rule in rules),
        }
        self.record.finish(self.outputs, started=started, summary=summary)

    def _say(self, line: str) -> None:
        self.report.line(line)

    # ------------------------------------------------------------ one rule

    def _rule(self, circuit: Circuit, make_answers: MakeAnswers, log: GroupTestLog) -> dict[str, Any]:
        """Search one rule and write its file; returns the file's content."""
        content = self._head(circuit)
        prepared = self._prepare(circuit, make_answers, content)
        if isinstance(prepared, Skipped):
            content |= {
                "status": "skipped",
                "reason": prepared.reason,
                "n_associated_tested": 0,
                "n_unrelated_tested": 0,
                "ablations": [],
            }
            self.lines.append(f"{circuit.name}: skipped, {prepared.reason}")
        else:
            slices, answers = prepared
            rows = np.concatenate([*(part.search for part in slices), *(part.confirm for part in slices)])
            bar = self.report.progress(itertools.count(), unit="answer", desc=circuit.name)
            next(bar)
            oracle = LoggedOracle(
                answers, circuit.neurons, rows, log, evidence=self._evidence(), progress=lambda n: _advance(bar, n)
            )
            findings = RuleSearch(circuit, self.regime, slices, oracle, self.options).run()
            bar.close()
            content |= self._body(findings, slices, oracle)
            self._fill_buckets(findings)
            self._summarise(findings, oracle)
        path = rule_file(self.folder, circuit.target, circuit.circuit_id, is_cluster=circuit.is_cluster)
        write_rule_file(path, content)
        self.outputs.append(path)
        return content

    def _evidence(self) -> Evidence:
        if self.args.evidence == "auto":
            published = self.options.order is SearchOrder.BISECT
            return Evidence.FLIP if published or self.regime == "positive" else Evidence.CHANGE
        return Evidence(self.args.evidence)

    def _head(self, circuit: Circuit) -> dict[str, Any]:
        return {
            "circuit_id": circuit.circuit_id,
            "circuit_label": circuit.label,
            "analysis_mode": "spectral_cluster" if circuit.is_cluster else "rule",
            "cluster_index": circuit.cluster_index,
            "rule_target": circuit.target,
            "rule_direction": circuit.direction,
            "intervention": self.args.intervention,
            "decode_only": self.args.decode_only,
            "n_associated_positive": 0,
            "n_unrelated_positive": 0,
            "baseline_subset": self.regime,
        }

    def _prepare(
        self, circuit: Circuit, make_answers: MakeAnswers, content: dict[str, Any]
    ) -> tuple[tuple[SliceRows, SliceRows], FlipAnswers] | Skipped:
        """Choose a rule's datapoints and compute their baseline; numbered as search rows, then confirmation rows."""
        args, alpha_slice = self.args, self.options.settings.alpha_slice
        if not circuit.neurons:
            return Skipped("no candidate neurons left by the flags")
        pools = pools_of(circuit, self.inputs.table, self.regime, self.inputs.plan, args.seed)
        if isinstance(pools, Skipped):
            return pools
        sizes = [pool.n_planned or len(pool.rows) for pool in pools]
        content |= {"n_associated_positive": sizes[0], "n_unrelated_positive": sizes[1]}
        wanted = (args.n_associated, args.n_unrelated)
        small = too_few(
            tuple(min(len(pool.rows), n) for pool, n in zip(pools, wanted, strict=True)),
            args.search_epsilon,
            alpha_slice,
        )
        if small is not None:
            return small
        prepared = [rows_to_prepare(pool, n, args.n_confirm) for pool, n in zip(pools, wanted, strict=True)]
        answers = make_answers(np.concatenate(prepared))
        agrees = np.split(answers.baseline_labels == (self.regime == "positive"), [len(prepared[0])])
        slices = tuple(
            assign_rows(rows, good, n, args.n_confirm) for rows, good, n in zip(prepared, agrees, wanted, strict=True)
        )
        small = too_few(tuple(len(part.search) for part in slices), args.search_epsilon, alpha_slice)
        return small or (slices, _Renumbered(answers, np.concatenate(prepared), slices))

    def _body(
        self, findings: RuleFindings, slices: tuple[SliceRows, SliceRows], oracle: LoggedOracle
    ) -> dict[str, Any]:
        """Keys of a searched rule's file."""
        accuracy = 1.0 if self.regime == "positive" else 0.0
        subset = self.inputs.table.subset_rows(self.regime)
        records = findings.records
        body: dict[str, Any] = {
            "status": "ok",
            "n_associated_tested": len(slices[0].search),
            "n_unrelated_tested": len(slices[1].search),
            "baseline_acc_associated": accuracy,
            "baseline_acc_unrelated": accuracy,
            "baseline_gap_neg_minus_pos": 0.0,
        }
        for side, part in zip(("associated", "unrelated"), slices, strict=True):
            body[f"sampled_{side}_indices"] = np.searchsorted(subset, part.search)
            body[f"sampled_{side}_original_idx"] = part.search
        body |= {"sampling_strategy_used": self.args.sampling_strategy, "ablations": records}
        body |= {"n_ablation_groups": len(records), "search_cost": findings.cost(), "audit": findings.audit_json()}
        for side, part in zip(("associated", "unrelated"), slices, strict=True):
            body[f"confirmation_{side}_original_idx"] = part.confirm
            body[f"replaced_{side}_original_idx"] = part.rejected
        neurons = findings.circuit.neurons
        body["agonists"] = [
            {"neuron": str(neurons[a.candidate]), "max_effect": a.max_effect, **a.to_json()} for a in findings.agonists
        ]
        body["answers_after_ablation"] = {
            str(neurons[a.candidate]): oracle.answers_of(a.candidate) for a in findings.kept
        }
        return body | {"config_fingerprint": self.record.fingerprint}

    def _fill_buckets(self, findings: RuleFindings) -> None:
        circuit = findings.circuit
        kept = {agonist.candidate: agonist for agonist in findings.kept}
        flagged = {agonist.candidate for agonist in findings.agonists if agonist.is_catastrophic}
        for candidate, record in findings.singles():
            neuron = circuit.neurons[candidate]
            compact = {
                "circuit_id": circuit.circuit_id,
                "baseline_subset": self.regime,
                "layer_label": neuron.layer_label,
                "neuron_id": neuron.index,
                "max_effect": record["max_effect"],
                "accuracy_gap": record["accuracy_gap"],
                "accuracy_on_associated": record["acc_after_knockout_on_associated"],
                "accuracy_on_unrelated": record["acc_after_knockout_on_unrelated"],
            }
            self.buckets.add_single(neuron, compact, is_catastrophic=candidate in flagged)
            if candidate in kept:
                self.buckets.add_agonist(neuron, compact | kept[candidate].to_json())

    def _summarise(self, findings: RuleFindings, oracle: LoggedOracle) -> None:
        """Lines for the terminal: what was found and what it cost."""
        cost, audit = findings.cost(), findings.audit_json()
        strong = [a for a in findings.kept if a.confirmed and a.confirmed.rate >= self.args.search_epsilon]
        line = (
            f"{findings.circuit.name}: {len(findings.kept)} agonists among {cost['n_candidates']} candidates "
            f"({len(strong)} flip {self.args.search_epsilon:g} or more of fresh datapoints); {cost['n_tests']} tests, "
            f"{100 * cost['share_of_single_tests']:.1f} % of the answers that single tests need"
        )
        if audit and audit["estimated_recall"] is not None:
            line += (
                f"; estimated recall {audit['estimated_recall']:.2f} "
                f"[{audit['estimated_recall_low']:.2f}, {audit['estimated_recall_high']:.2f}]"
            )
        self.lines.append(line)
        for agonist in sorted(findings.kept, key=lambda a: (-a.observed_rate, a.candidate))[:5]:
            self.lines.append("    " + _agonist_line(findings.circuit, agonist))
        if oracle.n_run == 0:
            self._say(f"{findings.circuit.name}: every test was in the log")


def _agonist_line(circuit: Circuit, agonist: Agonist) -> str:
    side = ("associated", "unrelated")[agonist.side]
    text = (
        f"{circuit.neurons[agonist.candidate]} flips {agonist.observed_rate:.2f} of the {side} datapoints searched on"
    )
    if agonist.confirmed:
        text += (
            f", {agonist.confirmed.rate:.2f} [{agonist.confirmed.low:.2f}, {agonist.confirmed.high:.2f}] of fresh ones"
        )
    return text + (" (catastrophic)" if agonist.is_catastrophic else "")


def _advance(bar: Iterator[int], n: int) -> None:
    for _ in range(n):
        next(bar)


class _Renumbered:
    """Answers for datapoints in another order: search rows of both slices, then confirmation rows of both."""

    def __init__(self, answers: FlipAnswers, prepared: np.ndarray, slices: Sequence[SliceRows]) -> None:
        place = {int(row): number for number, row in enumerate(prepared)}
        rows = np.concatenate([*(part.search for part in slices), *(part.confirm for part in slices)])
        self._answers = answers
        self._numbers = np.array([place[int(row)] for row in rows], dtype=np.int64)
        self.baseline_labels = answers.baseline_labels[self._numbers]

    def flips_and_answers(self, groups: Sequence, datapoints: Sequence[int]) -> tuple[np.ndarray, Any]:
        """As `FlipOracle.flips_and_answers`, datapoints renumbered."""
        return self._answers.flips_and_answers(groups, self._numbers[np.asarray(datapoints, dtype=np.int64)].tolist())


def reference_rows(table: ScoresTable, regime: str, n_points: int, seed: int) -> np.ndarray:
    """TRAIN rows of the regime from which replacement values are measured."""
    rows = table.subset_rows(regime)
    if not len(rows):
        rows = table.train_rows
    return np.sort(rng(seed, "stage6", regime, "references").choice(rows, min(n_points, len(rows)), replace=False))
