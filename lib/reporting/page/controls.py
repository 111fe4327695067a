"""Controls and caveats: what random neurons and a no-op edit give, other runs, what to be careful of."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lib.reporting.artifacts import REGIMES, RunFolder, Status, block_of, expect, read_json
from lib.reporting.issues import IssueLog
from lib.reporting.localization import agonists, all_costs, budget, knockout
from lib.reporting.naming import label_of
from lib.reporting.page.grids import Cell, Column, Grid, Kind, count_cell, percent_cell
from lib.reporting.page.inputs import PageInputs
from lib.reporting.page.texts import count, is_number, percent, visible
from lib.reporting.rules import hq_count, load_best_rows
from lib.reporting.scopes import DEFAULT_SCOPES


@dataclass(frozen=True)
class Control:
    """One control: what was done, what came out, what one would hope for."""

    what: str
    result: str
    meaning: str


@dataclass(frozen=True)
class ControlsSection:
    """runs: the model's runs side by side; missing: what the page had to do without."""

    controls: list[Control]
    caveats: list[str]
    runs: Grid | None
    missing: Grid | None


def controls_section(inputs: PageInputs, run_names: list[str]) -> ControlsSection:
    """The last section; call it when everything else has been read, so that nothing missing is left out."""
    controls = list(_flip_controls(inputs)) + list(_joint_control(inputs))
    caveats = list(_caveats(inputs))
    runs = _runs_grid(inputs, run_names)
    return ControlsSection(controls, caveats, runs, _missing_grid(inputs.issues))


def _flip_controls(inputs: PageInputs) -> Iterator[Control]:
    controls = block_of(inputs.flip_global, "controls")
    no_op = controls.get("no_op")
    if isinstance(no_op, dict):
        yield Control(
            "An edit that changes nothing",
            f"flips {count(no_op.get('n_flips'))} prompts, changes {count(no_op.get('n_changed_answers'))} answers",
            "should be 0: flips then come from the ablation alone",
        )
    noise = block_of(controls, "random_neurons")
    if is_number(noise.get("flip_any_rate")):
        yield Control(
            f"{count(noise.get('n_neurons'))} random neurons of the same components",
            f"flip {percent(noise['flip_any_rate'])} of the prompts on average, "
            f"at most {percent(noise.get('max_flip_any_rate'))}",
            "the agonists' flip rates are to be read against this floor",
        )
    baseline = block_of(controls, "baseline")
    if is_number(baseline.get("n_labels_unlike_stage_1")):
        yield Control(
            "Answers before ablation, asked again",
            f"{count(baseline['n_labels_unlike_stage_1'])} prompts have another label than in stage 1",
            "such prompts are left out: nobody can say whether they flip",
        )


def _joint_control(inputs: PageInputs) -> Iterator[Control]:
    """All agonists ablated at once, against as many random neurons."""
    if inputs.run is None:
        return
    joint = expect(read_json(inputs.run.path / "joint_ablation.json"), dict, "joint ablation").value
    test = block_of(joint, "test")
    for before, change, verb in (("positive", "lost", "lose"), ("negative", "gained", "show")):
        share = test.get(f"share_{before}_{change}")
        if not is_number(share):
            continue
        drawn = test.get(f"share_{before}_{change}_random")
        drawn = [value for value in drawn if is_number(value)] if isinstance(drawn, list) else []
        random = f"random neurons {percent(sum(drawn) / len(drawn))}" if drawn else "no random neurons to compare with"
        yield Control(
            "All agonists ablated at once, held-out prompts",
            f"{percent(share)} {verb} the behaviour; {random}",
            "what they do together, against as many random neurons of the same components",
        )


# ---------------------------------------------------------------- caveats


def _caveats(inputs: PageInputs) -> Iterator[str]:
    """What a reader should know before quoting a number of this page."""
    yield (
        "A neuron is one coordinate of what a component writes to the residual stream (m12:345: layer 12's MLP, "
        "coordinate 345; a16.h21:7: head 21 of layer 16), not a hidden unit inside the MLP."
    )
    yield (
        "TEST scores are of rules chosen on TRAIN and scored once on held-out prompts. ALL-FIT rules are chosen and "
        "scored on the same prompts: they describe this table and promise nothing for other prompts."
    )
    yield (
        "Flip rates over all evaluated prompts include prompts that helped to find the neuron, which raises them; "
        "the held-out column does not."
    )
    yield (
        "The search prunes a group when the exact bound of its flip rate is below the threshold. Members of a group "
        "that cancel each other can be lost; the estimated recall measures how often."
    )
    yield f"Rules that cover less than {percent(inputs.options.min_coverage, 2)} of the prompts do not count."
    yield from _caveats_of_run(inputs)


