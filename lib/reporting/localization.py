"""What stage 6 found and what it cost: agonist buckets, circuits, effects by circuit, group tests against N and 2N-1.

A run's folders follow from its whole name, so that a control's tests are never counted to the run that it controls.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib.reporting.artifacts import REGIMES, ModelRoot, Reading, RunFolder, Status, block_of, expect, read_json
from lib.reporting.naming import RunName

_METHOD = "eap_ig_inputs"
_MEMBER_KEYS = ("layers_neurons_dict", "layers_units_dict")
_CANDIDATE_KEYS = (
    "circuit_units",
    "circuit_neurons",
    "candidate_units",
    "candidate_neurons",
    "layer_units",
    "layer_neurons",
    "neurons",
    "mlp_neurons",
    "layer_neuron_counts",
    "layer_unit_counts",
    "candidate_counts_by_layer",
    "candidate_neuron_counts_by_layer",
    "circuit_neuron_counts_by_layer",
)


@dataclass(frozen=True)
class Agonist:
    """A localized neuron of the buckets. effect: `max_effect`, signed as written; circuit_id: the last that saw it.

    confirmed: its flip rate on fresh datapoints with the exact interval, (rate, low, high); None in older results.
    """

    neuron: str
    effect: float
    accuracy_gap: float
    circuit_id: int | None
    is_catastrophic: bool
    confirmed: tuple[float, float, float] | None = None


@dataclass(frozen=True)
class CircuitCost:
    """One searched circuit: its group tests and, if its detail file tells, its number of candidates.

    n_groups: tests of the search. n_audit: tests that only measure how much the search has missed; published runs made
    none, and the search would find the same without them, so they are no part of its cost.
    """

    regime: str
    circuit_id: int | None
    circuit_label: str
    n_groups: int
    n_candidates: int | None
    candidates_by_layer: Mapping[str, int] | None = None
    n_audit: int = 0

    @property
    def n_singles(self) -> int | None:
        """N: tests when every candidate is tested alone (brute force)."""
        return self.n_candidates

    @property
    def n_tree(self) -> int | None:
        """2N-1: nodes of a binary tree with N leaves, the most that a bisecting search can need."""
        return tree_size(self.n_candidates)

    @property
    def percent_of_singles(self) -> float:
        """Group tests in percent of N; NaN if N is unknown."""
        return percent(self.n_groups, self.n_singles)

    @property
    def percent_of_tree(self) -> float:
        """Group tests in percent of 2N-1; NaN if N is unknown."""
        return percent(self.n_groups, self.n_tree)


def tree_size(n_candidates: int | None) -> int | None:
    """2N-1, the one denominator of tree budgets; None without candidates."""
    return 2 * n_candidates - 1 if n_candidates else None


def percent(part: float, whole: float | None) -> float:
    """100 * part / whole; NaN without a whole."""
    return 100.0 * part / whole if whole else math.nan


# ---------------------------------------------------------------- folders


def circuit_dir(run: RunFolder) -> Path | None:
    """The run's circuit folder, or None for an unknown name or a bare `stats/` folder."""
    if run.name is None or run.root.path is None:
        return None
    base = run.root.path / run.name.discovery_base
    usual = base / _METHOD / run.name.circuit_label
    if usual.is_dir() or not base.is_dir():
        return usual
    others = sorted(child / run.name.circuit_label for child in base.iterdir() if child.is_dir())
    return next((path for path in others if path.is_dir()), usual)


def searched_run_names(root: ModelRoot) -> list[str]:
    """Runs whose search has left a folder, sorted; their flips may not have been measured yet."""
    found = []
    for base, suffix in (
        ("neural_circuit_discovery_results", ""),
        ("neural_circuit_discovery_results_fake_targets", "-fake_targets"),
    ):
        bags = (root.path / base).glob("*/*/agonist_neurons*") if root.path else ()
        found += [f"{bag.parent.name}-{bag.name}{suffix}" for bag in bags if bag.is_dir()]
    return sorted(name for name in set(found) if RunName.parse(name) is not None)


def regime_dir(run: RunFolder, regime: str) -> Path | None:
    """Stage 6's folder of one baseline regime of the run."""
    folder = circuit_dir(run)
    return folder / run.name.bag_label / f"{regime}_baseline" if folder and run.name else None


def regime_of(baseline_subset: str) -> str:
    """`positive` from `positive` or `positive_baseline`."""
    return baseline_subset.removesuffix("_baseline")


def _read(run: RunFolder, regime: str, name: str, kind: type) -> Reading[Any]:
    folder = regime_dir(run, regime)
    if folder is None:
        return Reading(Status.MISSING, reason="no circuit folder follows from the run's name", path=run.path)
    return expect(read_json(folder / name), kind, name)


# ---------------------------------------------------------------- buckets and knockout


