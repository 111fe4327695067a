"""Brute force as a judge: what each search mode finds of the agonists that testing every candidate alone finds."""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lib.artifacts import exclusive, text_digest, write_csv, write_json
from lib.cli import Report, UserError, rng
from lib.group_test_log import GroupTestLog
from lib.group_testing import Slices, sweep
from lib.stages.agonist_inputs import Circuit, regimes_to_run
from lib.stages.agonist_oracle import LoggedOracle
from lib.stages.agonist_prepare import Inputs, MakeAnswers, PreparedRule, RulePreparer, read_inputs, rule_options
from lib.stages.agonist_rule import RuleFindings, RuleSearch
from lib.stages.agonist_slices import Skipped

BRUTE_FORCE = "brute_force"
MODES: dict[str, dict[str, Any]] = {
    "bisect_fixed_n": {"search": "bisect", "fixed_n": True},
    "bisect": {"search": "bisect", "fixed_n": False},
    "attribution_fixed_n": {"search": "attribution", "fixed_n": True},
    "attribution": {"search": "attribution", "fixed_n": False},
    "attribution_alpha_0.2": {"search": "attribution", "fixed_n": False, "prune_alpha": 0.2},
    "attribution_alpha_0.5": {"search": "attribution", "fixed_n": False, "prune_alpha": 0.5},
}
"""Search modes by name: the flags that make them."""
DEFAULT_MODE = "attribution"
RATES = (0.1, 0.2, 0.5)


@dataclass(frozen=True)
class Judgement:
    """The truth about one rule: its agonists, and each candidate's highest flip rate on a slice [candidate]."""

    agonists: np.ndarray
    rate: np.ndarray

    def recall(self, found: set[int]) -> dict[str, Any]:
        """Share of the true agonists among the found ones: of all, and of those that flip at least some share."""
        truths = {"all": self.agonists} | {f"{rate:g}": np.flatnonzero(self.rate >= rate) for rate in RATES}
        row: dict[str, Any] = {}
        for name, true in truths.items():
            row[f"n_true_{name}"] = len(true)
            row[f"recall_{name}"] = float(np.isin(true, sorted(found)).mean()) if len(true) else None
        return row


def validate(args: Namespace, report: Report) -> None:
    """Compare the modes with brute force on every rule and regime; write and print the table."""
    from lib.stages.agonist_model import AgonistModel

    inputs = read_inputs(args)
    inputs = replace(inputs, circuits=[subset(circuit, args) for circuit in inputs.circuits[: args.max_rules]])
    model = AgonistModel(args, inputs, report)
    output = Path(args.output_data_dir)
    rows: list[dict[str, Any]] = []
    with exclusive(output):
        for regime, _ in regimes_to_run(args, inputs.plan):
            log = GroupTestLog(output / f"{BRUTE_FORCE}_{regime}.jsonl", text_digest(model.identity(regime)))
            for circuit in inputs.circuits:
                for row in _rule_rows(inputs, regime, circuit, model.answers_for(regime), log, report):
                    rows.append(row)
                    report.line(_line(row))
    if not rows:
        raise UserError("every rule was skipped, so there is nothing to compare; give more datapoints or another plan")
    _write(output, rows)
    report.line(_figures(rows))


def subset(circuit: Circuit, args: Namespace) -> Circuit:
    """The circuit with `--n_candidates` of its candidates, drawn at random."""
    n = len(circuit.neurons)
    if args.n_candidates >= n:
        return circuit
    generator = rng(args.seed, "validate_recall", circuit.target, circuit.circuit_id)
    kept = np.sort(generator.choice(n, args.n_candidates, replace=False))
    neurons = tuple(circuit.neurons[i] for i in kept)
    parts = {name: getattr(circuit, name)[kept] for name in ("scores", "scored", "strengths")}
    return replace(circuit, neurons=neurons, **parts)


def _rule_rows(
    inputs: Inputs, regime: str, circuit: Circuit, make_answers: MakeAnswers, log: GroupTestLog, report: Report
) -> Iterator[dict[str, Any]]:
    """One row for brute force, then one for each mode."""
    preparer = RulePreparer(inputs, regime)
    pools = preparer.pools(circuit)
    rule = pools if isinstance(pools, Skipped) else preparer.prepare(circuit, pools, make_answers, log)
    if isinstance(rule, Skipped):
        report.line(f"{regime} {circuit.name}: skipped, {rule.reason}")
        return
    sizes = tuple(len(use.search) for use in rule.slices)
    head = {"regime": regime, "circuit_id": circuit.circuit_id, "n_candidates": len(circuit.neurons)}
    head |= {"n_associated": sizes[0], "n_unrelated": sizes[1]}
    truth, brute = _brute_force(rule, inputs.args)
    # What testing each candidate alone on every datapoint takes, whether or not all of it was needed.
    full = len(circuit.neurons) * sum(sizes)
    share = brute["n_evaluations"] / full
    # Brute force needs no noise groups, though it is judged on the datapoints that they chose.
    found = set(truth.agonists.tolist())
    yield head | {"mode": BRUTE_FORCE, **brute, "n_noise_evaluations": 0, "cost_share": share, **truth.recall(found)}
    for mode in inputs.args.modes:
        findings, row = _run(_forgetful(rule), inputs.args, {"fast_ablation": True, "audit_members": 0} | MODES[mode])
        noise = rule.n_noise_evaluations
        row |= {"n_noise_evaluations": noise, "cost_share": (row["n_evaluations"] + noise) / full}
        timed = brute["seconds"] is not None and row["seconds"] > 0
        row["speedup"] = brute["seconds"] / row["seconds"] if timed else None
        yield head | {"mode": mode, **row, **truth.recall(_found(findings, sizes))}


