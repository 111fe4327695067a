"""The one reader of stage 2's output: `scores.csv` with its features, split and index spaces."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd

from lib.artifacts import read_csv, read_json
from lib.cli import UserError

if TYPE_CHECKING:
    from lib.task_spec import FeatureTaskSpec

BASELINE_SUBSETS = ("all", "positive", "negative")
_TRUE = {"true", "1", "1.0"}
_FALSE = {"false", "0", "0.0"}
_MISSING = ["", "NA", "N/A", "NaN", "nan", "null", "None", "<NA>"]


def sanitize_label(label: str) -> str:
    """Column name of a feature label: runs of other characters become one underscore, lower case."""
    return re.sub("[^0-9a-zA-Z]+", "_", label).strip("_").lower()


class TableLayout(NamedTuple):
    """Which columns of a feature table hold what, named as in a task: for a table whose task is not at hand."""

    DEFAULT_INPUT: str
    DEFAULT_OUTPUT: str
    DEFAULT_TARGETS: tuple[str, ...]


@dataclass(frozen=True)
class ScoresTable:
    """`scores.csv` in memory.

    frame: all rows in file order; the row number is `original_idx`. Prompts and answers are text (missing is ""),
    targets boolean, features float with missing as 0.
    """

    frame: pd.DataFrame
    prompt_col: str
    output_col: str
    targets: tuple[str, ...]
    feature_names: list[str]
    is_test: np.ndarray
    path: Path

    def __len__(self) -> int:
        return len(self.frame)

    @property
    def primary_target(self) -> str:
        """The label that stages 4 to 7 study."""
        return self.targets[0]

    @property
    def prompts(self) -> list[str]:
        """Prompt of each row."""
        return self.frame[self.prompt_col].tolist()

    @property
    def train_rows(self) -> np.ndarray:
        """Row numbers outside the hold-out."""
        return np.flatnonzero(~self.is_test)

    @property
    def test_rows(self) -> np.ndarray:
        """Row numbers of the hold-out."""
        return np.flatnonzero(self.is_test)

    def features(self, rows: np.ndarray | None = None) -> np.ndarray:
        """Feature matrix [row, feature], float64."""
        frame = self.frame if rows is None else self.frame.iloc[rows]
        return frame[self.feature_names].to_numpy(dtype=float)

    def target(self, name: str | None = None, rows: np.ndarray | None = None) -> np.ndarray:
        """Boolean label [row] of a target (default: the primary one); a row without a label counts as False."""
        frame = self.frame if rows is None else self.frame.iloc[rows]
        return frame[name or self.primary_target].fillna(False).to_numpy(dtype=bool)

    def subset_rows(self, baseline_subset: str) -> np.ndarray:
        """Row numbers of the TRAIN rows of a baseline subset, in order.

        Positions in this array are the index space of sampling plans: `positive` keeps rows whose primary target is
        True, `negative` those where it is False, `all` every TRAIN row.
        """
        if baseline_subset not in BASELINE_SUBSETS:
            raise UserError(f"{baseline_subset!r} is no baseline subset; choose from {', '.join(BASELINE_SUBSETS)}")
        rows = self.train_rows
        if baseline_subset == "all":
            return rows
        labelled = self.frame[self.primary_target].notna().to_numpy()[rows]
        return rows[labelled & (self.target(rows=rows) == (baseline_subset == "positive"))]

    def records(self, rows: np.ndarray) -> list[dict[str, object]]:
        """The rows as dictionaries, the form in which a task scores answers."""
        return self.frame.iloc[rows].to_dict("records")


def load_scores(features_scores_dir: str | Path, task: FeatureTaskSpec | TableLayout) -> ScoresTable:
    """Read `<dir>/scores.csv` and `<dir>/features.json` for a task, or as a layout says.

    Raises:
        UserError: a file is missing or unreadable, a needed column is absent, or a target is not a yes/no column.
    """
    folder = Path(features_scores_dir)
    path = folder / "scores.csv"
    frame = _read_frame(path, (task.DEFAULT_INPUT, task.DEFAULT_OUTPUT))
    needed = [task.DEFAULT_INPUT, *task.DEFAULT_TARGETS]
    missing = [name for name in needed if name not in frame.columns]
    if missing:
        raise UserError(
            f"{path} has no column {', '.join(missing)}; is it a table of this task ({type(task).__name__})?"
        )
    if frame.empty:
        raise UserError(f"{path} has no rows; run stage 2 again")
    for name in task.DEFAULT_TARGETS:
        frame[name] = _as_boolean(frame[name], name, path)
    feature_names = _feature_columns(folder / "features.json", frame, task)
    frame[feature_names] = frame[feature_names].apply(pd.to_numeric, errors="coerce").fillna(0.0).astype(float)
    is_test = np.zeros(len(frame), dtype=bool)
    if "is_test" in frame.columns:
        frame["is_test"] = _as_boolean(frame["is_test"], "is_test", path).fillna(False).astype(bool)
        is_test = frame["is_test"].to_numpy(dtype=bool)
    return ScoresTable(
        frame, task.DEFAULT_INPUT, task.DEFAULT_OUTPUT, tuple(task.DEFAULT_TARGETS), feature_names, is_test, path
    )


def _read_frame(path: Path, text_columns: tuple[str, ...]) -> pd.DataFrame:
    """The table; text columns are taken as they stand, so that the answers "007", "NA" and "" stay themselves."""
    header = read_csv(path, "feature table (stage 2)", nrows=0).columns
    missing = {name: _MISSING for name in header if name not in text_columns}
    types = {name: str for name in text_columns if name in header}
    return read_csv(path, "feature table (stage 2)", dtype=types, keep_default_na=False, na_values=missing)


def _feature_columns(path: Path, frame: pd.DataFrame, task: FeatureTaskSpec | TableLayout) -> list[str]:
    """Columns that hold features, in catalogue order; older catalogues name them by label only."""
    catalogue = read_json(path, "feature catalogue (stage 2)")
    if not isinstance(catalogue, list) or not all(isinstance(item, dict) and "label" in item for item in catalogue):
        raise UserError(f"{path} is not a feature catalogue (a list of objects with a label); run stage 2 again")
    names = [str(item.get("column") or sanitize_label(str(item["label"]))) for item in catalogue]
    reserved = {task.DEFAULT_INPUT, task.DEFAULT_OUTPUT, *task.DEFAULT_TARGETS, "is_test", "split", "row_id"}
    present = [name for name in dict.fromkeys(names) if name in frame.columns and name not in reserved]
    if not present:
        raise UserError(f"none of the features of {path} is a column of scores.csv beside it; run stage 2 again")
    return present


def _as_boolean(column: pd.Series, name: str, path: Path) -> pd.Series:
    """A yes/no column as pandas' nullable boolean; missing stays missing."""
    words = column.astype("string").str.strip().str.lower()
    known = words.isin(_TRUE | _FALSE) | words.isna() | (words == "")
    if not known.all():
        example = column[~known].iloc[0]
        raise UserError(f"column {name} of {path} is not a yes/no column (found {example!r})")
    result = pd.Series(pd.NA, index=column.index, dtype="boolean")
    result[words.isin(_TRUE)] = True
    result[words.isin(_FALSE)] = False
    return result
