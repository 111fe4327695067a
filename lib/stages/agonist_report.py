"""What stage 6 says of a rule: the content of its file, its agonists in the buckets, lines for the terminal."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import numpy as np

from lib.agonist_files import Buckets
from lib.scores_table import ScoresTable
from lib.stages.agonist_inputs import Circuit
from lib.stages.agonist_rule import Agonist, RuleFindings
from lib.stages.agonist_slices import SIDES, Pool, Skipped

_N_SHOWN = 5


def rule_head(circuit: Circuit, regime: str, args: Namespace, pools: tuple[Pool, Pool] | Skipped) -> dict[str, Any]:
    """First keys of a rule's file; `n_*_positive` are the sizes of the pools that its datapoints are drawn from."""
    sizes = [0, 0] if isinstance(pools, Skipped) else [pool.n_planned or len(pool.rows) for pool in pools]
    return {
        "circuit_id": circuit.circuit_id,
        "circuit_label": circuit.label,
        "analysis_mode": "spectral_cluster" if circuit.is_cluster else "rule",
        "cluster_index": circuit.cluster_index,
        "rule_target": circuit.target,
        "rule_direction": circuit.direction,
        "intervention": args.intervention,
        "decode_only": args.decode_only,
        "n_associated_positive": sizes[0],
        "n_unrelated_positive": sizes[1],
        "baseline_subset": regime,
    }


def skipped_body(skipped: Skipped) -> dict[str, Any]:
    """The other keys of a skipped rule's file."""
    counts = {"n_associated_tested": 0, "n_unrelated_tested": 0}
    return {"status": "skipped", "reason": skipped.reason, **counts, "ablations": []}


def rule_body(findings: RuleFindings, table: ScoresTable, strategy: str) -> dict[str, Any]:
    """The other keys of a searched rule's file: the published ones, then ours."""
    slices, oracle = findings.rule.slices, findings.rule.oracle
    accuracy = 1.0 if findings.rule.regime == "positive" else 0.0
    index_space = table.subset_rows(findings.rule.regime)
    body: dict[str, Any] = {
        "status": "ok",
        "n_associated_tested": len(slices[0].search),
        "n_unrelated_tested": len(slices[1].search),
        "baseline_acc_associated": accuracy,
        "baseline_acc_unrelated": accuracy,
        "baseline_gap_neg_minus_pos": 0.0,
    }
    for side, use in zip(SIDES, slices, strict=True):
        body[f"sampled_{side}_indices"] = np.searchsorted(index_space, oracle.rows[use.search])
        body[f"sampled_{side}_original_idx"] = oracle.rows[use.search]
    body |= {"sampling_strategy_used": strategy, "ablations": findings.records}
    body |= {"n_ablation_groups": len(findings.records), "search_cost": findings.cost(), "audit": findings.audit_json()}
    for side, use in zip(SIDES, slices, strict=True):
        body[f"confirmation_{side}_original_idx"] = oracle.rows[use.confirm]
        body[f"replaced_{side}_original_idx"] = oracle.rows[use.disagreeing]
        body[f"noisy_{side}_original_idx"] = oracle.rows[use.noisy]
    neurons = findings.rule.circuit.neurons
    body["agonists"] = [
        {"neuron": str(neurons[a.candidate]), "max_effect": a.max_effect, **a.to_json()} for a in findings.agonists
    ]
    used = np.concatenate([part for use in slices for part in (use.search, use.confirm)])
    body["answers_after_ablation"] = {
        str(neurons[a.candidate]): oracle.answers_of(a.candidate, used) for a in findings.kept
    }
    return body


def fill_buckets(buckets: Buckets, findings: RuleFindings) -> None:
    """Enter a rule's agonists and its neurons that flip everything."""
    circuit = findings.rule.circuit
    kept = {agonist.candidate: agonist for agonist in findings.kept}
    catastrophic = {agonist.candidate for agonist in findings.agonists if agonist.is_catastrophic}
    for candidate, record in findings.singles():
        neuron = circuit.neurons[candidate]
        compact = {
            "circuit_id": circuit.circuit_id,
            "baseline_subset": findings.rule.regime,
            "layer_label": neuron.layer_label,
            "neuron_id": neuron.index,
            "max_effect": record["max_effect"],
            "accuracy_gap": record["accuracy_gap"],
            "accuracy_on_associated": record["acc_after_knockout_on_associated"],
            "accuracy_on_unrelated": record["acc_after_knockout_on_unrelated"],
        }
        buckets.add_single(neuron, compact, is_catastrophic=candidate in catastrophic)
        if candidate in kept:
            buckets.add_agonist(neuron, compact | kept[candidate].to_json())


def summary_lines(findings: RuleFindings, epsilon: float) -> list[str]:
    """What was found and what it cost, then the strongest agonists."""
    cost, audit = findings.cost(), findings.audit_json()
    strong = [a for a in findings.kept if a.confirmed and a.confirmed.rate >= epsilon]
    line = (
        f"{findings.rule.circuit.name}: {len(findings.kept)} agonists among {cost['n_candidates']} candidates "
        f"({len(strong)} flip {epsilon:g} or more of fresh datapoints); {cost['n_tests']} group tests, "
        f"{100 * cost['share_of_single_tests']:.1f} % of the work of testing each alone"
    )
    if audit and audit["estimated_recall"] is not None:
        low, high = audit["estimated_recall_low"], audit["estimated_recall_high"]
        line += f"; estimated recall {audit['estimated_recall']:.2f} [{low:.2f}, {high:.2f}]"
    strongest = sorted(findings.kept, key=lambda a: (-a.observed_rate, a.candidate))[:_N_SHOWN]
    return [line, *(f"    {_agonist_line(findings.rule.circuit, agonist)}" for agonist in strongest)]


def _agonist_line(circuit: Circuit, agonist: Agonist) -> str:
    rate = f"{agonist.observed_rate:.2f} of the {SIDES[agonist.side]} datapoints searched on"
    text = f"{circuit.neurons[agonist.candidate]} flips {rate}"
    if agonist.confirmed:
        fresh = agonist.confirmed
        text += f", {fresh.rate:.2f} [{fresh.low:.2f}, {fresh.high:.2f}] of fresh ones"
    return text + (" (catastrophic)" if agonist.is_catastrophic else "")
