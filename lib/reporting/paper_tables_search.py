"""Tables 3, 12 and 13: what the search recovers of brute force's agonists, what it costs, and what tasks share."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from lib.cli import UserError
from lib.reporting.artifacts import REGIMES, Reading, RunFolder
from lib.reporting.issues import Issue
from lib.reporting.localization import Budget, agonists, budget, circuit_costs, effects_by_circuit, regime_of
from lib.reporting.naming import BRUTE_FORCE_RUN, MAIN_RUN, RunMode, model_label, task_label
from lib.reporting.paper_tables import DEFAULT_MODEL, PaperContext, main_tables_note, whole
from lib.reporting.tables import Table

_SHORT_TASKS = {"Arithmetic": "Arith.", "Jailbreaking": "Jail.", "HANS NLI": "HANS"}
_SHORT_REGIMES = {"positive": "pos.", "negative": "neg."}


# ---------------------------------------------------------------- table 3: one record per model and regime


@dataclass(frozen=True)
class Recall:
    """Brute force against the search, on the circuits both have searched.

    effects: |effect| of each agonist of brute force. recovered: those among them that the search found.
    """

    task: str
    model: str
    regime: str
    circuit_ids: tuple[int, ...]
    effects: dict[str, float]
    recovered: frozenset[str]
    search: Budget
    n_candidates: int | None

    @property
    def n_tree(self) -> int | None:
        """2N-1, summed over the circuits."""
        return 2 * self.n_candidates - len(self.circuit_ids) if self.n_candidates else None

    def to_json(self) -> dict[str, Any]:
        """For the table's metadata."""
        return {
            "task": self.task,
            "model": self.model,
            "baseline": self.regime,
            "circuit_ids": self.circuit_ids,
            "n_bruteforce": len(self.effects),
            "n_recovered": len(self.recovered),
            "missed": sorted(set(self.effects) - self.recovered),
            "n_group_tests": self.search.n_groups,
            "n_audit_tests": self.search.n_audit,
            "n_candidates": self.n_candidates,
            "tree_size": self.n_tree,
        }


def recall_of(context: PaperContext, brute: RunFolder, main: RunFolder, regime: str, floor: float) -> Recall | None:
    """The comparison in one regime; None (and an issue) if one of the two is not there."""
    found = {run.run_name: _agonist_effects(context, run, regime) for run in (brute, main)}
    costs = {
        run.run_name: context.session.take(run, circuit_costs(run, regime), f"{regime} rule_knockout.json")
        for run in (brute, main)
    }
    if any(effects is None for effects in found.values()) or any(not cost.is_usable for cost in costs.values()):
        return None
    shared = tuple(
        sorted(
            {cost.circuit_id for cost in costs[brute.run_name].value}
            & {cost.circuit_id for cost in costs[main.run_name].value}
        )
    )
    if not shared and costs[brute.run_name].value and costs[main.run_name].value:
        message = f"{regime}: no circuit was searched by both {brute.run_name} and the main run"
        context.session.issues.add(
            Issue(main.root.task, main.root.llm, main.run_name, "rule_knockout.json", "missing", message)
        )
        return None
    theirs = _within(found[brute.run_name], shared)
    ours = _within(found[main.run_name], shared)
    effects = {neuron: effect for neuron, effect in theirs.items() if effect >= floor}
    recovered = frozenset(neuron for neuron in effects if ours.get(neuron, 0.0) >= floor)
    search = budget(costs[main.run_name].value, shared)
    n_candidates = budget(costs[brute.run_name].value, shared).n_candidates or search.n_candidates
    return Recall(brute.root.task, brute.root.llm, regime, shared, effects, recovered, search, n_candidates)


def _agonist_effects(context: PaperContext, run: RunFolder, regime: str) -> dict[int, dict[str, float]] | None:
    """|effect| of the agonists by circuit: bucket members, with what each circuit's detail file says of them.

    Where detail files are not there, each agonist counts for the circuit that saw it last, as published.
    """
    bucket = context.session.take(run, agonists(run, regime), f"{regime} neuron_buckets.json")
    if not bucket.is_usable or bucket.value is None:
        return None
    members = {agonist.neuron for agonist in bucket.value}
    details = effects_by_circuit(run, regime)
    if details.is_usable and details.value is not None:
        return {
            circuit: {neuron: abs(effect) for neuron, effect in effects.items() if neuron in members}
            for circuit, effects in details.value.items()
        }
    if members:
        context.session.issues.add(
            Issue(
                run.root.task,
                run.root.llm,
                run.run_name,
                f"{regime} rule details",
                details.status.value,
                f"{details.reason}; each agonist is counted for the circuit that saw it last",
            )
        )
    effects: dict[int, dict[str, float]] = {}
    for agonist in bucket.value:
        if agonist.circuit_id is not None and math.isfinite(agonist.effect):
            effects.setdefault(agonist.circuit_id, {})[agonist.neuron] = abs(agonist.effect)
    return effects


