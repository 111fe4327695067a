"""Diagnostics of stage 6: tables and figures of each rule's agonists, and of all rules together."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lib.agonist_diagnostics import (
    SIDES,
    Datapoints,
    DiagnosticTables,
    LayerValues,
    UnitValues,
    activation_tables,
    describe,
    margin_tables,
    saliency_correlations,
    saliency_metrics,
    saliency_tables,
)
from lib.artifacts import save_figure, write_csv, write_json
from lib.neurons import Neuron
from lib.stages.agonist_oracle import FlipAnswers
from lib.stages.agonist_rule import RuleFindings

Measure = Callable[[FlipAnswers, np.ndarray, Sequence[Neuron]], tuple[np.ndarray, list[LayerValues]]]
"""(answers, datapoints, neurons) -> positions of the measured datapoints, values per neuron."""
KINDS = ("activation", "margin", "saliency")


class AgonistDiagnosis:
    """Writes the diagnostics that the flags ask for; `outputs` are the files written so far."""

    def __init__(self, args: Namespace, folder: Path, measure: Measure) -> None:
        self.kinds = [kind for kind in KINDS if not getattr(args, f"skip_agonist_{kind}_stats")]
        self.metrics = saliency_metrics(args.agonist_saliency_metrics)
        self.folder, self.measure = folder, measure
        self.outputs: list[Path] = []
        self._tables: dict[str, list[DiagnosticTables]] = {kind: [] for kind in self.kinds}

    def diagnose_rule(self, findings: RuleFindings, rule_path: Path) -> dict[str, Any]:
        """Measure a rule's agonists and write their files beside its own; the keys that its file gains."""
        blocks: dict[str, Any] = dict.fromkeys(f"agonist_{kind}_stats" for kind in KINDS)
        units, points = self._measured(findings)
        if not units or not len(points.sides):
            return blocks
        for kind in self.kinds:
            tables = {
                "activation": lambda: activation_tables(units, points),
                "margin": lambda: margin_tables(units, points),
                "saliency": lambda: saliency_tables(units, points, self.metrics),
            }[kind]()
            self._tables[kind].append(tables)
            stem = rule_path.with_name(f"{rule_path.stem}_agonist_{kind}")
            blocks[f"agonist_{kind}_stats"] = describe(tables, kind) | {"files": self._write(stem, kind, tables)}
        return blocks

    def write_overall(self) -> None:
        """Write activation and saliency of all rules' agonists together; nothing where there are none."""
        for kind in ("activation", "saliency"):
            parts = self._tables.get(kind, [])
            if not parts:
                continue
            summary = pd.concat([part.summary for part in parts], ignore_index=True)
            raw = pd.concat([part.raw for part in parts], ignore_index=True)
            found = saliency_correlations(summary) if kind == "saliency" else None
            tables = DiagnosticTables(raw, summary, found)
            stem = self.folder / f"agonist_{kind}"
            files = self._write(stem, kind, tables)
            write_json(Path(f"{stem}_stats.json"), describe(tables, kind) | {"files": files})
            self.outputs.append(Path(f"{stem}_stats.json"))

    def _measured(self, findings: RuleFindings) -> tuple[list[UnitValues], Datapoints]:
        """The kept agonists on the rule's search datapoints."""
        slices, circuit = findings.rule.slices, findings.rule.circuit
        datapoints = np.concatenate([use.search for use in slices])
        kept = np.zeros(0, dtype=int)
        values: list[LayerValues] = []
        neurons = [circuit.neurons[agonist.candidate] for agonist in findings.kept]
        if neurons and self.kinds:
            kept, values = self.measure(findings.rule.oracle.answers, datapoints, neurons)
        records = dict(findings.singles())
        units = [
            UnitValues(circuit.circuit_id, neuron, records[agonist.candidate], value)
            for agonist, neuron, value in zip(findings.kept, neurons, values, strict=False)
        ]
        sides = np.repeat(SIDES, [len(use.search) for use in slices])
        local_index = np.concatenate([np.arange(len(use.search)) for use in slices])
        points = Datapoints(sides[kept], local_index[kept], findings.rule.oracle.rows[datapoints[kept]])
        return units, points

    def _write(self, stem: Path, kind: str, tables: DiagnosticTables) -> dict[str, str]:
        """Write a kind's tables and figure; their names by role."""
        # A finished stage that is only summarised draws nothing: the plotting library is loaded on first need.
        from lib.agonist_diagnostic_plots import draw

        written = {"raw_csv": tables.raw, "summary_csv": tables.summary}
        if tables.correlations is not None and len(tables.correlations):
            written["correlations_csv"] = tables.correlations
        files = {}
        for role, frame in written.items():
            path = Path(f"{stem}_{role.removesuffix('_csv')}.csv")
            write_csv(path, frame)
            self.outputs.append(path)
            files[role] = path.name
        paths = save_figure(f"{stem}_stats", *draw(kind, tables.summary))
        self.outputs += paths
        return files | {"plot_png": next(path.name for path in paths if path.suffix == ".png")}
