"""What a rule about a neuron may predict: its flips of any kind, behaviour lost, or behaviour gained."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import numpy as np

from lib.neurons import Neuron


class FlipTarget(Enum):
    """A kind of flip, and the rows on which it can happen."""

    ANY = "any"
    """The label changes; every row."""
    C2I = "c2i"
    """The behaviour is lost; rows where it held before ablation."""
    I2C = "i2c"
    """The behaviour appears; rows where it did not hold before ablation."""

    @property
    def prefix(self) -> str:
        """Prefix of this target's columns: `flip_`, `flip_c2i_` or `flip_i2c_`."""
        return "flip_" if self is FlipTarget.ANY else f"flip_{self.value}_"

    def column(self, neuron: Neuron) -> str:
        """Column (and target) name: `flip_c2i_m5_16`."""
        return self.prefix + neuron.key

    def eligible(self, baseline: np.ndarray) -> np.ndarray:
        """Rows [row] on which this flip can happen."""
        if self is FlipTarget.ANY:
            return np.ones(len(baseline), dtype=bool)
        return baseline if self is FlipTarget.C2I else ~baseline

    @property
    def rows_name(self) -> str:
        """Name of the eligible rows, as written in tables."""
        return {"any": "all", "c2i": "baseline_positive", "i2c": "baseline_negative"}[self.value]


def target_of_column(column: str, neuron_key: str) -> FlipTarget:
    """The inverse of `FlipTarget.column`, given the neuron's key."""
    return next(target for target in FlipTarget if target.prefix + neuron_key == column)


@dataclass(frozen=True)
class MinimumCounts:
    """How many flips, and how many non-flips, a target needs before a rule about it means anything."""

    train: int = 20
    test: int = 10

    def status(self, on_train: np.ndarray, on_test: np.ndarray) -> str:
        """`ok`, `too_few_flips` or `too_few_non_flips` for the labels [row] of both sides."""
        for labels, minimum in ((on_train, self.train), (on_test, self.test)):
            if labels.sum() < minimum:
                return "too_few_flips"
        for labels, minimum in ((on_train, self.train), (on_test, self.test)):
            if (~labels).sum() < minimum:
                return "too_few_non_flips"
        return "ok"
