"""One trip through the network: some groups of ablated neurons on some datapoints, from the baseline to new answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from lib.architectures import embed, run_block
from lib.engine_forward import (
    Editor,
    GroupEdits,
    Prefix,
    WindowCache,
    causal_bias,
    engine_pass,
    filled_slots,
    shared_attention,
)
from lib.engine_logits import Rivals, next_tokens, next_tokens_near
from lib.engine_state import BaselineState, Window, block_input, combine_layer
from lib.interventions import ReplacementTable
from lib.modeling_and_ablation import Generation, LanguageModel
from lib.neurons import Neuron

_POSITIONS_AT_ONCE = 2048
"""Positions that go through a block together on a CPU: more no longer make its products faster, and what lies between
them would leave the cache."""


@dataclass(frozen=True)
class AnswerEnd:
    """When an answer is over: a stop token, the token limit, or the task's word that nothing after it matters."""

    lm: LanguageModel
    max_new_tokens: int
    is_complete: Callable[[str], bool] | None

    def is_finished(self, ids: Sequence[int]) -> bool:
        """True if nothing after these answer tokens matters."""
        if ids[-1] in self.lm.stop_token_ids or len(ids) >= self.max_new_tokens:
            return True
        return self.is_complete is not None and self.is_complete(self.lm.decode(ids))

    def tokens_that_matter(self, generation: Generation) -> tuple[int, ...]:
        """A baseline answer's tokens up to its end, with the stop token if there was one."""
        tokens = (*generation.ids, min(self.lm.stop_token_ids)) if generation.stopped else generation.ids
        finished = (length for length in range(1, len(tokens) + 1) if self.is_finished(tokens[:length]))
        return tokens[: next(finished, len(tokens))]

    def without_stop(self, ids: Sequence[int]) -> list[int]:
        """The answer's own tokens."""
        return [token for token in ids if token not in self.lm.stop_token_ids]

    def as_one_stop(self, tokens: torch.Tensor) -> torch.Tensor:
        """All stop tokens mean the same, the answer ends: the lowest stands for all."""
        stops = torch.tensor(sorted(self.lm.stop_token_ids), device=tokens.device)
        return torch.where(torch.isin(tokens, stops), stops[:1], tokens) if len(stops) else tokens


@dataclass(frozen=True)
class Places:
    """Where the datapoints' windows decide answer tokens: the baseline's prediction places of a block's selection.

    rows, positions [place]: datapoint row and window position. numbers: which answer token is decided there. expected
    [place]: the baseline's token. rivals: see `engine_logits`; None where finding them would cost more than it saves.
    """

    rows: torch.Tensor
    positions: torch.Tensor
    numbers: list[int]
    expected: torch.Tensor
    rivals: Rivals | None


