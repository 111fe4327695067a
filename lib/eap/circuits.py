"""Choosing a circuit from scores: which units, in which order, under the names that files use."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np


class CircuitLevel(Enum):
    """What a unit of a circuit is."""

    NEURON = "neuron"
    """One coordinate of a component's write."""

    NODE = "node"
    """A component: an MLP or an attention head."""

    EDGE = "edge"
    """A component's write as one reader of the stream sees it."""


@dataclass(frozen=True)
class Layout:
    """Numbering of a model's components: `input`, then layer by layer the heads and the MLP."""

    n_layers: int
    n_heads: int
    d_model: int
    d_head: int
    is_parallel: bool

    @property
    def n_rows(self) -> int:
        """Components that write, `input` included."""
        return 1 + self.n_layers * (self.n_heads + 1)

    def mlp_row(self, layer: int) -> int:
        """Number of a layer's MLP."""
        return 1 + layer * (self.n_heads + 1) + self.n_heads

    def head_row(self, layer: int, head: int) -> int:
        """Number of an attention head."""
        return 1 + layer * (self.n_heads + 1) + head

    def label(self, row: int) -> str:
        """`input`, `a3.h1` or `m3`."""
        if row == 0:
            return "input"
        layer, place = divmod(row - 1, self.n_heads + 1)
        return f"m{layer}" if place == self.n_heads else f"a{layer}.h{place}"

    @property
    def n_columns(self) -> int:
        """Readers of the stream: query, key and value of each head, each MLP, the logits."""
        return self.n_layers * (3 * self.n_heads + 1) + 1

    def reader_columns(self, kind: str, layer: int) -> slice:
        """Numbers of the readers of one kind: "q", "k", "v" (all heads of the layer), "m", or "logits"."""
        if kind == "logits":
            return slice(self.n_columns - 1, self.n_columns)
        start = layer * (3 * self.n_heads + 1)
        if kind == "m":
            return slice(start + 3 * self.n_heads, start + 3 * self.n_heads + 1)
        start += self.n_heads * "qkv".index(kind)
        return slice(start, start + self.n_heads)

    def column_label(self, column: int) -> str:
        """`a3.h1<q>`, `m3` or `logits`."""
        layer, place = divmod(column, 3 * self.n_heads + 1)
        if layer == self.n_layers:
            return "logits"
        if place == 3 * self.n_heads:
            return f"m{layer}"
        reader, head = divmod(place, self.n_heads)
        return f"a{layer}.h{head}<{'qkv'[reader]}>"

    def edges(self) -> np.ndarray:
        """Which component writes before which reader reads, [component row, reader column] bool."""
        exists = np.zeros((self.n_rows, self.n_columns), dtype=bool)
        exists[:, -1] = True
        for layer in range(self.n_layers):
            before = self.head_row(layer, 0)
            columns = slice(self.reader_columns("q", layer).start, self.reader_columns("v", layer).stop)
            exists[:before, columns] = True
            exists[: before if self.is_parallel else self.mlp_row(layer), self.reader_columns("m", layer)] = True
        return exists

    def is_mlp(self) -> np.ndarray:
        """[row] bool."""
        rows = np.arange(self.n_rows)
        return (rows > 0) & ((rows - 1) % (self.n_heads + 1) == self.n_heads)

    def out_degrees(self) -> np.ndarray:
        """Edges from each component to a later input (a head's query, key or value; an MLP; the logits), [row]."""
        n_inputs_per_layer = 3 * self.n_heads + 1
        degrees = np.empty(self.n_rows, dtype=np.int64)
        degrees[0] = self.n_layers * n_inputs_per_layer + 1
        for layer in range(self.n_layers):
            later = (self.n_layers - 1 - layer) * n_inputs_per_layer + 1
            degrees[self.head_row(layer, 0) : self.mlp_row(layer)] = later + (0 if self.is_parallel else 1)
            degrees[self.mlp_row(layer)] = later
        return degrees


