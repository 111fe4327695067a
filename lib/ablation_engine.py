"""The ablation engine: many neuron groups x many datapoints -> the answers after ablation.

Answers equal those of the plain model with a forward hook that replaces the same coordinates, token by token. Less is
computed: the prompt's keys and values are shared by all groups; a group starts at its first ablated layer from the
baseline's residual stream; the baseline's answer is fed in one pass and only rows whose next token differs are decoded
further; many groups of all layers go through the network together.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np
import torch

from lib.cli import Report, UserError
from lib.engine_baseline import answer_and_record, compute_baseline
from lib.engine_chunk import AnswerEnd, ChunkRun, Places
from lib.engine_forward import leaving_stage
from lib.engine_logits import Rivals, find_rivals
from lib.engine_state import BaselineState, Site, Window
from lib.interventions import DecodeScope, ReplacementTable
from lib.modeling_and_ablation import Generation, LanguageModel
from lib.neurons import Neuron
from lib.packed_weights import pack_weights, unpack_weights

IsSettled = Callable[[int, int, str], bool]
"""Says of the beginning of a changed answer, (group number, datapoint, text), that the rest of it is not wanted."""
_Result = TypeVar("_Result")
_SMALLEST_BUDGET = 2**20
_TOO_LARGE = "one datapoint does not fit into memory; use a smaller model or --dtype bfloat16"
_SINGLES_WORTH_RIVALS = 12
"""Single neurons from which on it pays to find a datapoint's rivals; larger groups move a row beyond all of them."""
_FEWEST_ROWS = 96
"""Rows worth a trip of their own through the network: below, reading the weights again costs what it saves."""


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