def _within(effects: dict[int, dict[str, float]] | None, circuits: Iterable[int]) -> dict[str, float]:
    """Largest effect of each neuron over some circuits."""
    largest: dict[str, float] = {}
    for circuit in circuits:
        for neuron, effect in (effects or {}).get(circuit, {}).items():
            largest[neuron] = max(effect, largest.get(neuron, 0.0))
    return largest


# ---------------------------------------------------------------- table 3: rows


def parse_bins(text: str) -> list[tuple[float, float]]:
    """Edges `0.2,0.3,1.0` as bins; the last one is closed.

    Raises:
        UserError: fewer than two edges, or not increasing.
    """
    try:
        edges = [float(piece) for piece in text.split(",")]
    except ValueError:
        edges = []
    if len(edges) < 2 or any(b <= a for a, b in zip(edges, edges[1:], strict=False)):
        raise UserError(f"--table3_bins {text!r}: give at least two increasing edges, like 0.2,0.3,0.5,1.0")
    return list(zip(edges, edges[1:], strict=False))


def bin_label(bins: Sequence[tuple[float, float]], number: int) -> str:
    """`[0.2, 0.3)`, the last one `[0.5, 1.0]`."""
    low, high = bins[number]
    return f"[{low}, {high}{']' if number == len(bins) - 1 else ')'}"


def recall_cell(n_recovered: int, n: int) -> str:
    """`2/3 (66.7%)`, or `0/0` where brute force found nothing."""
    return f"{n_recovered}/{n} ({100 * n_recovered / n:.1f}%)" if n else "0/0"


def _row_3(labels: tuple[str, str, str], records: Sequence[Recall], bins: Sequence[tuple[float, float]]) -> dict:
    n_groups = sum(record.search.n_groups for record in records)
    n_known = [record.n_candidates for record in records if record.n_candidates]
    complete = bool(records) and len(n_known) == len(records)
    n_candidates = sum(n_known) if complete else None
    n_tree = sum(record.n_tree or 0 for record in records) if complete else None
    row: dict[str, Any] = {
        "Task": labels[0],
        "Model": labels[1],
        "Baseline": labels[2],
        "Budget": _share(n_groups, n_tree),
        "CHA ablations": n_groups,
        "BF ablations": n_tree,
        "N": n_candidates,
        "Budget of N": _share(n_groups, n_candidates),
        "Overall": recall_cell(sum(len(r.recovered) for r in records), sum(len(r.effects) for r in records)),
        "#completed experiments": len(records),
    }
    for number, (low, high) in enumerate(bins):
        is_last = number == len(bins) - 1
        inside = [
            (neuron in record.recovered)
            for record in records
            for neuron, effect in record.effects.items()
            if low <= effect < high or (is_last and effect == high)
        ]
        row[bin_label(bins, number)] = recall_cell(sum(inside), len(inside))
    return row


def _share(part: int, of: int | None) -> str:
    return f"{100 * part / of:.2f}%" if of else "NA"


def table_3(context: PaperContext) -> int:
    """Recall of brute force's agonists by the search, by size of effect, and the share of the tests it took."""
    args, bins = context.args, parse_bins(context.args.table3_bins)
    roots = context.main_roots
    if args.table3_scope == "selected":
        roots = [context.root_for(args.table3_task, args.table3_model, "--table3_model")]
    records = []
    for root in roots:
        brute, main = (context.run_of(root, mode) for mode in (RunMode.BRUTE_FORCE, RunMode.SPECTRAL_PLAN))
        for run in (brute, main):
            if not run.exists:
                context.session.issues.add(
                    Issue(
                        root.task,
                        root.llm,
                        run.run_name,
                        "run folder",
                        "missing",
                        "no brute force to compare with, or no main run",
                    )
                )
        if brute.exists and main.exists:
            found = [recall_of(context, brute, main, regime, bins[0][0]) for regime in REGIMES]
            records += [record for record in found if record is not None]
    frame = pd.DataFrame(_rows_3(records, bins), columns=list(_row_3(("", "", ""), [], bins)))
    for name in ("BF ablations", "N"):
        frame[name] = whole(list(frame[name]))
    context.write(Table("table3_compact_bf_vs_cha", frame, _caption_3(bins, context)))
    context.write(_recall_budget(records, bins, _caption_3(bins, context)))
    context.write_json(
        "table3_compact_metadata.json",
        {
            "compared_runs": {"cha": MAIN_RUN, "bruteforce": BRUTE_FORCE_RUN},
            "variant": context.variant or "main",
            "counting_unit": "neuron of brute force's bucket, in one baseline regime",
            "cha_scope": "circuits that both runs have searched, in numerator and denominator",
            "effect_threshold_for_table3": bins[0][0],
            "bins": bins,
            "scope": args.table3_scope,
            "tasks": sorted({record.task for record in records}),
            "n_completed_baseline_records": len(records),
            "records": [record.to_json() for record in records],
        },
    )
    return len(frame)


