"""A tree of results as our own stages 6 and 7 write it: real stage code, on a model whose flips are planted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import lib.flip_diagnostic_plots
import lib.flip_plots
import lib.modeling_and_ablation
import lib.stages.agonist_model
from lib.artifacts import write_csv, write_json
from lib.cli import Report
from lib.stages.flip_anchoring import FlipAnchoring
from tests.flip_world import engine_factory, stage_arguments
from tests.scripts import run_script
from tests.stages import agonist_world
from tests.stages.agonist_world import PlantedModel, make_world, stage_6_arguments

SIZE = 60
"""Candidates of every circuit: 3 layers of 20 coordinates."""
MODELS = ("small/A", "B")
CIRCUITS = f"rule_split-spectral_sample-M{SIZE}-decode_only"
RUNS = {  # (bag folder, is_fake, flags of stage 6)
    "main": ("agonist_neurons-fast-spectral_anchor", False, []),
    "tau": ("agonist_neurons-fast-spectral_anchor-tau0.5", False, ["--search_epsilon", "0.5"]),
    "fake": ("agonist_neurons-fast-spectral_anchor", True, []),
    "brute": ("agonist_neurons-spectral_anchor", False, ["--no_fast"]),
}
PLANTED = {
    "small/A": {
        "m0:3": lambda f: f["first"] > 11,
        "m1:7": lambda f: (f["first"] > 20) & f["is_correct"],
        "m2:11": lambda f: f["prompt"].str.len() % 3 == 0,
        agonist_world.SELECTIVE: lambda f: f["is_sum"] > 0.5,
    },
    "B": {agonist_world.SELECTIVE: lambda f: (f["is_sum"] > 0.5) & (f["first"] < 9)},
}
"""What each model's neurons flip in stage 7, from the feature table."""


def run_name(run: str) -> str:
    bag, is_fake, _ = RUNS[run]
    return f"{CIRCUITS}-{bag}" + "-fake_targets" * is_fake


def circuits_dir(data: Path, model: str, run: str) -> Path:
    kind = "neural_circuit_discovery_results" + "_fake_targets" * RUNS[run][1]
    return data / "arithmetic" / model / kind / "eap_ig_inputs" / CIRCUITS


def stats_dir(data: Path, model: str, run: str) -> Path:
    return data / "arithmetic" / model / "rule_extraction_results/neuron_flip_rules/stats" / run_name(run)


def build(folder: Path, patch: pytest.MonkeyPatch) -> Path:
    """Write `data/`: model A with every run of RUNS, model B with the main run. Returns the data folder."""
    patch.setattr(lib.stages.agonist_model, "AgonistModel", PlantedModel)
    patch.setattr(lib.modeling_and_ablation, "model_identity", lambda name: {"model": name})
    patch.setattr(lib.flip_plots, "save_figure", _data_of_figure)
    world, data = make_world(folder / "world"), folder / "data"
    frame = pd.read_csv(world / "features" / "scores.csv")
    frame["raw_output"] = np.where(frame["is_correct"], "right", "wrong")
    write_csv(world / "features" / "scores.csv", frame)
    statistics = {"accuracy": float(frame["is_correct"].mean()), "n_examples": len(frame)}
    write_json(world / "features" / "dataset_stats.json", statistics)
    for model, runs in ((MODELS[0], list(RUNS)), (MODELS[1], ["main"])):
        root = data / "arithmetic" / model
        shutil.copytree(world / "features", root / "feature_report")
        for run in runs:
            _search(world, data, model, run, patch)
            _anchor(data, model, run, frame)
    return data


def _search(world: Path, data: Path, model: str, run: str, patch: pytest.MonkeyPatch) -> None:
    """Stage 6 in both regimes; the control's rules have no agonist, model B has one."""
    place = circuits_dir(data, model, run)
    if not place.exists():
        shutil.copytree(world / "nc", place / "neural_circuits")
    bag, is_fake, flags = RUNS[run]
    found = {} if is_fake or model == MODELS[1] else {"m0:3": 0.9, "m1:7": 0.5, "m2:11": 0.35}
    patch.setattr(agonist_world, "AGONISTS", found)
    patch.setattr(agonist_world, "SELECTIVE", "nothing" if is_fake else "m2:5")
    arguments = stage_6_arguments(world, "unused", *(flag for flag in flags if flag != "--no_fast"))
    arguments[arguments.index("--output_data_dir") + 1] = str(place / bag)
    arguments[arguments.index("--input_data_dir") + 1] = str(place / "neural_circuits")
    if "--no_fast" in flags:
        arguments.remove("--fast_ablation")
        arguments += ["--max_n_of_rules_to_analyze", "1"]
    arguments += [f"--skip_agonist_{kind}_stats" for kind in ("activation", "margin", "saliency")]
    assert run_script("6_analyze_bag_of_rules", arguments) == 0


def _anchor(data: Path, model: str, run: str, frame: pd.DataFrame) -> None:
    """Stage 7."""
    root = data / "arithmetic" / model
    paths = {
        "features": root / "feature_report",
        "agonists": circuits_dir(data, model, run) / RUNS[run][0],
        "rules": root / "rule_extraction_results" / "neuron_flip_rules",
    }
    flags = ("--stats_dirname", run_name(run), "--n_bootstrap", "20", "--skip_agonist_metric_stats")
    planted = PLANTED[model]
    stage = FlipAnchoring(stage_arguments(paths, *flags), Report(quiet=True), engine_factory(frame, planted))
    assert stage.run() == 0


def _data_of_figure(stem: Path, figure: object, data: pd.DataFrame) -> list[Path]:
    path = stem.with_name(stem.name + ".csv")
    write_csv(path, data)
    return [path]


# ---------------------------------------------------------------- raw files, read without any code of the reports


def details(data: Path, model: str, run: str, regime: str) -> list[dict]:
    """Stage 6's detail files of a regime that were searched, by circuit."""
    folder = circuits_dir(data, model, run) / RUNS[run][0] / f"{regime}_baseline" / "per_rule"
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*/rule_*.json"))]
    return [detail for detail in found if detail["status"] == "ok"]
