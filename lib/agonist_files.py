"""The files of stage 6: rule files with their group tests, agonist buckets, counts, and the summary of all rules."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lib.artifacts import atomic_write, json_text, plain, write_json
from lib.confidence_bounds import upper_flip_rate
from lib.group_testing import GroupRecord, Verdict
from lib.neurons import Neuron

RULE_KNOCKOUT, BUCKETS, BUCKET_STATS = "rule_knockout.json", "neuron_buckets.json", "neuron_bucket_stats.json"
_SUMMARY_KEYS = (
    "circuit_id",
    "circuit_label",
    "analysis_mode",
    "cluster_index",
    "rule_target",
    "rule_direction",
    "status",
    "baseline_subset",
    "n_associated_positive",
    "n_unrelated_positive",
    "n_associated_tested",
    "n_unrelated_tested",
)
_SUMMARY_KEYS_OK = (
    "baseline_acc_associated",
    "baseline_acc_unrelated",
    "baseline_gap_neg_minus_pos",
    "n_ablation_groups",
    "sampling_strategy_used",
    "search_cost",
)


def rule_file(folder: Path, target: str, circuit_id: int, *, is_cluster: bool) -> Path:
    """Where a circuit's detail file lives."""
    if is_cluster:
        return folder / "spectral_clusters" / f"cluster_{circuit_id:04d}.json"
    return folder / "per_rule" / target / f"rule_{circuit_id:04d}.json"


@dataclass(frozen=True)
class TestedGroup:
    """A group test with what it did to each datapoint that it saw.

    flips: for the associated and the unrelated slice, bool [datapoint], in the order of the sampled indices.
    """

    record: GroupRecord
    layers: dict[str, list[int]]
    flips: tuple[np.ndarray, np.ndarray]


def layers_of(members: Iterable[int], neurons: Sequence[Neuron]) -> dict[str, list[int]]:
    """Members by layer label, in order."""
    layers: dict[str, list[int]] = {}
    for member in members:
        layers.setdefault(neurons[member].layer_label, []).append(neurons[member].index)
    return layers


def ablation_records(tests: Sequence[TestedGroup], regime: str, alpha: float, *, is_tree: bool) -> list[dict[str, Any]]:
    """Records of group tests in the published keys.

    `acc_*` is the share (per datapoint: 0 or 1) whose label is True after ablation. is_tree: with the keys of the tree.
    """
    counts = np.array([[flips.sum() for flips in test.flips] for test in tests], dtype=np.int64).reshape(-1, 2)
    seen = np.array([[len(flips) for flips in test.flips] for test in tests], dtype=np.int64).reshape(-1, 2)
    bounds = upper_flip_rate(counts, seen, alpha / 2)
    return [_record(test, regime, alpha, bound.tolist(), is_tree) for test, bound in zip(tests, bounds, strict=True)]


def _record(test: TestedGroup, regime: str, alpha: float, bounds: list[float], is_tree: bool) -> dict[str, Any]:
    labels = [(~flips if regime == "positive" else flips).astype(int) for flips in test.flips]
    accuracy = [float(values.mean()) if len(values) else None for values in labels]
    flips = [int(values.sum()) for values in test.flips]
    seen = [len(values) for values in test.flips]
    record = {
        "layers_neurons_dict": test.layers,
        "group_size": sum(map(len, test.layers.values())),
        "accuracy_gap": accuracy[1] - accuracy[0] if None not in accuracy else None,
        "acc_after_knockout_on_associated": accuracy[0],
        "acc_after_knockout_on_unrelated": accuracy[1],
        "acc_after_knockout_on_associated_all": labels[0].tolist(),
        "acc_after_knockout_on_unrelated_all": labels[1].tolist(),
        "baseline_subset": regime,
        "alpha_slice": alpha / 2,
        "delta_on_associated_hat": flips[0] / seen[0] if seen[0] else 0.0,
        "delta_on_unrelated_hat": flips[1] / seen[1] if seen[1] else 0.0,
        "delta_on_associated_ucb": bounds[0],
        "delta_on_unrelated_ucb": bounds[1],
        "n_associated_eval": seen[0],
        "n_unrelated_eval": seen[1],
        "k_effect_associated": flips[0],
        "k_effect_unrelated": flips[1],
        "max_effect": max(bounds),
    }
    return record | (_tree_keys(test.record, alpha) if is_tree else {})