def agonists(run: RunFolder, regime: str) -> Reading[list[Agonist]]:
    """The non-catastrophic bucket of a regime; EMPTY if stage 6 finished and found none."""
    reading = _read(run, regime, "neuron_buckets.json", dict)
    if not reading.is_usable:
        return reading.without_value()
    bucket = (reading.value or {}).get("non_catastrophic_agonists", {})
    if not isinstance(bucket, dict) or not all(block_of(entry, "last_record") for entry in bucket.values()):
        reason = "an agonist has no record; run stage 6 again"
        return Reading(Status.INVALID, reason=reason, path=reading.path)
    found = [_agonist(neuron, entry) for neuron, entry in bucket.items()]
    return Reading(Status.OK if found else Status.EMPTY, found, path=reading.path)


def _agonist(neuron: str, entry: dict[str, Any]) -> Agonist:
    record = block_of(entry, "last_record")
    effect = _number(record.get("max_effect"))
    return Agonist(
        neuron,
        effect if math.isfinite(effect) else _number(entry.get("best_abs_gap")),
        _number(record.get("accuracy_gap")),
        _count(record.get("circuit_id")),
        bool(record.get("catastrophic", False)),
        _confirmed(record),
    )


def _confirmed(record: dict[str, Any]) -> tuple[float, float, float] | None:
    rate, low, high = (_number(record.get(f"confirmed_{end}")) for end in ("rate", "low", "high"))
    return (rate, low, high) if math.isfinite(rate) else None


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def knockout(run: RunFolder, regime: str, *, skipped: bool = False) -> Reading[list[dict[str, Any]]]:
    """Entries of `rule_knockout.json`, those with status `ok` only; EMPTY if the search ran but none is.

    skipped: the other entries instead, the circuits that were not searched.
    """
    reading = _read(run, regime, "rule_knockout.json", list)
    if not reading.is_usable:
        return reading.without_value()
    entries = [
        entry
        for entry in reading.value or []
        if isinstance(entry, dict) and (entry.get("status") == "ok") is not skipped
    ]
    return Reading(Status.OK if entries else Status.EMPTY, entries, path=reading.path)


def circuit_detail(run: RunFolder, regime: str, entry: Mapping[str, Any]) -> Reading[dict[str, Any]]:
    """The detail file of a knockout entry, in our or the published place, if its id and label agree."""
    folder, number = regime_dir(run, regime), entry.get("circuit_id")
    if folder is None or _count(number) is None:
        return Reading(Status.MISSING, reason="the entry has no circuit id", path=run.path)
    target = str(entry.get("rule_target") or entry.get("target") or "")
    for path in _detail_places(folder, target, number):
        reading = expect(read_json(path), dict, path.name)
        if reading.status is Status.INVALID:
            return reading
        if reading.value and all(_agrees(reading.value, entry, key) for key in ("circuit_id", "circuit_label")):
            return reading
    return Reading(Status.MISSING, reason=f"no detail file of circuit {number}", path=folder)


def _detail_places(folder: Path, target: str, number: int) -> Iterator[Path]:
    rule, cluster = f"rule_{number:04d}.json", f"cluster_{number:04d}.json"
    if target and "/" not in target and target not in (".", ".."):
        yield folder / "per_rule" / target / rule
        yield folder / target / rule
    yield folder / "spectral_clusters" / cluster
    yield from sorted(path for name in (rule, cluster) for path in folder.glob(f"*/{name}"))
    yield from sorted(path for name in (rule, cluster) for path in folder.glob(f"*/*/{name}"))


def _agrees(detail: Mapping[str, Any], entry: Mapping[str, Any], key: str) -> bool:
    return detail.get(key) is None or entry.get(key) is None or detail[key] == entry[key]


# ---------------------------------------------------------------- candidates and cost


def group_tests(detail: Mapping[str, Any]) -> Iterator[tuple[Mapping[str, Any], dict[str, list[int]]]]:
    """(record, members by layer) of every group test that a detail file states in full."""
    records = detail.get("ablations")
    for record in records if isinstance(records, list) else []:
        groups = (
            next((record[key] for key in _MEMBER_KEYS if key in record), None) if isinstance(record, dict) else None
        )
        if isinstance(groups, dict) and all(isinstance(ids, list) for ids in groups.values()):
            yield record, groups


def candidates_by_layer(detail: Mapping[str, Any]) -> dict[str, int]:
    """Candidates of a circuit by layer, counted from its group tests, else from an explicit map; {} if unknown."""
    members: dict[str, set[str]] = {}
    largest: dict[str, int] = {}
    for record, groups in group_tests(detail):
        for layer, ids in groups.items():
            members.setdefault(layer, set()).update(map(str, ids))
            # A group that lies in one layer may state its size without naming all of its members.
            stated = _count(record.get("group_size")) if len(groups) == 1 else None
            largest[layer] = max(largest.get(layer, 0), len(ids), stated or 0)
    if members:
        return {layer: max(len(ids), largest[layer]) for layer, ids in members.items()}
    for key in _CANDIDATE_KEYS:
        if isinstance(detail.get(key), dict):
            sizes = {
                layer: len(value) if isinstance(value, list) else _count(value) for layer, value in detail[key].items()
            }
            return {layer: size for layer, size in sizes.items() if size is not None}
    return {}


