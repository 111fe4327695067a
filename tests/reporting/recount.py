"""Figures of the tables counted again from what stages 6 and 7 wrote, without any code of the reports."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from tests.reporting.conftest import read_rows


def fires(expression: str, row: dict[str, str]) -> bool:
    """Whether a rule holds for a row of the feature table."""
    words = expression.replace("(", " ").replace(")", " ").split()
    values = {name: _number(row[name]) for name in words if name in row}
    return bool(eval(expression.replace(" OR ", " or ").replace("&", " and "), {"__builtins__": {}}, values))


def _number(text: str) -> float:
    return {"True": 1.0, "False": 0.0}[text] if text in ("True", "False") else float(text)


def correlation(pairs: list[tuple[bool, bool]]) -> float:
    """MCC of (rule holds, neuron flips) pairs, by its definition."""
    tp, fp, fn, tn = (pairs.count(pair) for pair in ((True, True), (True, False), (False, True), (False, False)))
    below = math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    return (tp * tn - fp * fn) / below if below else 0.0


def quality(stats: Path, scope: str) -> dict[str, float]:
    """MCC of each neuron's rule in a scope, from the rule's text and the flips of the run."""
    rows = read_rows(stats / "scores.csv")
    found: dict[str, float] = {}
    for rule in read_rows(stats / "rule_combo_metrics_all_scopes.csv"):
        if rule["score_scope"] != scope or (scope == "test" and rule["chosen_on_train"] != "True"):
            continue
        kind = rule["flip_target"].removeprefix("flip_").split("_")[0]
        eligible = {"c2i": {"True"}, "i2c": {"False"}}.get(kind, {"True", "False"})
        used = [row for row in rows if row["is_correct"] in eligible and (scope != "test" or row["is_test"] == "True")]
        pairs = [(fires(rule["expression"], row), row[rule["flip_target"]] == "True") for row in used]
        assert len(pairs) == int(float(rule["n_eval"]))
        assert float(rule["MCC"]) == pytest.approx(correlation(pairs), abs=1e-9)
        found[rule["neuron_key"]] = max(found.get(rule["neuron_key"], -1.0), correlation(pairs))
    return found


def n_high(stats: Path, scope: str, threshold: float = 0.7) -> int:
    """Neurons whose rule reaches the threshold."""
    return sum(value >= threshold for value in quality(stats, scope).values())


def flips(stats: Path, direction: str, keys: list[str] | None = None) -> tuple[int, int]:
    """(rows that some neuron flips, rows on which that is possible)."""
    rows = read_rows(stats / "scores.csv")
    known = [name[len("flip_c2i_") :] for name in rows[0] if name.startswith("flip_c2i_")]
    wanted = [f"flip_{direction}_{key}" for key in (known if keys is None else keys)]
    eligible = {"c2i": "True", "i2c": "False"}[direction]
    hit = sum(any(row[name] == "True" for name in wanted) for row in rows)
    return hit, sum(row["is_correct"] == eligible for row in rows)


def searched(detail: dict) -> int:
    """Group tests of the search, without those of its audit."""
    return sum(not record.get("audit", False) for record in detail["ablations"])
