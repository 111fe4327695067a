"""Products with weights ordered in advance equal plain ones and leave the model as it was."""

from __future__ import annotations

import copy

import pytest
import torch

from lib.ablation_engine import AblationEngine
from lib.engine_chunk import ChunkRun
from lib.interventions import Intervention, build_table
from lib.neurons import Neuron
from lib.packed_weights import pack_weights, packed_products, unpack_weights
from tests.models import FAMILIES, tiny_model

_ENOUGH = 2**30


@pytest.fixture
def make_model():
    """Fresh copies of tiny models, so that no other test has packed them; skips where packing is not supported."""

    def make(family):
        model = copy.deepcopy(tiny_model(family, seed=21).model)
        blocks = model.model.layers if family in ("llama", "qwen2") else model.transformer.h
        return model, blocks

    if not pack_weights(*make("llama"), _ENOUGH):
        pytest.skip("this processor has no products for weights ordered in advance")
    return make


def n_packed(model):
    """How many modules multiply with ordered weights while packed products are active."""
    with packed_products(model):
        return sum("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_plain_model(family, make_model):
    model, blocks = make_model(family)
    ids = torch.arange(4, 16).view(2, 6)
    with torch.inference_mode():
        plain = model(ids).logits
        assert pack_weights(model, blocks, _ENOUGH)
        with packed_products(model):
            torch.testing.assert_close(model(ids).logits, plain, rtol=1e-4, atol=1e-4)
        assert torch.equal(model(ids).logits, plain)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_every_projection_of_the_blocks_takes_part(family, make_model):
    model, blocks = make_model(family)
    pack_weights(model, blocks, _ENOUGH)
    assert n_packed(model) == {"llama": 7, "gpt2": 4}[family] * len(blocks)
    assert not any("forward" in vars(module) for module in model.modules())


def test_rows_by_hand_with_bias(make_model):
    layer = torch.nn.Linear(2, 3)
    layer.weight.data = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    layer.bias.data = torch.tensor([0.5, 0.0, -0.5])
    blocks = torch.nn.ModuleList([layer])
    assert pack_weights(blocks, blocks, _ENOUGH)
    with torch.inference_mode(), packed_products(blocks):
        assert layer(torch.tensor([[[1.0, 1.0]], [[2.0, -1.0]]])).tolist() == [[[3.5, 7.0, 10.5]], [[0.5, 2.0, 3.5]]]


def test_hooks_run_and_may_change_the_output(make_model):
    model, blocks = make_model("llama")
    pack_weights(model, blocks, _ENOUGH)
    ids = torch.tensor([[5, 6, 7]])
    with torch.inference_mode(), packed_products(model):
        before = model(ids).logits
        handle = blocks[1].mlp.down_proj.register_forward_hook(lambda _m, _i, output: torch.zeros_like(output))
        assert not torch.allclose(model(ids).logits, before)
        handle.remove()
        assert torch.equal(model(ids).logits, before)


def test_an_error_inside_leaves_the_plain_model(make_model):
    model, blocks = make_model("llama")
    pack_weights(model, blocks, _ENOUGH)
    with pytest.raises(RuntimeError, match="stop"), packed_products(model):
        raise RuntimeError("stop")
    assert not any("forward" in vars(module) for module in blocks.modules())


def test_copies_that_are_too_large_or_not_float32_are_not_made(make_model):
    model, blocks = make_model("llama")
    n_bytes = sum(m.weight.nbytes for m in blocks.modules() if isinstance(m, torch.nn.Linear))
    assert pack_weights(model, blocks, n_bytes - 1) == 0
    assert pack_weights(model.to(torch.bfloat16), blocks, n_bytes) == 0
    assert n_packed(model) == 0
    model.to(torch.float32)
    assert pack_weights(model, blocks, n_bytes) == n_bytes
    assert pack_weights(model, blocks, 0) == n_bytes


def test_a_dropped_copy_is_used_no_more(make_model):
    model, blocks = make_model("qwen2")
    pack_weights(model, blocks, _ENOUGH)
    assert n_packed(model) > 0
    unpack_weights(model)
    assert n_packed(model) == 0
    unpack_weights(model)


def test_the_engine_does_without_the_copy_when_memory_runs_out(make_model, monkeypatch):
    lm = copy.deepcopy(tiny_model("llama", seed=21))
    table = build_table(lm, Intervention.ZERO, ["1+1="], max_new_tokens=3)
    engine = AblationEngine(lm, ["1+2=", "3*4="], table, max_new_tokens=3)
    group = [Neuron(f"m{layer}", index) for layer in range(lm.n_layers) for index in range(lm.d_model)]
    expected = engine.answers([group], [0, 1])
    assert expected.texts
    assert n_packed(lm.model) > 0
    run, failures = ChunkRun.run, iter([True])

    def fail_once(self, decode_rows):
        if next(failures, False):
            raise MemoryError
        return run(self, decode_rows)

    monkeypatch.setattr(ChunkRun, "run", fail_once)
    assert engine.answers([group], [0, 1]).texts == expected.texts
    assert n_packed(lm.model) == 0
