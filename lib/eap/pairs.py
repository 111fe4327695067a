"""Clean and corrupted sequences as token ids, aligned at the border between prompt and answer, in batches.

One tokenisation: a sequence is the prompt's own ids followed by the answer's ids, and every span is counted in them.
Batches pad on both sides so that the border is in the same column everywhere; a clean token and the corrupted token in
its column are each other's counterpart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from lib.cli import UserError

if TYPE_CHECKING:
    from lib.modeling_and_ablation import LanguageModel


class AnsweredPrompt(NamedTuple):
    """A prompt with the answer that the model gave to it."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    """Never empty: an empty answer is the stop token."""


class Pair(NamedTuple):
    """A datapoint on which the rule holds (clean) with one on which it does not (corrupted)."""

    clean: AnsweredPrompt
    corrupted: AnsweredPrompt


def sequences(
    language_model: LanguageModel, prompts: Sequence[str], answers: Sequence[str], max_answer_tokens: int | None = None
) -> list[AnsweredPrompt]:
    """Token ids of prompts with recorded answers; answers are cut to `max_answer_tokens`.

    The answer's ids are what follows the prompt's ids in the tokenisation of the whole text. Where a token spans the
    border, the model cannot have produced that tokenisation: there the answer is tokenised by itself.
    """
    prompt_ids = language_model.tokenize(prompts)
    whole_ids = language_model.tokenize([prompt + answer for prompt, answer in zip(prompts, answers, strict=True)])
    result = []
    for prompt, whole, answer in zip(prompt_ids, whole_ids, answers, strict=True):
        if not answer:
            ids = [min(language_model.stop_token_ids, default=language_model.pad_token_id)]
        elif whole[: len(prompt)] == prompt and len(whole) > len(prompt):
            ids = whole[len(prompt) :]
        else:
            ids = language_model.tokenizer(answer, add_special_tokens=False)["input_ids"]
        ids = ids[:max_answer_tokens]
        result.append(AnsweredPrompt(tuple(prompt[-(language_model.n_positions - len(ids)) :]), tuple(ids)))
    return result


@dataclass(frozen=True)
class PairBatch:
    """Pairs as rectangles of token ids; column `border` is the first answer token of every row.

    ids, is_real: [side, pair, column], side 0 is clean and side 1 corrupted. positions: token positions counted
    without padding, same shape.
    """

    numbers: list[int]
    ids: torch.Tensor
    is_real: torch.Tensor
    positions: torch.Tensor
    border: int

    @property
    def n_pairs(self) -> int:
        """Number of pairs in the batch."""
        return self.ids.shape[1]

    @property
    def has_counterpart(self) -> torch.Tensor:
        """Columns where both sides have a token, [pair, column] bool."""
        return self.is_real.all(dim=0)

    @property
    def scored(self) -> torch.Tensor:
        """Columns whose logits predict an answer token of the clean side, [pair, column] bool."""
        result = torch.zeros_like(self.is_real[0])
        result[:, self.border - 1 : -1] = self.is_real[0][:, self.border :]
        return result

    def n_identical_columns(self) -> int:
        """Leading columns in which clean and corrupted agree, in ids, padding and position, in every pair."""
        same = (
            (self.ids[0] == self.ids[1])
            & (self.is_real[0] == self.is_real[1])
            & (self.positions[0] == self.positions[1])
        )
        agreeing = same.all(dim=0).long().cumprod(dim=0)
        return int(agreeing.sum())

    def to(self, device: torch.device) -> PairBatch:
        """The batch on a device."""
        return PairBatch(
            self.numbers, self.ids.to(device), self.is_real.to(device), self.positions.to(device), self.border
        )


def make_batch(pairs: Sequence[Pair], numbers: Sequence[int], pad_token_id: int) -> PairBatch:
    """Rectangle of the chosen pairs (numbers into `pairs`)."""
    rows = [[pairs[number].clean for number in numbers], [pairs[number].corrupted for number in numbers]]
    border = max(len(sequence.prompt) for side in rows for sequence in side)
    n_columns = border + max(len(sequence.answer) for side in rows for sequence in side)
    ids = torch.full((2, len(numbers), n_columns), pad_token_id)
    is_real = torch.zeros(ids.shape, dtype=torch.bool)
    for side, side_rows in enumerate(rows):
        for row, sequence in enumerate(side_rows):
            first, stop = border - len(sequence.prompt), border + len(sequence.answer)
            ids[side, row, first:stop] = torch.tensor(sequence.prompt + sequence.answer)
            is_real[side, row, first:stop] = True
    positions = (is_real.long().cumsum(dim=-1) - 1).clamp(min=0)
    return PairBatch(list(numbers), ids, is_real, positions, border)


def for_each_batch(
    pairs: Sequence[Pair],
    batch_size: int,
    language_model: LanguageModel,
    work: Callable[[PairBatch], None],
    progress: Iterable[int] = (),
) -> None:
    """Call `work` on batches (on the model's device) that together hold every pair once, similar lengths together.

    A batch that does not fit into memory is halved, as are all later ones: `work` must change nothing before it has
    everything. progress: iterated once per finished pair.

    Raises:
        UserError: a single pair does not fit into memory.
    """

    def shape(number: int) -> tuple[int, ...]:
        pair = pairs[number]
        return (
            len(pair.clean.prompt),
            len(pair.corrupted.prompt),
            len(pair.clean.answer),
            len(pair.corrupted.answer),
            number,
        )

    order = sorted(range(len(pairs)), key=shape)
    ticks = iter(progress)
    start = 0
    while start < len(order):
        numbers = order[start : start + batch_size]
        try:
            work(make_batch(pairs, numbers, language_model.pad_token_id).to(language_model.device))
        except (torch.OutOfMemoryError, MemoryError) as error:
            if len(numbers) == 1:
                raise UserError(
                    "one pair of prompts does not fit into memory; use a smaller model or --dtype bfloat16"
                ) from error
            batch_size = (len(numbers) + 1) // 2
            continue
        start += len(numbers)
        for _ in numbers:
            next(ticks, None)
    # A progress bar closes when it is exhausted.
    next(ticks, None)
