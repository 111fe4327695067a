"""Representations of prompts: against plain hooks, and through the cache."""

import json
from functools import partial

import numpy as np
import pytest
import torch

import lib.representations as representations
from lib.cli import Report, UserError
from lib.hook_sites import find_hook_site
from lib.representations import PromptEncoder, RepresentationSpec, RowView, prompt_representations
from tests.models import FAMILIES, tiny_model

PROMPTS = ["1+1=2; 3+4=", "1+1=2; 33+4=", "1+1=2; 3+44=", "1+1=2; 12+12="]
HOOKS = [
    "ln_final.hook_normalized",
    "ln_final.hook_out",
    "hook_embed",
    "blocks.1.hook_resid_pre",
    "blocks.2.hook_resid_post",
    "blocks.1.hook_mlp_out",
    "blocks.0.hook_attn_out",
    "blocks.1.attn.hook_z",
    "blocks.0.mlp.hook_post",
    "blocks.1.attn.hook_v",
]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_batches_with_a_shared_start_equal_single_prompts(family, hook, pooling):
    lm = tiny_model(family)
    spec = RepresentationSpec("hidden", hook, pooling)
    together = PromptEncoder(lm, PROMPTS, spec).encode(range(4))
    alone = [PromptEncoder(lm, [prompt], spec).encode([0])[0] for prompt in PROMPTS]
    np.testing.assert_allclose(together, alone, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_normalised_residual_is_taken_before_the_gain(family):
    lm = tiny_model(family)
    seen = {}
    handle = lm.final_norm.register_forward_hook(lambda m, inputs, output: seen.update(x=inputs[0], y=output))
    with torch.no_grad():
        lm.model(torch.tensor(lm.tokenize(PROMPTS[:1])))
    handle.remove()
    found = PromptEncoder(lm, PROMPTS[:1], RepresentationSpec(pooling="last")).encode([0])[0]
    x = seen["x"][0, -1]
    if lm.centred_writes:
        expected = (x - x.mean()) / (x.var(unbiased=False) + lm.final_norm.eps).sqrt()
    else:
        expected = x / (x.pow(2).mean() + lm.final_norm.variance_epsilon).sqrt()
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.abs(found - seen["y"][0, -1].numpy()).max() > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_activations_inside_a_block_follow_from_each_other(family):
    lm, layer = tiny_model(family), 1
    names = ["ln1.hook_normalized", "attn.hook_q", "attn.hook_k", "attn.hook_v", "mlp.hook_pre", "mlp.hook_post"]
    found = {}
    handles = [find_hook_site(lm, f"blocks.{layer}.{name}").watch(partial(found.__setitem__, name)) for name in names]
    with torch.no_grad():
        lm.model(torch.tensor(lm.tokenize(PROMPTS[:1])))
    for handle in handles:
        handle.remove()
    norm, attention, mlp = lm.attention_norm(layer), lm.attention(layer), lm.mlp(layer)
    normed = found["ln1.hook_normalized"] * norm.weight + getattr(norm, "bias", 0)
    for place, reader in enumerate("qkv"):
        if family == "gpt2":
            own = slice(place * lm.d_model, (place + 1) * lm.d_model)
            weight, bias = attention.c_attn.weight[:, own].T, attention.c_attn.bias[own]
        else:
            module = getattr(attention, f"{reader}_proj")
            weight, bias = module.weight, module.bias
        expected = torch.nn.functional.linear(normed, weight, bias)
        torch.testing.assert_close(found[f"attn.hook_{reader}"], expected, rtol=1e-4, atol=1e-4)
    activation = mlp.act_fn if hasattr(mlp, "act_fn") else mlp.act
    ratio = found["mlp.hook_post"] / activation(found["mlp.hook_pre"])
    if family in ("gpt2", "gptj"):
        torch.testing.assert_close(ratio, torch.ones_like(ratio), rtol=1e-4, atol=1e-4)
    else:
        # The other factor of a gated MLP.
        assert ratio.isfinite().all() and ratio.std() > 0.01


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_logits_are_those_of_the_model(family, pooling):
    lm = tiny_model(family, with_bos=True)
    found = PromptEncoder(lm, PROMPTS, RepresentationSpec("logits", pooling=pooling)).encode(range(4))
    for prompt, row in zip(PROMPTS, found, strict=True):
        with torch.no_grad():
            logits = lm.model(torch.tensor(lm.tokenize([prompt]))).logits[0]
        expected = logits[-1] if pooling == "last" else logits.mean(0)
        np.testing.assert_allclose(row, expected, atol=1e-3)


def test_unknown_hook_names_are_refused_with_the_known_ones():
    lm = tiny_model("gptj")
    for name in ("blocks.0.hook_resid_mid", "blocks.3.hook_resid_pre", "ln_final", "blocks.x.hook_resid_pre"):
        with pytest.raises(UserError, match=r"it has hook_embed, ln_final.hook_normalized"):
            find_hook_site(lm, name)


def load_once(lm, calls):
    def load():
        calls.append(1)
        return lm

    return load


@pytest.fixture
def cached(tmp_path, monkeypatch):
    lm = tiny_model("llama")
    monkeypatch.setattr(representations, "model_identity", lambda name: {"model": name})
    calls = []

    def represent(prompts, batch_size=2, **spec):
        return prompt_representations(
            "tiny",
            load_once(lm, calls),
            prompts,
            RepresentationSpec(**spec),
            tmp_path,
            batch_size=batch_size,
            report=Report(quiet=True),
        )

    return represent, calls, tmp_path


def test_second_time_needs_no_model(cached):
    represent, calls, folder = cached
    first = np.array(represent(PROMPTS, pooling="last"))
    assert len(calls) == 1
    np.testing.assert_array_equal(represent(PROMPTS, pooling="last"), first)
    assert len(calls) == 1
    (path,) = folder.glob("spectral_reps_*.npy")
    assert np.load(path).dtype == np.float32
    header = json.loads(path.with_suffix(".json").read_text())
    assert header["shape"] == [4, 16] and header["spec"]["pooling"] == "last" and header["weights_sha256"]


def test_other_spec_or_prompts_are_other_files(cached):
    represent, calls, folder = cached
    represent(PROMPTS, pooling="last")
    represent(PROMPTS, pooling="mean")
    represent(PROMPTS[:2], pooling="last")
    assert len(calls) == 3 and len(list(folder.glob("spectral_reps_*.npy"))) == 3


def test_repeated_prompts_are_run_once(cached):
    represent, _, folder = cached
    found = represent([PROMPTS[0], PROMPTS[1], PROMPTS[0]], pooling="last")
    np.testing.assert_array_equal(found[0], found[2])
    (path,) = folder.glob("spectral_reps_*.npy")
    assert np.load(path).shape == (2, 16)


def test_an_interrupted_run_goes_on_where_it_stopped(cached, monkeypatch):
    represent, _, folder = cached
    whole = np.array(represent(PROMPTS, batch_size=1, pooling="last"))
    for path in folder.glob("spectral_reps_*"):
        path.unlink()
    monkeypatch.setattr(representations, "_CHECKPOINT_EVERY", 2)
    encode, seen = PromptEncoder.encode, []

    def failing(self, rows):
        # The first call only measures the width.
        if len(seen) == 4:
            raise KeyboardInterrupt
        seen.append(list(rows))
        return encode(self, rows)

    monkeypatch.setattr(PromptEncoder, "encode", failing)
    with pytest.raises(KeyboardInterrupt):
        represent(PROMPTS, batch_size=1, pooling="last")
    assert not list(folder.glob("spectral_reps_*[0-9a-f].npy"))
    counted = []

    def counting(self, rows):
        counted.append(list(rows))
        return encode(self, rows)

    monkeypatch.setattr(PromptEncoder, "encode", counting)
    np.testing.assert_allclose(represent(PROMPTS, batch_size=1, pooling="last"), whole, atol=1e-5)
    assert len(counted) == 1 + 2
    assert not list(folder.glob("*.partial.*"))


@pytest.mark.parametrize("damage", ["cut off", "of another shape", "no number"])
def test_a_checkpoint_that_cannot_be_used_is_started_again(cached, damage):
    represent, _, folder = cached
    whole = np.array(represent(PROMPTS, pooling="last"))
    (path,) = folder.glob("spectral_reps_*.npy")
    partial, content = path.with_suffix(".partial.npy"), path.read_bytes()
    path.with_suffix(".json").unlink()
    if damage == "of another shape":
        np.save(partial, whole[:2])
    else:
        partial.write_bytes(content[:-20] if damage == "cut off" else content)
    n_done = "two" if damage == "no number" else 2
    path.with_suffix(".partial.json").write_text(json.dumps({"n_done": n_done}))
    path.unlink()
    np.testing.assert_array_equal(represent(PROMPTS, pooling="last"), whole)


def test_a_damaged_table_is_computed_again(cached):
    represent, calls, folder = cached
    whole = np.array(represent(PROMPTS, pooling="last"))
    (path,) = folder.glob("spectral_reps_*.npy")
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    np.testing.assert_array_equal(represent(PROMPTS, pooling="last"), whole)
    assert len(calls) == 2


def test_a_checkpoint_of_an_earlier_table_is_not_believed(cached, monkeypatch):
    """Killed at the very end, and once more before the first checkpoint: rows that were never computed are not done."""
    represent, _, folder = cached
    whole = np.array(represent(PROMPTS, batch_size=1, pooling="last"))
    (path,) = folder.glob("spectral_reps_*.npy")
    for old in folder.glob("spectral_reps_*"):
        old.unlink()
    path.with_suffix(".partial.json").write_text('{"n_done": 2}')
    encode, seen = PromptEncoder.encode, []

    def failing(self, rows):
        seen.append(rows)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return encode(self, rows)

    monkeypatch.setattr(PromptEncoder, "encode", failing)
    with pytest.raises(KeyboardInterrupt):
        represent(PROMPTS, batch_size=1, pooling="last")
    np.testing.assert_allclose(represent(PROMPTS, batch_size=1, pooling="last"), whole, atol=1e-5)


def test_views_read_only_what_is_asked_for():
    table = np.arange(20.0).reshape(10, 2)
    view = RowView(table, np.array([7, 1, 3]))
    assert view.shape == (3, 2) and len(view) == 3
    np.testing.assert_array_equal(view[1:], table[[1, 3]])
    np.testing.assert_array_equal(np.asarray(view), table[[7, 1, 3]])
