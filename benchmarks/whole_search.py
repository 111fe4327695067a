"""A whole search: the published one on the naive loop against the default one on the engine, same rule and candidates.

Published: random halves of each layer, every group on all datapoints of the plan as they come, each group by hooked
greedy decoding from a copy of the prompt cache. Default: one forest by attribution, calm datapoints, sequential looks,
on the engine; it runs before and after the published one and its mean time counts, as machines drift. Seconds are of
the search, the default's noise groups included; each side's baseline answers are timed beside. Takes the flags of stage
6 and needs the files of stages 2 to 5. Prints a table and one line of key=value pairs.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from benchmarks.ablation_engine import NaiveLoop
from lib.ablation_engine import AblatedAnswers, AblationEngine
from lib.cli import Report, positive_int, stage_main
from lib.engine_chunk import AnswerEnd
from lib.flip_oracle import FlipOracle
from lib.group_test_log import GroupTestLog
from lib.neurons import Neuron
from lib.stages.agonist_options import add_agonist_arguments

if TYPE_CHECKING:
    from lib.stages.agonist_oracle import FlipAnswers
    from lib.stages.agonist_prepare import Inputs, MakeAnswers

_QUICK_CANDIDATES = 300


class NaiveAnswers:
    """The engine's interface over the naive loop: answers of groups, one group at a time, all datapoints in a batch."""

    def __init__(self, engine: AblationEngine, prompts: Sequence[str], is_complete) -> None:  # noqa: ANN001
        self.engine, self.prompts = engine, prompts
        self.baseline_answers = engine.baseline_answers
        self.end = AnswerEnd(engine.lm, engine.end.max_new_tokens, is_complete)
        self._loops: dict[tuple[int, ...], NaiveLoop] = {}

    def answers(
        self, groups: Sequence[Sequence[Neuron]], datapoints: Sequence[int], is_settled: None = None
    ) -> AblatedAnswers:
        """Answers under each group, as `AblationEngine.answers`, always whole."""
        key = tuple(datapoints)
        if key not in self._loops:
            self._loops[key] = NaiveLoop(self.engine.lm, [self.prompts[d] for d in key], self.engine.table)
        changed, texts = np.zeros((len(groups), len(key)), dtype=bool), {}
        for number, group in enumerate(groups):
            for column, tokens in enumerate(self._loops[key].tokens_under(group, self.end.max_new_tokens)):
                length = next(n for n in range(1, len(tokens) + 1) if self.end.is_finished(tokens[:n]))
                text = self.engine.lm.decode(self.end.without_stop(tokens[:length]))
                if text != self.baseline_answers[key[column]]:
                    changed[number, column], texts[number, column] = True, text
        return AblatedAnswers(changed, texts)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of stage 6, and how many candidates."""
    add_agonist_arguments(parser)
    group = parser.add_argument_group("benchmark")
    group.add_argument("--n_candidates", type=positive_int, default=5000, help="random candidates of the first rule")
    group.add_argument("--quick", action="store_true", help=f"{_QUICK_CANDIDATES} candidates: under two minutes")


@dataclass(frozen=True)
class Way:
    """One way of searching: flags that make it, and whether it runs on the naive loop."""

    flags: dict[str, Any]
    naive: bool


@dataclass(frozen=True)
class Outcome:
    """What a way found and took; seconds: of the search with its noise groups, baseline_seconds: of what precedes."""

    found: set[int]
    n_evaluations: int
    seconds: float
    baseline_seconds: float


_DEFAULT = Way({"search": "attribution", "fixed_n": False}, naive=False)
_PUBLISHED = Way({"search": "bisect", "fixed_n": True, "max_noise": 1.0}, naive=True)


def run(args: argparse.Namespace, report: Report) -> None:
    """Search the first rule of the first regime in both ways."""
    from lib.stages.agonist_inputs import regimes_to_run
    from lib.stages.agonist_model import AgonistModel
    from lib.stages.agonist_prepare import read_inputs
    from lib.stages.recall_validation import subset

    args.n_candidates = min(args.n_candidates, _QUICK_CANDIDATES) if args.quick else args.n_candidates
    inputs = read_inputs(args)
    circuit = subset(inputs.circuits[0], args)
    inputs = replace(inputs, circuits=[circuit])
    model = AgonistModel(args, inputs, report)
    regime = next(iter(regimes_to_run(args, inputs.plan)))[0]
    # Both need the same replacement values: measured once, before either is timed.
    model.answers_for(regime)(inputs.table.subset_rows(regime)[:1]).engine.prepare([circuit.neurons])
    report.line(f"{regime} {circuit.name}, {len(circuit.neurons)} candidates")
    default, published, again = (
        _search(way, inputs, model.answers_for(regime), regime, report) for way in (_DEFAULT, _PUBLISHED, _DEFAULT)
    )
    share = default.n_evaluations / published.n_evaluations
    search_seconds = (default.seconds + again.seconds) / 2
    stage_seconds = search_seconds + (default.baseline_seconds + again.baseline_seconds) / 2
    stage_speedup = (published.seconds + published.baseline_seconds) / stage_seconds
    report.line(
        f"speedup={published.seconds / search_seconds:.2f} stage_speedup={stage_speedup:.2f} "
        f"evaluations_share={share:.3f} agonists_published={len(published.found)} "
        f"agonists_default={len(default.found)} agonists_common={len(default.found & published.found)}"
    )


def _search(way: Way, inputs: Inputs, make_answers: MakeAnswers, regime: str, report: Report) -> Outcome:
    """One search with an empty log, from the baseline answers of its datapoints on."""
    from lib.stages.agonist_prepare import RulePreparer, rule_options
    from lib.stages.agonist_rule import RuleSearch

    flags = way.flags | {"fast_ablation": True, "audit_members": 0}
    inputs = replace(inputs, args=argparse.Namespace(**(vars(inputs.args) | flags)))
    baseline_seconds = 0.0

    def timed(rows: np.ndarray) -> FlipAnswers:
        nonlocal baseline_seconds
        begun = time.perf_counter()
        answers = make_answers(rows)
        baseline_seconds = time.perf_counter() - begun
        return _on_the_naive_loop(answers.engine, rows, inputs) if way.naive else answers

    bar = tqdm(unit="answer", desc="naive" if way.naive else "engine", disable=report.quiet)
    preparer, circuit = RulePreparer(inputs, regime), inputs.circuits[0]
    started, cpu = time.perf_counter(), time.process_time()
    rule = preparer.prepare(circuit, preparer.pools(circuit), timed, GroupTestLog(None, ""), bar.update)
    findings = RuleSearch(rule, rule_options(inputs.args)).run()
    seconds, cpu = time.perf_counter() - started - baseline_seconds, time.process_time() - cpu
    bar.close()
    n = findings.result.n_evaluations + rule.n_noise_evaluations
    report.line(
        f"{way.flags['search']:12s} {'naive loop' if way.naive else 'engine':10s} tests {findings.result.n_tests:6d}  "
        f"evaluations {n:8d}  {seconds:7.1f} s, baseline answers {baseline_seconds:5.1f} s, {cpu:7.1f} CPU s in all  "
        f"{n / seconds:6.0f} evaluations/s  agonists {len(findings.agonists)}"
    )
    return Outcome({agonist.candidate for agonist in findings.agonists}, n, seconds, baseline_seconds)


def _on_the_naive_loop(engine: AblationEngine, rows: np.ndarray, inputs: Inputs) -> FlipOracle:
    """The oracle of these datapoints with the naive loop in place of the engine."""
    table, task = inputs.table, inputs.task
    naive = NaiveAnswers(engine, table.frame[table.prompt_col].iloc[rows].tolist(), task.answer_is_complete)
    return FlipOracle(naive, task.is_answer_positive, table.records(rows))


main = stage_main(add_arguments, run, description=__doc__)

if __name__ == "__main__":
    raise SystemExit(main())
