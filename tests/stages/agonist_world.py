"""What stage 6 reads, written by hand, and a model whose flips are planted."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lib.ablation_engine import AblatedAnswers
from lib.agonist_diagnostics import LayerValues
from lib.artifacts import write_csv, write_json
from lib.cli import rng
from lib.task_spec import AnswerScore, FeatureTaskSpec, TaskSettings
from tests.models import tiny_model


class FirstCharacterTask(FeatureTaskSpec):
    """The behaviour: an answer begins with a digit."""

    NAME = "first_character"

    def examples(self, seed: int) -> list[dict[str, Any]]:
        return []

    def cache_from_answers(self, examples: Sequence[dict[str, Any]], answers: Sequence[str]) -> Any:
        return {}

    def dataset_from_cache(self, cache: Any) -> pd.DataFrame:
        return pd.DataFrame()

    def score_answers(self, rows: Sequence[Mapping[str, Any]], answers: Sequence[str]) -> list[AnswerScore]:
        return [AnswerScore(answer[:1].isdigit()) for answer in answers]


TASK_SPEC = FirstCharacterTask(TaskSettings(max_new_tokens=3))
N_LAYERS, D_MODEL = 3, 20
RULES = ("is_sum > 0.5", "first > 14.5")
AGONISTS = {"m0:3": 0.9, "m1:7": 0.5, "m2:11": 0.35}
"""Flip rates of the planted neurons, alike in both slices."""
SELECTIVE = "m2:5"
"""Flips sums and nothing else."""


def make_world(folder: Path, *, n_rows: int = 700) -> Path:
    """Writes `features/`, `nc/` (manifest and dataset_info) and `plan_positive.json` below the folder."""
    stream = rng(0, "agonist world")
    rows = [
        {
            "prompt": f"{n}: {a}+{b}=",
            "raw_output": "1",
            "is_correct": bool(stream.random() < 0.5),
            "first": float(a),
            "is_sum": float(b % 2),
            "is_test": n % 5 == 4,
        }
        for n, (a, b) in enumerate(zip(stream.integers(0, 30, n_rows), stream.integers(0, 10, n_rows), strict=True))
    ]
    write_csv(folder / "features" / "scores.csv", pd.DataFrame(rows))
    write_json(folder / "features" / "features.json", [{"label": name} for name in ("first", "is_sum")])
    write_json(folder / "nc" / "manifest.json", [entry(number, text) for number, text in enumerate(RULES)])
    write_json(
        folder / "nc" / "dataset_info.json",
        {
            "scores_path": str(folder / "features" / "scores.csv"),
            "ai_model": "tiny",
            "prompt_col": "prompt",
            "target_col": "is_correct",
        },
    )
    write_plan(folder, "positive")
    write_plan(folder, "all")
    return folder


def add_tiny_model(folder: Path) -> None:
    """Writes `model/`, and the table and a manifest (rule 0) that fit its answers and width."""
    lm = tiny_model("llama")
    lm.model.save_pretrained(folder / "model")
    lm.tokenizer.save_pretrained(folder / "model")
    frame = pd.read_csv(folder / "features" / "scores.csv")
    answers = [generation.answer for generation in lm.generate(frame["prompt"].tolist(), 3)]
    frame["raw_output"], frame["is_correct"] = answers, [answer[:1].isdigit() for answer in answers]
    write_csv(folder / "features" / "scores.csv", frame)
    only = entry(0, RULES[0])
    only["metadata_topn"]["neurons"] = {f"m{layer}": list(range(lm.d_model)) for layer in range(lm.n_layers)}
    write_json(folder / "nc" / "manifest.json", [only])


def entry(number: int, text: str, **extra: object) -> dict:
    """A manifest entry with every MLP coordinate and random scores."""
    stream = rng(number, "scores")
    labels = [f"m{layer}" for layer in range(N_LAYERS)]
    scores = {f"('{label}', {index})": float(stream.standard_normal()) for label in labels for index in range(D_MODEL)}
    topn = {
        "level": "neuron",
        "d_model": D_MODEL,
        "neurons": {label: list(range(D_MODEL)) for label in labels},
        "neuron_label_score": scores,
    }
    return {
        "status": "ok",
        "circuit_id": number,
        "circuit_label": text,
        "coefficient_sign": "positive",
        "target": "is_correct",
        "sampling_strategy": "plan",
        "metadata_topn": topn,
    } | extra


def write_plan(folder: Path, subset: str, *, n_points: int = 40) -> None:
    """A plan for rule 0 only; rule 1 is skipped in it."""
    frame = pd.read_csv(folder / "features" / "scores.csv")
    frame = frame[~frame["is_test"]]
    if subset != "all":
        frame = frame[frame["is_correct"] == (subset == "positive")]
    covered = frame["is_sum"].to_numpy() > 0.5
    rule = {
        "rule_id": 0,
        "rule": RULES[0],
        "rule_target": "is_correct",
        "rule_direction": "positive",
        "status": "ok",
        "associated_indices": np.flatnonzero(covered)[:n_points].tolist(),
        "unrelated_indices": np.flatnonzero(~covered)[:n_points].tolist(),
    }
    skipped = {
        "rule_id": 1,
        "rule": RULES[1],
        "rule_target": "is_correct",
        "status": "skipped",
        "reason": "too few",
        "associated_indices": [],
        "unrelated_indices": [],
    }
    write_json(
        folder / f"plan_{subset}.json",
        {"baseline_subset": subset, "dataset_size": len(frame), "rules": [rule, skipped]},
    )


class PlantedModel:
    """Stands in for `AgonistModel`: neurons flip rows drawn with their rates; answers say which neuron flipped.

    disagreeing: rows whose un-ablated label is the other one. fragile: rows that flip under any ablation. stop_after:
    raise KeyboardInterrupt after this many (group, datapoint) pairs, as a killed run would end.
    """

    pairs: list[tuple[tuple[str, ...], int]] = []
    disagreeing: frozenset[int] = frozenset()
    fragile: frozenset[int] = frozenset()
    stop_after: int | None = None

    def __init__(self, args: object, inputs: object, report: object) -> None:
        self.table = inputs.table

    def identity(self, regime: str) -> dict:
        return {"planted": 1, "regime": regime}

    def answers_for(self, regime: str):
        return lambda rows: PlantedAnswers(self.table, rows)

    def measure(self, answers, datapoints, neurons):
        """Random activations, gradients and margins, alike in every run; every third datapoint has no site."""
        kept = np.flatnonzero(np.arange(len(datapoints)) % 3 > 0)
        values = []
        for neuron in neurons:
            stream = rng(2, str(neuron))
            activations, gradients = (stream.standard_normal((len(kept), D_MODEL)) for _ in range(2))
            replacement, margins = stream.standard_normal(len(kept)), stream.random(len(kept))
            values.append(LayerValues(neuron.index, activations, gradients, replacement, margins))
        return kept, values


class PlantedAnswers:
    """Flip answers of the planted neurons on some rows."""

    def __init__(self, table: object, rows: np.ndarray) -> None:
        self.rows = np.asarray(rows)
        self.is_sum = table.frame["is_sum"].to_numpy()[self.rows] > 0.5
        wrong = np.isin(self.rows, sorted(PlantedModel.disagreeing))
        self.baseline_labels = table.target(rows=self.rows) ^ wrong

    def flips_and_answers(self, groups, datapoints):
        changed = np.zeros((len(groups), len(datapoints)), dtype=bool)
        texts = {}
        for place, group in enumerate(groups):
            names = tuple(str(neuron) for neuron in group)
            for column, datapoint in enumerate(datapoints):
                PlantedModel.pairs.append((tuple(sorted(names)), int(self.rows[datapoint])))
                hits = [name for name in names if self.flips(name, datapoint)]
                if int(self.rows[datapoint]) in PlantedModel.fragile:
                    hits = hits or [names[0]]
                changed[place, column] = bool(hits)
                if hits:
                    texts[place, column] = "by " + hits[0]
        if PlantedModel.stop_after is not None and len(PlantedModel.pairs) > PlantedModel.stop_after:
            raise KeyboardInterrupt
        return changed, AblatedAnswers(changed, texts)

    def flips(self, name: str, datapoint: int) -> bool:
        if name == SELECTIVE:
            return bool(self.is_sum[datapoint])
        return name in AGONISTS and bool(draws(name)[self.rows[datapoint]] < AGONISTS[name])


@functools.cache
def draws(name: str) -> np.ndarray:
    """A neuron's random number on each row of the table."""
    return rng(1, name).random(10_000)


def stage_6_arguments(folder: Path, output: str = "out", *extra: str) -> list[str]:
    """A small run of stage 6 on rule and plan."""
    return [
        "--input_data_dir",
        str(folder / "nc"),
        "--output_data_dir",
        str(folder / output),
        "--n_associated",
        "40",
        "--n_unrelated",
        "40",
        "--n_confirm",
        "30",
        "--fast_ablation",
        "--sign_split_first",
        "--quiet",
        "--task_module",
        "tests.stages.agonist_world",
        *extra,
    ]
