"""The flip table (`scores.csv` of a run) and the flip statistics derived from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lib.artifacts import read_csv
from lib.cli import UserError
from lib.flip_rows import EvaluatedRows, Role
from lib.flip_targets import FlipTarget
from lib.neuron_intervention import UNKNOWN, FlipMatrix
from lib.neurons import Neuron


@dataclass(frozen=True)
class FlipTable:
    """Flips of neurons (in candidate order) on evaluated rows, the axes of the matrix [neuron, row]."""

    neurons: tuple[Neuron, ...]
    rows: EvaluatedRows
    matrix: FlipMatrix

    @property
    def baseline(self) -> np.ndarray:
        """Label before ablation, bool [row]."""
        return self.matrix.baseline

    def flips(self, target: FlipTarget) -> np.ndarray:
        """Flips of a kind, bool [neuron, row]."""
        return self.matrix.flips & target.eligible(self.baseline)

    def take(self, mask: np.ndarray) -> FlipTable:
        """The rows where the mask [row] is True."""
        return FlipTable(self.neurons, self.rows.take(mask), self.matrix.take_rows(mask))


def flip_frame(
    table: FlipTable, scores: pd.DataFrame, n_rows_total: int, *, keep_unsampled: bool, sampled: bool
) -> pd.DataFrame:
    """The run's `scores.csv`: stage 2's columns, bookkeeping, then three flip columns per neuron.

    With `keep_unsampled` all rows of `scores` are kept and flips of rows that were not evaluated are empty; otherwise
    only the evaluated rows are. `sampled` says whether rows were chosen by spectral sampling.
    """
    evaluated = np.zeros(n_rows_total, dtype=bool)
    evaluated[table.rows.rows] = True
    rows = np.arange(n_rows_total) if keep_unsampled else table.rows.rows
    # Position of each output row among the evaluated ones; -1 where it was not evaluated.
    position = np.full(n_rows_total, -1)
    position[table.rows.rows] = np.arange(len(table.rows))
    place = position[rows]
    columns: dict[str, Any] = {
        "_orig_row": rows,
        "_sampled": evaluated[rows],
        "_evaluated": evaluated[rows],
        "_spectral_sampled_center": evaluated[rows] & sampled,
        "_role": np.where(place >= 0, table.rows.roles[place], ""),
    }
    masks = {target: table.flips(target) for target in FlipTarget}
    known = table.matrix.known
    for index, neuron in enumerate(table.neurons):
        usable = (place >= 0) & known[index, place]
        for target in FlipTarget:
            column = pd.array(masks[target][index, place], dtype="boolean")
            column[~usable] = pd.NA
            columns[target.column(neuron)] = column
    kept = scores.drop(columns=[name for name in scores.columns if name in columns])
    return pd.concat([kept.iloc[rows].reset_index(drop=True), pd.DataFrame(columns)], axis=1)


def read_flip_table(path: Path, neurons: Sequence[Neuron], main_metric: str) -> FlipTable:
    """A flip table back from a run's `scores.csv`, ours or a published one (which has no roles).

    Rows that were not evaluated are left out. Missing flip columns are an error.
    """
    frame = read_csv(path, "flip table (stage 7)", low_memory=False)
    needed = [main_metric, *(target.column(neuron) for neuron in neurons for target in FlipTarget)]
    missing = [name for name in needed if name not in frame.columns]
    if missing:
        raise UserError(
            f"{path} has no column {', '.join(missing[:3])}{' ...' if len(missing) > 3 else ''}; run stage 7 again"
        )
    flips = np.array([_tristate(frame[FlipTarget.ANY.column(neuron)]) for neuron in neurons], dtype=np.int8)
    evaluated = _tristate(frame["_evaluated"]) == 1 if "_evaluated" in frame else (flips != UNKNOWN).any(axis=0)
    rows = frame["_orig_row"].to_numpy(dtype=int) if "_orig_row" in frame else np.arange(len(frame))
    baseline = _tristate(frame[main_metric]) == 1
    ablated = np.where(flips == UNKNOWN, UNKNOWN, np.where(flips == 1, ~baseline, baseline)).astype(np.int8)
    evaluated_rows = EvaluatedRows(rows, _roles(frame))
    return FlipTable(tuple(neurons), evaluated_rows, FlipMatrix(baseline, ablated, flips == 1)).take(evaluated)


def _roles(frame: pd.DataFrame) -> np.ndarray:
    if "_role" in frame:
        return frame["_role"].fillna("").to_numpy(dtype=object)
    is_test = _tristate(frame["is_test"]) == 1 if "is_test" in frame else np.zeros(len(frame), dtype=bool)
    return np.where(is_test, Role.TEST.value, Role.TRAIN.value).astype(object)


def _tristate(column: pd.Series) -> np.ndarray:
    """Yes/no column as int8 [row]: 1, 0, UNKNOWN where empty; numbers count as yes above a half."""
    words = column.astype("string").str.strip().str.lower()
    numbers = pd.to_numeric(words.replace({"true": "1", "false": "0"}), errors="coerce").to_numpy(dtype=float)
    return np.where(np.isnan(numbers), UNKNOWN, numbers > 0.5).astype(np.int8)


def neurons_of_frame(columns: Sequence[str]) -> list[Neuron]:
    """Neurons whose three flip columns a table has, in column order."""
    present = set(columns)
    found = []
    for name in columns:
        neuron = _neuron_of_key(name.removeprefix("flip_c2i_")) if name.startswith("flip_c2i_") else None
        if neuron and all(target.column(neuron) in present for target in FlipTarget):
            found.append(neuron)
    return found


def _neuron_of_key(key: str) -> Neuron | None:
    """`m5_16` or `a16_h21_7` as a neuron; None for anything else."""
    pieces = key.split("_")
    if len(pieces) in (2, 3) and all(piece.lstrip("mah").isdigit() for piece in pieces):
        return Neuron(".".join(pieces[:-1]), int(pieces[-1]))
    return None


def neuron_statistics(table: FlipTable, extra: pd.DataFrame | None = None) -> pd.DataFrame:
    """`flip_stats_by_neuron.csv`: one row per neuron, most flips first.

    Published columns first (rates over all evaluated rows), then the rates over the rows on which the flip can happen,
    the same counts on held-out rows, the share of changed answers, and the columns of `extra` (keyed by `neuron`).
    """
    masks = {target: table.flips(target) for target in FlipTarget}
    known = table.matrix.known
    is_test = table.rows.is_test
    frame = pd.DataFrame(
        {
            "layer_label": [neuron.layer_label for neuron in table.neurons],
            "layer_key": [neuron.key.rpartition("_")[0] for neuron in table.neurons],
            "neuron_id": [neuron.index for neuron in table.neurons],
            "neuron": [str(neuron) for neuron in table.neurons],
            "n_eval": known.sum(axis=1),
            "c2i_count": masks[FlipTarget.C2I].sum(axis=1),
            "i2c_count": masks[FlipTarget.I2C].sum(axis=1),
            "flip_any_count": masks[FlipTarget.ANY].sum(axis=1),
        }
    )
    for name in ("c2i", "i2c", "flip_any"):
        frame[f"{name}_rate"] = frame[f"{name}_count"] / frame["n_eval"].where(frame["n_eval"] > 0)
    for name in ("c2i", "i2c", "flip_any"):
        frame[f"{name}_pct"] = 100.0 * frame[f"{name}_rate"]
    for target in (FlipTarget.C2I, FlipTarget.I2C):
        frame[f"{target.value}_eligible_rate"] = _rates(masks[target], known & target.eligible(table.baseline))
    frame["test_n_eval"] = (known & is_test).sum(axis=1)
    for target in FlipTarget:
        frame[f"test_flip_{target.value}_count"] = (masks[target] & is_test).sum(axis=1)
        frame[f"test_flip_{target.value}_rate"] = _rates(
            masks[target] & is_test, known & is_test & target.eligible(table.baseline)
        )
    frame["changed_answer_rate"] = _rates(table.matrix.changed, known)
    if extra is not None:
        frame = frame.merge(extra, on="neuron", how="left", validate="one_to_one")
    return frame.sort_values(["flip_any_count", "c2i_count", "i2c_count"], ascending=False, kind="stable").reset_index(
        drop=True
    )


def _rates(hits: np.ndarray, counted: np.ndarray) -> np.ndarray:
    """Hits per counted row of each neuron, [neuron]; NaN without counted rows."""
    n_counted = counted.sum(axis=1)
    return np.where(n_counted > 0, (hits & counted).sum(axis=1) / np.maximum(n_counted, 1), np.nan)


def global_statistics(table: FlipTable) -> dict[str, Any]:
    """`flip_stats_global.json`: sums over neurons and unions over rows, on all evaluated and on held-out rows."""
    return {
        "n_neurons": len(table.neurons),
        "n_evaluated_rows": len(table.rows),
        "n_rows_by_role": table.rows.counts(),
        **_unions(table),
        "test": _unions(table.take(table.rows.is_test)),
    }


def _unions(table: FlipTable) -> dict[str, Any]:
    names = {FlipTarget.C2I: "c2i", FlipTarget.I2C: "i2c", FlipTarget.ANY: "flip_any"}
    n_known = int(table.matrix.known.any(axis=0).sum())
    result: dict[str, Any] = {
        "n_baseline_positive": int(table.baseline.sum()),
        "n_baseline_negative": int((~table.baseline).sum()),
    }
    for target, name in names.items():
        result[f"sum_{name}_counts_over_neurons"] = int(table.flips(target).sum())
    for target, name in names.items():
        union = table.flips(target).any(axis=0)
        eligible = int(target.eligible(table.baseline).sum())
        result[f"union_{name}_unique_count"] = int(union.sum())
        result[f"union_{name}_unique_rate"] = union.sum() / n_known if n_known else float("nan")
        result[f"union_{name}_eligible_rate"] = union.sum() / eligible if eligible else float("nan")
    return result
