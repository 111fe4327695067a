"""What a search missed: single members of pruned groups, drawn at random and tested alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lib.confidence_bounds import Interval, flip_rate_interval
from lib.group_testing import Oracle, SearchResult, Slices, sweep


@dataclass(frozen=True)
class SearchAudit:
    """Random members of pruned groups, tested alone on all datapoints.

    n_pruned: members of all pruned groups. audited: candidates tested, missed: those among them that are agonists.
    recall: estimated share of all agonists that the search found, with its 95 % interval; None if neither the search
    nor the audit found any.
    """

    n_pruned: int
    audited: np.ndarray
    missed: np.ndarray
    recall: Interval | None
    result: SearchResult | None


def audit_pruned(
    result: SearchResult, slices: Slices, oracle: Oracle, n_members: int, generator: np.random.Generator
) -> SearchAudit:
    """Draw members of pruned groups without replacement, each equally likely, and test them alone.

    The interval holds whatever pruning went wrong (a bound that failed, members that cancel each other): it rests on
    the draw alone. Every pruned member audited leaves nothing to estimate.
    """
    pruned = np.sort(result.pruned_members())
    chosen = np.sort(generator.choice(pruned, min(n_members, len(pruned)), replace=False)) if len(pruned) else pruned
    found = len(result.agonists())
    if not len(chosen):
        recall = Interval(1.0, 1.0, 1.0) if found and not len(pruned) else None
        return SearchAudit(len(pruned), chosen, chosen, recall, None)
    singles = sweep(chosen, slices, oracle, result.settings)
    missed = singles.agonists()
    return SearchAudit(len(pruned), chosen, missed, _recall(found, len(missed), len(chosen), len(pruned)), singles)


def _recall(found: int, missed: int, audited: int, pruned: int) -> Interval | None:
    """found / (found + missed members), with the missed share's exact interval carried over."""
    share = flip_rate_interval(missed, audited)
    if share is None or (found == 0 and missed == 0):
        return None
    if audited == pruned:
        share = Interval(share.rate, share.rate, share.rate)
    rate, high, low = (found / (found + part * pruned) if found + part * pruned else 0.0 for part in share)
    return Interval(rate, low, high)
