"""Forward passes of the ablation engine: rows that share their prompt's keys and values, and edits of writes.

A row is one (group of ablated neurons, datapoint) pair. Its tokens are split into a prefix that no intervention touches
(keys and values computed once per datapoint, shared by all rows) and a window that is run for every row.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from lib.architectures import AttentionFunction, attention_replaced, attention_scale
from lib.interventions import ReplacementTable, head_write
from lib.modeling_and_ablation import LanguageModel
from lib.neurons import Neuron, parse_label
from lib.packed_weights import packed_products

MINUS_INFINITY = float("-inf")


@dataclass
class WindowCache:
    """Takes the place of a Hugging Face cache while blocks run on windows.

    Without `slots` the keys and values of a pass are kept as they come, one entry per layer. With `slots` [row], each
    row has one new token, which is written into slot `slots[row]` of a store [row, kv head, slot, d_head] per layer;
    `rows` [row] are the rows of the store that take part, None if all do.
    """

    keys: list[torch.Tensor | None]
    values: list[torch.Tensor | None]
    slots: torch.Tensor | None = None
    rows: torch.Tensor | None = None
    _rotary: tuple[Any, Any] | None = None

    @classmethod
    def empty(cls, n_layers: int) -> WindowCache:
        """A cache that records a pass."""
        return cls([None] * n_layers, [None] * n_layers)

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Called by an attention module with the keys and values of its new tokens."""
        if self.slots is None:
            self.keys[layer], self.values[layer] = keys, values
            return keys, values
        rows = torch.arange(len(self.slots), device=keys.device) if self.rows is None else self.rows
        self.keys[layer][rows, :, self.slots] = keys[:, :, 0].to(self.keys[layer].dtype)
        self.values[layer][rows, :, self.slots] = values[:, :, 0].to(self.values[layer].dtype)
        if self.rows is None:
            return self.keys[layer], self.values[layer]
        return self.keys[layer][rows], self.values[layer][rows]

    def narrow_in_place(self, rows: torch.Tensor) -> None:
        """Keep some rows of the stores; layer by layer, so that there are never two copies of all. Slots stay."""
        for store in (self.keys, self.values):
            for layer, tensor in enumerate(store):
                store[layer] = tensor[rows]

    def rotary(self, module: torch.nn.Module, hidden: torch.Tensor, positions: torch.Tensor) -> Any:
        """The rotary tables of these positions, computed once per set of positions."""
        if self._rotary is None or self._rotary[0] is not positions:
            self._rotary = (positions, module(hidden, positions))
        return self._rotary[1]


@dataclass(frozen=True)
class Prefix:
    """Keys and values of the shared prompt tokens, one [datapoint, kv head, position, d_head] per layer."""

    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    bias: torch.Tensor
    """[datapoint, position]: 0 for a token, -inf for padding."""

    @property
    def n_bytes(self) -> int:
        """Memory held."""
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))

    def select(self, datapoints: torch.Tensor) -> Prefix:
        """The prefix of some datapoints (which may repeat), trimmed to the longest."""
        bias = self._bias_of(datapoints)
        width = bias.shape[1]
        return Prefix(
            [k[datapoints, :, :width] for k in self.keys], [v[datapoints, :, :width] for v in self.values], bias
        )

    def narrow_in_place(self, datapoints: torch.Tensor) -> Prefix:
        """As `select`, but layer by layer in this prefix's own lists: it must be nobody else's, and is used up."""
        bias = self._bias_of(datapoints)
        for store in (self.keys, self.values):
            for layer, tensor in enumerate(store):
                store[layer] = tensor[datapoints, :, : bias.shape[1]]
        return Prefix(self.keys, self.values, bias)

    def _bias_of(self, datapoints: torch.Tensor) -> torch.Tensor:
        """The bias of some datapoints, trimmed to the longest."""
        bias = self.bias[datapoints]
        return bias[:, : int((bias == 0).sum(1).max()) if bias.numel() else 0]


@contextlib.contextmanager
def engine_pass(lm: LanguageModel, attend: AttentionFunction) -> Iterator[None]:
    """While active, blocks compute attention with `attend`, multiply as fast as they can, and keep no gradients."""
    with torch.inference_mode(), attention_replaced(lm.model, lm.family, attend), packed_products(lm.model):
        yield


