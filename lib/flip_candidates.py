"""Stage 7's candidates: single neurons that stage 6 found, read from every `neuron_buckets.json` of a run.

Each entry read is kept or rejected with a named reason; the kept ones have a total order, strongest first.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lib.artifacts import expecting
from lib.cli import UserError
from lib.neurons import Neuron, parse_neuron
from lib.zip_files import open_zip

if TYPE_CHECKING:
    from lib.scores_table import ScoresTable

BUCKETS_NAME = "neuron_buckets.json"
_NOT_RULE_FILES = {BUCKETS_NAME, "neuron_bucket_stats.json", "rule_knockout.json"}
_SAMPLED = re.compile(r"(?:sampled|confirmation)_(?:associated|unrelated)_(original_idx|indices)\Z")
_PLANNED = re.compile(r"(?:associated|unrelated)_(original_idx|indices)\Z")


class CatastrophicPolicy(Enum):
    """What to do with neurons whose ablation flips every datapoint: their flips say nothing a rule could say."""

    KEEP = "keep"
    """Treat them like any other agonist."""

    DROP_CONFIRMED = "drop_confirmed"
    """Leave out those that a second look confirmed."""

    DROP_ALL = "drop_all"
    """Leave out confirmed ones and mere suspects, as the published version does."""


_DROPPED_BUCKETS = {
    CatastrophicPolicy.KEEP: (),
    CatastrophicPolicy.DROP_CONFIRMED: ("confirmed",),
    CatastrophicPolicy.DROP_ALL: ("confirmed", "not_always", "candidates"),
}


class Verdict(Enum):
    """Whether a candidate is analysed, and if not, why."""

    KEPT = "kept"
    CATASTROPHIC = "catastrophic"
    NO_EFFECT_RECORDED = "no_effect_recorded"
    BELOW_EPSILON = "below_search_epsilon"
    BELOW_CONFIRMED_RATE = "below_min_confirmed_rate"
    BEYOND_MAX_NEURONS = "beyond_max_neurons"


@dataclass(frozen=True)
class CandidateFilter:
    """The explicit conditions a candidate must meet."""

    search_epsilon: float = 0.2
    """Smallest |max_effect|: stage 6's upper bound of the flip rate, its acceptance threshold."""
    min_confirmed_rate: float = 0.0
    """Smallest flip rate confirmed on fresh datapoints, where stage 6 has one."""
    catastrophic: CatastrophicPolicy = CatastrophicPolicy.DROP_CONFIRMED
    max_neurons: int | None = None
    """Keep this many of the strongest."""


@dataclass(frozen=True)
class Candidate:
    """What stage 6 says about one neuron; rates are of the regime in which it is strongest."""

    neuron: Neuron
    regimes: tuple[str, ...]
    max_effect: float
    observed_rate: float
    confirmed_rate: float
    confirmed_low: float
    confirmed_high: float
    catastrophic: str

    @property
    def strength(self) -> float:
        """The best estimate of its effect at hand: the confirmed rate, else the observed one, else the upper bound."""
        estimates = (self.confirmed_rate, self.observed_rate, abs(self.max_effect))
        return next((value for value in estimates if not math.isnan(value)), math.nan)

    @property
    def order(self) -> tuple[float, float, tuple[int, bool, int, int]]:
        """Sort key of the total order: strongest first, then larger bound, then by place in the network."""
        return (-_or_zero(self.strength), -abs(_or_zero(self.max_effect)), self.neuron.sort_key)

    def verdict(self, wanted: CandidateFilter) -> Verdict:
        """Judge this candidate alone; the limit on their number is applied by `select_candidates`."""
        if self.catastrophic in _DROPPED_BUCKETS[wanted.catastrophic]:
            return Verdict.CATASTROPHIC
        if math.isnan(self.max_effect):
            return Verdict.NO_EFFECT_RECORDED
        if abs(self.max_effect) < wanted.search_epsilon:
            return Verdict.BELOW_EPSILON
        if self.confirmed_rate < wanted.min_confirmed_rate:
            return Verdict.BELOW_CONFIRMED_RATE
        return Verdict.KEPT

    def to_json(self) -> dict[str, Any]:
        """The row of `candidates.csv`, without the verdict."""
        return {
            "neuron": str(self.neuron),
            "layer_label": self.neuron.layer_label,
            "neuron_id": self.neuron.index,
            "regimes": "+".join(self.regimes),
            "strength": self.strength,
            "max_effect": self.max_effect,
            "observed_rate": self.observed_rate,
            "confirmed_rate": self.confirmed_rate,
            "confirmed_low": self.confirmed_low,
            "confirmed_high": self.confirmed_high,
            "catastrophic": self.catastrophic,
        }


