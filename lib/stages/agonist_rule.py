"""One rule of stage 6: search its candidates, audit what was pruned, confirm what was found, and write it down."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from lib.agonist_files import TestedGroup, ablation_records, layers_of
from lib.cli import rng
from lib.confidence_bounds import Interval, flip_rate_interval, rate_difference_interval, upper_flip_rate
from lib.group_test_log import FLIPPED
from lib.group_testing import SIDES, GroupRecord, SearchResult, Slices, Verdict, search, sweep
from lib.search_audit import SearchAudit, audit_pruned
from lib.search_orders import Forest, SearchOrder, attribution_forest, bisect_forest
from lib.stages.agonist_prepare import PreparedRule, RuleOptions

# Where answers are wrong before ablation, a large group only makes other wrong answers, whatever its members do.
_NEGATIVE_GROUP_SIZE = 64
# How easily a datapoint flips that no noise group flipped.
_LEAST_EASE = 0.02


@dataclass(frozen=True)
class Agonist:
    """A neuron that, ablated alone, may flip epsilon or more of some slice, and what fresh datapoints say of it.

    flips, confirm_flips: (associated, unrelated). n_search, n_confirm: datapoints behind them.
    """

    candidate: int
    flips: tuple[int, int]
    n_search: tuple[int, int]
    confirm_flips: tuple[int, int]
    n_confirm: tuple[int, int]
    max_effect: float
    is_catastrophic: bool
    found_by: str

    @property
    def side(self) -> int:
        """The slice on which the search saw the higher flip rate: 0 associated, 1 unrelated."""
        rates = [flips / n for flips, n in zip(self.flips, self.n_search, strict=True)]
        return int(rates[1] > rates[0])

    @property
    def observed_rate(self) -> float:
        """Flip rate on that slice's search datapoints: an overestimate, for it was selected by being high."""
        return self.flips[self.side] / self.n_search[self.side]

    @property
    def confirmed(self) -> Interval | None:
        """Flip rate on the same slice's fresh datapoints; None without any."""
        return flip_rate_interval(self.confirm_flips[self.side], self.n_confirm[self.side])

    @property
    def selectivity(self) -> Interval | None:
        """Associated minus unrelated flip rate, on fresh datapoints where both slices have some."""
        if min(self.n_confirm) > 0:
            flips, n = self.confirm_flips, self.n_confirm
        else:
            flips, n = self.flips, self.n_search
        return rate_difference_interval((flips[0], n[0]), (flips[1], n[1]))

    def to_json(self) -> dict[str, Any]:
        """Keys added to bucket records and rule files."""
        confirmed, selectivity = self.confirmed or (None,) * 3, self.selectivity or (None,) * 3
        return {
            "slice": SIDES[self.side],
            "observed_rate": self.observed_rate,
            "confirmed_rate": confirmed[0],
            "confirmed_low": confirmed[1],
            "confirmed_high": confirmed[2],
            "n_confirm_associated": self.n_confirm[0],
            "n_confirm_unrelated": self.n_confirm[1],
            "k_confirm_associated": self.confirm_flips[0],
            "k_confirm_unrelated": self.confirm_flips[1],
            "selectivity": selectivity[0],
            "selectivity_low": selectivity[1],
            "selectivity_high": selectivity[2],
            "catastrophic": self.is_catastrophic,
            "found_by": self.found_by,
        }


