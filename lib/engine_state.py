"""The baseline run of a block of datapoints, kept so that ablated runs can start from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from lib.architectures import attention_replaced, combine, embed, run_block
from lib.engine_forward import MINUS_INFINITY, Prefix, WindowCache, causal_bias, shared_attention
from lib.modeling_and_ablation import LanguageModel
from lib.prefix import common_prefix_length


@dataclass(frozen=True)
class Window:
    """The tokens of one datapoint, split where the intervention begins.

    prefix: prompt tokens before it. tokens: prompt tokens inside it, then the baseline answer without its last token.
    first_prediction: the position in `tokens` whose logits decide answer token number `first_token`; from there on each
    position decides the next one. answer: the baseline's answer tokens, with the stop token if there was one.
    """

    prefix: tuple[int, ...]
    tokens: tuple[int, ...]
    first_prediction: int
    first_token: int
    answer: tuple[int, ...]


class Site(NamedTuple):
    """Where a datapoint's first answer token within reach of an intervention is decided: at the last of these tokens.

    datapoint: its number in the engine. answer: the token that the un-ablated model puts behind them.
    """

    datapoint: int
    ids: tuple[int, ...]
    answer: int


@dataclass(frozen=True)
class BaselineState:
    """What the un-ablated model computes on the windows of a block of datapoints.

    prefix_length, window_length [datapoint]; tokens [datapoint, position] right-padded; positions [datapoint, position]
    token positions in the whole text; mid, attention_writes and mlp_writes: one [datapoint, position, d_model] per
    layer (`attention_writes` only for parallel blocks); keys and values: one [datapoint, kv head, position, d_head] per
    layer; final: residual stream after the last block.
    """

    prefix: Prefix
    prefix_length: torch.Tensor
    window_length: torch.Tensor
    tokens: torch.Tensor
    positions: torch.Tensor
    mid: list[torch.Tensor]
    attention_writes: list[torch.Tensor]
    mlp_writes: list[torch.Tensor]
    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    final: torch.Tensor

    @property
    def n_bytes(self) -> int:
        """Memory held."""
        lists = (
            self.mid,
            self.attention_writes,
            self.mlp_writes,
            self.keys,
            self.values,
            self.prefix.keys,
            self.prefix.values,
        )
        return sum(tensor.nbytes for tensors in lists for tensor in tensors)

    def select(self, datapoints: torch.Tensor) -> BaselineState:
        """The state of some datapoints of the block, trimmed to their longest window."""
        if torch.equal(datapoints, torch.arange(len(self.window_length), device=datapoints.device)):
            return self
        window_length = self.window_length[datapoints]
        width = max(1, int(window_length.max()))

        def cut(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
            return [tensor[datapoints, :width] for tensor in tensors]

        def cut_heads(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
            return [tensor[datapoints, :, :width] for tensor in tensors]

        return BaselineState(
            self.prefix.select(datapoints),
            self.prefix_length[datapoints],
            window_length,
            self.tokens[datapoints, :width],
            self.positions[datapoints, :width],
            cut(self.mid),
            cut(self.attention_writes),
            cut(self.mlp_writes),
            cut_heads(self.keys),
            cut_heads(self.values),
            self.final[datapoints, :width],
        )


def compute_baseline(lm: LanguageModel, windows: Sequence[Window], prefix: Prefix | None = None) -> BaselineState:
    """Run the model once on the windows of some datapoints and keep every layer's intermediate results.

    prefix: that of the windows, where it is known.
    """
    prefix = prefix or prefill(lm, [window.prefix for window in windows])
    prefix_length = torch.tensor([len(window.prefix) for window in windows], device=lm.device)
    window_length = torch.tensor([len(window.tokens) for window in windows], device=lm.device)
    width = max(1, int(window_length.max()))
    tokens = torch.full((len(windows), width), lm.pad_token_id, device=lm.device)
    for row, window in enumerate(windows):
        tokens[row, : len(window.tokens)] = torch.tensor(window.tokens, device=lm.device)
    positions = prefix_length[:, None] + torch.arange(width, device=lm.device)[None]
    # Padding at the end of a window may run past the model's last position; what is computed there is never used.
    positions = positions.clamp(max=lm.n_positions - 1)
    recorder = _Recorder(lm)
    cache = WindowCache.empty(lm.n_layers)
    with (
        torch.inference_mode(),
        attention_replaced(lm.model, lm.family, shared_attention(prefix, causal_bias(width, lm.device))),
    ):
        hidden = embed(lm.model, lm.family, tokens, positions)
        for layer in range(lm.n_layers):
            with recorder.recording(layer, hidden):
                hidden = run_block(lm.model, lm.family, layer, hidden, positions, cache)
    return BaselineState(
        prefix,
        prefix_length,
        window_length,
        tokens,
        positions,
        recorder.mid,
        recorder.attention_writes,
        recorder.mlp_writes,
        list(cache.keys),
        list(cache.values),
        hidden,
    )


def n_kv_heads(lm: LanguageModel) -> int:
    """Heads that have keys and values of their own; with grouped-query attention several query heads share one."""
    return getattr(lm.model.config, "num_key_value_heads", None) or lm.n_heads


def block_input(lm: LanguageModel, state: BaselineState, layer: int) -> torch.Tensor:
    """The residual stream entering a block in the baseline, [datapoint, position, d_model]."""
    if layer == 0:
        return embed(lm.model, lm.family, state.tokens, state.positions)
    return combine_layer(lm, state, layer - 1, state.mlp_writes[layer - 1])


def combine_layer(lm: LanguageModel, state: BaselineState, layer: int, mlp_write: torch.Tensor) -> torch.Tensor:
    """A block's output with the baseline's attention and this MLP output, [..., datapoint, position, d_model]."""
    attention_write = state.attention_writes[layer] if lm.is_parallel else None
    return combine(lm.family, state.mid[layer], attention_write, mlp_write)


class _Recorder:
    """Collects the parts of each block's output."""

    def __init__(self, lm: LanguageModel) -> None:
        self.lm = lm
        self.mid: list[torch.Tensor] = []
        self.attention_writes: list[torch.Tensor] = []
        self.mlp_writes: list[torch.Tensor] = []

    def recording(self, layer: int, hidden: torch.Tensor) -> _Hooks:
        """Hooks that record this layer while its block runs on `hidden`."""
        handles = [self.lm.mlp(layer).register_forward_hook(lambda _m, _i, output: self.mlp_writes.append(output))]
        if self.lm.is_parallel:
            self.mid.append(hidden)
            handles.append(
                self.lm.attention(layer).register_forward_hook(
                    lambda _m, _i, output: self.attention_writes.append(output[0])
                )
            )
        else:
            norm = getattr(self.lm.blocks[layer], self.lm.family.mid_norm)
            handles.append(norm.register_forward_pre_hook(lambda _m, inputs: self.mid.append(inputs[0])))
        return _Hooks(handles)