def read_candidates(path: str | Path) -> list[Candidate]:
    """Every neuron in any `neuron_buckets.json` below a folder or in a zip, united over files, strongest first.

    Raises:
        UserError: the path is neither folder nor zip, holds no buckets file, or one that cannot be understood.
    """
    files = [(name, data) for name, data in _json_files(path) if name.rpartition("/")[2] == BUCKETS_NAME]
    if not files:
        raise UserError(f"no {BUCKETS_NAME} below {path}; run stage 6 first")
    united: dict[Neuron, Candidate] = {}
    for name, data in files:
        with expecting("a file of agonists (stage 6)", name):
            found = list(_bucket_candidates(_parse(data, name), name))
        for candidate in found:
            known = united.get(candidate.neuron)
            united[candidate.neuron] = candidate if known is None else _unite(known, candidate)
    return sorted(united.values(), key=lambda candidate: candidate.order)


def select_candidates(candidates: list[Candidate], wanted: CandidateFilter) -> list[tuple[Candidate, Verdict]]:
    """Each candidate, in order, with its verdict."""
    judged, n_kept = [], 0
    for candidate in sorted(candidates, key=lambda item: item.order):
        verdict = candidate.verdict(wanted)
        if verdict is Verdict.KEPT and wanted.max_neurons is not None and n_kept >= wanted.max_neurons:
            verdict = Verdict.BEYOND_MAX_NEURONS
        n_kept += verdict is Verdict.KEPT
        judged.append((candidate, verdict))
    return judged


def discovery_rows(sources: Iterable[str | Path], table: ScoresTable) -> np.ndarray:
    """Rows of `scores.csv` that earlier stages used to find the neurons, sorted.

    Read from the rule files of stage 6 (searched on, or confirmed on) and the sampling plans of stage 4: their
    `*_original_idx` lists, or in older files `*_indices` lists, which count the TRAIN rows of the baseline subset.
    """
    found: set[int] = set()
    for source in sources:
        for name, data in _json_files(source):
            if name.rpartition("/")[2] in _NOT_RULE_FILES or not (b"_original_idx" in data or b"_indices" in data):
                continue
            with expecting("a file that names datapoints (stages 4 to 6)", name):
                found.update(_rows_named(_parse(data, name), name, table))
    rows = np.array(sorted(found), dtype=int)
    if rows.size and not 0 <= rows[0] <= rows[-1] < len(table):
        raise UserError(
            f"discovery rows {rows[0]}..{rows[-1]} lie outside {table.path} ({len(table)} rows); "
            "were stages 4 to 6 run on another table?"
        )
    return rows


def _json_files(path: str | Path) -> Iterator[tuple[str, bytes]]:
    """(name, content) of a JSON file, of all below a folder, or of all in a zip, in name order."""
    path = Path(path)
    if path.is_dir():
        for file in sorted(path.rglob("*.json")):
            yield file.as_posix(), file.read_bytes()
    elif path.suffix.lower() == ".zip" and path.is_file():
        yield from _zipped_json_files(path)
    elif path.is_file():
        yield path.as_posix(), path.read_bytes()
    else:
        raise UserError(f"{path} is neither a folder nor a .zip file; give the output folder of stage 6")