def attend_shared(
    scale: float,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    prefix_key: torch.Tensor,
    prefix_value: torch.Tensor,
    prefix_bias: torch.Tensor,
    own_bias: torch.Tensor,
) -> torch.Tensor:
    """Attention over a shared prefix and each row's own window, without copying the prefix.

    query [row, head, position, d_head], rows group-major (row = group * n_datapoints + datapoint); key and value
    [row, kv head, slot, d_head]; prefix_* [datapoint, kv head, token, d_head]; prefix_bias [datapoint, token]; own_bias
    [1 or row, position, slot]. Returns [row, position, head, d_head].

    All groups of a datapoint are extra queries against the same prefix, so one matrix product serves them all.
    """
    n_rows, n_heads, n_positions, d_head = query.shape
    n_datapoints, n_kv, n_prefix = prefix_key.shape[:3]
    n_groups, repeat = n_rows // n_datapoints, n_heads // n_kv
    query = query.reshape(n_rows, n_kv, repeat * n_positions, d_head) * scale
    own = torch.matmul(query, key.transpose(-1, -2)).view(n_rows, n_kv, repeat, n_positions, -1)
    own = (own + own_bias[:, None, None]).view(n_rows, n_kv, repeat * n_positions, -1)
    if n_prefix == 0:
        mixed = torch.matmul(own.float().softmax(-1).to(value.dtype), value)
    else:
        by_datapoint = _to_datapoint_major(query, n_groups, n_datapoints)
        # GPT-J multiplies queries and keys in float32, whatever the model's precision.
        shared = torch.matmul(by_datapoint, prefix_key.to(query.dtype).transpose(-1, -2)) + prefix_bias[:, None, None]
        weights = torch.cat([shared, _to_datapoint_major(own, n_groups, n_datapoints)], dim=-1)
        weights = weights.float().softmax(-1).to(value.dtype)
        mixed = _to_row_major(torch.matmul(weights[..., :n_prefix], prefix_value), n_groups, n_rows)
        mixed = mixed + torch.matmul(_to_row_major(weights[..., n_prefix:], n_groups, n_rows), value)
    return mixed.reshape(n_rows, n_heads, n_positions, d_head).transpose(1, 2)


def _to_datapoint_major(rows: torch.Tensor, n_groups: int, n_datapoints: int) -> torch.Tensor:
    """[group * datapoint, kv, query, x] -> [datapoint, kv, group * query, x]."""
    _, n_kv, n_queries, width = rows.shape
    return (
        rows.view(n_groups, n_datapoints, n_kv, n_queries, width)
        .permute(1, 2, 0, 3, 4)
        .reshape(n_datapoints, n_kv, n_groups * n_queries, width)
    )


def _to_row_major(by_datapoint: torch.Tensor, n_groups: int, n_rows: int) -> torch.Tensor:
    """[datapoint, kv, group * query, x] -> [group * datapoint, kv, query, x]."""
    n_datapoints, n_kv, _, width = by_datapoint.shape
    return (
        by_datapoint.view(n_datapoints, n_kv, n_groups, -1, width)
        .permute(2, 0, 1, 3, 4)
        .reshape(n_rows, n_kv, -1, width)
    )


