"""The slow judge of the ablation engine: one group, datapoint and token at a time, full forwards with plain hooks."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lib.interventions import DecodeScope, ReplacementTable
from lib.modeling_and_ablation import LanguageModel
from lib.neurons import Neuron


def naive_answer(
    lm: LanguageModel,
    prompt: str,
    number: int,
    group: Sequence[Neuron],
    table: ReplacementTable,
    *,
    max_new_tokens: int,
    decode_only: bool,
    scope: DecodeScope,
) -> str:
    """The answer of the model while `group` is ablated; `number` is the datapoint's number for the table."""
    ids = lm.tokenize([prompt])[0]
    n_prompt = len(ids)
    first = 0 if not decode_only else n_prompt - (1 if scope is DecodeScope.ANSWER else 0)
    answer: list[int] = []
    while len(answer) < max_new_tokens:
        handles = [hook for neuron in group for hook in _hooks(lm, neuron, table, number, first)]
        try:
            with torch.inference_mode():
                logits = lm.model(torch.tensor([ids], device=lm.device), use_cache=False).logits[0, -1]
        finally:
            for handle in handles:
                handle.remove()
        token = int(logits.argmax())
        if token in lm.stop_token_ids:
            break
        answer.append(token)
        ids = [*ids, token]
    return lm.decode(answer)


def _hooks(lm: LanguageModel, neuron: Neuron, table: ReplacementTable, number: int, first: int) -> list:
    layer, index = neuron.layer, neuron.index

    def replacement(n_positions: int) -> torch.Tensor:
        positions = torch.arange(n_positions)[None]
        return table.values(neuron.layer_label, positions, torch.tensor([number]))[0, first:, index]

    if neuron.head is None:

        def edit_mlp(module, inputs, output):
            output = output.clone()
            mean = output.mean(-1) if lm.centred_writes else torch.zeros(output.shape[:2])
            output[0, first:, index] = replacement(output.shape[1]) + edit_mlp.means(mean)[0, first:]
            return output

        # Several neurons of one layer: the mean to add back is that of the unedited write.
        edit_mlp.means = _first_mean(lm, layer)
        return [lm.mlp(layer).register_forward_hook(edit_mlp)]

    def edit_head(module, inputs, output):
        output = output.clone()
        start = neuron.head * lm.d_head
        own = inputs[0][..., start : start + lm.d_head] @ lm.head_output_weight(layer)[neuron.head]
        if lm.centred_writes:
            own = own - own.mean(-1, keepdim=True)
        output[0, first:, index] += replacement(output.shape[1]) - own[0, first:, index]
        return output

    return [lm.attention_output(layer).register_forward_hook(edit_head)]


def _first_mean(lm: LanguageModel, layer: int):
    """Returns a function that ignores edited outputs and gives the mean of the layer's unedited MLP output."""
    store = {}

    def before(module, inputs):
        with torch.inference_mode():
            store["mean"] = (
                module.forward(inputs[0]).mean(-1) if lm.centred_writes else torch.zeros(inputs[0].shape[:2])
            )

    handle = lm.mlp(layer).register_forward_pre_hook(before)

    def mean(_):
        handle.remove()
        return store["mean"]

    return mean
