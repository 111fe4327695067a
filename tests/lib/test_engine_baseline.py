"""Baseline runs of the engine: beginnings run once, answers as the model gives them, states as one pass makes them."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.ablation_engine import AblationEngine
from lib.cli import UserError
from lib.engine_baseline import answer_and_record, compute_baseline
from lib.engine_prefill import _levels, _parts, prefill
from lib.engine_state import Window
from lib.interventions import Intervention, build_table
from lib.modeling_and_ablation import LanguageModel
from lib.neurons import Neuron
from tests.models import FAMILIES, tiny_model

PROMPTS = ["5", "1+2=", "1+20=", "1+2+3=", "123-4=56;", "123-4=57;"]
MAX_NEW_TOKENS = 5


@pytest.fixture
def stopping_model(monkeypatch):
    """Makes models that end one of the answers early."""

    def make(family: str, dtype: torch.dtype):
        lm = tiny_model(family, seed=4)
        if dtype != torch.float32:
            lm = LanguageModel(copy.deepcopy(lm.model).to(dtype), lm.tokenizer, lm.name)
        stop_at(lm, [])
        stop_at(lm, [lm.generate(PROMPTS, MAX_NEW_TOKENS)[1].ids[1]])
        return lm

    def stop_at(lm: LanguageModel, stops: list[int]) -> None:
        monkeypatch.setattr(lm, "stop_token_ids", frozenset(stops))
        monkeypatch.setattr(lm.model.generation_config, "eos_token_id", stops or None)

    return make


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_the_models_and_states_those_of_one_pass(family, dtype, stopping_model):
    lm = stopping_model(family, dtype)
    error = 1e-4 if dtype == torch.float32 else 0.1
    ids = lm.tokenize(PROMPTS)
    found, state = answer_and_record(lm, ids, MAX_NEW_TOKENS)
    assert len({len(generation.ids) for generation in found}) > 1
    # In half precision the order of sums decides between tokens that are as likely.
    assert dtype != torch.float32 or found == lm.generate(PROMPTS, MAX_NEW_TOKENS)
    windows = []
    for row, generation in zip(ids, found, strict=True):
        tokens = (*generation.ids, *lm.stop_token_ids) if generation.stopped else generation.ids
        windows.append(Window(tuple(row[:-1]), (row[-1], *tokens[:-1]), 0, 0, tokens))
    one_pass = compute_baseline(lm, windows)
    cut = state.cut(one_pass.window_length)
    for row, window in enumerate(windows):
        n = len(window.tokens)
        assert cut.tokens[row, :n].tolist() == list(window.tokens)
        assert cut.positions[row, :n].tolist() == one_pass.positions[row, :n].tolist()
        torch.testing.assert_close(cut.final[row, :n], one_pass.final[row, :n], rtol=error, atol=error)
        for name in ("mid", "attention_writes", "mlp_writes"):
            pairs = zip(getattr(cut, name), getattr(one_pass, name), strict=True)
            for mine, theirs in pairs:
                torch.testing.assert_close(mine[row, :n], theirs[row, :n], rtol=error, atol=error)
        for name in ("keys", "values"):
            pairs = zip(getattr(cut, name), getattr(one_pass, name), strict=True)
            for mine, theirs in pairs:
                torch.testing.assert_close(mine[row, :, :n], theirs[row, :, :n], rtol=error, atol=error)


def test_a_cut_state_is_as_wide_as_its_longest_window():
    lm = tiny_model("llama", seed=4)
    _, state = answer_and_record(lm, lm.tokenize(PROMPTS), MAX_NEW_TOKENS)
    assert state.tokens.shape == (6, MAX_NEW_TOKENS)
    cut = state.cut(torch.tensor([1, 2, 3, 2, 1, 1]))
    assert cut.tokens.shape == (6, 3) and cut.final.shape[:2] == (6, 3) and cut.keys[0].shape[2] == 3


def test_a_block_that_does_not_fit_into_memory_is_halved(monkeypatch):
    lm = tiny_model("llama", seed=4)
    table = build_table(lm, Intervention.ZERO, PROMPTS, max_new_tokens=MAX_NEW_TOKENS)
    groups = [[Neuron("m0", index), Neuron("m1", index)] for index in range(6)]
    whole = AblationEngine(lm, PROMPTS, table, max_new_tokens=MAX_NEW_TOKENS)
    sizes = []

    def small_memory(lm, prompts, max_new_tokens):
        sizes.append(len(prompts))
        if len(prompts) > 2:
            raise MemoryError
        return answer_and_record(lm, prompts, max_new_tokens)

    monkeypatch.setattr("lib.ablation_engine.answer_and_record", small_memory)
    halved = AblationEngine(lm, PROMPTS, table, max_new_tokens=MAX_NEW_TOKENS)
    assert sizes == [6, 3, 2, 1, 3, 2, 1] and halved.memory_bytes == whole.memory_bytes
    assert halved.baseline_answers == whole.baseline_answers
    assert halved.answers(groups, range(6)).texts == whole.answers(groups, range(6)).texts
    monkeypatch.setattr("lib.ablation_engine.answer_and_record", lambda *args: (_ for _ in ()).throw(MemoryError))
    with pytest.raises(UserError, match="does not fit into memory"):
        AblationEngine(lm, PROMPTS, table, max_new_tokens=MAX_NEW_TOKENS)


def test_beginnings_worth_a_trip_of_their_own():
    # Ten tokens that all share, then one of ten eights, then three of their own: 200 * 21 tokens, or 10 + 80 + 600.
    tree = [(1,) * 10 + (row // 20,) * 8 + (row, row, row) for row in range(200)]
    assert _levels(tree) == [10, 18]
    # A trip counts as 64 tokens: 66 saved ones are worth it, 63 are not.
    assert _levels([(7,) * 33 + (row,) for row in range(3)]) == [33]
    assert _levels([(7,) * 63 + (row,) for row in range(2)]) == []
    assert _levels([(1, 2, 3)] * 3) == _levels([(), (1,)]) == _levels([(5,)]) == []
    assert _levels([(1, 2, 3)] * 60) == [3]


def test_rests_are_parted_where_the_padding_saved_is_worth_a_trip():
    # Put with longer ones, 63 rows of one token need 63 more, which are not worth a trip; 64 are.
    assert _parts([0, 2, *[1] * 63]) == [[*range(2, 65), 1]]
    assert _parts([0, 2, *[1] * 64]) == [list(range(2, 66)), [1]]
    assert _parts([40, 8, 0, 39]) == [[1, 3, 0]]
    assert _parts([80, 8, 0, 7]) == [[3, 1], [0]]
    assert _parts([0, 0]) == []


sequences = st.lists(st.lists(st.integers(2, 4), max_size=6), min_size=1, max_size=8)


@settings(max_examples=25)
@given(family=st.sampled_from(FAMILIES), rows=sequences, trip=st.sampled_from([0, 2, 64]))
def test_prefixes_are_those_of_each_prompt_alone(family, rows, trip):
    lm = tiny_model(family, seed=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lib.engine_prefill._TRIP", trip)
        together = prefill(lm, rows)
    for number, row in enumerate(rows):
        assert (together.bias[number] == 0).tolist() == [place < len(row) for place in range(together.bias.shape[1])]
        if not row:
            continue
        alone = lm.base(torch.tensor([row]), use_cache=True).past_key_values
        for layer, kept in enumerate(alone.layers):
            for mine, theirs in ((together.keys, kept.keys), (together.values, kept.values)):
                torch.testing.assert_close(mine[layer][number, :, : len(row)], theirs[0], rtol=1e-4, atol=1e-4)