def _tree_keys(record: GroupRecord, alpha: float) -> dict[str, Any]:
    keys: dict[str, Any] = {"depth": record.depth, "alpha_node": alpha, "split": record.verdict is Verdict.SPLIT}
    if record.verdict is Verdict.SINGLE:
        return keys | {"stop_reason": "single_neuron"}
    if record.verdict is Verdict.PRUNED:
        return keys | {"stop_reason": "max_effect_below_epsilon"}
    keys["split_strategy"] = record.split_strategy
    if record.split_strategy == "score_sign":
        keys |= {"split_left_size": record.split_sizes[0], "split_right_size": record.split_sizes[1]}
    return keys


def write_rule_file(path: Path, content: dict[str, Any]) -> None:
    """Write a rule's detail: one key per line, lists of records with one record per line, other lists on one line."""
    with atomic_write(path) as handle:
        handle.write("{\n")
        for number, (key, value) in enumerate(content.items()):
            end = ",\n" if number < len(content) - 1 else "\n"
            handle.write(f"    {json.dumps(key)}: {_compact(value)}{end}")
        handle.write("}\n")


def _compact(value: Any) -> str:
    value = plain(value)
    if isinstance(value, list) and value and isinstance(value[0], dict):
        lines = ",\n".join(f"        {json_text(item, indent=None)}" for item in value)
        return f"[\n{lines}\n    ]"
    return json_text(value, indent=None)


def write_rule_knockout(folder: Path, rules: Sequence[dict[str, Any]]) -> Path:
    """The summary of all rules, from their details."""
    entries = []
    for rule in rules:
        is_ok = rule["status"] == "ok"
        entry = {key: rule[key] for key in _SUMMARY_KEYS}
        entries.append(entry | ({key: rule[key] for key in _SUMMARY_KEYS_OK} if is_ok else {"reason": rule["reason"]}))
    write_json(folder / RULE_KNOCKOUT, entries, indent=4)
    return folder / RULE_KNOCKOUT


# ---------------------------------------------------------------- buckets


@dataclass
class Buckets:
    """Agonists over all rules of a run, and neurons that flip everything.

    Those that flip every datapoint of both slices are kept among the agonists, flagged `catastrophic`, and also listed
    as candidates; after `n_trials` rules they are confirmed (everything flipped in each) or not_always.
    """

    n_trials: int = 3
    agonists: dict[str, dict[str, Any]] = field(default_factory=dict)
    catastrophic: dict[str, dict[str, dict[str, Any]]] = field(
        default_factory=lambda: {"candidates": {}, "confirmed": {}, "not_always": {}}
    )

    def add_single(self, neuron: Neuron, record: dict[str, Any], *, is_catastrophic: bool) -> None:
        """Note a neuron tested alone: counts the trial if it flips everything here or did before."""
        key = str(neuron)
        if key in self.catastrophic["confirmed"] or key in self.catastrophic["not_always"]:
            return
        if not is_catastrophic and key not in self.catastrophic["candidates"]:
            return
        entry = self.catastrophic["candidates"].setdefault(key, {"n_trials": 0, "n_zero_zero": 0, "history": []})
        entry["n_trials"] += 1
        entry["n_zero_zero"] += int(is_catastrophic)
        entry["history"].append(record)
        if entry["n_trials"] >= self.n_trials:
            always = entry["n_zero_zero"] == entry["n_trials"]
            self.catastrophic["confirmed" if always else "not_always"][key] = self.catastrophic["candidates"].pop(key)

    def add_agonist(self, neuron: Neuron, record: dict[str, Any]) -> None:
        """Keep an agonist's latest record, and the best of its effects."""
        entry = self.agonists.setdefault(str(neuron), {"best_abs_gap": record["max_effect"], "last_record": record})
        entry["best_abs_gap"] = max(entry["best_abs_gap"], record["max_effect"])
        entry["last_record"] = record

    def to_json(self) -> dict[str, Any]:
        """The content of neuron_buckets.json."""
        return {"catastrophic_zero": self.catastrophic, "non_catastrophic_agonists": self.agonists}

    def stats(self) -> dict[str, Any]:
        """The content of neuron_bucket_stats.json; nothing is excluded from later rules, so that count is 0."""
        return {
            "counts": {f"catastrophic_zero_{name}": len(members) for name, members in self.catastrophic.items()}
            | {"non_catastrophic_agonists": len(self.agonists)},
            "excluded_from_future_ablations": 0,
        }

    def write(self, folder: Path) -> list[Path]:
        """Write both bucket files."""
        write_json(folder / BUCKETS, self.to_json(), indent=4)
        write_json(folder / BUCKET_STATS, self.stats(), indent=4)
        return [folder / BUCKETS, folder / BUCKET_STATS]