def shared_attention(prefix: Prefix, own_bias: torch.Tensor) -> Callable[..., torch.Tensor]:
    """The attention function of one pass (see `architectures.attention_replaced`)."""

    def attend(module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        layer = module.layer_idx
        mixed = attend_shared(
            attention_scale(module), query, key, value, prefix.keys[layer], prefix.values[layer], prefix.bias, own_bias
        )
        return mixed.to(value.dtype)

    return attend


def causal_bias(n_positions: int, device: torch.device) -> torch.Tensor:
    """[1, position, slot]: a window position sees itself and what is before it."""
    ones = torch.ones(n_positions, n_positions, dtype=torch.bool, device=device).tril()
    return torch.zeros(n_positions, n_positions, device=device).masked_fill(~ones, MINUS_INFINITY)[None]


def filled_slots(slots: torch.Tensor, n_slots: int) -> torch.Tensor:
    """[row, 1, slot]: a row's one new token sees the slots up to its own, `slots` [row]."""
    visible = torch.arange(n_slots, device=slots.device)[None] <= slots[:, None]
    return torch.zeros(visible.shape, device=slots.device).masked_fill(~visible, MINUS_INFINITY)[:, None]


# ---------------------------------------------------------------- edits


def leaving_stage(group: Sequence[Neuron], n_layers: int) -> int:
    """Where a group leaves the baseline: 2 * layer if it must be run through block `layer` (an attention unit there),
    2 * layer + 1 if it starts from that block's edited output, 2 * n_layers if it ablates nothing."""
    stages = [2 * n_layers]
    for label in {neuron.layer_label for neuron in group}:
        layer, head = parse_label(label)
        stages.append(2 * layer + (head is None))
    return min(stages)


@dataclass
class GroupEdits:
    """Which coordinates each group ablates, per component: label -> (group numbers [n], mask [n, d_model])."""

    masks: dict[str, tuple[torch.Tensor, torch.Tensor]]
    first_stage: list[int]
    """Per group its `leaving_stage`."""
    labels_by_layer: dict[int, list[str]] = field(default_factory=dict)

    @classmethod
    def build(cls, groups: Sequence[Sequence[Neuron]], d_model: int, n_layers: int, device: torch.device) -> GroupEdits:
        """Index the units of the groups."""
        coordinates: dict[str, dict[int, list[int]]] = {}
        first_stage = []
        for number, group in enumerate(groups):
            first_stage.append(leaving_stage(group, n_layers))
            for neuron in group:
                coordinates.setdefault(neuron.layer_label, {}).setdefault(number, []).append(neuron.index)
        masks = {}
        for label, members in coordinates.items():
            numbers = sorted(members)
            mask = torch.zeros(len(numbers), d_model, dtype=torch.bool)
            for row, number in enumerate(numbers):
                mask[row, members[number]] = True
            masks[label] = (torch.tensor(numbers, device=device), mask.to(device))
        edits = cls(masks, first_stage)
        for label in sorted(masks):
            edits.labels_by_layer.setdefault(parse_label(label)[0], []).append(label)
        return edits


class Editor:
    """Applies the edits of groups to the writes of a pass.

    groups_of_rows: [row] group of each row. positions [row, position] and datapoints [row] choose replacement values.
    """

    def __init__(self, lm: LanguageModel, table: ReplacementTable, edits: GroupEdits) -> None:
        self.lm = lm
        self.table = table
        self.edits = edits

    def edit_write(
        self,
        label: str,
        write: torch.Tensor,
        rows: torch.Tensor,
        masks: torch.Tensor,
        positions: torch.Tensor,
        datapoints: torch.Tensor,
    ) -> torch.Tensor:
        """New MLP output of the chosen rows, [n, position, d_model]; masks [n, d_model]."""
        values = self.table.values(label, positions[rows], datapoints[rows]).to(write.dtype)
        chosen = write[rows]
        if self.lm.centred_writes:
            values = values + chosen.mean(dim=-1, keepdim=True)
        return torch.where(masks[:, None], values, chosen)

    @contextlib.contextmanager
    def active(
        self, layer: int, groups_of_rows: torch.Tensor, positions: torch.Tensor, datapoints: torch.Tensor
    ) -> Iterator[None]:
        """Hooks on one layer's modules that edit the rows whose group has units there."""
        handles = []
        head_labels = []
        for label in self.edits.labels_by_layer.get(layer, ()):
            rows, masks = self._rows_with(label, groups_of_rows)
            if not len(rows):
                continue
            if parse_label(label)[1] is None:
                handles.append(
                    self.lm.mlp(layer).register_forward_hook(self._mlp_hook(label, rows, masks, positions, datapoints))
                )
            else:
                head_labels.append((label, rows, masks))
        if head_labels:
            handles.append(
                self.lm.attention_output(layer).register_forward_hook(
                    self._head_hook(layer, head_labels, positions, datapoints)
                )
            )
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _rows_with(self, label: str, groups_of_rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows whose group has units in this component, and their masks."""
        numbers, masks = self.edits.masks[label]
        place = torch.full((len(self.edits.first_stage),), -1, dtype=torch.long, device=numbers.device)
        place[numbers] = torch.arange(len(numbers), device=numbers.device)
        found = place[groups_of_rows]
        rows = torch.nonzero(found >= 0).flatten()
        return rows, masks[found[rows]]

    def _mlp_hook(
        self, label: str, rows: torch.Tensor, masks: torch.Tensor, positions: torch.Tensor, datapoints: torch.Tensor
    ) -> Callable[..., torch.Tensor]:
        def hook(module: torch.nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
            output[rows] = self.edit_write(label, output, rows, masks, positions, datapoints)
            return output

        return hook

    def _head_hook(
        self,
        layer: int,
        edits: list[tuple[str, torch.Tensor, torch.Tensor]],
        positions: torch.Tensor,
        datapoints: torch.Tensor,
    ) -> Callable[..., torch.Tensor]:
        def hook(module: torch.nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
            for label, rows, masks in edits:
                own = head_write(self.lm, layer, parse_label(label)[1], inputs[0][rows])
                values = self.table.values(label, positions[rows], datapoints[rows]).to(own.dtype)
                output[rows] += torch.where(masks[:, None], values - own, torch.zeros_like(own))
            return output

        return hook
