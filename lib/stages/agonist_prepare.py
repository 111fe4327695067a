"""From flags and files to a rule that can be searched: its inputs, its options, its datapoints."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lib.agonist_diagnostics import saliency_metrics
from lib.cli import UserError, require_file, rng
from lib.confidence_bounds import min_datapoints_to_prune
from lib.group_test_log import GroupTestLog
from lib.group_testing import SearchSettings
from lib.scores_table import ScoresTable, load_scores
from lib.search_orders import SearchOrder
from lib.stages.agonist_inputs import Circuit, DatasetInfo, SamplingPlan, read_circuits, read_dataset_info, read_plan
from lib.stages.agonist_oracle import FlipAnswers, LoggedOracle
from lib.stages.agonist_slices import (
    Pool,
    Skipped,
    SliceUse,
    assign_slice,
    noise_groups,
    noise_of_slices,
    pools_of,
    rows_to_prepare,
    search_pool,
    too_few,
)
from lib.task_spec import FeatureTaskSpec, resolve_task_spec

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


def read_inputs(args: Namespace) -> Inputs:
    """Check the flags, and read and check everything that stages 2, 4 and 5 wrote."""
    if not args.search_epsilon < 1.0:
        raise UserError(f"--search_epsilon {args.search_epsilon:g} is no flip rate; give one below 1")
    if not 0.0 < args.prune_alpha < 1.0:
        raise UserError(f"--prune_alpha {args.prune_alpha:g} is no probability; give one between 0 and 1")
    saliency_metrics(args.agonist_saliency_metrics)
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
    table = load_scores(info.scores_path.parent, task)
    if plan is not None:
        plan.check_table(table.path)
    return Inputs(args, info, table, task, read_circuits(manifest, args), plan, files)


@dataclass(frozen=True)
class RuleOptions:
    """How rules are searched: the flags that matter inside a rule."""

    settings: SearchSettings
    order: SearchOrder
    is_fast: bool
    sign_split: bool
    max_group_size: int | None
    audit_members: int
    min_selectivity: float | None
    catastrophic_acc_tol: float
    seed: int


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


def reference_rows(table: ScoresTable, regime: str, n_points: int, seed: int) -> np.ndarray:
    """TRAIN rows of the regime from which replacement values are measured."""
    rows = table.subset_rows(regime)
    if not len(rows):
        rows = table.train_rows
    return np.sort(rng(seed, "stage6", regime, "references").choice(rows, min(n_points, len(rows)), replace=False))


@dataclass(frozen=True)
class PreparedRule:
    """A circuit whose datapoints are chosen and whose group tests can be asked.

    n_noise_evaluations: (group, datapoint) pairs spent on telling noisy datapoints from calm ones.
    """

    circuit: Circuit
    regime: str
    slices: tuple[SliceUse, SliceUse]
    oracle: LoggedOracle
    n_noise_evaluations: int


class RulePreparer:
    """Chooses the datapoints of the rules of one regime."""

    def __init__(self, inputs: Inputs, regime: str) -> None:
        self.inputs, self.args, self.regime = inputs, inputs.args, regime
        self._wanted = (self.args.n_associated, self.args.n_unrelated)

    def pools(self, circuit: Circuit) -> tuple[Pool, Pool] | Skipped:
        """The rule's pools of datapoints, or why it cannot be searched."""
        if not circuit.neurons:
            return Skipped("no candidate neurons left by the flags")
        pools = pools_of(circuit, self.inputs.table, self.regime, self.inputs.plan, self.args.seed)
        if isinstance(pools, Skipped):
            return pools
        return self._too_few([len(pool.rows) for pool in pools]) or pools

    def prepare(
        self,
        circuit: Circuit,
        pools: tuple[Pool, Pool],
        make_answers: MakeAnswers,
        log: GroupTestLog,
        advance: Callable[[int], None] = lambda n: None,
    ) -> PreparedRule | Skipped:
        """Compute the baseline of the pools' first datapoints and say what each is used for."""
        parts = [rows_to_prepare(pool, n, self.args.n_confirm) for pool, n in zip(pools, self._wanted, strict=True)]
        rows = np.concatenate(parts)
        answers = make_answers(rows)
        oracle = LoggedOracle(answers, circuit.neurons, rows, log, progress=advance)
        agrees = np.split(answers.baseline_labels == (self.regime == "positive"), [len(parts[0])])
        slices = self._assign(circuit, oracle, agrees)
        small = self._too_few([len(use.search) for use in slices])
        return small or PreparedRule(circuit, self.regime, slices, oracle, oracle.n_run + oracle.n_remembered)

    def _too_few(self, n_rows: Sequence[int]) -> Skipped | None:
        sizes = tuple(min(n, most) for n, most in zip(n_rows, self._wanted, strict=True))
        return too_few(sizes, self.args.search_epsilon, self.args.prune_alpha / 2)

    def _assign(self, circuit: Circuit, oracle: LoggedOracle, agrees: list[np.ndarray]) -> tuple[SliceUse, SliceUse]:
        """Say which datapoints are searched on and which confirm, without noisy ones among the former."""
        args, starts = self.args, (0, len(agrees[0]))
        places = [search_pool(good, n) for good, n in zip(agrees, self._wanted, strict=True)]
        noise = [np.zeros(len(pool)) for pool in places]
        if args.max_noise < 1.0 and sum(map(len, places)):
            generator = rng(args.seed, "stage6", self.regime, circuit.target, circuit.circuit_id, "noise")
            layers = np.array([neuron.layer for neuron in circuit.neurons])
            groups = noise_groups(circuit.strengths, generator, layers)
            points = [start + pool for start, pool in zip(starts, places, strict=True)]
            noise = noise_of_slices(oracle, groups, points, self._wanted, args.max_noise)
            places = [pool[: len(rates)] for pool, rates in zip(places, noise, strict=True)]
        n_needed = min_datapoints_to_prune(args.search_epsilon, args.prune_alpha / 2)
        parts = zip(starts, agrees, places, noise, self._wanted, strict=True)
        first, second = (
            assign_slice(
                start,
                good,
                pool,
                own_noise,
                max_noise=args.max_noise,
                n_search=n,
                n_confirm=args.n_confirm,
                n_needed=n_needed,
            )
            for start, good, pool, own_noise, n in parts
        )
        return first, second
