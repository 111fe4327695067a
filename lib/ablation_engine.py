"""The ablation engine: many neuron groups x many datapoints -> the answers after ablation.

Answers equal those of the plain model with a forward hook that replaces the same coordinates, token by token. Less is
computed: the prompt's keys and values are shared by all groups; a group starts at its first ablated layer from the
baseline's residual stream; the baseline's answer is fed in one pass and only rows whose next token differs are decoded
further; many groups of all layers go through the network together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from lib.architectures import attention_replaced, embed, run_block
from lib.cli import Report, UserError
from lib.engine_forward import (
    MINUS_INFINITY,
    Editor,
    GroupEdits,
    Prefix,
    WindowCache,
    causal_bias,
    leaving_stage,
    shared_attention,
)
from lib.engine_logits import Rivals, find_rivals, next_tokens, next_tokens_near
from lib.engine_state import BaselineState, Window, block_input, combine_layer, compute_baseline
from lib.interventions import DecodeScope, ReplacementTable
from lib.modeling_and_ablation import Generation, LanguageModel
from lib.neurons import Neuron


@dataclass
class AblatedAnswers:
    """Answers of some groups on some datapoints.

    changed: [group, datapoint] True where the generated tokens differ from the baseline's. texts: the answer of each
    changed (group, datapoint), numbered as in `changed`.
    """

    changed: np.ndarray
    texts: dict[tuple[int, int], str]


@dataclass
class EngineCounters:
    """Work done so far."""

    n_evaluations: int = 0
    """(group, datapoint) pairs evaluated."""
    n_diverged: int = 0
    """Pairs whose tokens differed from the baseline's."""


@dataclass
class _Chunk:
    """Groups that go through the network together, ordered by where they leave the baseline."""

    groups: list[Sequence[Neuron]]
    numbers: list[int]
    edits: GroupEdits
    n_active: list[int] = field(default_factory=list)
    """Per layer: how many groups are run through that block."""