class RuleSearch:
    """Searches a prepared rule's candidates on its slices."""

    def __init__(self, rule: PreparedRule, options: RuleOptions) -> None:
        self.rule, self.options = rule, options
        self.circuit, self.oracle = rule.circuit, rule.oracle
        associated, unrelated = rule.slices
        ease = (associated.noise + _LEAST_EASE, unrelated.noise + _LEAST_EASE)
        self.search_slices = Slices(associated.search, unrelated.search, ease)
        self.confirm_slices = Slices(associated.confirm, unrelated.confirm)

    def run(self) -> RuleFindings:
        """Search (or sweep), audit, confirm."""
        options = self.options
        if options.is_fast:
            result = search(self._forest(), self.search_slices, self.oracle, options.settings)
            audit = audit_pruned(
                result, self.search_slices, self.oracle, options.audit_members, self._generator("audit")
            )
        else:
            result = sweep(np.arange(len(self.rule.circuit.neurons)), self.search_slices, self.oracle, options.settings)
            audit = None
        tests = [self._tested(record) for record in result.records()]
        audit_tests = [self._tested(record) for record in audit.result.records()] if audit and audit.result else []
        agonists = self._confirmed(self._agonists(tests, "search") + self._agonists(audit_tests, "audit"))
        return RuleFindings(self.rule, result, audit, tests, audit_tests, agonists, options)

    def _forest(self) -> Forest:
        circuit, options = self.circuit, self.options
        if options.order is SearchOrder.ATTRIBUTION:
            layers = np.array([neuron.layer for neuron in circuit.neurons])
            limit = options.max_group_size or (_NEGATIVE_GROUP_SIZE if self.rule.regime == "negative" else None)
            signs = circuit.scores if options.sign_split else None
            return attribution_forest(circuit.strengths, layers, signs=signs, max_group_size=limit)
        labels = list(dict.fromkeys(neuron.layer_label for neuron in circuit.neurons))
        generators = [self._generator(label) for label in labels]
        has_scores = np.array([circuit.scored[members].any() for members in circuit.layers])
        return bisect_forest(circuit.layers, circuit.scores, has_scores, generators, sign_split=options.sign_split)

    def _generator(self, *labels: object) -> np.random.Generator:
        return rng(self.options.seed, "stage6", self.rule.regime, self.circuit.target, self.circuit.circuit_id, *labels)

    def _tested(self, record: GroupRecord) -> TestedGroup:
        """A search record with its flips per datapoint, which the log holds."""
        points = [part[:n] for part, n in zip(self.search_slices.both, record.n_evaluated, strict=True)]
        members = record.members.tolist()
        flips = self.oracle.remembered(members, np.concatenate(points)) == FLIPPED
        cut = record.n_evaluated[0]
        return TestedGroup(record, layers_of(members, self.rule.circuit.neurons), (flips[:cut], flips[cut:]))

    def _agonists(self, tests: list[TestedGroup], found_by: str) -> list[Agonist]:
        """Neurons tested alone on both whole slices whose flip rate may be epsilon or more on one."""
        settings, found = self.options.settings, []
        for test in tests:
            if test.record.verdict is not Verdict.SINGLE:
                continue
            associated, unrelated = test.flips
            flips, seen = (int(associated.sum()), int(unrelated.sum())), (len(associated), len(unrelated))
            bound = float(upper_flip_rate(np.array(flips), np.array(seen), settings.alpha_slice).max())
            if bound < settings.epsilon:
                continue
            calm = sum(seen) - sum(flips)
            everything = calm <= self.options.catastrophic_acc_tol * sum(seen)
            found.append(Agonist(int(test.record.members[0]), flips, seen, (0, 0), (0, 0), bound, everything, found_by))
        return found

    def _confirmed(self, agonists: list[Agonist]) -> list[Agonist]:
        """The agonists with their flips on fresh datapoints."""
        points = np.concatenate(self.confirm_slices.both)
        cut = len(self.confirm_slices.associated)
        groups = [(agonist.candidate,) for agonist in agonists]
        flips = self.oracle.outcomes(groups, points) == FLIPPED if groups else np.zeros((0, len(points)), dtype=bool)
        return [
            replace(
                agonist,
                confirm_flips=(int(row[:cut].sum()), int(row[cut:].sum())),
                n_confirm=(cut, len(points) - cut),
            )
            for agonist, row in zip(agonists, flips, strict=True)
        ]


@dataclass(frozen=True)
class RuleFindings:
    """What the search of one rule found, and what it cost."""

    rule: PreparedRule
    result: SearchResult
    audit: SearchAudit | None
    tests: list[TestedGroup]
    audit_tests: list[TestedGroup]
    agonists: list[Agonist]
    options: RuleOptions

    @property
    def kept(self) -> list[Agonist]:
        """Agonists that are selective enough, if that was asked for."""
        least = self.options.min_selectivity
        if least is None:
            return self.agonists
        return [a for a in self.agonists if a.selectivity is not None and a.selectivity.rate >= least]

    @cached_property
    def records(self) -> list[dict[str, Any]]:
        """Records of all group tests: the search's, then the audit's."""
        alpha = self.options.settings.alpha
        own = ablation_records(self.tests, self.rule.regime, alpha, is_tree=self.options.is_fast)
        audited = ablation_records(self.audit_tests, self.rule.regime, alpha, is_tree=False)
        return own + [record | {"audit": True} for record in audited]

    def singles(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Candidates tested alone, with their records."""
        for test, record in zip(self.tests + self.audit_tests, self.records, strict=True):
            if test.record.verdict is Verdict.SINGLE:
                yield int(test.record.members[0]), record

    def cost(self) -> dict[str, Any]:
        """Tests and evaluations, also as shares of testing every candidate alone on every datapoint."""
        n_candidates = len(self.rule.circuit.neurons)
        audit_evaluations = sum(sum(test.record.n_evaluated) for test in self.audit_tests)
        n_datapoints = sum(len(use.search) for use in self.rule.slices)
        return {
            "n_candidates": n_candidates,
            "n_datapoints": n_datapoints,
            "n_tests": self.result.n_tests,
            "n_rounds": self.result.n_rounds,
            "n_datapoint_evaluations": self.result.n_evaluations,
            "share_of_single_tests": self.result.n_evaluations / (n_candidates * n_datapoints),
            "n_noise_evaluations": self.rule.n_noise_evaluations,
            "n_audit_tests": len(self.audit_tests),
            "n_audit_evaluations": audit_evaluations,
        }

    def audit_json(self) -> dict[str, Any] | None:
        """What the audit says of the search's recall."""
        if self.audit is None:
            return None
        rates = [float(np.mean(np.concatenate(test.flips))) for test in self.audit_tests]
        recall = self.audit.recall or (None,) * 3
        return {
            "n_pruned_members": self.audit.n_pruned,
            "n_audited": len(self.audit.audited),
            "n_missed": len(self.audit.missed),
            "missed": [str(self.rule.circuit.neurons[i]) for i in self.audit.missed],
            "estimated_recall": recall[0],
            "estimated_recall_low": recall[1],
            "estimated_recall_high": recall[2],
            "mean_flip_rate_of_audited": float(np.mean(rates)) if rates else None,
        }