def _count(value: Any) -> int | None:
    """A count from a file, or None if it is none."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def circuit_costs(run: RunFolder, regime: str) -> Reading[list[CircuitCost]]:
    """Cost of every searched circuit of a regime."""
    reading = knockout(run, regime)
    if not reading.is_usable:
        return reading.without_value()
    costs = []
    for entry in reading.value or []:
        n_groups = _count(entry.get("n_ablation_groups"))
        if n_groups is None:
            reason = f"circuit {entry.get('circuit_id')} states no n_ablation_groups; run stage 6 again"
            return Reading(Status.INVALID, reason=reason, path=reading.path)
        found = circuit_detail(run, regime, entry)
        if found.status is Status.INVALID:
            return Reading(Status.INVALID, reason=f"{found.path.name}: {found.reason}", path=found.path)
        detail = found.value or {}
        layers = candidates_by_layer(detail)
        cost = block_of(entry, "search_cost") or block_of(detail, "search_cost")
        n_audit = min(_count(cost.get("n_audit_tests")) or 0, n_groups)
        n_candidates = _count(cost.get("n_candidates")) or sum(layers.values()) or None
        costs.append(
            CircuitCost(
                regime,
                _count(entry.get("circuit_id")),
                str(entry.get("circuit_label", "")),
                n_groups - n_audit,
                n_candidates,
                layers or None,
                n_audit,
            )
        )
    return Reading(Status.OK if costs else Status.EMPTY, costs, path=reading.path)


def all_costs(run: RunFolder) -> dict[str, Reading[list[CircuitCost]]]:
    """Costs by regime."""
    return {regime: circuit_costs(run, regime) for regime in REGIMES}


@dataclass(frozen=True)
class Budget:
    """Group tests of some circuits against the candidates of the same circuits."""

    n_groups: int
    n_candidates: int | None
    n_circuits: int
    n_audit: int = 0

    @property
    def n_tree(self) -> int | None:
        """Sum of 2N-1 over the circuits."""
        return 2 * self.n_candidates - self.n_circuits if self.n_candidates else None

    @property
    def percent_of_singles(self) -> float:
        """Group tests in percent of N."""
        return percent(self.n_groups, self.n_candidates)

    @property
    def percent_of_tree(self) -> float:
        """Group tests in percent of 2N-1."""
        return percent(self.n_groups, self.n_tree)


def budget(costs: Iterable[CircuitCost], circuit_ids: Iterable[int] | None = None) -> Budget:
    """Cost of the named circuits (default: all); N is unknown as soon as one circuit's is."""
    wanted = None if circuit_ids is None else set(circuit_ids)
    chosen = [cost for cost in costs if wanted is None or cost.circuit_id in wanted]
    known = [cost.n_candidates for cost in chosen if cost.n_candidates is not None]
    total = sum(known) if chosen and len(known) == len(chosen) else None
    groups, audits = (sum(getattr(cost, name) for cost in chosen) for name in ("n_groups", "n_audit"))
    return Budget(groups, total, len(chosen), audits)


# ---------------------------------------------------------------- effects by circuit


def detail_effects(detail: Mapping[str, Any]) -> dict[str, float]:
    """Effect of each neuron tested alone in a circuit; where the file lists confirmed agonists, only theirs."""
    if isinstance(detail.get("agonists"), list):
        return {
            str(entry["neuron"]): _number(entry.get("max_effect"))
            for entry in detail["agonists"]
            if isinstance(entry, dict) and "neuron" in entry
        }
    effects: dict[str, float] = {}
    for record, groups in group_tests(detail):
        names = [f"{layer}:{index}" for layer, ids in groups.items() for index in ids]
        effect = _number(record.get("max_effect"))
        if len(names) == 1 and record.get("group_size", 1) == 1 and math.isfinite(effect):
            effects[names[0]] = max(effect, effects.get(names[0], -math.inf))
    return effects


def effects_by_circuit(run: RunFolder, regime: str) -> Reading[dict[int, dict[str, float]]]:
    """circuit id -> neuron -> effect, from the circuits' detail files.

    INVALID if a searched circuit has no readable detail file: recall on part of the circuits would flatter or harm.
    """
    reading = knockout(run, regime)
    if not reading.is_usable:
        return reading.without_value()
    effects: dict[int, dict[str, float]] = {}
    for entry in reading.value or []:
        detail = circuit_detail(run, regime, entry)
        if detail.value is None:
            return Reading(
                Status.INVALID, reason=f"circuit {entry.get('circuit_id')}: {detail.reason}", path=detail.path
            )
        effects.setdefault(int(entry["circuit_id"]), {}).update(detail_effects(detail.value))
    return Reading(Status.OK if effects else Status.EMPTY, effects, path=reading.path)
