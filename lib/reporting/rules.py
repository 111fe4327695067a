"""Rule rows of a run: the one loader that every comparison and table uses."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.reporting.artifacts import Reading, RunFolder, Status, read_table
from lib.reporting.scopes import Scope

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

DEFAULT_MIN_COVERAGE = 0.005
DEFAULT_THRESHOLD = 0.7
METRIC_COLUMNS = {"mcc": "MCC", "f1": "F1", "balanced_accuracy": "BalancedAcc", "tpr": "TPR", "tnr": "TNR"}
_SORT_COLUMNS = ("MCC", "F1", "BalancedAcc")


def load_rule_rows(run: RunFolder, scope: Scope, min_coverage: float = DEFAULT_MIN_COVERAGE) -> Reading[pd.DataFrame]:
    """All rule rows of a run in a scope, after the coverage floor.

    EMPTY: the run finished and has no such rows, which counts as zero. MISSING: nothing says so; it counts as unknown.
    Scopes other than `test` need a manifest of the known signature: older files held something else under that name.
    """
    if not run.exists:
        return Reading(Status.MISSING, reason="no such run folder", path=run.path)
    if scope.needs_manifest and not run.manifest.is_usable:
        reason = f"manifest {run.manifest.status.value}: {run.manifest.reason}"
        return Reading(run.manifest.status, reason=reason, path=run.manifest.path)
    broken: Reading[pd.DataFrame] | None = None
    for path, is_of_scope in _candidates(run, scope):
        reading = read_table(path)
        if reading.status is Status.INVALID:
            broken = broken or reading
        if not reading.is_usable or reading.value is None:
            continue
        rows = _of_scope(reading.value, scope)
        if rows.empty and not _proves_absence(run, scope, reading, is_of_scope):
            continue
        kept = _covering(rows, min_coverage).reset_index(drop=True)
        return Reading(Status.OK if len(kept) else Status.EMPTY, kept, path=path)
    return broken or _without_tables(run, scope)


def _candidates(run: RunFolder, scope: Scope) -> list[tuple[Path, bool]]:
    """(file, whether it is of this scope alone), best first."""
    names = [(f"rule_combo_metrics_{scope.slug}_all.csv", True), ("rule_combo_metrics_all_scopes.csv", False)]
    if scope is Scope.TEST:
        names.append(("rule_combo_metrics_all.csv", True))
    names.append((f"rule_combo_metrics_{scope.slug}_best_per_neuron.csv", True))
    if scope is Scope.TEST:
        names.append(("rule_combo_metrics_best_per_neuron.csv", True))
    return [(run.path / name, alone) for name, alone in names]


def _proves_absence(run: RunFolder, scope: Scope, reading: Reading[pd.DataFrame], is_of_scope: bool) -> bool:
    """Whether a table without rows of the scope says that there are none, not that the scope was not emitted."""
    if is_of_scope and reading.status is Status.EMPTY:
        return True
    if is_of_scope:
        return False
    return reading.status is Status.EMPTY or scope is Scope.TEST or scope.slug in _scopes_written(run)


def _scopes_written(run: RunFolder) -> list[str]:
    return list((run.manifest.value or {}).get("score_scopes_written") or [])


def _without_tables(run: RunFolder, scope: Scope) -> Reading[pd.DataFrame]:
    """The status of a run that has no table of a scope: older stage 7 wrote none where there were no rows."""
    import pandas as pd

    n_raw = (run.manifest.value or {}).get("n_raw_rule_combo_files")
    n_neurons = (run.flip_global.value or {}).get("n_neurons")
    n_ruled = (run.summary(scope).value or {}).get("n_neurons_with_rules")
    if 0 in (n_raw, n_neurons, n_ruled):
        return Reading(Status.EMPTY, pd.DataFrame(), path=run.path)
    return Reading(Status.MISSING, reason=f"no rule table of scope {scope.slug}", path=run.path)


def _of_scope(frame: pd.DataFrame, scope: Scope) -> pd.DataFrame:
    """Rows of a scope: by the raw file's name, else by column, else all if the scope is `test`. TRAIN rows go."""
    import pandas as pd

    column = next((name for name in ("score_scope", "computed_on") if name in frame), None)
    if column is not None:
        stated = frame[column].astype("string").str.strip().str.lower().replace({"eval": "test"})
    else:
        stated = pd.Series("test", index=frame.index, dtype="string")
    keep = stated == scope.slug
    names = _file_names(frame)
    if names is not None:
        from_name = _scope_of_file(names)
        keep = (from_name == scope.slug).where(from_name != "", keep)
    if "flip_target" in frame:
        keep &= ~frame["flip_target"].astype("string").str.startswith("train_").fillna(False)
    return frame[keep.fillna(False).astype(bool)]


