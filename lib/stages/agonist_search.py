"""Stage 6 as a whole: for each baseline regime, the agonists of each rule, in files."""

from __future__ import annotations

import contextlib
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
from lib.confidence_bounds import min_datapoints_to_prune
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
from lib.stages.agonist_oracle import FlipAnswers, LoggedOracle
from lib.stages.agonist_report import fill_buckets, rule_body, rule_head, skipped_body, summary_lines
from lib.stages.agonist_rule import RuleOptions, RuleSearch
from lib.stages.agonist_slices import (
    Pool,
    Skipped,
    SliceUse,
    assign_slice,
    noise_rates,
    pools_of,
    rows_to_prepare,
    search_pool,
    too_few,
)
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
    order = SearchOrder(args.search)
    if args.max_group_size is not None and order is SearchOrder.BISECT:
        raise UserError(
            "--max_group_size belongs to --search attribution; the published search starts from whole layers"
        )
    settings = SearchSettings(
        args.search_epsilon, args.prune_alpha, looks, args.full_records or args.fixed_n, args.dense_size
    )
    return RuleOptions(
        settings=settings,
        order=order,
        is_fast=args.fast_ablation,
        sign_split=args.sign_split_first,
        max_group_size=args.max_group_size,
        audit_members=args.audit_members,
        min_selectivity=args.min_selectivity,
        catastrophic_acc_tol=args.catastrophic_acc_tol,
        seed=args.seed,
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
        n_rules = len(self.inputs.circuits)
        self.report.line(f"{n_rules} rules" + (f"; {len(log)} groups were tested before" if len(log) else ""))
        rules = [self._rule(circuit, make_answers, log) for circuit in self.inputs.circuits]
        self.outputs.append(write_rule_knockout(self.folder, rules))
        self.outputs += self.buckets.write(self.folder)
        n_skipped = sum(rule["status"] == "skipped" for rule in rules)
        counts = {"n_agonists": len(self.buckets.agonists), "n_rules": n_rules, "n_skipped": n_skipped}
        self.record.finish(self.outputs, started=started, summary={"lines": self.lines, **counts})

    def _rule(self, circuit: Circuit, make_answers: MakeAnswers, log: GroupTestLog) -> dict[str, Any]:
        """Search one rule and write its file; returns the file's content."""
        pools = pools_of(circuit, self.inputs.table, self.regime, self.inputs.plan, self.args.seed)
        content = rule_head(circuit, self.regime, self.args, pools)
        body = self._skip_reason(circuit, pools)
        if body is None:
            with self._progress(circuit) as advance:
                body = self._search(circuit, pools, make_answers, log, advance)
        if isinstance(body, Skipped):
            self.lines.append(f"{circuit.name}: skipped, {body.reason}")
            body = skipped_body(body)
        content |= body | {"config_fingerprint": self.record.fingerprint}
        path = rule_file(self.folder, circuit.target, circuit.circuit_id, is_cluster=circuit.is_cluster)
        write_rule_file(path, content)
        self.outputs.append(path)
        return content

    def _skip_reason(self, circuit: Circuit, pools: tuple[Pool, Pool] | Skipped) -> Skipped | None:
        """Why a rule need not even be prepared."""
        if not circuit.neurons:
            return Skipped("no candidate neurons left by the flags")
        return pools if isinstance(pools, Skipped) else self._too_few([len(pool.rows) for pool in pools])

    def _too_few(self, n_rows: Sequence[int]) -> Skipped | None:
        wanted = (self.args.n_associated, self.args.n_unrelated)
        sizes = tuple(min(n, most) for n, most in zip(n_rows, wanted, strict=True))
        return too_few(sizes, self.args.search_epsilon, self.options.settings.alpha_slice)

    def _search(
        self,
        circuit: Circuit,
        pools: tuple[Pool, Pool],
        make_answers: MakeAnswers,
        log: GroupTestLog,
        advance: Callable[[int], None],
    ) -> dict[str, Any] | Skipped:
        """Prepare a rule's datapoints and search its candidates; the rest of its file."""
        wanted = (self.args.n_associated, self.args.n_unrelated)
        parts = [rows_to_prepare(pool, n, self.args.n_confirm) for pool, n in zip(pools, wanted, strict=True)]
        rows = np.concatenate(parts)
        answers = make_answers(rows)
        oracle = LoggedOracle(answers, circuit.neurons, rows, log, progress=advance)
        agrees = np.split(answers.baseline_labels == (self.regime == "positive"), [len(parts[0])])
        slices = self._assign(circuit, oracle, agrees)
        small = self._too_few([len(use.search) for use in slices])
        if small is not None:
            return small
        findings = RuleSearch(circuit, self.regime, slices, oracle, self.options).run()
        fill_buckets(self.buckets, findings)
        self.lines += summary_lines(findings, self.args.search_epsilon)
        return rule_body(findings, slices, oracle, self.inputs.table, self.args.sampling_strategy)

    def _assign(self, circuit: Circuit, oracle: LoggedOracle, agrees: list[np.ndarray]) -> tuple[SliceUse, SliceUse]:
        """Say which datapoints are searched on and which confirm, without noisy ones among the former."""
        args = self.args
        wanted, starts = (args.n_associated, args.n_unrelated), (0, len(agrees[0]))
        places = [search_pool(good, n) for good, n in zip(agrees, wanted, strict=True)]
        noise = np.zeros(sum(map(len, places)))
        if args.max_noise < 1.0 and len(noise):
            positions = np.concatenate([start + place for start, place in zip(starts, places, strict=True)])
            generator = rng(args.seed, "stage6", self.regime, circuit.target, circuit.circuit_id, "noise")
            noise = noise_rates(oracle, circuit.scores, positions, generator)
        noisy = np.split(noise > args.max_noise, [len(places[0])])
        needed = min_datapoints_to_prune(args.search_epsilon, self.options.settings.alpha_slice)
        first, second = (
            assign_slice(*part, n, args.n_confirm, needed)
            for part, n in zip(zip(starts, agrees, places, noisy, strict=True), wanted, strict=True)
        )
        return first, second

    @contextlib.contextmanager
    def _progress(self, circuit: Circuit) -> Iterator[Callable[[int], None]]:
        """A bar that counts answers; their number is not known beforehand."""
        bar = self.report.progress(itertools.count(), unit="answer", desc=circuit.name)
        next(bar)

        def advance(n: int) -> None:
            for _ in range(n):
                next(bar)

        yield advance


def reference_rows(table: ScoresTable, regime: str, n_points: int, seed: int) -> np.ndarray:
    """TRAIN rows of the regime from which replacement values are measured."""
    rows = table.subset_rows(regime)
    if not len(rows):
        rows = table.train_rows
    return np.sort(rng(seed, "stage6", regime, "references").choice(rows, min(n_points, len(rows)), replace=False))