def _zipped_json_files(path: Path) -> Iterator[tuple[str, bytes]]:
    with open_zip(path) as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".json") and "__MACOSX" not in name)
        for name in names:
            yield f"{path.as_posix()}/{name}", archive.read(name)


def _parse(data: bytes, name: str) -> Any:
    try:
        return json.loads(data, parse_constant=lambda _: None)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name} is not readable JSON ({error}); run stage 6 again") from None


def _bucket_candidates(buckets: Any, name: str) -> Iterator[Candidate]:
    """The agonists of one buckets file, flagged with the catastrophic bucket they are also in."""
    if not isinstance(buckets, dict) or not isinstance(buckets.get("non_catastrophic_agonists"), dict):
        raise UserError(f"{name} has no non_catastrophic_agonists; is it a file of stage 6?")
    catastrophic = buckets.get("catastrophic_zero") or {}
    flags = {
        key: bucket for bucket in ("candidates", "not_always", "confirmed") for key in catastrophic.get(bucket) or {}
    }
    for key, entry in sorted(buckets["non_catastrophic_agonists"].items()):
        record = entry.get("last_record") or {}
        regime = str(record.get("baseline_subset") or "all")
        yield Candidate(
            neuron=parse_neuron(key),
            regimes=(regime,),
            max_effect=_number(record, "max_effect"),
            observed_rate=_number(record, "observed_rate"),
            confirmed_rate=_number(record, "confirmed_rate"),
            confirmed_low=_number(record, "confirmed_low"),
            confirmed_high=_number(record, "confirmed_high"),
            catastrophic=flags.get(key, ""),
        )


def _unite(first: Candidate, second: Candidate) -> Candidate:
    """One candidate out of two regimes: the stronger one's numbers, the gravest flag, both regimes."""
    strongest = min(first, second, key=lambda candidate: (candidate.order, candidate.regimes))
    gravity = ("", "candidates", "not_always", "confirmed")
    return replace(
        strongest,
        regimes=tuple(sorted({*first.regimes, *second.regimes})),
        catastrophic=max(first.catastrophic, second.catastrophic, key=gravity.index),
    )


def _number(record: dict[str, Any], key: str) -> float:
    value = record.get(key)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def _or_zero(value: float) -> float:
    return 0.0 if math.isnan(value) else value


def _rows_named(value: Any, name: str, table: ScoresTable, subset: str | None = None) -> Iterator[int]:
    """Original rows in the sampled (else planned) index lists of a JSON value, at any depth."""
    if isinstance(value, list):
        for item in value:
            if isinstance(item, dict | list):
                yield from _rows_named(item, name, table, subset)
        return
    if not isinstance(value, dict):
        return
    subset = value.get("baseline_subset") or subset or _subset_of_path(name)
    pattern = _SAMPLED if any(_SAMPLED.match(key) for key in value) else _PLANNED
    kinds = {match[1] for key in value if (match := pattern.match(key))}
    kind = "original_idx" if "original_idx" in kinds else "indices"
    for key, item in value.items():
        match = pattern.match(key)
        if match is None:
            yield from _rows_named(item, name, table, subset)
        elif match[1] == kind and isinstance(item, list):
            yield from (
                int(row) for row in (item if kind == "original_idx" else _original_rows(item, subset, name, table))
            )


def _subset_of_path(name: str) -> str:
    """`positive` or `negative` if a folder or file name of the path says so, else `all`."""
    match = re.search(r"(positive|negative)_baseline|baseline_(positive|negative)", name)
    return (match[1] or match[2]) if match else "all"


def _original_rows(positions: list[int], subset: str, name: str, table: ScoresTable) -> np.ndarray:
    rows = table.subset_rows(subset)
    if positions and not 0 <= min(positions) <= max(positions) < len(rows):
        raise UserError(
            f"{name} names {subset} training rows up to {max(positions)}, but {table.path} has {len(rows)}; "
            "were stages 4 to 6 run on another table?"
        )
    return rows[np.asarray(positions, dtype=int)]
