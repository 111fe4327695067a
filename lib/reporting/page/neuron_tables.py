"""Flip rates, anchored rules and flipped prompts of the neurons as tables of the page."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from lib.flip_targets import FlipTarget
from lib.reporting.page.grids import (
    Cell,
    Column,
    Grid,
    Kind,
    count_cell,
    interval_cell,
    model_cell,
    number_cell,
    rate_cell,
    score_cell,
    share_cell,
    small_cell,
)
from lib.reporting.page.neurons import VERBS, Flip, NeuronFacts, Neurons, Rate, union_rate
from lib.reporting.page.texts import is_number, percent, to_float, visible
from lib.reporting.rules import DEFAULT_THRESHOLD
from lib.reporting.scopes import Scope

_N_CARDS, _N_CARD_PROMPTS = 4, 6
_MAX_PROMPT = 300
_TRUE = ("true", "1", "1.0")
NO_RULE = "no rule on held-out prompts"


@dataclass(frozen=True)
class NeuronCard:
    """A neuron shown in full at once: a sentence, its scores, some of its flipped prompts."""

    neuron: str
    verb: str
    rule: str
    score: str
    flips: str
    prompts: Grid
    is_badged: bool


@dataclass(frozen=True)
class NeuronSection:
    """flips: rates of every neuron. anchored: its rule; details: what opens under a row, by neuron.

    unions: (kind of flip, shown share of prompts that some neuron flips).
    """

    flips: Grid | None
    anchored: Grid | None
    details: dict[str, Any]
    cards: list[NeuronCard]
    unions: list[tuple[str, str]]
    n_neurons: int
    n_ruled: int
    n_badges: int
    n_high: dict[str, int | None]
    prefix: str


def neuron_section(neurons: Neurons) -> NeuronSection:
    """Everything about single neurons."""
    facts = neurons.facts
    ordered = sorted(facts, key=lambda item: _rank(neurons, item))
    measured = [item for item in ordered if item.place is not None]
    best = neurons.best[Scope.TEST]
    return NeuronSection(
        flips=_flips_grid(facts) if facts else None,
        anchored=_anchored_grid(neurons, measured) if measured else None,
        details=_details(neurons, measured),
        cards=[_card(neurons, item) for item in measured[:_N_CARDS] if item.neuron.key in best],
        unions=_unions(neurons),
        n_neurons=len(facts),
        n_ruled=len(best),
        n_badges=sum(_is_true(row.get("badge")) for row in best.values()),
        n_high={scope.slug: _n_high(neurons, scope) for scope in (Scope.TEST, Scope.ALL_FIT)},
        prefix=visible(neurons.prefix),
    )


def _n_high(neurons: Neurons, scope: Scope) -> int | None:
    """Neurons of high quality in a scope; None where the scope is not available."""
    if neurons.inputs.rules(scope) is None:
        return None
    threshold = neurons.inputs.options.hq_threshold
    return sum(_rank_of(row.get("MCC")) >= threshold for row in neurons.best[scope].values())


def _rank(neurons: Neurons, facts: NeuronFacts) -> tuple:
    """Best rule first: badge, held-out MCC, then flips."""
    row = neurons.best[Scope.TEST].get(facts.neuron.key, {})
    return (not _is_true(row.get("badge")), -_rank_of(row.get("MCC")), -_rank_of(facts.rate), facts.neuron.sort_key)


def _rank_of(value: object) -> float:
    number = to_float(value)
    return -math.inf if math.isnan(number) else number


def _is_true(value: object) -> bool:
    return str(value).strip().lower() in _TRUE


def _unions(neurons: Neurons) -> list[tuple[str, str]]:
    shown = []
    for target, name in (
        (FlipTarget.C2I, "prompts with the behaviour lose it"),
        (FlipTarget.I2C, "prompts without the behaviour gain it"),
    ):
        hits, n = union_rate(neurons.inputs.flips, target)
        if n:
            shown.append((name, f"{percent(hits / n)} ({hits:,} of {n:,})"))
    return shown


# ---------------------------------------------------------------- flip rates


def _flips_grid(facts: list[NeuronFacts]) -> Grid:
    """Every neuron; where stage 7 has not measured any, only what the search says of them."""
    measured = any(item.place is not None for item in facts)
    rows = [
        [
            str(item.neuron),
            count_cell(item.neuron.layer),
            _found_where(item),
            *(map(_rate, (item.lost, item.gained, item.flips, item.held_out)) if measured else ()),
            interval_cell(*max(item.confirmed.values(), default=(None, None, None))),
        ]
        for item in facts
    ]
    columns = [*_FOUND_COLUMNS, *(_MEASURED_COLUMNS if measured else ()), _CONFIRMED_COLUMN]
    return Grid("flips", "Flip rates of the agonist neurons", columns, rows, noun="neuron")


def _rate(rate: Rate) -> Cell:
    return rate_cell(*rate)


_FOUND_COLUMNS = (
    Column("neuron", Kind.NEURON, "component and coordinate: m12:345 is coordinate 345 of layer 12's MLP write"),
    Column("layer", Kind.NUMBER),
    Column("found where the behaviour", help="holds, does not hold, or both: the regimes of the search"),
)
_MEASURED_COLUMNS = (
    Column("behaviour lost", Kind.RATE, "of the evaluated prompts with the behaviour, exact 95 % interval"),
    Column("behaviour gained", Kind.RATE, "of the evaluated prompts without the behaviour, exact 95 % interval"),
    Column("any flip", Kind.RATE, "of all evaluated prompts, exact 95 % interval"),
    Column("any flip, TEST", Kind.RATE, "of the held-out prompts, exact 95 % interval"),
)
_CONFIRMED_COLUMN = Column(
    "confirmed by the search",
    Kind.RATE,
    "flip rate on datapoints that the search had not seen, the higher of both regimes, 95 % interval",
)


def _found_where(facts: NeuronFacts) -> str:
    words = {"positive": "holds", "negative": "does not hold"}
    where = " and ".join(words[regime] for regime in words if regime in facts.effects)
    return (where or "not recorded") + (" (flips everything)" if facts.is_catastrophic else "")


# ---------------------------------------------------------------- anchored rules


def _anchored_grid(neurons: Neurons, facts: list[NeuronFacts]) -> Grid:
    columns = [
        Column("neuron", Kind.NEURON, "open a row for all rules of the neuron and the prompts it flips"),
        Column("ablation makes the model"),
        Column("when", Kind.MODEL, "the rule anchored to the neuron, chosen on TRAIN"),
        Column("MCC, TEST", Kind.RATE, "of rule and flips on held-out prompts, 95 % bootstrap interval"),
        Column("MCC, ALL-FIT", Kind.NUMBER, "of the rule chosen and scored on all evaluated prompts: descriptive"),
        Column("precision, TEST", Kind.RATE, "share of the covered held-out prompts that flip"),
        Column("recall, TEST", Kind.NUMBER, "share of the held-out flips that the rule covers"),
        Column("coverage", Kind.NUMBER, "share of the held-out prompts that the rule covers"),
        Column("gain", Kind.NUMBER, "MCC above the rule that only knows whether the behaviour held before"),
        Column("q", Kind.NUMBER, "chance of such a score, corrected over neurons"),
        Column("badge", help="high quality on TEST, above 0.5 within its interval, beyond chance and the obvious rule"),
    ]
    rows = [_anchored_row(neurons, item) for item in facts]
    return Grid("anchored", "The rule anchored to each neuron", columns, rows, opens=True, noun="neuron")


def _anchored_row(neurons: Neurons, facts: NeuronFacts) -> list[Cell]:
    key = facts.neuron.key
    row, described = neurons.best[Scope.TEST].get(key), neurons.best[Scope.ALL_FIT].get(key, {})
    all_fit = number_cell(to_float(described.get("MCC")))
    if row is None:
        missing: Cell = ["NA", None]
        return [str(facts.neuron), "", NO_RULE, missing, all_fit, *[missing] * 5, "no"]
    return [
        str(facts.neuron),
        VERBS[neurons.target_of(row, facts.neuron)],
        neurons.shown(row),
        score_cell(row, "MCC"),
        all_fit,
        score_cell(row, "Precision"),
        share_cell(row, "TPR"),
        share_cell(row, "dataset_coverage"),
        number_cell(to_float(row.get("MCC_gain"))),
        small_cell(to_float(row.get("q_value"))),
        "yes" if _is_true(row.get("badge")) else "no",
    ]


# ---------------------------------------------------------------- what opens under a row


def _details(neurons: Neurons, facts: list[NeuronFacts]) -> dict[str, Any]:
    """By neuron its rules and flipped prompts. Prompts are stored once; a flip is
    [prompt, 1 if the behaviour held before, 1/0/None the rule fires, answer after or None]."""
    numbers: dict[int, int] = {}
    found: dict[str, Any] = {}
    for item in facts:
        flipped = neurons.flipped(item, neurons.inputs.options.max_prompts)
        found[str(item.neuron)] = {
            "rules": [
                [
                    "TEST" if scope is Scope.TEST else "ALL-FIT",
                    VERBS[target],
                    neurons.shown(row),
                    score_cell(row, "MCC"),
                    *(share_cell(row, name) for name in ("Precision", "TPR", "dataset_coverage")),
                    "yes" if speaks else "no",
                ]
                for scope, target, row, speaks in neurons.rules_of(item)
            ],
            "flips": [
                [
                    numbers.setdefault(flip.row, len(numbers)),
                    int(flip.before),
                    None if flip.fires is None else int(flip.fires),
                    None if flip.after is None else visible(flip.after, _MAX_PROMPT),
                ]
                for flip in flipped.first
            ],
            "n": flipped.n_all,
        }
    return {"prompts": [_prompt_record(neurons, row) for row in numbers], "neurons": found}


def _prompt_record(neurons: Neurons, row: int) -> list[str | None]:
    """[prompt without the shared beginning, answer before, what the prompt was used for]."""
    table = neurons.inputs.flips
    role = visible(table.rows.roles[row], 40) if table is not None else None
    return [_prompt(neurons, row), _before(neurons, row), role]


def _prompt(neurons: Neurons, row: int) -> str | None:
    prompts = neurons.inputs.prompts
    return visible(prompts[row][len(neurons.prefix) :], _MAX_PROMPT) if prompts is not None else None


def _before(neurons: Neurons, row: int) -> str | None:
    answer = neurons.answer_before(row)
    return None if answer is None else visible(answer, _MAX_PROMPT)


# ---------------------------------------------------------------- neurons shown at once


def _card(neurons: Neurons, facts: NeuronFacts) -> NeuronCard:
    row = neurons.best[Scope.TEST][facts.neuron.key]
    flipped = neurons.flipped(facts, _N_CARD_PROMPTS)
    columns = [
        Column("prompt", Kind.MODEL),
        Column("answer before", Kind.MODEL),
        Column("answer after ablation", Kind.MODEL),
        Column("behaviour"),
        Column("rule fires"),
    ]
    name = str(facts.neuron)
    return NeuronCard(
        name,
        VERBS[neurons.target_of(row, facts.neuron)],
        neurons.shown(row),
        str(score_cell(row, "MCC")[0]),
        rate_cell(*facts.flips)[0],
        Grid(f"card-{facts.neuron.key}", f"Some of the {flipped.n_all:,} prompts that {name} flips", columns,
             [_flip_row(neurons, flip) for flip in flipped.first], noun="prompt"),
        _is_true(row.get("badge")) or _rank_of(row.get("MCC")) >= DEFAULT_THRESHOLD,
    )


def _flip_row(neurons: Neurons, flip: Flip) -> list[Cell]:
    fires = {None: "unknown", True: "yes", False: "no"}[flip.fires]
    prompt, before = _prompt(neurons, flip.row), _before(neurons, flip.row)
    return [
        "not recorded" if prompt is None else prompt,
        "not recorded" if before is None else before,
        "not recorded" if flip.after is None else model_cell(flip.after, _MAX_PROMPT),
        "lost" if flip.before else "gained",
        fires,
    ]


def held_out_pairs(neurons: Neurons) -> list[tuple[str, float, float]]:
    """(neuron, MCC on TEST, MCC in ALL-FIT) of every neuron with a rule in both scopes."""
    test, all_fit = neurons.best[Scope.TEST], neurons.best[Scope.ALL_FIT]
    pairs = []
    for facts in neurons.facts:
        key = facts.neuron.key
        values = to_float(test.get(key, {}).get("MCC")), to_float(all_fit.get(key, {}).get("MCC"))
        if all(map(is_number, values)):
            pairs.append((str(facts.neuron), *values))
    return pairs