class AblationEngine:
    """Answers of a language model on fixed prompts while groups of neurons are ablated.

    lm: the model. prompts: all datapoints; calls name them by number. table: replacement values. decode_only: leave
    the prompt alone and intervene at answer-producing positions (`decode_scope`); otherwise at every position.
    is_complete: says of an answer so far that nothing after it matters; decoding stops there, and later tokens are not
    compared.
    memory_mb: working memory for passes and, again as much, for baseline states.
    """

    def __init__(
        self,
        lm: LanguageModel,
        prompts: Sequence[str],
        table: ReplacementTable,
        *,
        max_new_tokens: int,
        decode_only: bool = True,
        decode_scope: DecodeScope = DecodeScope.ANSWER,
        is_complete: Callable[[str], bool] | None = None,
        memory_mb: int = 700,
        batch_size: int = 64,
        report: Report | None = None,
    ) -> None:
        self.lm = lm
        self.is_complete = is_complete
        self.table = table
        self.max_new_tokens = max_new_tokens
        self.memory_bytes = memory_mb * 2**20
        self.counters = EngineCounters()
        prompt_ids = lm.tokenize(prompts, max_len=lm.n_positions - max_new_tokens)
        baseline = lm.generate(prompts, max_new_tokens, batch_size=batch_size, report=report)
        self.baseline_answers = [generation.answer for generation in baseline]
        self._windows = [
            _window(ids, self._answer_tokens(generation), decode_only, decode_scope)
            for ids, generation in zip(prompt_ids, baseline, strict=True)
        ]
        self._blocks = self._make_blocks()
        self._block_of = {
            d: (number, place) for number, block in enumerate(self._blocks) for place, d in enumerate(block)
        }
        self._states: dict[int, BaselineState] = {}
        self._rivals_of: dict[int, Rivals] = {}
        self._known: set[Neuron] = set()

    # ------------------------------------------------------------ public

    def answers(
        self,
        groups: Sequence[Sequence[Neuron]],
        datapoints: Sequence[int],
        progress: Callable[[int], None] | None = None,
    ) -> AblatedAnswers:
        """Answers after ablating each group, on each of the datapoints.

        progress: called with the number of finished (group, datapoint) pairs of each chunk.
        """
        self._check(groups)
        changed = np.zeros((len(groups), len(datapoints)), dtype=bool)
        texts: dict[tuple[int, int], str] = {}
        columns: dict[int, list[int]] = {}
        for column, datapoint in enumerate(datapoints):
            columns.setdefault(self._block_of[int(datapoint)][0], []).append(column)
        self.table.prepare({neuron.layer_label for group in groups for neuron in group})
        for number in sorted(columns):
            members = [int(datapoints[column]) for column in columns[number]]
            places = torch.tensor([self._block_of[d][1] for d in members], device=self.lm.device)
            state = self._state(number).select(places)
            for chunk in self._chunks(groups, state):
                for (group, row), text in self._run_chunk(chunk, state, members).items():
                    column = columns[number][row]
                    changed[group, column] = True
                    texts[group, column] = text
                self.counters.n_evaluations += len(chunk.groups) * len(members)
                if progress is not None:
                    progress(len(chunk.groups) * len(members))
        self.counters.n_diverged += len(texts)
        return AblatedAnswers(changed, dict(sorted(texts.items())))

    # ------------------------------------------------------------ preparation

    def _answer_tokens(self, generation: Generation) -> tuple[int, ...]:
        """The baseline's answer tokens that matter, with the stop token if there was one."""
        tokens = (*generation.ids, min(self.lm.stop_token_ids)) if generation.stopped else generation.ids
        finished = (length for length in range(1, len(tokens) + 1) if self._is_finished(tokens[:length]))
        return tokens[: next(finished, len(tokens))]

    def _check(self, groups: Sequence[Sequence[Neuron]]) -> None:
        unseen = {neuron for group in groups for neuron in group} - self._known
        for neuron in unseen:
            layer, head = neuron.layer, neuron.head
            if layer >= self.lm.n_layers or neuron.index >= self.lm.d_model or (head or 0) >= self.lm.n_heads:
                raise UserError(
                    f"neuron {neuron} is not part of {self.lm.name}, which has {self.lm.n_layers} layers, "
                    f"{self.lm.n_heads} heads and d_model {self.lm.d_model}"
                )
        self._known |= unseen

    def _make_blocks(self) -> list[list[int]]:
        """Datapoints of similar length together, as many as fit into the memory for baseline states."""
        order = sorted(
            range(len(self._windows)), key=lambda i: (len(self._windows[i].prefix), len(self._windows[i].tokens), i)
        )
        size = self.lm.dtype.itemsize
        parts = 3 if self.lm.is_parallel else 2
        blocks: list[list[int]] = [[]]
        used = 0
        for datapoint in order:
            window = self._windows[datapoint]
            length = len(window.tokens)
            per_layer = (
                parts * length * self.lm.d_model + 2 * (len(window.prefix) + length) * self.lm.n_heads * self.lm.d_head
            )
            cost = self.lm.n_layers * per_layer * size
            if blocks[-1] and used + cost > self.memory_bytes / 2:
                blocks.append([])
                used = 0
            blocks[-1].append(datapoint)
            used += cost
        return blocks

    def _state(self, number: int) -> BaselineState:
        """Baseline of a block; the least recently used ones are dropped when memory is short."""
        state = self._states.pop(number, None)
        if state is None:
            state = compute_baseline(self.lm, [self._windows[d] for d in self._blocks[number]])
            while (
                self._states
                and state.n_bytes + sum(other.n_bytes for other in self._states.values()) > self.memory_bytes
            ):
                del self._states[next(iter(self._states))]
        self._states[number] = state
        return state

    def _chunks(self, groups: Sequence[Sequence[Neuron]], state: BaselineState) -> Iterator[_Chunk]:
        """Groups in the order in which they leave the baseline, as many at a time as fit into memory."""
        stages = [leaving_stage(group, self.lm.n_layers) for group in groups]
        order = sorted(range(len(groups)), key=lambda i: (stages[i], i))
        n_datapoints, width = state.tokens.shape
        d_mlp = 4 * self.lm.d_model
        kv = 2 * state.keys[0].shape[1] * self.lm.d_head * self.lm.n_layers
        row_bytes = 4 * width * (kv + 8 * self.lm.d_model + 3 * d_mlp) + 8 * self.lm.n_heads * width * (
            state.prefix.bias.shape[1] + width
        )
        per_chunk = max(1, int(self.memory_bytes / row_bytes / n_datapoints))
        for start in range(0, len(order), per_chunk):
            numbers = order[start : start + per_chunk]
            chosen = [groups[i] for i in numbers]
            chunk = _Chunk(chosen, numbers, GroupEdits.build(chosen, self.lm.d_model, self.lm.n_layers, self.lm.device))
            chunk.n_active = [
                sum(stage <= 2 * layer for stage in chunk.edits.first_stage) for layer in range(self.lm.n_layers + 1)
            ]
            yield chunk

    # ------------------------------------------------------------ one chunk

    def _run_chunk(self, chunk: _Chunk, state: BaselineState, members: list[int]) -> dict[tuple[int, int], str]:
        """Changed answers by (group number, datapoint row)."""
        editor = Editor(self.lm, self.table, chunk.edits)
        datapoints = torch.tensor(members, device=self.lm.device)
        with torch.inference_mode():
            hidden, cache = self._teacher_forced_pass(chunk, state, editor, datapoints)
            finished, open_rows = self._first_differences(hidden, state, members)
            del hidden
            answers = finished
            if open_rows:
                answers.update(self._decode(chunk, state, editor, datapoints, cache, open_rows, members))
        n_datapoints = len(members)
        return {
            (chunk.numbers[row // n_datapoints], row % n_datapoints): self.lm.decode(ids)
            for row, ids in answers.items()
        }

    def _teacher_forced_pass(
        self, chunk: _Chunk, state: BaselineState, editor: Editor, datapoints: torch.Tensor
    ) -> tuple[torch.Tensor, WindowCache]:
        """Feed the baseline's tokens under ablation: final residual [group * datapoint, position, d_model].

        A group joins the batch at the layer where it leaves the baseline.
        """
        n_datapoints, width = state.tokens.shape
        hidden = state.final.new_zeros(0, width, self.lm.d_model)
        cache = WindowCache.empty(self.lm.n_layers)
        bias = causal_bias(width, self.lm.device)
        with attention_replaced(self.lm.model, self.lm.family, shared_attention(state.prefix, bias)):
            for layer in range(self.lm.n_layers):
                n_active = chunk.n_active[layer]
                hidden = self._join_before(chunk, state, layer, hidden)
                if n_active:
                    groups = torch.arange(n_active, device=self.lm.device).repeat_interleave(n_datapoints)
                    positions = state.positions.repeat(n_active, 1)
                    with editor.active(layer, groups, positions, datapoints.repeat(n_active)):
                        hidden = run_block(self.lm.model, self.lm.family, layer, hidden, positions, cache)
                hidden = self._join_after(chunk, state, editor, layer, hidden, datapoints)
        n_missing = len(chunk.groups) - hidden.shape[0] // n_datapoints
        return torch.cat([hidden, state.final.repeat(n_missing, 1, 1)]), cache

    def _join_before(self, chunk: _Chunk, state: BaselineState, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """Add the groups that ablate attention units of this layer first."""
        n_joining = sum(stage == 2 * layer for stage in chunk.edits.first_stage)
        if not n_joining:
            return hidden
        return torch.cat([hidden, block_input(self.lm, state, layer).repeat(n_joining, 1, 1)])

    def _join_after(
        self,
        chunk: _Chunk,
        state: BaselineState,
        editor: Editor,
        layer: int,
        hidden: torch.Tensor,
        datapoints: torch.Tensor,
    ) -> torch.Tensor:
        """Add the groups whose first edit is this layer's MLP write, from the baseline's block output."""
        joining = [g for g, stage in enumerate(chunk.edits.first_stage) if stage == 2 * layer + 1]
        if not joining:
            return hidden
        label = f"m{layer}"
        numbers, masks = chunk.edits.masks[label]
        place = {int(number): i for i, number in enumerate(numbers)}
        masks = masks[[place[g] for g in joining]]
        n_datapoints = len(datapoints)
        write = state.mlp_writes[layer]
        values = self.table.values(label, state.positions, datapoints).to(write.dtype)
        if self.lm.centred_writes:
            values = values + write.mean(dim=-1, keepdim=True)
        edited = torch.where(masks[:, None, None], values[None], write[None])
        joined = combine_layer(self.lm, state, layer, edited)
        return torch.cat([hidden, joined.view(len(joining) * n_datapoints, *write.shape[1:])])

    # ------------------------------------------------------------ comparing with the baseline

    def _first_differences(
        self, hidden: torch.Tensor, state: BaselineState, members: list[int]
    ) -> tuple[dict[int, list[int]], dict[int, tuple[int, int]]]:
        """Compare each row's predicted tokens with the baseline's.

        Returns rows whose new answer is already complete (row -> ids), and rows to be decoded further
        (row -> (number of answer tokens kept, the first new token)).
        """
        n_datapoints = len(members)
        windows = [self._windows[d] for d in members]
        places = [
            (row, window.first_prediction + number - window.first_token, number)
            for row, window in enumerate(windows)
            for number in range(window.first_token, len(window.answer))
        ]
        if not places:
            return {}, {}
        rows, positions, _ = (torch.tensor(column, device=hidden.device) for column in zip(*places, strict=True))
        by_group = hidden.view(-1, n_datapoints, *hidden.shape[1:])[:, rows, positions]
        predicted = self._as_one_stop(
            next_tokens_near(self.lm, self._rivals(state, members, rows, positions), by_group)
        )
        expected = torch.tensor([windows[row].answer[number] for row, _, number in places], device=hidden.device)
        finished: dict[int, list[int]] = {}
        open_rows: dict[int, tuple[int, int]] = {}
        for group, place in torch.nonzero(predicted != expected[None]).tolist():
            datapoint, _, kept = places[place]
            row = group * n_datapoints + datapoint
            if row in finished or row in open_rows:
                continue
            token = int(predicted[group, place])
            ids = [*windows[datapoint].answer[:kept], token]
            if self._is_finished(ids):
                finished[row] = self._without_stop(ids)
            else:
                open_rows[row] = (kept, token)
        return finished, open_rows

    def _rivals(self, state: BaselineState, members: list[int], rows: torch.Tensor, positions: torch.Tensor) -> Rivals:
        """Rivals of the baseline's tokens at these places; kept per datapoint, as every call asks for them again."""
        missing = [row for row, datapoint in enumerate(members) if datapoint not in self._rivals_of]
        if missing:
            wanted = torch.isin(rows, torch.tensor(missing, device=rows.device))
            found = find_rivals(self.lm, state.final[rows[wanted], positions[wanted]])
            owners = rows[wanted]
            for row in missing:
                self._rivals_of[members[row]] = found.select(torch.nonzero(owners == row).flatten())
        parts = [self._rivals_of[datapoint] for datapoint in members]
        return Rivals(
            *(torch.cat([getattr(part, name) for part in parts]) for name in ("state", "winner", "reach", "tokens"))
        )

    def _as_one_stop(self, tokens: torch.Tensor) -> torch.Tensor:
        """All stop tokens mean the same, the answer ends: the lowest stands for all."""
        stops = torch.tensor(sorted(self.lm.stop_token_ids), device=tokens.device)
        return torch.where(torch.isin(tokens, stops), stops[:1], tokens) if len(stops) else tokens

    def _is_finished(self, ids: Sequence[int]) -> bool:
        """True if nothing after these answer tokens matters."""
        if ids[-1] in self.lm.stop_token_ids or len(ids) >= self.max_new_tokens:
            return True
        return self.is_complete is not None and self.is_complete(self.lm.decode(ids))

    def _without_stop(self, ids: Sequence[int]) -> list[int]:
        return [token for token in ids if token not in self.lm.stop_token_ids]

    # ------------------------------------------------------------ decoding rows that left the baseline

    def _decode(
        self,
        chunk: _Chunk,
        state: BaselineState,
        editor: Editor,
        datapoints: torch.Tensor,
        cache: WindowCache,
        open_rows: dict[int, tuple[int, int]],
        members: list[int],
    ) -> dict[int, list[int]]:
        """Continue rows from their first new token, greedily: row -> answer ids."""
        answers: dict[int, list[int]] = {}
        rows = sorted(open_rows)
        kv_bytes = (
            8
            * state.keys[0].shape[1]
            * self.lm.d_head
            * self.lm.n_layers
            * (state.tokens.shape[1] + self.max_new_tokens)
        )
        step = max(16, int(self.memory_bytes / 2 / max(kv_bytes, 1)))
        for start in range(0, len(rows), step):
            part = rows[start : start + step]
            answers.update(
                self._decode_rows(
                    chunk, state, editor, datapoints, cache, {row: open_rows[row] for row in part}, members
                )
            )
        return answers

    def _decode_rows(
        self,
        chunk: _Chunk,
        state: BaselineState,
        editor: Editor,
        datapoints: torch.Tensor,
        cache: WindowCache,
        open_rows: dict[int, tuple[int, int]],
        members: list[int],
    ) -> dict[int, list[int]]:
        device = self.lm.device
        rows = list(open_rows)
        windows = [self._windows[members[row % len(members)]] for row in rows]
        ids = [
            [*window.answer[: open_rows[row][0]], open_rows[row][1]] for row, window in zip(rows, windows, strict=True)
        ]
        slots = torch.tensor(
            [
                window.first_prediction + open_rows[row][0] - window.first_token + 1
                for row, window in zip(rows, windows, strict=True)
            ],
            device=device,
        )
        local = torch.tensor(rows, device=device)
        place, groups = local % len(members), local // len(members)
        own = self._own_cache(chunk, state, cache, local, place)
        prefix = state.prefix.select(place)
        alive = torch.arange(len(rows), device=device)
        while len(alive):
            own.slots = slots[alive]
            token = torch.tensor([[ids[i][-1]] for i in alive.tolist()], device=device)
            positions = state.prefix_length[place[alive]][:, None] + own.slots[:, None]
            new = self._decode_step(prefix, own, token, positions, editor, groups[alive], datapoints[place[alive]])
            for i, next_token in zip(alive.tolist(), new.tolist(), strict=True):
                ids[i].append(next_token)
            kept = [index for index, i in enumerate(alive.tolist()) if not self._is_finished(ids[i])]
            if len(kept) < len(alive):
                keep = torch.tensor(kept, dtype=torch.long, device=device)
                own = WindowCache([k[keep] for k in own.keys], [v[keep] for v in own.values])
                prefix = prefix.select(keep)
                alive = alive[keep]
            slots = slots + 1
        return {row: self._without_stop(answer) for row, answer in zip(rows, ids, strict=True)}

    def _own_cache(
        self, chunk: _Chunk, state: BaselineState, cache: WindowCache, rows: torch.Tensor, place: torch.Tensor
    ) -> WindowCache:
        """Keys and values of the rows' windows with room for new tokens, one [row, kv head, slot, d_head] per layer.

        Below the layer where a group left the baseline they are the baseline's.
        """
        n_slots = state.tokens.shape[1] + self.max_new_tokens
        n_datapoints = state.tokens.shape[0]
        keys, values = [], []
        for layer in range(self.lm.n_layers):
            active = rows < chunk.n_active[layer] * n_datapoints
            for store, passed, baseline in (
                (keys, cache.keys[layer], state.keys[layer]),
                (values, cache.values[layer], state.values[layer]),
            ):
                room = baseline.new_zeros(len(rows), baseline.shape[1], n_slots, baseline.shape[3])
                window = baseline[place]
                if bool(active.any()):
                    window[active] = passed[rows[active]]
                room[:, :, : window.shape[2]] = window
                store.append(room)
        return WindowCache(keys, values)

    def _decode_step(
        self,
        prefix: Prefix,
        own: WindowCache,
        token: torch.Tensor,
        positions: torch.Tensor,
        editor: Editor,
        groups: torch.Tensor,
        datapoints: torch.Tensor,
    ) -> torch.Tensor:
        """Run one new token of each row through the network under ablation: the next token of each row."""
        n_slots = own.keys[0].shape[2]
        visible = torch.arange(n_slots, device=token.device)[None] <= own.slots[:, None]
        bias = torch.zeros(visible.shape, device=token.device).masked_fill(~visible, MINUS_INFINITY)[:, None]
        with attention_replaced(self.lm.model, self.lm.family, shared_attention(prefix, bias)):
            hidden = embed(self.lm.model, self.lm.family, token, positions)
            for layer in range(self.lm.n_layers):
                with editor.active(layer, groups, positions, datapoints):
                    hidden = run_block(self.lm.model, self.lm.family, layer, hidden, positions, own)
        return next_tokens(self.lm, hidden[:, 0])


def _window(prompt: list[int], answer: tuple[int, ...], decode_only: bool, scope: DecodeScope) -> Window:
    """Split a datapoint's tokens where the intervention begins."""
    fed = answer[:-1]
    if not decode_only:
        return Window((), (*prompt, *fed), len(prompt) - 1, 0, answer)
    if scope is DecodeScope.ANSWER:
        return Window(tuple(prompt[:-1]), (prompt[-1], *fed), 0, 0, answer)
    return Window(tuple(prompt), fed, 0, 1, answer)