def _brute_force(rule: PreparedRule, args: Namespace) -> tuple[Judgement, dict[str, Any]]:
    """Every candidate alone: who is an agonist, and what it took.

    With `--screen` all candidates see the first datapoints of each slice only, and those that flip one of them all.
    """
    n, rates = len(rule.circuit.neurons), np.zeros(len(rule.circuit.neurons))
    kept, meter = np.arange(n), _Meter(rule.oracle)
    n_screening = 0
    if args.screen:
        first = np.concatenate([use.search[: args.screen] for use in rule.slices])
        kept = np.flatnonzero(rule.oracle([(candidate,) for candidate in range(n)], first).any(axis=1))
        n_screening = (n - len(kept)) * len(first)
    options = rule_options(Namespace(**(vars(args) | {"fast_ablation": False})))
    slices = Slices(rule.slices[0].search, rule.slices[1].search)
    result = sweep(kept, slices, rule.oracle, options.settings)
    for record in result.records():
        rates[record.members[0]] = max(k / m for k, m in zip(record.n_flips, record.n_evaluated, strict=True))
    agonists = np.sort(result.agonists())
    row = {"n_tests": n, "n_evaluations": result.n_evaluations + n_screening, "n_agonists": len(agonists)}
    return Judgement(agonists, rates), row | meter.times(row["n_evaluations"])


class _Meter:
    """Time since its creation, for work of which the log may know a part."""

    def __init__(self, oracle: LoggedOracle) -> None:
        self.oracle, self.n_before = oracle, oracle.n_run
        self.started, self.started_cpu = time.perf_counter(), time.process_time()

    def times(self, n_needed: int) -> dict[str, float | None]:
        """Seconds for `n_needed` evaluations: scaled up if a part was run, None if nothing was left to run."""
        seconds, cpu_seconds = time.perf_counter() - self.started, time.process_time() - self.started_cpu
        n_run = self.oracle.n_run - self.n_before
        scale = n_needed / n_run if n_run else None
        return {"seconds": seconds * scale if scale else None, "cpu_seconds": cpu_seconds * scale if scale else None}


def _forgetful(rule: PreparedRule) -> PreparedRule:
    """The rule with an empty log: what brute force knows must not make a mode look cheap."""
    oracle = rule.oracle
    return replace(rule, oracle=LoggedOracle(oracle.answers, oracle.neurons, oracle.rows, GroupTestLog(None, "")))


def _found(findings: RuleFindings, sizes: tuple[int, ...]) -> set[int]:
    """Candidates tested alone on all datapoints.

    With a wider alpha fewer neurons count as agonists than brute force at the narrow one says, but what is known of
    these is the same.
    """
    records = (test.record for test in findings.tests)
    return {int(record.members[0]) for record in records if len(record.members) == 1 and record.n_evaluated == sizes}


def _run(rule: PreparedRule, args: Namespace, flags: dict[str, Any]) -> tuple[RuleFindings, dict[str, Any]]:
    """Search a rule with some flags replaced; its findings and what they cost."""
    meter = _Meter(rule.oracle)
    findings = RuleSearch(rule, rule_options(Namespace(**(vars(args) | flags)))).run()
    n_evaluations = findings.result.n_evaluations
    n_needed = n_evaluations + sum(sum(agonist.n_confirm) for agonist in findings.agonists)
    row = {
        "n_tests": findings.result.n_tests,
        "n_evaluations": n_evaluations,
        "n_agonists": len(findings.agonists),
    }
    return findings, row | meter.times(n_needed)


def _line(row: dict[str, Any]) -> str:
    names = ("all", *(f"{rate:g}" for rate in RATES))
    recalls = "  ".join(f"{name} {_number(row[f'recall_{name}'], '5.3f')}" for name in names)
    return (
        f"{row['regime']:8s} rule {row['circuit_id']} {row['mode']:22s} N {row['n_candidates']:6d} "
        f"tests {row['n_tests']:6d} answers {row['n_evaluations']:8d} ({100 * row['cost_share']:6.2f} %) "
        f"{_number(row['seconds'], '6.0f')} s  agonists {row['n_agonists']:4d}  recall {recalls}"
    )


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _write(output: Path, rows: list[dict[str, Any]]) -> None:
    import pandas as pd

    write_csv(output / "validate_recall.csv", pd.DataFrame(rows))
    write_json(output / "validate_recall.json", rows)


def _figures(rows: list[dict[str, Any]]) -> str:
    """The default mode (else the last one asked for) over all rules and regimes, as key=value pairs."""
    modes = [row["mode"] for row in rows]
    judged = DEFAULT_MODE if DEFAULT_MODE in modes else modes[-1]
    own = [row for row in rows if row["mode"] == judged]
    brute = [row for row in rows if row["mode"] == BRUTE_FORCE]
    work = sum(row["n_evaluations"] + row["n_noise_evaluations"] for row in own)
    full = sum(row["n_evaluations"] / row["cost_share"] for row in brute)
    times = [(b["seconds"], o["seconds"]) for b, o in zip(brute, own, strict=True) if b["seconds"] and o["seconds"]]
    speedup = sum(b for b, _ in times) / sum(o for _, o in times) if times else float("nan")
    return (
        f"recall_strong={_pooled(own, '0.5'):.4f} recall_all={_pooled(own, 'all'):.4f} "
        f"cost_share={work / full:.4f} speedup={speedup:.2f}"
    )


def _pooled(rows: list[dict[str, Any]], name: str) -> float:
    n_true = sum(row[f"n_true_{name}"] for row in rows)
    hits = sum(row[f"recall_{name}"] * row[f"n_true_{name}"] for row in rows if row[f"n_true_{name}"])
    return hits / n_true if n_true else float("nan")
