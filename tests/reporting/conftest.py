"""A small tree in the published layout for the tests of the reports, and readers that share no code with them."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from lib.artifacts import write_csv
from lib.reporting import models, plots, sensitivity_plots
from tests import published_tree

EMPTY_CELL = ("arithmetic", published_tree.MODELS[1], "fake_targets")


@pytest.fixture(scope="session")
def tree(tmp_path_factory):
    """One task with its five modes on two models, one of whose controls found nothing, and sensitivity runs."""
    return published_tree.build(
        tmp_path_factory.mktemp("tree"),
        tasks=("arithmetic",),
        models=published_tree.MODELS[:2],
        states={EMPTY_CELL: "empty"},
    )


@pytest.fixture
def no_figures(monkeypatch):
    """Figures as their data only: drawing takes most of a report's time, and one run per stage draws them all."""

    def save_data(stem, figure, data):
        write_csv(Path(f"{stem}.csv"), data)
        Path(f"{stem}.pdf").write_bytes(b"%PDF")
        return [Path(f"{stem}.pdf"), Path(f"{stem}.csv")]

    for module in (plots, models, sensitivity_plots):
        monkeypatch.setattr(module, "save_figure", save_data)


def read_rows(path: Path) -> list[dict[str, str]]:
    """A CSV as dictionaries of text."""
    with open(path, newline="") as handle:
        return list(csv.DictReader(handle))


def raw_best(stats: Path, scope: str, floor: float = 0.005, column: str = "MCC") -> dict[str, dict[str, float]]:
    """From the raw table of all scopes: neuron key -> its row with the highest MCC (then F1, BalancedAcc)."""
    best: dict[str, dict] = {}
    for row in read_rows(stats / "rule_combo_metrics_all_scopes.csv"):
        if row["score_scope"] != scope or float(row["dataset_coverage"]) < floor:
            continue
        rank = tuple(float(row[name]) for name in ("MCC", "F1", "BalancedAcc"))
        if row["neuron_key"] not in best or rank > best[row["neuron_key"]]["rank"]:
            best[row["neuron_key"]] = {"rank": rank, **row}
    return best


def raw_union(stats: Path, keys: list[str], direction: str) -> int:
    """Rows of the raw `scores.csv` that one of the neurons flips."""
    return sum(any(row[f"flip_{direction}_{key}"] == "True" for key in keys) for row in read_rows(stats / "scores.csv"))


def number(text: str) -> float:
    """A cell as a number; NaN where it is empty."""
    return float(text) if text else float("nan")


def no_absolute_path(folder: Path) -> None:
    """Nothing below the folder names a place of this machine."""
    for path in folder.rglob("*"):
        if path.suffix in (".json", ".csv", ".md", ".tex"):
            text = path.read_text()
            assert str(folder.parent) not in text and '"/' not in text, path


def provenance(folder: Path) -> dict:
    return json.loads((folder / "provenance.json").read_text())