class _Hooks:
    """Removes its hooks on exit."""

    def __init__(self, handles: list) -> None:
        self.handles = handles

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()


def prefill(lm: LanguageModel, prefixes: Sequence[Sequence[int]]) -> Prefix:
    """Keys and values of the prefixes, right-padded; tokens that all begin with are run once."""
    n_common = common_prefix_length(prefixes)
    common = _extend(lm, _nothing(lm, 1), [prefixes[0][:n_common]], 0) if n_common else _nothing(lm, 1)
    if max(map(len, prefixes)) == n_common:
        return common.select(torch.zeros(len(prefixes), dtype=torch.long, device=lm.device))
    return _extend(lm, common, [prefix[n_common:] for prefix in prefixes], n_common)


def _extend(lm: LanguageModel, before: Prefix, sequences: Sequence[Sequence[int]], start: int) -> Prefix:
    """The prefix of each sequence put behind `before` (one datapoint, `start` tokens)."""
    width = max(map(len, sequences))
    tokens = torch.full((len(sequences), width), lm.pad_token_id)
    mask = torch.zeros(len(sequences), width, dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        tokens[row, : len(sequence)] = torch.tensor(list(sequence), dtype=torch.long)
        mask[row, : len(sequence)] = True
    tokens, mask = tokens.to(lm.device), mask.to(lm.device)
    cache = WindowCache.empty(lm.n_layers)
    positions = (start + torch.arange(width, device=lm.device)).expand(len(sequences), -1)
    # Every sequence is one more group of the single datapoint `before`; padding is at the end, so causality hides it.
    attend = shared_attention(before, causal_bias(width, lm.device))
    with torch.inference_mode(), attention_replaced(lm.model, lm.family, attend):
        hidden = embed(lm.model, lm.family, tokens, positions)
        for layer in range(lm.n_layers):
            hidden = run_block(lm.model, lm.family, layer, hidden, positions, cache)

    def joined(shared: list[torch.Tensor], own: list[torch.Tensor | None]) -> list[torch.Tensor]:
        pairs = zip(shared, own, strict=True)
        return [torch.cat([first.expand(len(sequences), -1, -1, -1), second], dim=2) for first, second in pairs]

    bias = torch.zeros(mask.shape, device=lm.device).masked_fill(~mask, MINUS_INFINITY)
    bias = torch.cat([bias.new_zeros(len(sequences), start), bias], dim=1)
    return Prefix(joined(before.keys, cache.keys), joined(before.values, cache.values), bias)


def _nothing(lm: LanguageModel, n_rows: int) -> Prefix:
    """A prefix without tokens."""
    empty = [torch.zeros(n_rows, n_kv_heads(lm), 0, lm.d_head, device=lm.device, dtype=lm.dtype)] * lm.n_layers
    return Prefix(empty, empty, torch.zeros(n_rows, 0, device=lm.device))