class AblationEngine:
    """Answers of a language model on fixed prompts while groups of neurons are ablated.

    lm: the model. prompts: all datapoints; calls name them by number. table: replacement values. decode_only: leave
    the prompt alone and intervene at answer-producing positions (`decode_scope`); otherwise at every position.
    is_complete: says of an answer so far that nothing after it matters; decoding stops there, and later tokens are not
    compared.
    memory_mb: working memory for passes and, again as much, for baseline states. A second copy of the weights makes
    products faster (`packed_weights`); where it is no larger it is made, and passes have the rest, but at least half.
    batch_size: prompts per forward pass where the model's answers come from a run of their own, for any but the
    default intervention.
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
        self.table = table
        self.end = AnswerEnd(lm, max_new_tokens, is_complete)
        self.memory_bytes = memory_mb * 2**20
        packed_bytes = _if_it_fits(partial(pack_weights, lm.model, lm.blocks, self.memory_bytes)) or 0
        self.pass_bytes = max(self.memory_bytes // 2, self.memory_bytes - packed_bytes)
        self.counters = EngineCounters()
        self._mode = decode_only, decode_scope
        prompt_ids = lm.tokenize(prompts, max_len=lm.n_positions - max_new_tokens)
        longest = (_window(ids, (0,) * max_new_tokens, *self._mode) for ids in prompt_ids)
        self._sizes = [(len(window.prefix), len(window.tokens)) for window in longest]
        """Lengths of prefixes and windows if all answers were as long as they may be: memory is shared out by these."""
        self._states: dict[int, BaselineState] = {}
        if self._mode == (True, DecodeScope.ANSWER):
            self._blocks, baseline = self._answer_by_blocks(prompt_ids, report)
        else:
            self._blocks = self._make_blocks(range(len(prompt_ids)))
            baseline = lm.generate(prompts, max_new_tokens, batch_size=batch_size, report=report)
        self._block_of = {
            d: (number, place) for number, block in enumerate(self._blocks) for place, d in enumerate(block)
        }
        self.baseline_answers = [generation.answer for generation in baseline]
        self._windows = self._windows_of(prompt_ids, baseline)
        self._rivals_of: dict[int, Rivals] = {}
        self._known: set[Neuron] = set()

    # ------------------------------------------------------------ public

    def prepare(self, groups: Sequence[Sequence[Neuron]]) -> None:
        """Measure the replacement values of all these groups in one pass over the reference prompts.

        `answers` does it for its own groups; whoever calls it several times saves passes by announcing all of them.
        """
        self._check(groups)
        self.table.prepare({neuron.layer_label for group in groups for neuron in group})

    def answers(
        self,
        groups: Sequence[Sequence[Neuron]],
        datapoints: Sequence[int],
        progress: Callable[[int], None] | None = None,
        is_settled: IsSettled | None = None,
    ) -> AblatedAnswers:
        """Answers after ablating each group, on each of the datapoints.

        progress: called with the number of finished (group, datapoint) pairs of each chunk. is_settled: a changed
        answer of which it says True is left as it is then, without what would follow; None to have all answers whole.

        Raises:
            UserError: a neuron that the model does not have, or one row that does not fit into memory.
        """
        self.prepare(groups)
        changed = np.zeros((len(groups), len(datapoints)), dtype=bool)
        texts: dict[tuple[int, int], str] = {}
        stages = [leaving_stage(group, self.lm.n_layers) for group in groups]
        order = sorted(range(len(groups)), key=lambda i: (stages[i], i))
        for number, columns in self._parts(datapoints, len(groups)):
            members = [int(datapoints[column]) for column in columns]
            for numbers, found in self._run_block(number, members, groups, order, is_settled):
                for (place, row), text in found.items():
                    key = numbers[place], columns[row]
                    changed[key] = True
                    texts[key] = text
                self.counters.n_evaluations += len(numbers) * len(members)
                if progress is not None:
                    progress(len(numbers) * len(members))
        self.counters.n_diverged += len(texts)
        return AblatedAnswers(changed, dict(sorted(texts.items())))

    def sites(self, datapoints: Sequence[int]) -> list[Site]:
        """Where each datapoint's first answer token within reach of the intervention is decided.

        Datapoints whose answer has no such token are left out.
        """
        windows = [(int(datapoint), self._windows[int(datapoint)]) for datapoint in datapoints]
        return [
            Site(
                datapoint,
                (*window.prefix, *window.tokens[: window.first_prediction + 1]),
                window.answer[window.first_token],
            )
            for datapoint, window in windows
            if len(window.answer) > window.first_token
        ]

    # ------------------------------------------------------------ running

    def _parts(self, datapoints: Sequence[int], n_groups: int) -> list[tuple[int, list[int]]]:
        """The datapoints in parts that go through the network together: (block, columns of `datapoints`).

        Short windows are not filled up to the length of long ones where there are enough rows of either.
        """
        columns: dict[int, list[int]] = {}
        for column, datapoint in enumerate(datapoints):
            columns.setdefault(self._block_of[int(datapoint)][0], []).append(column)
        parts = []
        # Blocks whose baseline is still in memory come first: the next call begins where this one ends.
        for number in sorted(columns, key=lambda number: (number not in self._states, number)):
            lengths = [len(self._windows[int(datapoints[column])].tokens) for column in columns[number]]
            by_length = sorted(range(len(lengths)), key=lengths.__getitem__)
            part: list[int] = []
            for place, index in enumerate(by_length):
                is_longer = bool(part) and lengths[index] > lengths[by_length[place - 1]]
                n_rest = len(by_length) - place
                if is_longer and min(len(part), n_rest) * n_groups >= _FEWEST_ROWS:
                    parts.append((number, sorted(part)))
                    part = []
                part.append(columns[number][index])
            parts.append((number, sorted(part)))
        return parts

    def _run_block(
        self,
        number: int,
        members: list[int],
        groups: Sequence[Sequence[Neuron]],
        order: list[int],
        is_settled: IsSettled | None,
    ) -> Iterator[tuple[list[int], dict[tuple[int, int], str]]]:
        """Run all groups on some datapoints of a block, in chunks: (group numbers, changed answers by place)."""
        places = torch.tensor([self._block_of[d][1] for d in members], device=self.lm.device)
        state = self._state(number).select(places)
        decided = self._places(state, members, sum(len(group) == 1 for group in groups))
        if decided is None:
            yield order, {}
            return
        windows = [self._windows[d] for d in members]
        numbers_for_table = torch.tensor(members, device=self.lm.device)
        start = 0
        while start < len(order):
            n_groups, decode_rows = self._chunk_size(state)
            numbers = order[start : start + n_groups]
            chosen = [groups[i] for i in numbers]
            settled = None if is_settled is None else partial(_of_chunk, is_settled, numbers, members)
            chunk = ChunkRun(
                self.lm, self.table, self.end, chosen, state, windows, numbers_for_table, decided, settled
            )  # fmt: skip
            found = _if_it_fits(partial(chunk.run, decode_rows))
            if found is None:
                self._shrink()
                continue
            yield numbers, found
            start += len(numbers)

    def _chunk_size(self, state: BaselineState) -> tuple[int, int]:
        """How many groups go through the network together, and how many rows are decoded together."""
        n_datapoints, width = state.tokens.shape
        kv_values = 2 * self.lm.n_kv_heads * self.lm.d_head * self.lm.n_layers
        widest = 20 * self.lm.d_model
        scores = 2 * self.lm.n_heads * (state.prefix.bias.shape[1] + width)
        row_bytes = self.lm.dtype.itemsize * width * (kv_values + widest + scores)
        n_groups = max(1, int(self.pass_bytes / row_bytes / n_datapoints))
        n_slots = state.prefix.bias.shape[1] + width + self.end.max_new_tokens
        return n_groups, max(16, int(self.pass_bytes / (2 * self.lm.dtype.itemsize * kv_values * n_slots)))

    def _shrink(self) -> None:
        """Halve the working memory after running out of it, and do without a copy of the weights."""
        unpack_weights(self.lm.model)
        self.memory_bytes //= 2
        self.pass_bytes //= 2
        if self.pass_bytes < _SMALLEST_BUDGET:
            raise UserError(_TOO_LARGE)

    def _places(self, state: BaselineState, members: list[int], n_singles: int) -> Places | None:
        """Where these datapoints decide answer tokens; None if none does. n_singles: groups of one neuron to come."""
        found = [
            (row, window.first_prediction + number - window.first_token, number, window.answer[number])
            for row, window in enumerate(self._windows[d] for d in members)
            for number in range(window.first_token, len(window.answer))
        ]
        if not found:
            return None
        rows, positions, numbers, expected = zip(*found, strict=True)
        row_tensor, position_tensor, expected_tensor = (
            torch.tensor(column, device=self.lm.device) for column in (rows, positions, expected)
        )
        is_known = all(datapoint in self._rivals_of for datapoint in members)
        is_worth_it = self.lm.dtype == torch.float32 and (is_known or n_singles >= _SINGLES_WORTH_RIVALS)
        rivals = self._rivals(state, members, row_tensor, position_tensor) if is_worth_it else None
        return Places(row_tensor, position_tensor, list(numbers), expected_tensor, rivals)

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

    # ------------------------------------------------------------ preparation

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

    def _answer_by_blocks(
        self, prompt_ids: Sequence[list[int]], report: Report | None
    ) -> tuple[list[list[int]], list[Generation]]:
        """Blocks and the model's own answers; the blocks' states, computed on the way, are kept as memory allows."""
        bar = report.progress(range(len(prompt_ids)), unit="prompt", desc="answers") if report else iter(prompt_ids)
        answers: dict[int, Generation] = {}
        done: list[list[int]] = []
        waiting = self._make_blocks(range(len(prompt_ids)))
        while waiting:
            ids = [prompt_ids[d] for d in waiting[0]]
            run = _if_it_fits(partial(answer_and_record, self.lm, ids, self.end.max_new_tokens))
            if run is None:
                if len(ids) == 1 and not self._states:
                    raise UserError(_TOO_LARGE)
                self._states.clear()
                unpack_weights(self.lm.model)
                middle = (len(ids) + 1) // 2
                waiting[:1] = [part for part in (waiting[0][:middle], waiting[0][middle:]) if part]
                continue
            found, state = run
            lengths = [len(window.tokens) for window in self._windows_of(ids, found)]
            self._keep(len(done), state.cut(torch.tensor(lengths, device=self.lm.device)))
            done.append(waiting.pop(0))
            answers.update(zip(done[-1], found, strict=True))
            for _ in ids:
                next(bar, None)
        next(bar, None)
        return done, [answers[d] for d in range(len(prompt_ids))]

    def _windows_of(self, prompt_ids: Sequence[list[int]], baseline: Sequence[Generation]) -> list[Window]:
        """The windows of prompts with these answers."""
        pairs = zip(prompt_ids, baseline, strict=True)
        return [_window(ids, self.end.tokens_that_matter(generation), *self._mode) for ids, generation in pairs]

    def _make_blocks(self, datapoints: Iterable[int]) -> list[list[int]]:
        """Datapoints of similar length together, as many as fit into the memory for baseline states."""
        size = self.lm.dtype.itemsize
        parts = 3 if self.lm.is_parallel else 2
        kv_width = 2 * self.lm.n_kv_heads * self.lm.d_head
        blocks: list[list[int]] = []
        used = 0
        for datapoint in sorted(datapoints, key=lambda d: (self._sizes[d], d)):
            n_prefix, n_window = self._sizes[datapoint]
            per_layer = parts * n_window * self.lm.d_model + (n_prefix + n_window) * kv_width
            cost = self.lm.n_layers * per_layer * size
            if not blocks or used + cost > self.memory_bytes / 2:
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
        self._keep(number, state)
        return state

    def _keep(self, number: int, state: BaselineState) -> None:
        """Keep a block's state, in place of others where memory is short."""
        while self._states and state.n_bytes + sum(kept.n_bytes for kept in self._states.values()) > self.memory_bytes:
            del self._states[next(iter(self._states))]
        self._states[number] = state


def _if_it_fits(run: Callable[[], _Result]) -> _Result | None:
    """What `run` returns; None if it ran out of memory, with all that it held let go."""
    with contextlib.suppress(torch.OutOfMemoryError, MemoryError):
        return run()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


def _of_chunk(
    is_settled: IsSettled, numbers: list[int], members: list[int], group: int, row: int, text: str
) -> bool:
    """`is_settled` for the places of a chunk."""
    return is_settled(numbers[group], members[row], text)


def _window(prompt: list[int], answer: tuple[int, ...], decode_only: bool, scope: DecodeScope) -> Window:
    """Split a datapoint's tokens where the intervention begins."""
    fed = answer[:-1]
    if not decode_only:
        return Window((), (*prompt, *fed), len(prompt) - 1, 0, answer)
    if scope is DecodeScope.ANSWER:
        return Window(tuple(prompt[:-1]), (prompt[-1], *fed), 0, 0, answer)
    return Window(tuple(prompt), fed, 0, 1, answer)
