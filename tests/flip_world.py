"""A small world for stage 7: prompts with features, a task, candidates, and an engine whose flips are planted."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd

from lib.flip_measuring import LoadedEngine
from lib.neurons import Neuron
from lib.stages.flip_options import add_flip_arguments
from lib.task_spec import AnswerScore, FeatureTaskSpec

FEATURES = ("operand_a", "operand_b", "parity")
Planted = Callable[[pd.DataFrame], np.ndarray]
"""Where a neuron's ablation flips, bool [row], from the feature table."""


class WorldTask(FeatureTaskSpec):
    """An answer is right if it is `right`; `unclear` has no label."""

    NAME = "world"

    def examples(self, seed: int) -> list[dict[str, Any]]:
        return []

    def cache_from_answers(self, examples: Sequence[dict[str, Any]], answers: Sequence[str]) -> Any:
        return {}

    def dataset_from_cache(self, cache: Any) -> pd.DataFrame:
        return pd.DataFrame()

    def score_answers(self, rows: Sequence[Mapping[str, Any]], answers: Sequence[str]) -> list[AnswerScore]:
        return [AnswerScore(None if answer == "unclear" else answer == "right") for answer in answers]


TASK_SPEC = WorldTask()


def world_frame(n_rows: int = 400, seed: int = 0) -> pd.DataFrame:
    """A feature table: two operands, a parity, a baseline that is right for about half of the prompts."""
    random = np.random.default_rng(seed)
    frame = pd.DataFrame({"operand_a": random.integers(0, 100, n_rows), "operand_b": random.integers(0, 100, n_rows)})
    frame["parity"] = (frame["operand_a"] + frame["operand_b"]) % 2
    frame["prompt"] = [
        f"{row}: {a}+{b}=" for row, (a, b) in enumerate(zip(frame["operand_a"], frame["operand_b"], strict=True))
    ]
    frame["is_correct"] = random.random(n_rows) < 0.5
    frame["raw_output"] = np.where(frame["is_correct"], "right", "wrong")
    frame["is_test"] = random.random(n_rows) < 0.3
    return frame


def write_world(
    root: Path, frame: pd.DataFrame, neurons: Mapping[str, float], discovery: Sequence[int] = ()
) -> dict[str, Path]:
    """Stage 2's and stage 6's files; `neurons` maps names to max_effect. Returns the folders."""
    features, agonists = root / "feature_report", root / "discovery" / "bag"
    features.mkdir(parents=True)
    frame.to_csv(features / "scores.csv", index=False)
    (features / "features.json").write_text(json.dumps([{"label": name} for name in FEATURES]))
    regime = agonists / "positive_baseline"
    regime.mkdir(parents=True)
    entries = {
        name: {"best_abs_gap": effect, "last_record": {"baseline_subset": "positive", "max_effect": effect}}
        for name, effect in neurons.items()
    }
    buckets = {"catastrophic_zero": {}, "non_catastrophic_agonists": entries}
    (regime / "neuron_buckets.json").write_text(json.dumps(buckets))
    rule = {"sampled_associated_original_idx": list(discovery), "baseline_subset": "positive"}
    (regime / "rule_0000.json").write_text(json.dumps(rule))
    return {"features": features, "agonists": agonists, "rules": root / "neuron_flip_rules"}


class PlantedEngine:
    """Answers `right` or `wrong`; a neuron turns the answer round where planted, a group where any member does."""

    def __init__(self, frame: pd.DataFrame, prompts: Sequence[str], planted: Mapping[str, Planted]) -> None:
        rows = frame.set_index("prompt").loc[list(prompts)].reset_index()
        self.baseline_answers = rows["raw_output"].tolist()
        self._flips = {name: np.asarray(rule(rows), dtype=bool) for name, rule in planted.items()}
        self.calls: list[list[Sequence[Neuron]]] = []
        self.prepared: list[list[Sequence[Neuron]]] = []

    def prepare(self, groups: Sequence[Sequence[Neuron]]) -> None:
        self.prepared.append(list(groups))

    def answers(
        self,
        groups: Sequence[Sequence[Neuron]],
        datapoints: Sequence[int],
        progress: Callable[[int], object] | None = None,
    ) -> Any:
        self.calls.append(list(groups))
        points = list(datapoints)
        changed = np.zeros((len(groups), len(points)), dtype=bool)
        for number, group in enumerate(groups):
            for neuron in group:
                if str(neuron) in self._flips:
                    changed[number] |= self._flips[str(neuron)][points]
        texts = {
            (int(g), int(d)): "wrong" if self.baseline_answers[points[d]] == "right" else "right"
            for g, d in zip(*np.nonzero(changed), strict=True)
        }
        if progress is not None:
            progress(changed.size)
        return SimpleNamespace(changed=changed, texts=texts)


def engine_factory(
    frame: pd.DataFrame, planted: Mapping[str, Planted], made: list[PlantedEngine] | None = None, d_model: int = 32
) -> Callable[[Sequence[str], Sequence[str]], LoadedEngine]:
    """A factory for stage 7; engines made are appended to `made`."""

    def make(prompts: Sequence[str], references: Sequence[str]) -> LoadedEngine:
        engine = PlantedEngine(frame, prompts, planted)
        if made is not None:
            made.append(engine)
        return LoadedEngine(engine, d_model)

    return make


def stage_arguments(paths: Mapping[str, Path], *flags: str) -> Namespace:
    """Parsed flags of stage 7 for a world, everything switched on, one process."""
    from lib.cli import build_parser

    argv = [
        "--circuit_agonists_path",
        str(paths["agonists"]),
        "--features_scores_dir",
        str(paths["features"]),
        "--rules_dir",
        str(paths["rules"]),
        "--stats_dirname",
        "run",
        "--task_module",
        "tests.flip_world",
        "--quiet",
        "--decode_only",
        "--extract_rules",
        "--summarize_rule_metrics",
        "--jobs",
        "1",
        *flags,
    ]
    return build_parser(add_flip_arguments, None).parse_args(argv)