class ChunkRun:
    """Groups that go through the network together, in the order in which they leave the baseline.

    groups: ordered by `leaving_stage`. state: baseline of the datapoints. windows: their tokens. datapoints: their
    numbers for the replacement table, [datapoint]. places: None where no window decides any token. is_settled: says of
    a changed answer so far, (group, datapoint, text), that the rest of it is not wanted.
    A row is group * n_datapoints + datapoint.
    """

    def __init__(
        self,
        lm: LanguageModel,
        table: ReplacementTable,
        end: AnswerEnd,
        groups: Sequence[Sequence[Neuron]],
        state: BaselineState,
        windows: Sequence[Window],
        datapoints: torch.Tensor,
        places: Places,
        is_settled: Callable[[int, int, str], bool] | None,
    ) -> None:
        self.lm, self.table, self.end, self.state = lm, table, end, state
        self.is_settled = is_settled
        self.windows, self.datapoints, self.places = windows, datapoints, places
        self.n_groups, self.n_datapoints = len(groups), len(datapoints)
        self.edits = GroupEdits.build(groups, lm.d_model, lm.n_layers, lm.device)
        self.editor = Editor(lm, table, self.edits)
        self.n_active = [sum(stage <= 2 * layer for stage in self.edits.first_stage) for layer in range(lm.n_layers)]
        """Per layer: how many groups are run through that block."""
        self.cache = WindowCache.empty(lm.n_layers)
        self.n_at_once = len(groups)
        """How many groups go through a block together."""
        if lm.device.type == "cpu":
            self.n_at_once = min(self.n_at_once, max(1, _POSITIONS_AT_ONCE // state.tokens.numel()))
        self.positions = state.positions.repeat(self.n_at_once, 1)

    def run(self, decode_rows: int) -> dict[tuple[int, int], str]:
        """Changed answers by (group, datapoint) place; `decode_rows` rows at a time are decoded further."""
        with torch.inference_mode():
            answers, open_rows = self._first_differences(self._teacher_forced_pass())
            rows = sorted(open_rows)
            for start in range(0, len(rows), decode_rows):
                answers |= self._decode({row: open_rows[row] for row in rows[start : start + decode_rows]})
        return {divmod(row, self.n_datapoints): self.lm.decode(ids) for row, ids in sorted(answers.items())}

    # ------------------------------------------------------------ the baseline's tokens under ablation

    def _teacher_forced_pass(self) -> torch.Tensor:
        """Feed the baseline's tokens under ablation: final residual [group, datapoint, position, d_model].

        A group joins the batch at the layer where it leaves the baseline.
        """
        state, n_joined = self.state, 0
        hidden = state.final.repeat(self.n_groups, 1, 1, 1)
        attend = shared_attention(state.prefix, causal_bias(state.tokens.shape[1], self.lm.device))
        with engine_pass(self.lm, attend):
            for layer, n_active in enumerate(self.n_active):
                if n_active > n_joined:
                    hidden[n_joined:n_active] = block_input(self.lm, state, layer)
                self._through_block(layer, hidden[:n_active])
                n_joined = n_active + self._join_after(layer, hidden[n_active:])
        return hidden

    def _through_block(self, layer: int, hidden: torch.Tensor) -> None:
        """Run groups through a block, some at a time: [group, datapoint, position, d_model], changed in place."""
        keys, values = [], []
        for first in range(0, len(hidden), self.n_at_once):
            some = hidden[first : first + self.n_at_once]
            groups = torch.arange(first, first + len(some), device=hidden.device).repeat_interleave(self.n_datapoints)
            # The cache knows rotary tables by the very tensor of positions: the whole one stays the same.
            positions = self.positions if len(some) == self.n_at_once else self.positions[: len(groups)]
            with self.editor.active(layer, groups, positions, self.datapoints.repeat(len(some))):
                output = run_block(self.lm.model, self.lm.family, layer, some.flatten(0, 1), positions, self.cache)
            some.copy_(output.view_as(some))
            keys.append(self.cache.keys[layer])
            values.append(self.cache.values[layer])
        if len(keys) > 1:
            self.cache.keys[layer], self.cache.values[layer] = torch.cat(keys), torch.cat(values)

    def _join_after(self, layer: int, hidden: torch.Tensor) -> int:
        """Start the groups whose first edit is this layer's MLP write from the baseline's block output; how many.

        hidden [group, datapoint, position, d_model]: of these groups, and of those that join later.
        """
        joining = [group for group, stage in enumerate(self.edits.first_stage) if stage == 2 * layer + 1]
        if not joining:
            return 0
        label = f"m{layer}"
        numbers, masks = self.edits.masks[label]
        place = {int(number): i for i, number in enumerate(numbers)}
        masks = masks[[place[group] for group in joining]]
        write = self.state.mlp_writes[layer]
        values = self.table.values(label, self.state.positions, self.datapoints).to(write.dtype)
        if self.lm.centred_writes:
            values = values + write.mean(dim=-1, keepdim=True)
        edited = torch.where(masks[:, None, None], values[None], write[None])
        hidden[: len(joining)] = combine_layer(self.lm, self.state, layer, edited)
        return len(joining)

    # ------------------------------------------------------------ comparing with the baseline

    def _first_differences(self, hidden: torch.Tensor) -> tuple[dict[int, list[int]], dict[int, tuple[int, int]]]:
        """Compare each row's predicted tokens with the baseline's.

        Returns rows whose new answer is already complete (row -> ids), and rows to be decoded further
        (row -> (number of answer tokens kept, the first new token)).
        """
        places = self.places
        deciding = hidden[:, places.rows, places.positions]
        if places.rivals is None:
            predicted = next_tokens(self.lm, deciding.flatten(0, 1)).view(deciding.shape[:2])
        else:
            predicted = next_tokens_near(self.lm, places.rivals, deciding)
        predicted = self.end.as_one_stop(predicted)
        finished: dict[int, list[int]] = {}
        open_rows: dict[int, tuple[int, int]] = {}
        datapoint_of = places.rows.tolist()
        for group, place in torch.nonzero(predicted != places.expected[None]).tolist():
            datapoint, kept = datapoint_of[place], places.numbers[place]
            row = group * self.n_datapoints + datapoint
            if row in finished or row in open_rows:
                continue
            token = int(predicted[group, place])
            ids = [*self.windows[datapoint].answer[:kept], token]
            if self._is_finished(row, ids):
                finished[row] = self.end.without_stop(ids)
            else:
                open_rows[row] = (kept, token)
        return finished, open_rows

    def _is_finished(self, row: int, ids: Sequence[int]) -> bool:
        """True if the row's changed answer is over, or nobody wants the rest."""
        if self.end.is_finished(ids):
            return True
        return self.is_settled is not None and self.is_settled(*divmod(row, self.n_datapoints), self.lm.decode(ids))

    # ------------------------------------------------------------ decoding rows that left the baseline

    def _decode(self, open_rows: dict[int, tuple[int, int]]) -> dict[int, list[int]]:
        """Continue rows from their first new token, greedily: row -> answer ids."""
        device = self.lm.device
        numbers = list(open_rows)
        rows = torch.tensor(numbers, device=device)
        places, groups = rows % self.n_datapoints, rows // self.n_datapoints
        windows = [self.windows[place] for place in places.tolist()]
        starts = list(zip(windows, open_rows.values(), strict=True))
        ids = [[*window.answer[:kept], token] for window, (kept, token) in starts]
        first_slots = [window.first_prediction + kept - window.first_token + 1 for window, (kept, _) in starts]
        slots = torch.tensor(first_slots, device=device)
        own, prefix = self._own_cache(rows, places), self.state.prefix.select(places)
        alive = torch.arange(len(rows), device=device)
        while len(alive):
            own.slots = slots[alive]
            token = torch.tensor([[ids[i][-1]] for i in alive.tolist()], device=device)
            positions = self.state.prefix_length[places[alive]][:, None] + own.slots[:, None]
            new = self._decode_step(prefix, own, token, positions, groups[alive], self.datapoints[places[alive]])
            for i, next_token in zip(alive.tolist(), new.tolist(), strict=True):
                ids[i].append(next_token)
            kept = [index for index, i in enumerate(alive.tolist()) if not self._is_finished(numbers[i], ids[i])]
            if len(kept) < len(alive):
                keep = torch.tensor(kept, dtype=torch.long, device=device)
                own.narrow_in_place(keep)
                prefix, alive = prefix.narrow_in_place(keep), alive[keep]
            slots = slots + 1
        return {row: self.end.without_stop(answer) for row, answer in zip(numbers, ids, strict=True)}

    def _own_cache(self, rows: torch.Tensor, places: torch.Tensor) -> WindowCache:
        """Keys and values of the rows' windows with room for new tokens, one [row, kv head, slot, d_head] per layer.

        Below the layer where a group left the baseline they are the baseline's.
        """
        n_slots = self.state.tokens.shape[1] + self.end.max_new_tokens
        cache = WindowCache([], [])
        for layer, n_active in enumerate(self.n_active):
            active = rows < n_active * self.n_datapoints
            for store, passed, baseline in (
                (cache.keys, self.cache.keys[layer], self.state.keys[layer]),
                (cache.values, self.cache.values[layer], self.state.values[layer]),
            ):
                room = baseline.new_zeros(len(rows), baseline.shape[1], n_slots, baseline.shape[3])
                window = baseline[places]
                if bool(active.any()):
                    window[active] = passed[rows[active]]
                room[:, :, : window.shape[2]] = window
                store.append(room)
        return cache

    def _decode_step(
        self,
        prefix: Prefix,
        own: WindowCache,
        token: torch.Tensor,
        positions: torch.Tensor,
        groups: torch.Tensor,
        datapoints: torch.Tensor,
    ) -> torch.Tensor:
        """Run one new token of each row through the network under ablation: the next token of each row."""
        attend = shared_attention(prefix, filled_slots(own.slots, own.keys[0].shape[2]))
        with engine_pass(self.lm, attend):
            hidden = embed(self.lm.model, self.lm.family, token, positions)
            for layer in range(self.lm.n_layers):
                with self.editor.active(layer, groups, positions, datapoints):
                    hidden = run_block(self.lm.model, self.lm.family, layer, hidden, positions, own)
        return next_tokens(self.lm, hidden[:, 0])
