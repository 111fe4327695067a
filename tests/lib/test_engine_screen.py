"""The screened argmax equals the argmax over the whole vocabulary."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib import engine_screen
from lib.engine_screen import VocabularyScreen, pays


def projection(n_tokens: int, d_model: int, seed: int, scale: float) -> torch.nn.Linear:
    generator = torch.Generator().manual_seed(seed)
    head = torch.nn.Linear(d_model, n_tokens, bias=False)
    # Rows of very unlike length, as real vocabularies have.
    lengths = torch.rand(n_tokens, 1, generator=generator) ** 2 * scale + 0.01
    head.weight = torch.nn.Parameter(torch.randn(n_tokens, d_model, generator=generator) * lengths)
    return head


@settings(max_examples=60)
@given(
    n_tokens=st.sampled_from([1, 5, 64, 65, 700, 3000]),
    d_model=st.sampled_from([2, 16, 96]),
    n_rows=st.integers(0, 300),
    seed=st.integers(0, 10_000),
    scale=st.sampled_from([1e-3, 1.0, 50.0]),
)
def test_equals_the_argmax_of_all_logits(n_tokens, d_model, n_rows, seed, scale):
    head = projection(n_tokens, d_model, seed, scale)
    state = torch.randn(n_rows, d_model, generator=torch.Generator().manual_seed(seed + 1)) * scale
    with torch.inference_mode():
        logits, found = head(state), VocabularyScreen.of(head).next_tokens(state)
        # The same product in another order may differ in its last bit: the logits decide, not the numbers.
        chosen = logits.gather(1, found[:, None])[:, 0]
        if n_rows:
            best = logits.max(-1).values
            assert (chosen >= best - 1e-5 * best.abs().clamp(min=1e-9)).all()


def test_rivals_closer_than_half_precision_can_tell_are_told_apart():
    # Logits 1000.0 to 1000.7 are one number in bfloat16.
    head = torch.nn.Linear(2, 8, bias=False)
    head.weight = torch.nn.Parameter(torch.tensor([[1000.0, 0.1 * token] for token in (3, 1, 7, 0, 2, 6, 5, 4)]))
    with torch.inference_mode():
        assert VocabularyScreen.of(head).next_tokens(torch.tensor([[1.0, 1.0], [1.0, -1.0]])).tolist() == [2, 3]


def test_a_tie_goes_to_the_lowest_token_and_filling_never_wins():
    head = torch.nn.Linear(2, 70, bias=False)
    head.weight = torch.nn.Parameter(torch.full((70, 2), -3.0))
    with torch.inference_mode():
        found = VocabularyScreen.of(head).next_tokens(torch.tensor([[1.0, 1.0], [0.0, 0.0]]))
    assert found.tolist() == [0, 0]


def test_flat_logits_are_computed_plainly(monkeypatch):
    monkeypatch.setattr(engine_screen, "_MOST_CANDIDATES", 0.0)
    head = projection(100, 8, 1, 1.0)
    state = torch.randn(5, 8, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        assert VocabularyScreen.of(head).next_tokens(state).tolist() == head(state).argmax(-1).tolist()


@pytest.mark.parametrize(("bias", "dtype"), [(True, torch.float32), (False, torch.bfloat16)])
def test_other_projections_are_left_alone(bias, dtype, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True, raising=False)
    state = torch.zeros(1, 2, dtype=dtype)
    assert not pays(torch.nn.Linear(2, 3, bias=bias), state)
    assert pays(torch.nn.Linear(2, 3, bias=False), torch.zeros(1, 2))
