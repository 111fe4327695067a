"""The neurons: how often each flips the behaviour, when (its anchored rule), and on which prompts, before and after."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from lib.cli import UserError
from lib.confidence_bounds import lower_flip_rate, upper_flip_rate
from lib.flip_answer_log import group_key
from lib.flip_targets import FlipTarget
from lib.neurons import Neuron, parse_neuron
from lib.reporting.page.behaviour_rules import shown_rule
from lib.reporting.page.inputs import PageInputs, is_possible
from lib.reporting.page.texts import shared_prefix, to_float, visible
from lib.reporting.rules import best_per_neuron, neuron_keys
from lib.reporting.scopes import Scope
from lib.text_and_rules import parse_rule

if TYPE_CHECKING:
    import pandas as pd

    from lib.flip_table import FlipTable

_ALPHA = 0.025
VERBS = {
    FlipTarget.ANY: "change its verdict",
    FlipTarget.C2I: "lose the behaviour",
    FlipTarget.I2C: "show the behaviour",
}
NO_RATE = (0, 0, float("nan"), float("nan"))
Rate = tuple[int, int, float, float]
"""Hits, of how many, exact 95 % limits of the share."""


@dataclass
class NeuronFacts:
    """One neuron. confirmed: by regime, flip rate on fresh datapoints with its interval. place: its row of the flip
    table, or None if its flips were not measured."""

    neuron: Neuron
    effects: dict[str, float] = field(default_factory=dict)
    confirmed: dict[str, tuple[float, float, float]] = field(default_factory=dict)
    is_catastrophic: bool = False
    place: int | None = None
    flips: Rate = NO_RATE
    lost: Rate = NO_RATE
    gained: Rate = NO_RATE
    held_out: Rate = NO_RATE

    @property
    def rate(self) -> float:
        """Share of the evaluated prompts that it flips, else the confirmed rate, else the search's bound; or NaN."""
        if self.flips[1]:
            return self.flips[0] / self.flips[1]
        best = [rate for rate, _, _ in self.confirmed.values()] or list(self.effects.values())
        return max(best, default=float("nan"))