def _caveats_of_run(inputs: PageInputs) -> Iterator[str]:
    name = inputs.run.name if inputs.run else None
    if name is not None and name.is_fake:
        yield "This run is a control: its rules are those of shuffled labels, so nothing it finds is an explanation."
    if name is not None and name.choices.spectral_splits:
        yield "This run searches clusters of prompts instead of rules: associated means a cluster's own prompts."
    if inputs.run is None:
        return
    for regime in REGIMES:
        for entry in knockout(inputs.run, regime, skipped=True).value or ():
            reason = visible(entry.get("reason") or "no reason recorded", 200)
            yield f"Circuit {visible(entry.get('circuit_id'), 20)}, {regime} baseline, was not searched: {reason}."


# ---------------------------------------------------------------- other runs


def _runs_grid(inputs: PageInputs, run_names: list[str]) -> Grid | None:
    """The model's runs side by side; a run that found nothing is a row of zeros, an unknown number is NA."""
    if not run_names:
        return None
    columns = [
        Column("run", Kind.MODEL),
        Column("shown here"),
        Column("agonists", Kind.NUMBER, "different neurons over both regimes"),
        Column("group tests", Kind.NUMBER),
        Column("tests, % of N", Kind.NUMBER),
        Column("tests, % of 2N-1", Kind.NUMBER),
        *(Column(scope.label, Kind.NUMBER, f"neurons of high quality: {scope.meaning}") for scope in DEFAULT_SCOPES),
        Column("prompts flipped by some neuron", Kind.NUMBER),
    ]
    rows = [_run_row(inputs, inputs.root.run(name)) for name in run_names]
    return Grid("runs", "The runs of this task and model", columns, rows, noun="run")


def _run_row(inputs: PageInputs, run: RunFolder) -> list[Cell]:
    found = [agonists(run, regime) for regime in REGIMES]
    known = [reading.value for reading in found if reading.is_usable]
    costs = [reading.value for reading in all_costs(run).values() if reading.is_usable and reading.value]
    total = budget([cost for part in costs for cost in part]) if costs else None
    return [
        visible(label_of(run.run_name), 120),
        "yes" if inputs.run and run.run_name == inputs.run.run_name else "no",
        count_cell(len({item.neuron for part in known for item in part or ()}) if known else None),
        count_cell(total.n_groups if total else None),
        percent_cell(total.percent_of_singles / 100 if total else None, 2),
        percent_cell(total.percent_of_tree / 100 if total else None, 2),
        *(_hq_cell(inputs, run, scope) for scope in DEFAULT_SCOPES),
        percent_cell(_union_rate(run)),
    ]


def _hq_cell(inputs: PageInputs, run: RunFolder, scope: Any) -> Cell:
    reading = load_best_rows(run, scope, inputs.options.min_coverage)
    if not reading.is_usable or reading.value is None:
        return count_cell(None)
    return count_cell(hq_count(reading.value, inputs.options.hq_threshold))


def _union_rate(run: RunFolder) -> float | None:
    value = (run.flip_global.value or {}).get("union_flip_any_unique_rate")
    return value if is_number(value) else None


def _missing_grid(issues: IssueLog) -> Grid | None:
    """What the page had to do without, and why."""
    if not len(issues):
        return None
    words = {Status.MISSING.value: "not there", Status.STALE.value: "out of date", Status.INVALID.value: "unreadable"}
    rows: list[list[Cell]] = [
        [visible(issue.artifact, 120), words.get(issue.status, issue.status), visible(issue.message, 300)]
        for issue in issues
    ]
    columns = [Column("artifact", Kind.MODEL), Column("status"), Column("reason", Kind.MODEL)]
    return Grid("missing", "What this page had to do without", columns, rows, noun="artifact", shown=100)
