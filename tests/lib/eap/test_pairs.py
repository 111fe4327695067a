"""Spans and alignment in token ids."""

import pytest
import torch

from lib.cli import UserError
from lib.eap.pairs import AnsweredPrompt, Pair, for_each_batch, make_batch, sequences
from tests.lib.eap.cases import mixed_pairs
from tests.models import tiny_model


class MergingTokenizer:
    """Like the tiny tokenizer, but `=4` is one token, and every text starts with BOS."""

    eos_token_id, pad_token_id = 1, 3

    def __call__(self, texts, add_special_tokens=True):
        if isinstance(texts, str):
            return {"input_ids": self._ids(texts, add_special_tokens)}
        return {"input_ids": [self._ids(text, add_special_tokens) for text in texts]}

    @staticmethod
    def _ids(text, add_special_tokens):
        ids = [2] if add_special_tokens else []
        while text:
            width = 2 if text.startswith("=4") else 1
            ids.append(40 if width == 2 else 4 + "0123456789+-*/=".index(text[0]))
            text = text[width:]
        return ids


def test_answer_span_follows_the_prompt_with_and_without_bos():
    for with_bos in (False, True):
        lm = tiny_model("llama", with_bos=with_bos)
        (item,) = sequences(lm, ["12+34="], ["46"])
        assert list(item.prompt) == lm.tokenize(["12+34="])[0]
        assert list(item.prompt + item.answer) == lm.tokenize(["12+34=46"])[0]
        assert len(item.answer) == 2


def test_a_token_across_the_border_does_not_move_the_border(monkeypatch):
    # The whole text would be tokenised 1 2 + 3 4 (=4) 6; the model saw 1 2 + 3 4 = and answered 4 6.
    lm = tiny_model("llama")
    monkeypatch.setattr(lm, "tokenizer", MergingTokenizer())
    (item,) = sequences(lm, ["12+34="], ["46"])
    assert list(item.prompt) == [2, 5, 6, 14, 7, 8, 18]
    assert list(item.answer) == [8, 10]


def test_an_empty_answer_is_the_stop_token_and_long_answers_are_cut():
    lm = tiny_model("llama")
    empty, long = sequences(lm, ["1=", "2="], ["", "12345"], max_answer_tokens=3)
    assert empty.answer == (1,)
    assert len(long.answer) == 3


def test_rows_are_aligned_at_the_border():
    pair = Pair(AnsweredPrompt((5, 6, 7), (8, 9)), AnsweredPrompt((6, 7), (8,)))
    batch = make_batch([pair], [0], pad_token_id=3)
    assert batch.border == 3
    assert batch.ids.tolist() == [[[5, 6, 7, 8, 9]], [[3, 6, 7, 8, 3]]]
    assert batch.positions.tolist() == [[[0, 1, 2, 3, 4]], [[0, 0, 1, 2, 2]]]
    assert batch.has_counterpart.tolist() == [[False, True, True, True, False]]
    # Columns 2 and 3 predict the two answer tokens of the clean side.
    assert batch.scored.tolist() == [[False, False, True, True, False]]


def test_identical_columns_end_at_the_first_difference():
    same = AnsweredPrompt((5, 6, 7), (8,))
    batch = make_batch([Pair(same, AnsweredPrompt((5, 6, 9), (8,))), Pair(same, same)], [0, 1], pad_token_id=3)
    assert batch.n_identical_columns() == 2


@pytest.mark.parametrize("error", [MemoryError, torch.OutOfMemoryError])
def test_batches_that_do_not_fit_are_halved(error):
    lm = tiny_model("llama")
    done, ticks = [], []

    def work(batch):
        if batch.n_pairs > 2:
            raise error
        done.append(batch.numbers)

    def count():
        for number in range(4):
            ticks.append(number)
            yield number

    for_each_batch(mixed_pairs(lm), 8, lm, work, count())
    assert sorted(number for numbers in done for number in numbers) == [0, 1, 2, 3]
    assert [len(numbers) for numbers in done] == [2, 2] and len(ticks) == 4


def test_a_pair_that_does_not_fit_is_an_error_for_people():
    lm = tiny_model("llama")

    def work(batch):
        raise MemoryError

    with pytest.raises(UserError, match="does not fit into memory"):
        for_each_batch(mixed_pairs(lm), 4, lm, work)
