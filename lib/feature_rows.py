"""The rows of the feature table: one per prompt, in a fixed order, with labels and groups."""

from __future__ import annotations

import numpy as np
import pandas as pd

from lib.artifacts import json_text
from lib.cli import UserError, rng
from lib.task_spec import FeatureTaskSpec

OWN_COLUMNS = ("row_id", "is_test", "split")
"""Columns that stage 2 adds; a dataset's own of these names get the prefix `dataset_`."""


def prepare_rows(frame: pd.DataFrame, task: FeatureTaskSpec, max_prompts: int, seed: int) -> pd.DataFrame:
    """The rows of the table: prompts once each, in descending order, `row_id` in front.

    `max_prompts` (0: all) draws at random, keeping the share of each label.

    Raises:
        UserError: nothing is left, or a column that the task promises is absent.
    """
    needed = [task.DEFAULT_INPUT, task.DEFAULT_OUTPUT, *task.DEFAULT_TARGETS]
    absent = [name for name in needed if name not in frame.columns]
    if absent:
        raise UserError(f"the cache of answers gives no column {', '.join(absent)}; was it made by the task "
                        f"{task.NAME}?")
    prompts = frame[task.DEFAULT_INPUT]
    frame = frame[prompts.notna() & (prompts != "")].drop_duplicates(task.DEFAULT_INPUT)
    frame = frame.sort_values(task.DEFAULT_INPUT, ascending=False, kind="stable").reset_index(drop=True)
    if 0 < max_prompts < len(frame):
        labels = label_codes(frame, task)
        order = np.lexsort((rng(seed, "stage2", "max_prompts").random(len(frame)), labels))
        picks = (np.arange(max_prompts) * len(frame)) // max_prompts
        frame = frame.iloc[np.sort(order[picks])].reset_index(drop=True)
    if frame.empty:
        raise UserError("the cache of answers holds no prompts; run stage 1 again")
    frame = frame.rename(columns={name: f"dataset_{name}" for name in OWN_COLUMNS if name in frame.columns})
    for name in frame.columns:
        if frame[name].map(lambda value: isinstance(value, dict | list | tuple)).any():
            frame[name] = frame[name].map(lambda value: json_text(value, indent=None))
    frame.insert(0, "row_id", np.arange(len(frame)))
    return frame


def label_codes(frame: pd.DataFrame, task: FeatureTaskSpec) -> np.ndarray:
    """Primary label of each row as 0, 1, or 2 if unknown, int [row]."""
    labels = frame[task.DEFAULT_TARGETS[0]]
    return np.where(labels.isna(), 2, labels.fillna(False).astype(bool).astype(int))


def group_keys(frame: pd.DataFrame, task: FeatureTaskSpec) -> np.ndarray | None:
    """Keys of rows that belong together [row], or None if every row stands alone."""
    return frame[task.GROUP_COLUMN].to_numpy(dtype=str) if task.GROUP_COLUMN else None