@dataclass
class Neurons:
    """All neurons of a run with their rules and flipped prompts; the other parts of the page ask here."""

    inputs: PageInputs

    @cached_property
    def facts(self) -> list[NeuronFacts]:
        """Every agonist and every neuron with measured flips, most flips first."""
        found: dict[str, NeuronFacts] = {}
        for regime, agonists in self.inputs.agonists.items():
            for agonist in agonists or ():
                neuron = self._parsed(agonist.neuron)
                if neuron is None:
                    continue
                facts = found.setdefault(agonist.neuron, NeuronFacts(neuron))
                facts.effects[regime] = agonist.effect
                facts.is_catastrophic |= agonist.is_catastrophic
                if agonist.confirmed:
                    facts.confirmed[regime] = agonist.confirmed
        if self.inputs.flips is not None:
            self._add_flips(found, self.inputs.flips)
        return sorted(found.values(), key=lambda facts: (-np.nan_to_num(facts.rate, nan=-1.0), facts.neuron.sort_key))

    def _parsed(self, name: str) -> Neuron | None:
        """The neuron of a name; None, with a note, if no model can have it."""
        try:
            neuron = parse_neuron(name)
        except (UserError, ValueError) as error:
            self.inputs.note("neuron_buckets.json", "invalid", visible(error, 200))
            return None
        if is_possible(neuron):
            return neuron
        self.inputs.note("neuron_buckets.json", "invalid", f"{visible(name, 60)!r} is no neuron of any model")
        return None

    @staticmethod
    def _add_flips(found: dict[str, NeuronFacts], table: FlipTable) -> None:
        known, baseline = table.matrix.known, table.baseline
        any_flips = table.flips(FlipTarget.ANY)
        counted = {
            "flips": _rates(any_flips, known),
            "lost": _rates(table.flips(FlipTarget.C2I), known & baseline),
            "gained": _rates(table.flips(FlipTarget.I2C), known & ~baseline),
            "held_out": _rates(any_flips & table.rows.is_test, known & table.rows.is_test),
        }
        for place, neuron in enumerate(table.neurons):
            facts = found.setdefault(str(neuron), NeuronFacts(neuron))
            facts.place = place
            for name, rates in counted.items():
                setattr(facts, name, rates[place])

    # ------------------------------------------------------------ rules

    @cached_property
    def best(self) -> dict[Scope, dict[str, dict[str, Any]]]:
        """By scope, neuron key -> the rule row that speaks for the neuron."""
        found = {}
        for scope in (Scope.TEST, Scope.ALL_FIT):
            rows = self.inputs.rules(scope)
            try:
                best = best_per_neuron(rows, scope) if rows is not None else None
            except KeyError as error:
                self.inputs.note(f"rule tables, {scope.slug}", "invalid", str(error.args[0]))
                best = None
            found[scope] = _by_key(best)
        return found

    @cached_property
    def _all_rules(self) -> dict[tuple[Scope, str], list[dict[str, Any]]]:
        """(scope, neuron key) -> every rule row, one per kind of flip."""
        found: dict[tuple[Scope, str], list[dict[str, Any]]] = {}
        for scope in (Scope.TEST, Scope.ALL_FIT):
            rows = self.inputs.rules(scope)
            if rows is None or rows.empty or "neuron_key" not in rows:
                continue
            for row in rows.to_dict("records"):
                found.setdefault((scope, str(row["neuron_key"])), []).append(row)
        return found

    def target_of(self, row: Mapping[str, Any], neuron: Neuron) -> FlipTarget:
        """What kind of flip a rule row is about."""
        column = str(row.get("flip_target", ""))
        return next((target for target in FlipTarget if target.column(neuron) == column), FlipTarget.ANY)

    def shown(self, row: Mapping[str, Any]) -> str:
        """A rule row's rule, for people."""
        text = str(row.get("expression", ""))
        if text not in self._shown:
            self._shown[text] = shown_rule(text, self.inputs.feature_columns)
        return self._shown[text]

    @cached_property
    def _shown(self) -> dict[str, str]:
        return {}

    # ------------------------------------------------------------ prompts that a neuron flips

    @cached_property
    def prefix(self) -> str:
        """What all evaluated prompts begin with: it is said once and left out of each."""
        return shared_prefix(self.inputs.scores.prompts) if self.inputs.scores is not None else ""

    def flipped(self, facts: NeuronFacts, limit: int) -> FlippedPrompts:
        """The prompts that a neuron flips: held-out ones first, there those that its rule is about and fires on."""
        table = self.inputs.flips
        if table is None or facts.place is None:
            return FlippedPrompts([], 0)
        rule = self._speaking_rule(facts)
        fires = self._fires(rule) if rule is not None else None
        rows = np.flatnonzero(self._any_flips[facts.place])
        target = FlipTarget.ANY if rule is None else self.target_of(rule, facts.neuron)
        is_meant = target.eligible(table.baseline) & (np.zeros(len(table.rows), dtype=bool) if fires is None else fires)
        is_test = table.rows.is_test
        order = sorted(rows.tolist(), key=lambda row: (not is_test[row], not is_meant[row]))
        after = self._answers_after(facts.neuron)
        return FlippedPrompts(
            [
                Flip(row, bool(table.baseline[row]), None if fires is None else bool(fires[row]), after.get(row),
                     str(table.rows.roles[row]))
                for row in order[:limit]
            ],
            len(rows),
        )

    @cached_property
    def _any_flips(self) -> np.ndarray:
        """Flips of any kind, bool [neuron, row]."""
        return self.inputs.flips.flips(FlipTarget.ANY)

    def _speaking_rule(self, facts: NeuronFacts) -> dict[str, Any] | None:
        key = facts.neuron.key
        return self.best[Scope.TEST].get(key) or self.best[Scope.ALL_FIT].get(key)

    def _fires(self, rule: Mapping[str, Any]) -> np.ndarray | None:
        """Where a rule fires, bool [row of the flip table]; None if that cannot be told."""
        columns = self.inputs.feature_columns
        try:
            return parse_rule(str(rule.get("expression"))).covers(columns) if columns else None
        except UserError:
            return None

    def _answers_after(self, neuron: Neuron) -> dict[int, str]:
        """Row of the flip table -> changed answer."""
        log = self.inputs.answers
        run = log.runs.get(group_key([neuron])) if log is not None else None
        return dict(zip(run.rows.tolist(), run.answers, strict=True)) if run is not None else {}

    def answer_before(self, row: int) -> str | None:
        """The answer before ablation to a row of the flip table: the log's, else stage 1's."""
        if self.inputs.answers is not None:
            return self.inputs.answers.baseline[row]
        scores, table = self.inputs.scores, self.inputs.flips
        if scores is None or table is None or self.inputs.prompts is None or scores.output_col not in scores.frame:
            return None
        return str(scores.frame[scores.output_col].iloc[int(table.rows.rows[row])])

    def rules_of(self, facts: NeuronFacts) -> list[tuple[Scope, FlipTarget, dict[str, Any], bool]]:
        """Every rule of a neuron: (scope, kind of flip, row, whether it is the one that speaks for the neuron)."""
        found = []
        for scope in (Scope.TEST, Scope.ALL_FIT):
            speaking = self.best[scope].get(facts.neuron.key, {}).get("flip_target")
            for row in self._all_rules.get((scope, facts.neuron.key), []):
                target = self.target_of(row, facts.neuron)
                found.append((scope, target, row, row.get("flip_target") == speaking))
        return found


@dataclass(frozen=True)
class Flip:
    """One flipped prompt. before: the label before ablation; fires: the rule, None if unknown; after: the answer."""

    row: int
    before: bool
    fires: bool | None
    after: str | None
    role: str


@dataclass(frozen=True)
class FlippedPrompts:
    """The first flipped prompts of a neuron, and how many there are."""

    first: list[Flip]
    n_all: int


def _rates(hits: np.ndarray, counted: np.ndarray) -> list[Rate]:
    """Per neuron: hits among the counted rows, and the exact limits of their share."""
    n_hits, n = (hits & counted).sum(axis=1), counted.sum(axis=1)
    low, high = lower_flip_rate(n_hits, n, _ALPHA), upper_flip_rate(n_hits, n, _ALPHA)
    return list(zip(n_hits.tolist(), n.tolist(), low.tolist(), high.tolist(), strict=True))


def _by_key(best: pd.DataFrame | None) -> dict[str, dict[str, Any]]:
    if best is None or best.empty:
        return {}
    return dict(zip(neuron_keys(best), best.to_dict("records"), strict=True))


def union_rate(table: FlipTable | None, target: FlipTarget) -> tuple[int, int]:
    """Prompts that some neuron flips, of those on which this kind of flip can happen."""
    if table is None or not len(table.rows):
        return 0, 0
    hits = table.flips(target).any(axis=0) if len(table.neurons) else np.zeros(len(table.rows), dtype=bool)
    return int(hits.sum()), int(target.eligible(table.baseline).sum())


def scores_of(rows: Iterable[Mapping[str, Any]], name: str) -> list[float]:
    """A score of rule rows as numbers."""
    return [to_float(row.get(name)) for row in rows]
