"""Measuring flips: candidates, controls, joint groups. The model is loaded only if an answer is missing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lib.artifacts import text_digest
from lib.cli import Report, UserError, rng
from lib.flip_answer_log import AnswerLog, Group
from lib.flip_rows import EvaluatedRows
from lib.flip_table import FlipTable
from lib.flip_targets import FlipTarget
from lib.neuron_intervention import (
    UNKNOWN,
    AnswerLabels,
    Engine,
    FlipMatrix,
    label_flips,
    measure_answers,
    random_neurons,
)
from lib.neurons import Neuron
from lib.scores_table import ScoresTable

NO_OP: Group = ()


@dataclass(frozen=True)
class MeasureSettings:
    """Everything but the prompts that determines the answers."""

    model: dict[str, Any]
    dtype: str
    intervention: str
    points_to_use_for_mean_ablation: int
    decode_only: bool
    decode_scope: str
    max_new_tokens: int
    seed: int


@dataclass(frozen=True)
class LoadedEngine:
    """An engine over the evaluated prompts, and the width of its model."""

    engine: Engine
    d_model: int


EngineFactory = Callable[[Sequence[str], Sequence[str]], LoadedEngine]
"""Makes the engine from the evaluated prompts and the reference prompts."""


@dataclass(frozen=True)
class FlipMeasurement:
    """Flips of the candidates on the rows with a stable baseline, and the controls measured with them."""

    table: FlipTable
    log: AnswerLog
    positions: np.ndarray
    """Position in the log of each row of the table, [row]."""
    controls: dict[str, Any]
    joint: dict[str, Any] | None


class FlipMeasurer:
    """Measures what is missing in the log, and labels what is there."""

    def __init__(
        self,
        scores: ScoresTable,
        rows: EvaluatedRows,
        task: Any,
        settings: MeasureSettings,
        log_dir: Path,
        make_engine: EngineFactory,
        report: Report,
    ) -> None:
        self.scores, self.rows, self.settings, self.report = scores, rows, settings, report
        self._make_engine = make_engine
        prompts = [scores.prompts[row] for row in rows.rows]
        self._prompts, self._references = prompts, self._reference_prompts()
        fingerprint = text_digest([asdict(settings), prompts, self._references, "flips/2"])
        self.log = AnswerLog(log_dir / f"flips_{fingerprint[:16]}.jsonl", fingerprint, len(prompts))
        self._labels = AnswerLabels(task, scores.records(rows.rows))
        self._loaded: LoadedEngine | None = None

    def _reference_prompts(self) -> list[str]:
        """The TRAIN prompts whose activations give the replacement values."""
        train = self.scores.train_rows
        n_points = min(self.settings.points_to_use_for_mean_ablation, len(train))
        chosen = rng(self.settings.seed, "replacement").choice(train, n_points, replace=False)
        return [self.scores.prompts[row] for row in np.sort(chosen)]

    def run(self, neurons: Sequence[Neuron], *, n_random: int, n_joint_controls: int) -> FlipMeasurement:
        """Flips of the neurons, of a no-op edit, of random neurons; with `n_joint_controls` also of all at once."""
        if self.log.baseline is None:
            self.log.start(self._engine().engine.baseline_answers, self._engine().d_model)
        singles: list[Group] = [(neuron,) for neuron in neurons]
        randoms: list[Group] = [(neuron,) for neuron in self._random(neurons, n_random, "noise floor")]
        joint = self._joint_groups(neurons, n_joint_controls)
        self._measure([*singles, *randoms, NO_OP, *joint])
        no_op = label_flips([NO_OP], self.log, self._labels)
        self._check_no_op(no_op)
        stable, mismatch = self._stable_rows(no_op.baseline)
        table = FlipTable(tuple(neurons), self.rows, label_flips(singles, self.log, self._labels)).take(stable)
        random_table = FlipTable(
            tuple(group[0] for group in randoms), self.rows, label_flips(randoms, self.log, self._labels)
        ).take(stable)
        controls = {
            "no_op": {"n_changed_answers": int(no_op.changed.sum()), "n_flips": int(no_op.flips.sum())},
            "baseline": mismatch,
            "random_neurons": noise_floor(random_table),
        }
        return FlipMeasurement(
            table, self.log, np.flatnonzero(stable), controls, self._joint_report(joint, stable) if joint else None
        )

    def planned(self, neurons: Sequence[Neuron], n_random: int, n_joint_controls: int) -> tuple[int, int]:
        """How many ablations a run needs, and how many of them are not stored. Needs no model."""
        n_joint = 1 + n_joint_controls if neurons and n_joint_controls else 0
        n_groups = len(neurons) + (n_random if neurons else 0) + 1 + n_joint
        if self.log.baseline is None:
            return n_groups, n_groups
        singles: list[Group] = [(neuron,) for neuron in (*neurons, *self._random(neurons, n_random, "noise floor"))]
        groups = [*singles, NO_OP, *self._joint_groups(neurons, n_joint_controls)]
        return len(groups), len(self.log.missing(groups))

    # ------------------------------------------------------------ model

    def _engine(self) -> LoadedEngine:
        if self._loaded is None:
            self._loaded = self._make_engine(self._prompts, self._references)
        return self._loaded

    def _measure(self, groups: Sequence[Group]) -> None:
        missing = self.log.missing(groups)
        if not missing:
            return
        engine = self._engine().engine
        with self.report.counter(total=len(missing) * self.log.n_rows, unit="answer", desc="flips") as advance:
            measure_answers(engine, missing, self.log, progress=advance)

    def _random(self, like: Sequence[Neuron], n_neurons: int, label: str) -> list[Neuron]:
        """Random neurons, none a candidate, from the candidates' components in proportion."""
        random = rng(self.settings.seed, "stage7", label)
        order = [like[place] for place in random.permutation(len(like))]
        wanted = [order[number % len(order)] for number in range(n_neurons)] if order else []
        return random_neurons(wanted, self.log.d_model, like, random)

    # ------------------------------------------------------------ controls

    def _check_no_op(self, no_op: FlipMatrix) -> None:
        n_flips = int(no_op.flips.sum())
        if n_flips:
            raise UserError(
                f"an edit that changes nothing flips {n_flips} of {self.log.n_rows} labels: --dtype "
                f"{self.settings.dtype} is too coarse on this device; use --dtype float32"
            )

    def _stable_rows(self, baseline: np.ndarray) -> tuple[np.ndarray, dict[str, Any]]:
        """Rows whose label before ablation is stage 1's, [row]: of others nobody can say if they flip."""
        recorded = self.scores.target(rows=self.rows.rows)
        labels = self._labels(range(self.log.n_rows), self.log.baseline)
        stable = (baseline == recorded) & (labels != UNKNOWN)
        texts = (
            self.scores.frame[self.scores.output_col].to_numpy()[self.rows.rows]
            if self.scores.output_col in self.scores.frame
            else np.array(self.log.baseline)
        )
        differing = sum(text.strip() != answer.strip() for text, answer in zip(texts, self.log.baseline, strict=True))
        return stable, {
            "n_answers_unlike_stage_1": differing,
            "n_labels_unlike_stage_1": int((~stable).sum()),
            "original_idx_left_out": self.rows.rows[~stable].tolist(),
        }

    # ------------------------------------------------------------ joint ablation

    def _joint_groups(self, neurons: Sequence[Neuron], n_controls: int) -> list[Group]:
        """All neurons at once, then as many random ones of the same components, several times."""
        if not n_controls or not neurons:
            return []
        return [
            tuple(neurons),
            *(tuple(self._random(neurons, len(neurons), f"joint {number}")) for number in range(n_controls)),
        ]

    def _joint_report(self, groups: Sequence[Group], stable: np.ndarray) -> dict[str, Any]:
        """`joint_ablation.json`: on held-out rows, and on all evaluated ones."""
        matrix = label_flips(groups, self.log, self._labels).take_rows(stable)
        rows = self.rows.take(stable)
        return {
            "n_neurons": len(groups[0]),
            "neurons": [str(neuron) for neuron in groups[0]],
            "test": _joint_rates(matrix.take_rows(rows.is_test)),
            "all_rows": _joint_rates(matrix),
            "controls": "random neurons of the same components, as many in each component, none a candidate",
        }


