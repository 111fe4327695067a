"""The experiments as data: tasks x models x run modes, the settings of each, and the pipeline's options they mean.

Standard library only: the check of downloaded artifacts, which runs before set-up, asks it which runs there should be.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from lib.cli import UserError
from lib.reporting.naming import RunMode
from lib.run_names import DEFAULT_CIRCUIT_SIZE, DEFAULT_MIN_FLIP_RATE, RunChoices

TASKS = ("arithmetic", "bon_jailbreaking", "hans_nli")
MODELS = ("Qwen/Qwen2-1.5B-Instruct", "Qwen/Qwen2-7B-Instruct", "EleutherAI/gpt-j-6B")
EVAL_INTERVENTION = "mean-positional"


_MODE_FLAGS = {
    RunMode.SPECTRAL_PLAN: "--spectral_circuit_discovery --spectral_anchoring_plan --fast_anchoring",
    RunMode.RANDOM_PLAN: "--spectral_circuit_discovery --random_anchoring_plan --fast_anchoring",
    RunMode.SPECTRAL_SPLIT: "--spectral_splits --fast_anchoring",
    RunMode.FAKE_TARGETS: "--incorrect_rules --spectral_circuit_discovery --spectral_anchoring_plan --fast_anchoring",
    # Every candidate of one circuit: of more circuits it would cost weeks.
    RunMode.BRUTE_FORCE: "--spectral_circuit_discovery --spectral_anchoring_plan --slow_anchoring "
    "--max_number_of_circuits_to_search 1",
}


def mode_word(mode: RunMode) -> str:
    """What MODES=... calls a mode: spectral_plan, random_plan, fake_targets, spectral_split or brute_force."""
    return mode.name.lower()


@dataclass(frozen=True)
class PairSettings:
    """Settings of one task and model. z_thresh: largest robust z-score of a kept feature, -1 for no limit."""

    z_thresh: int = -1
    batch_size: int = 32
    n_circuits: int = 1
    decode_only: bool = True


_SETTINGS = {
    ("arithmetic", MODELS[0]): PairSettings(z_thresh=10, batch_size=256),
    ("arithmetic", MODELS[1]): PairSettings(z_thresh=10, batch_size=256, n_circuits=5),
    ("arithmetic", MODELS[2]): PairSettings(z_thresh=5, batch_size=256, n_circuits=5),
    ("bon_jailbreaking", MODELS[1]): PairSettings(batch_size=256),
}


def pair_settings(task: str, model: str) -> PairSettings:
    """The settings of the experiments; HANS answers are one token, so all positions are ablated there."""
    return _SETTINGS.get((task, model), PairSettings(decode_only=task != "hans_nli"))


@dataclass(frozen=True)
class Cell:
    """One run of the grid. circuit_size and min_flip_rate differ from their defaults in sensitivity runs."""

    task: str
    model: str
    mode: RunMode
    circuit_size: int = DEFAULT_CIRCUIT_SIZE
    min_flip_rate: str = DEFAULT_MIN_FLIP_RATE
    more_flags: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """Name of the cell for people."""
        size = f", size {self.circuit_size}" if self.circuit_size != DEFAULT_CIRCUIT_SIZE else ""
        rate = f", tau {self.min_flip_rate}" if self.min_flip_rate != DEFAULT_MIN_FLIP_RATE else ""
        return f"{self.task} / {self.model} / {mode_word(self.mode)}{size}{rate}"

    @property
    def choices(self) -> RunChoices:
        """What appears in the names of its folders."""
        return replace(
            self.mode.run_name.choices,
            decode_only=pair_settings(self.task, self.model).decode_only,
            circuit_size=self.circuit_size,
            min_flip_rate=self.min_flip_rate,
            eval_intervention=EVAL_INTERVENTION,
        )

    def pipeline_arguments(self, extra: Sequence[str] = ()) -> list[str]:
        """The pipeline's command line; `extra` comes last and wins."""
        settings = pair_settings(self.task, self.model)
        return [
            self.task, self.model, *_MODE_FLAGS[self.mode].split(), *["--decode_only"] * settings.decode_only,
            "--mlp_neurons_only", "--z_thresh", str(settings.z_thresh), "--batch_size", str(settings.batch_size),
            "--circuit_level", "neuron", "--circuit_size", str(self.circuit_size),
            "--max_number_of_circuits_to_analyze", str(settings.n_circuits),
            "--min_flip_rate", self.min_flip_rate, "--eval_intervention", EVAL_INTERVENTION,
            *self.more_flags, *extra,
        ]  # fmt: skip


@dataclass(frozen=True)
class Selection:
    """The part of the grid that is asked for."""

    tasks: tuple[str, ...]
    models: tuple[str, ...]
    modes: tuple[RunMode, ...]

    @classmethod
    def from_environment(
        cls,
        environment: Mapping[str, str] = os.environ,
        *,
        tasks: Sequence[str] = TASKS,
        models: Sequence[str] = MODELS,
        modes: Sequence[RunMode] = tuple(RunMode),
    ) -> Selection:
        """TASKS, MODELS and MODES of the environment, each a list separated by spaces or commas; else the defaults."""
        return cls(
            _words(environment.get("TASKS", "")) or tuple(tasks),
            _words(environment.get("MODELS", "")) or tuple(models),
            tuple(map(_mode, _words(environment.get("MODES", "")))) or tuple(modes),
        )

    def cells(self) -> list[Cell]:
        """Every cell, task by task and model by model."""
        return [Cell(task, model, mode) for task in self.tasks for model in self.models for mode in self.modes]


def sensitivity_cells(selection: Selection, environment: Mapping[str, str] = os.environ) -> list[list[Cell]]:
    """For each task and model: the main run (at BASE_SIZE), then other sizes (SIZES) and thresholds (RATES) of it.

    The published size 80000 also admitted candidates of attribution zero.
    """
    base = _size(environment.get("BASE_SIZE") or str(DEFAULT_CIRCUIT_SIZE))
    sizes = [_size(word) for word in _words(environment.get("SIZES", "")) or ("25000", "80000")]
    rates = _words(environment.get("RATES", "")) or ("0.3", "0.4", "0.5")
    variants = [(base, DEFAULT_MIN_FLIP_RATE), *((size, DEFAULT_MIN_FLIP_RATE) for size in sizes if size != base)]
    variants += [(base, rate) for rate in rates if rate != DEFAULT_MIN_FLIP_RATE]
    return [
        [
            Cell(task, model, RunMode.SPECTRAL_PLAN, size, rate, ("--include_zero_scores",) * (size == 80_000))
            for size, rate in variants
        ]
        for task in selection.tasks
        for model in selection.models
    ]


def extra_flags(given: Sequence[str], environment: Mapping[str, str] = os.environ) -> list[str]:
    """Options for the pipeline: EXTRA_FLAGS, then those on the command line (after `--`)."""
    try:
        return [*shlex.split(environment.get("EXTRA_FLAGS", "")), *given]
    except ValueError as error:
        raise UserError(f"EXTRA_FLAGS cannot be read ({error}); close the quotation marks") from None


def _words(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(word for word in re.split(r"[\s,]+", text) if word))


def _mode(word: str) -> RunMode:
    modes = {mode_word(mode): mode for mode in RunMode}
    if word not in modes:
        raise UserError(f"MODES names {word!r}, which is none of: {', '.join(modes)}")
    return modes[word]


def _size(word: str) -> int:
    if not (word.isascii() and word.isdigit() and int(word) > 0):
        raise UserError(f"BASE_SIZE or SIZES names {word!r}, which is not a number of candidates")
    return int(word)
