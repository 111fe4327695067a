"""The behaviour: how often it holds, in which groups, what prompts and answers look like, how the run was made."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lib.confidence_bounds import flip_rate_interval
from lib.reporting.artifacts import block_of, read_json
from lib.reporting.page.grids import Cell, Column, Grid, Kind, count_cell, model_cell, percent_cell, rate_cell
from lib.reporting.page.inputs import PageInputs
from lib.reporting.page.texts import is_number, percent, shared_prefix, visible

_N_EXAMPLES = 4
_NEVER_SHOWN = ("path", "dir", "url", "file", "key")


@dataclass(frozen=True)
class BehaviourSection:
    """What the template shows. rate: share of prompts with the behaviour, as text; names: what true and false mean."""

    n_prompts: int | None
    rate: str
    target: str
    positive_name: str
    negative_name: str
    prefix: str
    groups: Grid | None
    examples: Grid | None
    settings: list[tuple[str, str]]
    features: Grid | None


def behaviour_section(inputs: PageInputs) -> BehaviourSection:
    """The first section."""
    statistics, task = inputs.statistics, inputs.task
    n_prompts = statistics.get("n_examples")
    if not is_number(n_prompts):
        n_prompts = len(inputs.scores) if inputs.scores is not None else None
    prefix = shared_prefix(inputs.scores.prompts) if inputs.scores is not None else ""
    return BehaviourSection(
        n_prompts=int(n_prompts) if n_prompts is not None else None,
        rate=percent(_rate(inputs)),
        target=visible(inputs.target, 60),
        positive_name=task.POSITIVE_NAME if task else "the behaviour holds",
        negative_name=task.NEGATIVE_NAME if task else "the behaviour does not hold",
        prefix=visible(prefix),
        groups=_groups(statistics),
        examples=_examples(inputs, len(prefix)),
        settings=list(_settings(inputs)),
        features=_features(inputs),
    )


def _rate(inputs: PageInputs) -> float | None:
    """Share of the studied label: as stage 1 states it (in older results under other names), else counted."""
    statistics = inputs.statistics
    names = (f"pct_{inputs.target}", f"{inputs.target}_rate", "accuracy", "jailbreak_rate")
    stated = next((statistics[name] for name in names if is_number(statistics.get(name))), None)
    if stated is not None:
        return stated / 100 if stated > 1 else stated
    return float(inputs.scores.target().mean()) if inputs.scores is not None else None


def _groups(statistics: dict[str, Any]) -> Grid | None:
    """The task's own break-downs: one row per group, with the exact interval of its rate."""
    rows: list[list[Cell]] = []
    for key, groups in statistics.items():
        if "_by_" not in key or not isinstance(groups, dict):
            continue
        what, _, by = key.partition("_by_")
        for name, group in groups.items():
            rate = next(
                (group[field] for field in ("accuracy", "rate", what) if is_number(group.get(field))), None
            ) if isinstance(group, dict) else group
            n = group.get("n") if isinstance(group, dict) else None
            if not is_number(rate):
                continue
            head = [visible(what.replace("_", " "), 60), visible(by.replace("_", " "), 60), visible(name, 80)]
            rows.append([*head, count_cell(n), _rate_with_interval(rate, n)])
    if not rows:
        return None
    columns = [
        Column("rate of"),
        Column("grouped by"),
        Column("group", Kind.MODEL),
        Column("prompts", Kind.NUMBER),
        Column("rate", Kind.RATE, "share of the group's prompts, with its exact 95 % interval"),
    ]
    return Grid("groups", "The behaviour in groups of prompts", columns, rows, noun="group")


def _rate_with_interval(rate: float, n: object) -> Cell:
    if not is_number(n) or not 0 <= rate <= 1:
        return percent_cell(rate)
    found = flip_rate_interval(round(rate * n), int(n))
    return rate_cell(round(rate * n), int(n), found.low, found.high) if found else percent_cell(rate)


def _examples(inputs: PageInputs, n_prefix: int) -> Grid | None:
    """A few prompts with and without the behaviour, spread over the table."""
    if inputs.scores is None:
        return None
    scores, labels = inputs.scores, inputs.scores.target()
    answers = scores.frame[scores.output_col].tolist() if scores.output_col in scores.frame else None
    rows: list[list[Cell]] = []
    for wanted in (True, False):
        places = (labels == wanted).nonzero()[0]
        step = max(1, len(places) // _N_EXAMPLES)
        for place in places[::step][:_N_EXAMPLES].tolist():
            answer = model_cell(answers[place]) if answers is not None else "not recorded"
            rows.append([model_cell(scores.prompts[place][n_prefix:]), answer, "yes" if wanted else "no"])
    columns = [Column("prompt", Kind.MODEL), Column("answer", Kind.MODEL), Column("behaviour holds")]
    return Grid("examples", "Prompts and answers before any ablation", columns, rows, noun="example")


def _features(inputs: PageInputs) -> Grid | None:
    """What the features of the rules measure."""
    rows: list[list[Cell]] = []
    for item in inputs.features:
        column = item.get("column") or item.get("label", "")
        rows.append([model_cell(column, 80), model_cell(item.get("description", ""), 300),
                     visible(item.get("origin", ""), 40)])
    if not rows:
        return None
    columns = [
        Column("feature", Kind.MODEL),
        Column("what it measures", Kind.MODEL),
        Column("origin", help="predefined by the task, or proposed by a language model"),
    ]
    return Grid("features", "Features that rules may use", columns, rows, noun="feature")


def _settings(inputs: PageInputs) -> Iterator[tuple[str, str]]:
    """Choices that the results depend on, as recorded; places on this machine are not among them."""
    metadata = block_of(read_json(inputs.features_dir / "run_metadata.json").value)
    seed = block_of(metadata, "settings").get("seed")
    if is_number(seed):
        yield "seed", str(seed)
    for name, value in inputs.task_settings.items():
        if isinstance(value, str | int | float | bool) and not any(part in name.lower() for part in _NEVER_SHOWN):
            yield visible(name.replace("_", " "), 60), visible(value, 120)
    run_name = inputs.run.name if inputs.run else None
    if run_name is not None:
        choices = run_name.choices
        size = choices.circuit_size
        kept = f"{percent(size)} of all" if isinstance(size, float) else f"{size:,}"
        yield "candidates kept per circuit, at most", kept
        yield "smallest flip rate worth finding", visible(choices.min_flip_rate, 20)
        yield "ablation at", "answer-producing positions only" if choices.decode_only else "all positions"
    for package, version in block_of(metadata, "packages").items():
        if isinstance(version, str):
            yield visible(package, 40), visible(version, 40)
