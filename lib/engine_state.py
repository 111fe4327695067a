"""What the baseline run of a block of datapoints leaves behind, so that ablated runs can start from it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from lib.architectures import combine, embed
from lib.engine_forward import Prefix
from lib.modeling_and_ablation import LanguageModel


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
        lists = (self.mid, self.attention_writes, self.mlp_writes, self.keys, self.values, [self.final])
        return self.prefix.n_bytes + sum(tensor.nbytes for tensors in lists for tensor in tensors)

    def cut(self, window_length: torch.Tensor) -> BaselineState:
        """The state with shorter windows, [datapoint], trimmed to the longest."""
        everything = torch.arange(len(window_length), device=window_length.device)
        return replace(self, window_length=window_length).select(everything)

    def select(self, datapoints: torch.Tensor) -> BaselineState:
        """The state of some datapoints of the block, trimmed to their longest window."""
        window_length = self.window_length[datapoints]
        width = max(1, int(window_length.max()))
        everything = torch.arange(len(self.window_length), device=datapoints.device)
        if torch.equal(datapoints, everything) and width == self.tokens.shape[1]:
            return self

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


def block_input(lm: LanguageModel, state: BaselineState, layer: int) -> torch.Tensor:
    """The residual stream entering a block in the baseline, [datapoint, position, d_model]."""
    if layer == 0:
        return embed(lm.model, lm.family, state.tokens, state.positions)
    return combine_layer(lm, state, layer - 1, state.mlp_writes[layer - 1])


def combine_layer(lm: LanguageModel, state: BaselineState, layer: int, mlp_write: torch.Tensor) -> torch.Tensor:
    """A block's output with the baseline's attention and this MLP output, [..., datapoint, position, d_model]."""
    attention_write = state.attention_writes[layer] if lm.is_parallel else None
    return combine(lm.family, state.mid[layer], attention_write, mlp_write)
