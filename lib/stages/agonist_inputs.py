"""What stage 6 reads of stages 4 and 5: circuits with their candidate neurons, and datapoints that stand for a rule."""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lib.artifacts import expecting, file_digest, path_piece, read_json
from lib.cli import UserError
from lib.neurons import Neuron, parse_label
from lib.scores_table import BASELINE_SUBSETS

_SCORE_KEY = re.compile(r"\(\s*['\"](?P<label>[^'\"]+)['\"]\s*,\s*(?P<index>\d+)\s*\)\Z")
_USABLE = ("ok", "full_network_fallback")
_CLUSTERS = "spectral_clusters"


@dataclass(frozen=True)
class Circuit:
    """A rule (or cluster) with its candidate neurons, layer by layer in the order of the manifest.

    scores: signed attribution [candidate], 0 where the manifest has none. scored: whether it has one [candidate].
    strengths: how strong an effect attribution promises, [candidate]: its magnitude, else |score|.
    cluster_rows: `original_idx` of a cluster's members; None for rules.
    """

    circuit_id: int
    label: str
    target: str
    direction: str | None
    cluster_index: int | None
    cluster_rows: tuple[int, ...] | None
    neurons: tuple[Neuron, ...]
    scores: np.ndarray
    scored: np.ndarray
    strengths: np.ndarray

    @property
    def is_cluster(self) -> bool:
        """True for a cluster of datapoints without a rule."""
        return self.cluster_rows is not None

    @property
    def name(self) -> str:
        """Short name for messages."""
        return f"{'cluster' if self.is_cluster else 'rule'} {self.circuit_id}"

    @property
    def layers(self) -> list[np.ndarray]:
        """Candidate indices of each layer label, in order."""
        places: dict[str, list[int]] = {}
        for index, neuron in enumerate(self.neurons):
            places.setdefault(neuron.layer_label, []).append(index)
        return [np.array(members, dtype=np.int64) for members in places.values()]


@dataclass(frozen=True)
class DatasetInfo:
    """`dataset_info.json`: what stage 5 was run on; flags override it."""

    scores_path: Path
    ai_model: str | None


def read_dataset_info(folder: Path, args: Namespace) -> DatasetInfo:
    """The feature table and the model, from the flags or from stage 5's record.

    Raises:
        UserError: neither names them.
    """
    path = folder / "dataset_info.json"
    stored = read_json(path, "stage 5's dataset_info.json") if path.is_file() else {}
    if not isinstance(stored, dict) or not all(isinstance(stored.get(k, ""), str) for k in ("scores_path", "ai_model")):
        raise UserError(f"{path} is not a record of stage 5; run stage 5 again")
    scores_path = args.scores_path or stored.get("scores_path")
    ai_model = args.ai_model or stored.get("ai_model")
    for value, flag in ((scores_path, "--scores_path"), (ai_model, "--ai_model")):
        if not value:
            raise UserError(f"{folder} has no dataset_info.json that names it; give {flag}")
    if Path(scores_path).name != "scores.csv":
        raise UserError(f"--scores_path must name a scores.csv (with features.json beside it), not {scores_path}")
    return DatasetInfo(Path(scores_path), ai_model)


def read_circuits(path: Path, args: Namespace, d_model: int | None = None) -> list[Circuit]:
    """Circuits of `manifest.json` in order, with the candidates that the flags leave.

    d_model: width of the model, needed only for manifests of nodes or edges that do not say it.

    Raises:
        UserError: no usable circuit of the wanted kind.
    """
    entries = read_json(path, "stage 5's manifest.json")
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise UserError(f"{path} is not a manifest of stage 5 (a list of circuits)")
    wanted = [
        entry
        for entry in entries
        if entry.get("status") in _USABLE and (entry.get("sampling_strategy") == _CLUSTERS) == args.cluster_by_spectral
    ]
    if not wanted:
        kind = "cluster" if args.cluster_by_spectral else "rule"
        raise UserError(
            f"{path} has no {kind} circuit that was analysed; run stage 5 again"
            + ("" if args.cluster_by_spectral else ", or give --cluster_by_spectral if it was run by clusters")
        )
    with expecting("a manifest of stage 5", path):
        circuits = [_circuit(entry, args, d_model, path) for entry in wanted[: args.max_n_of_rules_to_analyze]]
    numbers = [(circuit.target, circuit.circuit_id) for circuit in circuits]
    if len(set(numbers)) < len(numbers):
        raise UserError(f"{path} names a circuit twice; run stage 5 again")
    return circuits


def _circuit(entry: dict[str, Any], args: Namespace, d_model: int | None, path: Path) -> Circuit:
    number = next(
        (entry[key] for key in ("circuit_id", "rule_id", "cluster_index") if entry.get(key) is not None), None
    )
    if number is None:
        raise UserError(f"a circuit of {path} has no circuit_id; run stage 5 again")
    rows = None
    if args.cluster_by_spectral:
        rows = entry.get("member_original_idx")
        if rows is None:
            raise UserError(f"circuit {number} of {path} does not name the members of its cluster; run stage 5 again")
    candidates = _candidates(entry.get("metadata_topn") or {}, args, d_model, path)
    return Circuit(
        int(number),
        str(entry.get("circuit_label", "")),
        path_piece(str(entry["target"]), path),
        entry.get("coefficient_sign"),
        entry.get("cluster_index"),
        None if rows is None else tuple(int(row) for row in rows),
        *candidates,
    )


