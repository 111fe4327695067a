"""Baseline runs of the ablation engine: the model's own answers, and what each layer computed on the way.

What decoding the answers leaves behind is the state from which ablated runs start; where it was not kept, or answers
come from elsewhere, it is made in one pass over their tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lib.architectures import embed, run_block
from lib.engine_forward import Prefix, WindowCache, causal_bias, engine_pass, filled_slots, shared_attention
from lib.engine_logits import next_tokens
from lib.engine_prefill import prefill
from lib.engine_state import BaselineState, Window
from lib.modeling_and_ablation import Generation, LanguageModel


def answer_and_record(
    lm: LanguageModel, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> tuple[list[Generation], BaselineState]:
    """Greedy answers to prompts, and the baseline of their windows: a prompt's last token and the answer's.

    prompts: tokens of each. The state has room for the longest answers there may be; `cut` it to the windows' lengths.
    """
    prefixes = [prompt[:-1] for prompt in prompts]
    state = _empty_state(lm, prefill(lm, prefixes), list(map(len, prefixes)), max_new_tokens)
    state.tokens[:, 0] = torch.tensor([prompt[-1] for prompt in prompts], device=lm.device)
    answers: list[list[int]] = [[] for _ in prompts]
    prefix, alive = state.prefix, torch.arange(len(prompts), device=lm.device)
    with torch.inference_mode():
        for step in range(max_new_tokens):
            found = _answer_step(lm, state, prefix, alive, step)
            for row, token in zip(alive.tolist(), found.tolist(), strict=True):
                answers[row].append(token)
            kept = [place for place, token in enumerate(found.tolist()) if token not in lm.stop_token_ids]
            if not kept or step + 1 == max_new_tokens:
                break
            if len(kept) < len(alive):
                keep = torch.tensor(kept, device=lm.device)
                prefix, alive, found = prefix.select(keep), alive[keep], found[keep]
            state.tokens[alive, step + 1] = found
    return [lm.generation(ids) for ids in answers], state


def _answer_step(
    lm: LanguageModel, state: BaselineState, prefix: Prefix, rows: torch.Tensor, step: int
) -> torch.Tensor:
    """Run one window position of some rows, keep its results in the state: each row's next token.

    prefix: that of the rows.
    """
    recorder = _Recorder(lm)
    some = rows if len(rows) < len(state.tokens) else None
    cache = WindowCache(state.keys, state.values, torch.full_like(rows, step), some)
    attend = shared_attention(prefix, filled_slots(cache.slots[:1], state.tokens.shape[1]))
    tokens, positions = state.tokens[rows, step, None], state.positions[rows, step, None]
    with engine_pass(lm, attend):
        hidden = embed(lm.model, lm.family, tokens, positions)
        for layer in range(lm.n_layers):
            with recorder.recording(layer, hidden):
                hidden = run_block(lm.model, lm.family, layer, hidden, positions, cache)
    state.final[rows, step] = hidden[:, 0]
    for kept, new in (
        (state.mid, recorder.mid),
        (state.attention_writes, recorder.attention_writes),
        (state.mlp_writes, recorder.mlp_writes),
    ):
        for layer, part in enumerate(new):
            kept[layer][rows, step] = part[:, 0]
    return next_tokens(lm, hidden[:, 0])


def _empty_state(lm: LanguageModel, prefix: Prefix, prefix_lengths: list[int], width: int) -> BaselineState:
    """A state with room for windows of `width` positions, each with one token so far."""
    n_rows = len(prefix_lengths)
    prefix_length = torch.tensor(prefix_lengths, device=lm.device)

    def room(*shape: int) -> list[torch.Tensor]:
        return [torch.zeros(n_rows, *shape, device=lm.device, dtype=lm.dtype) for _ in range(lm.n_layers)]

    return BaselineState(
        prefix,
        prefix_length,
        torch.ones_like(prefix_length),
        torch.full((n_rows, width), lm.pad_token_id, device=lm.device),
        _positions(lm, prefix_length, width),
        room(width, lm.d_model),
        room(width, lm.d_model) if lm.is_parallel else [],
        room(width, lm.d_model),
        room(lm.n_kv_heads, width, lm.d_head),
        room(lm.n_kv_heads, width, lm.d_head),
        torch.zeros(n_rows, width, lm.d_model, device=lm.device, dtype=lm.dtype),
    )


def _positions(lm: LanguageModel, prefix_length: torch.Tensor, width: int) -> torch.Tensor:
    """Position of each window token in the whole text, [datapoint, position]."""
    return prefix_length[:, None] + torch.arange(width, device=lm.device)[None]


def compute_baseline(lm: LanguageModel, windows: Sequence[Window]) -> BaselineState:
    """Run the model once on the windows of some datapoints, whose answers are known, and keep what it computes."""
    prefix = prefill(lm, [window.prefix for window in windows])
    prefix_length = torch.tensor([len(window.prefix) for window in windows], device=lm.device)
    window_length = torch.tensor([len(window.tokens) for window in windows], device=lm.device)
    width = max(1, int(window_length.max()))
    tokens = torch.full((len(windows), width), lm.pad_token_id, device=lm.device)
    for row, window in enumerate(windows):
        tokens[row, : len(window.tokens)] = torch.tensor(window.tokens, device=lm.device)
    positions = _positions(lm, prefix_length, width)
    recorder = _Recorder(lm)
    cache = WindowCache.empty(lm.n_layers)
    with engine_pass(lm, shared_attention(prefix, causal_bias(width, lm.device))):
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