@dataclass(frozen=True)
class ScoreTable:
    """Scores of one job, NaN where nothing was attributed.

    values: [component row, d_model]; whole writes [component row, 1]; edges [component row, reader column].
    """

    layout: Layout
    values: np.ndarray

    @classmethod
    def from_arrays(cls, layout: Layout, arrays: dict[str, np.ndarray], suffix: str = "") -> ScoreTable:
        """From stored arrays: `mlp` [layer, d_model], `embedding` [d_model], if attributed `heads` [layer, head,
        d_model] (scores of whole writes: 1 for d_model); or `edges` [component row, reader column]. All with the
        suffix."""
        if "edges" in arrays:
            return cls(layout, np.where(layout.edges(), arrays["edges" + suffix], np.nan))
        values = np.full((layout.n_rows, arrays["mlp" + suffix].shape[1]), np.nan)
        values[0] = arrays["embedding" + suffix]
        for layer in range(layout.n_layers):
            values[layout.mlp_row(layer)] = arrays["mlp" + suffix][layer]
            if "heads" + suffix in arrays:
                values[layout.head_row(layer, 0) : layout.mlp_row(layer)] = arrays["heads" + suffix][layer]
        return cls(layout, values)

    def candidates(self, level: CircuitLevel, mlp_only: bool) -> np.ndarray:
        """What may be chosen, a mask of `values`; for nodes of their first column. `input` only has edges."""
        layout = self.layout
        rows = ~np.isnan(self.values).all(axis=1)
        if level is CircuitLevel.EDGE:
            mask = layout.edges() & ~np.isnan(self.values)
            if mlp_only:
                is_head_column = np.array(["<" in layout.column_label(c) for c in range(layout.n_columns)])
                mask &= (layout.is_mlp() | (np.arange(layout.n_rows) == 0))[:, None] & ~is_head_column
            return mask
        rows[0] = False
        if mlp_only:
            rows &= layout.is_mlp()
        width = self.values.shape[1] if level is CircuitLevel.NEURON else 1
        return np.repeat(rows[:, None], width, axis=1)