def _file_names(frame: pd.DataFrame) -> pd.Series | None:
    """Name of each row's raw file."""
    for name in ("source_filename", "rule_combo_path", "source_file", "path", "file"):
        if name in frame:
            return frame[name].astype("string").fillna("").str.replace("\\", "/").str.rsplit("/", n=1).str[-1]
    return None


def _scope_of_file(names: pd.Series) -> pd.Series:
    """Scope that a raw file's name states: `train` also for obsolete files, "" for anything else."""
    scope = names.where(names == "", "").astype("string")
    for prefix, value in (
        ("rule_combo_", "test"),
        ("rule_combo_train_", "train"),
        ("rule_combo_test_selected_", "test_selected"),
        ("rule_combo_all_fit_", "all_fit"),
    ):
        scope = scope.mask(names.str.startswith(prefix).fillna(False), value)
    return scope


def _covering(frame: pd.DataFrame, min_coverage: float) -> pd.DataFrame:
    """Rows whose rule covers enough of the datapoints; without a floor or a coverage column, all."""
    import pandas as pd

    column = next((name for name in ("dataset_coverage", "coverage") if name in frame), None)
    if min_coverage <= 0 or column is None:
        return frame
    return frame[pd.to_numeric(frame[column], errors="coerce") >= min_coverage]


def best_per_neuron(rows: pd.DataFrame, scope: Scope = Scope.TEST) -> pd.DataFrame:
    """The row that speaks for each neuron: highest MCC, then F1, then balanced accuracy.

    Held-out rows of runs that say which target was chosen on TRAIN speak through that one: taking the best of a
    neuron's targets there would be choosing on TEST. Published runs do not say it; there the best one counts.
    """
    if rows.empty:
        return rows
    if scope is Scope.TEST and "chosen_on_train" in rows:
        rows = rows[rows["chosen_on_train"].astype("string").str.lower().isin(["true", "1", "1.0"])]
    by = [name for name in _SORT_COLUMNS if name in rows]
    ranked = rows.sort_values(by, ascending=False, kind="stable", na_position="last") if by else rows
    return _identified(ranked).drop_duplicates(["layer_key", "neuron_id"]).reset_index(drop=True)


def _identified(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows with `layer_key` and an integer `neuron_id`, from `neuron_key` where these are absent.

    Raises:
        KeyError: a row names no neuron.
    """
    import pandas as pd

    if not {"layer_key", "neuron_id"} <= set(rows.columns):
        if "neuron_key" not in rows:
            raise KeyError("rule rows name no neuron: expected layer_key and neuron_id, or neuron_key")
        parts = rows["neuron_key"].astype("string").str.rpartition("_")
        rows = rows.assign(layer_key=parts[0], neuron_id=parts[2])
    ids = pd.to_numeric(rows["neuron_id"], errors="coerce")
    if not ((ids >= 0) & (ids < 2**31)).all() or rows["layer_key"].isna().any():
        raise KeyError("a rule row names no neuron: its layer_key or neuron_id is not readable")
    return rows.assign(neuron_id=ids.astype(int))


def load_best_rows(run: RunFolder, scope: Scope, min_coverage: float = DEFAULT_MIN_COVERAGE) -> Reading[pd.DataFrame]:
    """`load_rule_rows`, one row per neuron."""
    reading = load_rule_rows(run, scope, min_coverage)
    if reading.value is None:
        return reading
    try:
        best = best_per_neuron(reading.value, scope)
    except KeyError as error:
        return Reading(Status.INVALID, reason=str(error.args[0]), path=reading.path)
    return Reading(Status.OK if len(best) else Status.EMPTY, best, path=reading.path)


def neuron_keys(best: pd.DataFrame) -> list[str]:
    """The neurons' spelling in column names (`m12_345`), row by row."""
    if best.empty:
        return []
    return [f"{layer}_{index}" for layer, index in zip(best["layer_key"], best["neuron_id"], strict=True)]


def metric_values(best: pd.DataFrame, column: str = "MCC") -> np.ndarray:
    """A column as numbers [neuron]; NaN where it is not one."""
    import numpy as np
    import pandas as pd

    if best.empty or column not in best:
        return np.full(len(best), np.nan)
    return pd.to_numeric(best[column], errors="coerce").to_numpy(dtype=float)


def hq_count(best: pd.DataFrame, threshold: float = DEFAULT_THRESHOLD, column: str = "MCC") -> int:
    """High-quality neurons: those whose row reaches the threshold."""
    return int((metric_values(best, column) >= threshold).sum())


def optional_int(value: Any) -> int | None:
    """A count from JSON: None where there is none, so that zero and missing stay apart."""
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
        return None
    return int(value)