def _caption_3(bins: Sequence[tuple[float, float]], context: PaperContext) -> str:
    return (
        f"Agonists of brute force (effect of at least {bins[0][0]:g}) that the search found too, by effect, on the "
        "circuits that both have searched. Budget: group tests in percent of 2N-1, the nodes of a binary tree over "
        "the N candidates (BF ablations); Budget of N: in percent of N, one test per candidate. "
        f"{main_tables_note(context)}"
    )


def _rows_3(records: Sequence[Recall], bins: Sequence[tuple[float, float]]) -> list[dict]:
    rows = []
    for task in dict.fromkeys(record.task for record in records):
        of_task = [record for record in records if record.task == task]
        for model in dict.fromkeys(record.model for record in of_task):
            of_model = [record for record in of_task if record.model == model]
            name = (task_label(task), model_label(model))
            rows += [_row_3((*name, record.regime), [record], bins) for record in of_model]
            rows.append(_row_3((*name, "both"), of_model, bins))
        rows.append(_row_3((task_label(task), "All", "both"), of_task, bins))
    return [*rows, _row_3(("All", "All", "both"), records, bins)] if records else []


def _recall_budget(records: Sequence[Recall], bins: Sequence[tuple[float, float]], caption: str) -> Table:
    """The compact form: a row per model and regime, and one for all."""
    rows = []
    for record in records:
        task = task_label(record.task)
        name = f"{_SHORT_TASKS.get(task, task)}/{model_label(record.model)}"
        rows.append({"Task/model": name, "b": _SHORT_REGIMES[record.regime]} | _row_3(("", "", ""), [record], bins))
    if records:
        rows.append({"Task/model": "All completed", "b": "all"} | _row_3(("", "", ""), records, bins))
    columns = ["Task/model", "b", "Budget", "Overall", *(bin_label(bins, number) for number in range(len(bins)))]
    return Table("table3_e2_recall_budget", pd.DataFrame(rows, columns=columns), caption)


# ---------------------------------------------------------------- table 12


def table_12(context: PaperContext) -> int:
    """Group tests of each searched circuit of the main run, and their share of N and of 2N-1."""
    rows = []
    for root in context.main_roots:
        run = context.run_of(root, RunMode.SPECTRAL_PLAN)
        for regime in REGIMES:
            reading = context.session.take(run, circuit_costs(run, regime), f"{regime} rule_knockout.json")
            if reading.is_usable and reading.value is not None:
                rows.append(_row_12(run, regime, reading))
    frame = pd.DataFrame(rows, columns=list(_ROW_12))
    frame["N"] = whole(list(frame["N"]))
    context.write(
        Table(
            "table12_cha_ablation_budget",
            frame,
            "Group tests of the search in the main run, by circuit; tests of its audit, which measures what was "
            f"missed, are counted apart (Audit). {main_tables_note(context)}",
            decimals=1,
            shown=tuple(name for name in _ROW_12 if name not in ("llm", "run_name")),
        )
    )
    return len(frame)


_ROW_12 = (
    "Task",
    "Model",
    "Baseline",
    "#rules",
    "n ablation_groups (by circuit id)",
    "Mean",
    "Median",
    "Min–Max",
    "Total",
    "Audit",
    "N",
    "% of N",
    "% of 2N-1",
    "llm",
    "run_name",
)


def _row_12(run: RunFolder, regime: str, reading: Reading) -> dict[str, Any]:
    costs = sorted(reading.value, key=lambda cost: cost.circuit_id if cost.circuit_id is not None else -1)
    counts, total = [cost.n_groups for cost in costs], budget(costs)
    return {
        "Task": task_label(run.root.task),
        "Model": model_label(run.root.llm),
        "Baseline": _SHORT_REGIMES[regime].rstrip("."),
        "#rules": len(costs),
        "n ablation_groups (by circuit id)": ",".join(f"{cost.circuit_id}:{cost.n_groups}" for cost in costs),
        "Mean": float(np.mean(counts)) if counts else math.nan,
        "Median": float(np.median(counts)) if counts else math.nan,
        "Min–Max": f"{min(counts)}–{max(counts)}" if counts else "NA",
        "Total": total.n_groups,
        "Audit": total.n_audit,
        "N": total.n_candidates,
        "% of N": total.percent_of_singles,
        "% of 2N-1": total.percent_of_tree,
        "llm": run.root.llm,
        "run_name": run.run_name,
    }