def _joint_rates(matrix: FlipMatrix) -> dict[str, Any]:
    """Flip rates of the first group and of its controls, per direction."""
    result: dict[str, Any] = {}
    for target, name in ((FlipTarget.C2I, "positive_lost"), (FlipTarget.I2C, "negative_gained")):
        eligible = target.eligible(matrix.baseline)
        counts = (matrix.flips & eligible).sum(axis=1)
        rates = counts / eligible.sum() if eligible.any() else np.full(len(counts), np.nan)
        result |= {
            f"n_baseline_{name.split('_')[0]}": int(eligible.sum()),
            f"n_{name}": int(counts[0]),
            f"share_{name}": float(rates[0]),
            f"share_{name}_random": [float(rate) for rate in rates[1:]],
        }
    return result


def noise_floor(table: FlipTable) -> dict[str, Any]:
    """Flip rates of random neurons: mean and largest, over all rows and per direction over all rows."""
    floor: dict[str, Any] = {"n_neurons": len(table.neurons), "neurons": {}}
    if not table.neurons or not len(table.rows):
        return floor
    for target, name in ((FlipTarget.ANY, "flip_any_rate"), (FlipTarget.C2I, "c2i_rate"), (FlipTarget.I2C, "i2c_rate")):
        rates = table.flips(target).mean(axis=1)
        floor |= {name: float(rates.mean()), f"max_{name}": float(rates.max())}
    any_rates = table.flips(FlipTarget.ANY).mean(axis=1)
    floor["neurons"] = {str(neuron): float(rate) for neuron, rate in zip(table.neurons, any_rates, strict=True)}
    return floor
