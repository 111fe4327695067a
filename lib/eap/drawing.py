"""Pictures of a circuit: a map of layers by components, and a graph where Graphviz is installed."""

from __future__ import annotations

import shutil
import subprocess
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd

from lib.artifacts import atomic_write, save_figure
from lib.eap.circuits import Circuit, CircuitLevel, ScoreTable

_MOST_GRAPH_EDGES = 200


def draw_circuit(folder: Path, table: ScoreTable, circuit: Circuit, title: str) -> list[Path]:
    """Write `circuit_map.{pdf,png,csv}`, `circuit.dot` and, with Graphviz, `circuit.svg`; returns the files."""
    files = draw_map(folder / "circuit_map", table, circuit, title)
    dot = folder / "circuit.dot"
    with atomic_write(dot) as handle:
        handle.write(graph_text(circuit))
    files.append(dot)
    if shutil.which("dot"):
        picture = folder / "circuit.svg"
        subprocess.run(["dot", "-Tsvg", str(dot), "-o", str(picture)], check=True, timeout=120)
        files.append(picture)
    return files


def component_table(table: ScoreTable, circuit: Circuit) -> pd.DataFrame:
    """One row per component: layer, component (h0, h1, ..., mlp), sum of absolute scores, units in the circuit."""
    layout = table.layout
    units = Counter(circuit.rows.tolist())
    rows = []
    for row in range(1, layout.n_rows):
        scores = table.values[row]
        if np.isnan(scores).all():
            continue
        layer, place = divmod(row - 1, layout.n_heads + 1)
        name = "mlp" if place == layout.n_heads else f"h{place}"
        total = float(np.nansum(np.abs(scores)))
        rows.append({"layer": layer, "component": name, "absolute_score": total, "n_units": units[row]})
    return pd.DataFrame(rows)


def draw_map(stem: Path, table: ScoreTable, circuit: Circuit, title: str) -> list[Path]:
    """Layers (up) by components (across); colour is the sum of absolute scores, the number counts chosen units."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    data = component_table(table, circuit)
    names = list(dict.fromkeys(data["component"]))
    names.sort(key=lambda name: (name == "mlp", int(name[1:]) if name != "mlp" else 0))
    grid = data.pivot(index="layer", columns="component", values="absolute_score")[names]
    counts = data.pivot(index="layer", columns="component", values="n_units")[names]
    figure, axes = plt.subplots(figsize=(1.6 + 0.5 * len(names), 1.2 + 0.22 * len(grid)))
    image = axes.imshow(grid.to_numpy(), origin="lower", aspect="auto", cmap="Blues")
    middle = np.nanmax(grid.to_numpy()) / 2
    for (row, column), count in np.ndenumerate(counts.to_numpy()):
        if count:
            colour = "white" if grid.to_numpy()[row, column] > middle else "black"
            axes.text(column, row, int(count), ha="center", va="center", fontsize=6, color=colour)
    axes.set_xticks(range(len(names)), names)
    axes.set_yticks(range(len(grid)), [f"{layer}" for layer in grid.index], fontsize=6)
    axes.set_ylabel("layer")
    axes.set_title(title, fontsize=8)
    figure.colorbar(image, label="sum of |score|")
    return save_figure(stem, figure, data)


def graph_text(circuit: Circuit) -> str:
    """The circuit in Graphviz's language: its strongest edges, or its components in the order of layers."""
    layout = circuit.layout
    lines = ["digraph circuit {", "  rankdir=BT; node [shape=box, fontname=Helvetica];"]
    if circuit.level is CircuitLevel.EDGE:
        largest = float(np.abs(circuit.scores).max(initial=0.0)) or 1.0
        for index, score in list(zip(circuit.indices.tolist(), circuit.scores, strict=True))[:_MOST_GRAPH_EDGES]:
            row, column = divmod(index, circuit.width)
            target, _, reader = layout.column_label(column).partition("<")
            colour, width = ("red" if score > 0 else "blue"), 0.5 + 3 * abs(score) / largest
            lines.append(f'  "{layout.label(row)}" -> "{target}" [label="{reader.rstrip(">")}", color={colour}, '
                         f"penwidth={width:.2f}];")  # fmt: skip
    else:
        units = Counter(circuit.rows.tolist())
        ordered = sorted(units)
        lines += [f'  "{layout.label(row)}" [label="{layout.label(row)}\\n{units[row]} units"];' for row in ordered]
        names = [f'"{layout.label(row)}"' for row in ordered]
        lines += [f"  {left} -> {right} [style=invis];" for left, right in zip(names, names[1:], strict=False)]
    return "\n".join([*lines, "}"]) + "\n"