# ---------------------------------------------------------------- table 13


@dataclass(frozen=True)
class AgonistSet:
    """Agonists of one task over some regimes. present, missing: `task/model/regime` with and without a usable file."""

    neurons: frozenset[str]
    present: tuple[str, ...]
    missing: tuple[str, ...]


def table_13(context: PaperContext) -> int:
    """Agonists of two tasks in one model, and how many they share."""
    args = context.args
    tasks, model = (args.table13_task_a, args.table13_task_b), _shared_model(context)
    if model is None:
        message = f"no model has finished runs of both {tasks[0]} and {tasks[1]}"
        context.session.issues.add(Issue("", "", "", "Table 13", "missing", message))
    named = {"both": REGIMES, "selected": (regime_of(args.baseline_subset),)}
    regimes = named.get(args.table13_baseline_scope, (args.table13_baseline_scope,))
    first, second = (_agonist_set(context, task, model, regimes) for task in tasks)
    missing = [*first.missing, *second.missing]
    setting = f"{model_label(model or '')} {tasks[0]} vs {tasks[1]}"
    row = None if missing else overlap_row(setting, set(first.neurons), set(second.neurons))
    frame = pd.DataFrame([row] if row else [], columns=["Setting", "|A|", "|J|", "|A ∩ J|", "Jaccard"])
    caption = (
        f"Agonists (effect of at least {args.tau:g}) of {tasks[0]} (A) and {tasks[1]} (J), baseline regimes: "
        f"{', '.join(regimes)}."
    )
    context.write(Table("table13_cross_task_overlap", frame, caption))
    shared = sorted(first.neurons & second.neurons) if row else []
    context.write_text("table13_intersection_neurons.txt", "".join(f"{neuron}\n" for neuron in shared))
    content = {"status": "ok" if row else "skipped_missing_neuron_buckets", "task_a": tasks[0], "task_b": tasks[1]}
    content |= {"model": model, "tau": args.tau, "baseline_scope": args.table13_baseline_scope}
    content |= {"baseline_subsets": list(regimes), "present": [*first.present, *second.present], "missing": missing}
    content |= {"task_a_neurons": sorted(first.neurons), "task_b_neurons": sorted(second.neurons)}
    content |= {"intersection_neurons": shared, "jaccard": row["Jaccard"] if row else None}
    context.write_json("table13_metadata.json", content)
    return len(frame)


def _shared_model(context: PaperContext) -> str | None:
    """The model asked for, else the paper's, else the first that has both tasks; None if none has them."""
    args = context.args
    if args.table13_model:
        return args.table13_model
    models = [
        {root.llm for root in context.roots if root.task == task} for task in (args.table13_task_a, args.table13_task_b)
    ]
    both = [root.llm for root in context.roots if root.llm in models[0] & models[1]]
    return DEFAULT_MODEL if DEFAULT_MODEL in both else next(iter(both), None)


def _agonist_set(context: PaperContext, task: str, model: str | None, regimes: Sequence[str]) -> AgonistSet:
    if model is None:
        return AgonistSet(frozenset(), (), tuple(f"{task}/{regime}" for regime in regimes))
    roots = [root for root in context.roots if root.task == task and model in (root.llm, root.model)]
    if not roots:
        context.session.issues.add(Issue(task, model, "", "model", "missing", "no finished run of it, for Table 13"))
        return AgonistSet(frozenset(), (), tuple(f"{task}/{model}/{regime}" for regime in regimes))
    run = context.run_of(roots[0], RunMode.SPECTRAL_PLAN)
    neurons: set[str] = set()
    places: dict[bool, list[str]] = {True: [], False: []}
    for regime in regimes:
        reading = context.session.take(run, agonists(run, regime), f"{regime} neuron_buckets.json")
        places[reading.is_usable].append(f"{task}/{model}/{regime}")
        neurons |= {agonist.neuron for agonist in reading.value or [] if abs(agonist.effect) >= context.args.tau}
    return AgonistSet(frozenset(neurons), tuple(places[True]), tuple(places[False]))


def overlap_row(setting: str, first: set[str], second: set[str]) -> dict[str, Any]:
    """Sizes of two sets, of their intersection, and its share of the union (0 if both are empty)."""
    union = len(first | second)
    return {
        "Setting": setting,
        "|A|": len(first),
        "|J|": len(second),
        "|A ∩ J|": len(first & second),
        "Jaccard": len(first & second) / union if union else 0.0,
    }