@dataclass(frozen=True)
class Circuit:
    """The chosen units of one job, strongest first.

    indices: component row (node), row * d_model + coordinate (neuron), or row * n_columns + column (edge), [unit].
    scores: signed, [unit]. magnitudes: sums of |score| over pairs by which the units were ranked, [unit]; None if they
    were ranked by score.
    """

    level: CircuitLevel
    layout: Layout
    indices: np.ndarray
    scores: np.ndarray
    n_candidates: int
    n_eligible: int
    n_requested: int
    is_absolute: bool
    includes_zeros: bool
    score_range: tuple[float, float] | None
    magnitudes: np.ndarray | None = None

    @property
    def width(self) -> int:
        """Units per component row."""
        widths = {CircuitLevel.NEURON: self.layout.d_model, CircuitLevel.EDGE: self.layout.n_columns}
        return widths.get(self.level, 1)

    @property
    def rows(self) -> np.ndarray:
        """Component row of each unit, [unit]."""
        return self.indices // self.width

    def keep_mask(self) -> np.ndarray:
        """What belongs to the circuit: [component row, d_model] bool, or [component row, reader column] for edges."""
        if self.level is CircuitLevel.NODE:
            mask = np.zeros((self.layout.n_rows, self.layout.d_model), dtype=bool)
            mask[self.indices] = True
            return mask
        mask = np.zeros((self.layout.n_rows, self.width), dtype=bool)
        mask.ravel()[self.indices] = True
        return mask

    def edge_counts(self) -> dict[str, float]:
        """Edges of the circuit (edges chosen, or all that leave a component with a unit in it) and the others.

        The last key holds per cent, whatever its name says.
        """
        degrees = self.layout.out_degrees()
        is_edge = self.level is CircuitLevel.EDGE
        n_kept = len(self.indices) if is_edge else int(degrees[np.unique(self.rows)].sum())
        total = int(degrees.sum())
        return {
            "corrupted_edges": total - n_kept,
            "circuit_edges": n_kept,
            "corrupted_edges_ppt": 100 * (total - n_kept) / total,
        }

    def scalars(self) -> dict[str, Any]:
        """The circuit without its lists of units, in the key order of score files."""
        selected = len(self.indices)
        reason = None
        if not selected:
            reason = "no candidate has a finite, non-zero score" if not self.n_eligible else "--circuit_size is 0"
        return {
            "level": self.level.value,
            "absolute": self.is_absolute,
            "include_special": False,
            "requested_n": self.n_requested,
            "selected_n": selected,
            "num_scored": self.n_eligible,
            "num_considered": self.n_candidates,
            "total_entities": self._n_entities(),
            "was_clipped": selected < self.n_requested,
            "score_range": list(self.score_range) if self.score_range else None,
            "threshold": _short(self._keys[-1]) if selected else None,
            "empty_reason": reason,
            "include_zero_scores": self.includes_zeros,
            "d_model": self.layout.d_model,
            "d_head": self.layout.d_head,
            "n_heads": self.layout.n_heads,
            "n_layers": self.layout.n_layers,
            "ranked_by": "score" if self.magnitudes is None else "magnitude",
            "kept_share": selected / self.n_candidates if self.n_candidates else None,
        }

    @property
    def _keys(self) -> np.ndarray:
        return self.scores if self.magnitudes is None else self.magnitudes

    def _n_entities(self) -> int:
        if self.level is CircuitLevel.EDGE:
            return int(self.layout.out_degrees().sum())
        return self.layout.n_rows * self.width

    def metadata(self) -> dict[str, Any]:
        """The `metadata_topn` block of a manifest, under its published keys."""
        block = {**self.scalars(), "indices": self.indices.tolist()}
        if self.level is CircuitLevel.NODE:
            return {**block, **self._label_blocks([self.layout.label(row) for row in self.indices.tolist()])}
        if self.level is CircuitLevel.EDGE:
            pairs = (divmod(index, self.width) for index in self.indices.tolist())
            labels = [f"{self.layout.label(row)}->{self.layout.column_label(column)}" for row, column in pairs]
            return {**block, **self._label_blocks(labels)}
        neurons: dict[str, list[int]] = {}
        names = []
        for index in self.indices.tolist():
            row, coordinate = divmod(index, self.layout.d_model)
            label = self.layout.label(row)
            neurons.setdefault(label, []).append(coordinate)
            names.append(str((label, coordinate)))
        return {**block, **self._label_blocks(names), "neurons": neurons}

    def _label_blocks(self, labels: list[str]) -> dict[str, dict[str, float]]:
        """`<level>_label_score` and, where units were ranked by magnitude, `<level>_label_magnitude`."""
        columns = {"score": self.scores, "magnitude": self.magnitudes}
        return {
            f"{self.level.value}_label_{name}": dict(zip(labels, map(_short, values), strict=True))
            for name, values in columns.items()
            if values is not None
        }


def _short(score: float) -> float:
    """A score with the digits that mean something."""
    return float(f"{score:.9g}")


def choose_circuit(
    table: ScoreTable,
    level: CircuitLevel,
    size: int | float,
    *,
    absolute: bool,
    include_zeros: bool,
    mlp_only: bool,
    magnitudes: ScoreTable | None = None,
) -> Circuit:
    """The highest-ranking units. `size` is a number of units (int) or a share of the candidates (float).

    Candidates are all attributed units (see `ScoreTable.candidates`); eligible ones have a finite and (unless
    `include_zeros`) non-zero key. The key is the magnitude where given, else the (absolute) score. Ties go to the lower
    index.
    """
    layout = table.layout
    values = table.values.sum(axis=1, keepdims=True) if level is CircuitLevel.NODE else table.values
    candidates = np.flatnonzero(table.candidates(level, mlp_only))
    scores = values.ravel()[candidates]
    keys = np.abs(scores) if absolute else scores
    if magnitudes is not None:
        keys = magnitudes.values.ravel()[candidates]
    eligible = np.isfinite(keys) & (include_zeros | (keys != 0))
    n_requested = size if isinstance(size, int) else max(1, round(size * len(candidates)))
    order = np.argsort(-np.where(eligible, keys, -np.inf), kind="stable")[: min(n_requested, int(eligible.sum()))]
    score_range = (_short(keys[eligible].min()), _short(keys[eligible].max())) if eligible.any() else None
    return Circuit(
        level,
        layout,
        candidates[order],
        scores[order],
        len(candidates),
        int(eligible.sum()),
        n_requested,
        absolute,
        include_zeros,
        score_range,
        None if magnitudes is None else keys[order],
    )