def _candidates(
    topn: dict[str, Any], args: Namespace, d_model: int | None, path: Path
) -> tuple[tuple[Neuron, ...], np.ndarray, np.ndarray, np.ndarray]:
    """Candidate neurons with scores, `scored` and strengths, layer by layer, ascending inside a layer."""
    units = topn.get("neurons") or topn.get("mlp_neurons")
    if units is None:
        width = topn.get("d_model") or d_model
        if width is None:
            raise UserError(f"{path} lists nodes or edges but no d_model; run stage 5 again")
        units = {label: range(width) for label in _labels_of_components(topn)}
    score_of = _by_neuron(topn.get("neuron_label_score"), path)
    strength_of = _by_neuron(topn.get("neuron_label_magnitude"), path)
    heads = {label: parse_label(label)[1] for label in units}
    labels = [label for label, head in heads.items() if not (args.mlp_neurons_only and head is not None)]
    if args.last_k_layers is not None:
        mlp_layers = sorted({parse_label(label)[0] for label in labels if parse_label(label)[1] is None})
        last = mlp_layers[-args.last_k_layers :]
        labels = [label for label in labels if parse_label(label)[1] is not None or parse_label(label)[0] in last]
    neurons = [Neuron(label, index) for label in labels for index in sorted({int(index) for index in units[label]})]
    keys = [(neuron.layer_label, neuron.index) for neuron in neurons]
    scores = np.array([score_of.get(key, 0.0) for key in keys])
    scored = np.array([key in score_of for key in keys], dtype=bool)
    strengths = np.array([abs(strength_of.get(key, score)) for key, score in zip(keys, scores, strict=True)])
    kept = np.arange(len(neurons))
    if args.top_k_neurons is not None:
        kept = np.sort(np.argsort(-strengths, kind="stable")[: args.top_k_neurons])
    return tuple(neurons[i] for i in kept), scores[kept], scored[kept], strengths[kept]


def _by_neuron(values: dict[str, float] | None, path: Path) -> dict[tuple[str, int], float]:
    """Values of a manifest that are keyed by the text of a (layer label, index) tuple."""
    found = {}
    for key, value in (values or {}).items():
        match = _SCORE_KEY.match(key)
        if match is None:
            raise UserError(f"{path} has a score for {key!r}, which is not a neuron like ('m12', 345)")
        found[match["label"], int(match["index"])] = float(value)
    return found


def _labels_of_components(topn: dict[str, Any]) -> list[str]:
    """Components of a node or edge circuit, strongest first."""
    strength: dict[str, float] = {}
    for label, score in (topn.get("node_label_score") or {}).items():
        strength[label] = abs(float(score))
    for edge, score in (topn.get("edge_label_score") or {}).items():
        for end in edge.split("->"):
            label = re.sub(r"<.*>\Z", "", end)
            strength[label] = max(strength.get(label, 0.0), abs(float(score)))
    components = [label for label in strength if re.match(r"(m\d+|a\d+\.h\d+)\Z", label)]
    return sorted(components, key=lambda label: (-strength[label], label))


# ---------------------------------------------------------------- sampling plans


@dataclass(frozen=True)
class SamplingPlan:
    """A plan of stage 4: for each rule, the datapoints that stand for it and those that stand against it."""

    path: Path
    baseline_subset: str
    dataset_size: int
    rules: dict[tuple[str, int], dict[str, Any]]
    scores_sha256: object = None
    """Digest of the feature table that it was made from; published plans hold none."""

    def check_table(self, scores_path: Path) -> None:
        """Refuse a plan of another feature table.

        Raises:
            UserError: the table's content is not what the plan was made from.
        """
        if self.scores_sha256 not in (None, file_digest(scores_path)):
            raise UserError(f"{self.path} was made from other contents of {scores_path}; run stage 4 again")

    def entry(self, circuit: Circuit) -> dict[str, Any] | None:
        """The plan's entry for a rule."""
        return self.rules.get((circuit.target, circuit.circuit_id))


def read_plan(path: Path) -> SamplingPlan:
    """Read a sampling plan of stage 4, ours or a published one.

    Raises:
        UserError: not a plan.
    """
    plan = read_json(path, "sampling plan (stage 4)")
    with expecting("a sampling plan of stage 4", path):
        if plan["baseline_subset"] not in BASELINE_SUBSETS:
            raise ValueError(f"unknown baseline_subset {plan['baseline_subset']!r}")
        rules = {(str(rule["rule_target"]), int(rule["rule_id"])): rule for rule in plan["rules"]}
        digest = plan.get("scores_sha256")
        return SamplingPlan(path, plan["baseline_subset"], int(plan["dataset_size"]), rules, digest)


def regimes_to_run(args: Namespace, plan: SamplingPlan | None) -> Iterator[tuple[str, Path]]:
    """The baseline regimes that the flags ask for, each with its output folder.

    Without `--baseline_subset` both regimes (or the one that the plan is for) go into folders of their own.

    Raises:
        UserError: the plan is for the other regime.
    """
    output = Path(args.output_data_dir)
    planned = "all" if plan is None else plan.baseline_subset
    if args.baseline_subset != "all":
        if planned not in ("all", args.baseline_subset):
            raise UserError(
                f"{plan.path} was made for --baseline_subset {planned}, not {args.baseline_subset}; "
                "give the plan of this regime"
            )
        yield args.baseline_subset, output
        return
    for regime in ("positive", "negative") if planned == "all" else (planned,):
        yield regime, output / f"{regime}_baseline"
