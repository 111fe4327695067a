"""A whole search: the published one on the naive loop against the default one on the engine, same rule and candidates.

Published: random halves of each layer, every group on all datapoints of the plan as they come, each group by hooked
greedy decoding from a copy of the prompt cache. Default: one forest by attribution, calm datapoints, sequential looks,
on the engine. Takes the flags of stage 6 and needs the files of stages 2 to 5. Prints a table and one line of key=value
pairs.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace

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

_QUICK_CANDIDATES = 300


class NaiveAnswers:
    """The engine's interface over the naive loop: answers of groups, one group at a time, all datapoints in a batch."""

    def __init__(self, engine: AblationEngine, prompts: Sequence[str], is_complete) -> None:  # noqa: ANN001
        self.engine, self.prompts = engine, prompts
        self.baseline_answers = engine.baseline_answers
        self.end = AnswerEnd(engine.lm, engine.end.max_new_tokens, is_complete)
        self._loops: dict[tuple[int, ...], NaiveLoop] = {}

    def answers(self, groups: Sequence[Sequence[Neuron]], datapoints: Sequence[int]) -> AblatedAnswers:
        """Answers under each group, as `AblationEngine.answers`."""
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


def run(args: argparse.Namespace, report: Report) -> None:
    """Prepare the first rule of the first regime, search it twice."""
    from lib.stages.agonist_inputs import regimes_to_run
    from lib.stages.agonist_model import AgonistModel
    from lib.stages.agonist_prepare import RulePreparer, read_inputs
    from lib.stages.recall_validation import subset

    args.n_candidates = min(args.n_candidates, _QUICK_CANDIDATES) if args.quick else args.n_candidates
    inputs = read_inputs(args)
    circuit = subset(inputs.circuits[0], args)
    model = AgonistModel(args, inputs, report)
    regime = next(iter(regimes_to_run(args, inputs.plan)))[0]

    def prepared(max_noise: float):  # noqa: ANN202
        own = replace(inputs, circuits=[circuit], args=argparse.Namespace(**(vars(args) | {"max_noise": max_noise})))
        preparer = RulePreparer(own, regime)
        return preparer.prepare(circuit, preparer.pools(circuit), model.answers_for(regime), GroupTestLog(None, ""))

    report.line(f"{regime} {circuit.name}, {len(circuit.neurons)} candidates")
    default = _search(prepared(args.max_noise), args, {"search": "attribution", "fixed_n": False}, None, report)
    published = _search(prepared(1.0), args, {"search": "bisect", "fixed_n": True}, inputs, report)
    share = default.n_evaluations / published.n_evaluations
    common = len(default.found & published.found)
    report.line(
        f"speedup={published.seconds / default.seconds:.2f} evaluations_share={share:.3f} "
        f"agonists_published={len(published.found)} agonists_default={len(default.found)} agonists_common={common}"
    )


def _search(rule, args, flags, naive_inputs, report: Report) -> SimpleNamespace:  # noqa: ANN001
    """One search with an empty log; on the naive loop if inputs are given."""
    from lib.stages.agonist_oracle import LoggedOracle
    from lib.stages.agonist_prepare import rule_options
    from lib.stages.agonist_rule import RuleSearch

    oracle = rule.oracle
    answers = oracle.answers
    if naive_inputs is not None:
        table, task = naive_inputs.table, naive_inputs.task
        prompts = table.frame[table.prompt_col].iloc[oracle.rows].tolist()
        naive = NaiveAnswers(answers.engine, prompts, task.answer_is_complete)
        answers = FlipOracle(naive, task.is_answer_positive, table.records(oracle.rows))
    bar = tqdm(unit="answer", desc="naive" if naive_inputs is not None else "engine", disable=report.quiet)
    fresh = LoggedOracle(answers, oracle.neurons, oracle.rows, GroupTestLog(None, ""), progress=bar.update)
    started, cpu = time.perf_counter(), time.process_time()
    options = rule_options(argparse.Namespace(**(vars(args) | flags | {"fast_ablation": True, "audit_members": 0})))
    findings = RuleSearch(replace(rule, oracle=fresh), options).run()
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    bar.close()
    n = findings.result.n_evaluations + rule.n_noise_evaluations
    report.line(
        f"{flags['search']:12s} {'naive loop' if naive_inputs is not None else 'engine':10s} "
        f"tests {findings.result.n_tests:6d}  evaluations {n:8d}  {seconds:7.1f} s wall  {cpu:7.1f} CPU s  "
        f"{n / seconds:6.0f} evaluations/s  agonists {len(findings.agonists)}"
    )
    return SimpleNamespace(n_evaluations=n, seconds=seconds, found={a.candidate for a in findings.agonists})


main = stage_main(add_arguments, run, description=__doc__)

if __name__ == "__main__":
    raise SystemExit(main())
