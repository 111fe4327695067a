"""Replacement values: what they are, and what they do not depend on."""

from __future__ import annotations

import pytest
import torch

from lib.cli import UserError
from lib.interventions import Intervention, build_table, iterate_writes
from tests.models import tiny_model

REFERENCES = ["1+2=", "10+20=", "7*8=", "123-4="]


def table(lm, intervention, **options):
    return build_table(lm, intervention, REFERENCES, max_new_tokens=3, **options)


def naive_writes(lm, ids, label):
    """Write of one component in one unpadded sequence, [position, d_model]."""
    return next(iter(iterate_writes(lm, [ids], [label], 1)))[2](label)[0]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gptj"])
@pytest.mark.parametrize("label", ["m1", "a1.h2"])
def test_means_are_over_real_tokens_only(family, label):
    lm = tiny_model(family)
    positional = table(lm, Intervention.MEAN_POSITIONAL)
    writes = [naive_writes(lm, ids, label) for ids in positional.reference_ids]
    everywhere = torch.cat(writes).mean(0)
    # Position 8 exists in the two longer references only.
    position = 8
    there = torch.stack([write[position] for write in writes if len(write) > position]).mean(0)
    positions = torch.tensor([[position, 500]])
    values = positional.values(label, positions, torch.tensor([0]))[0]
    assert torch.allclose(values[0], there, atol=1e-5)
    assert torch.allclose(values[1], everywhere, atol=1e-5)
    assert torch.allclose(
        table(lm, Intervention.MEAN).values(label, positions, torch.tensor([0]))[0, 0], everywhere, atol=1e-5
    )


def test_batch_size_does_not_matter():
    lm = tiny_model("qwen2")
    one = table(lm, Intervention.MEAN_POSITIONAL, batch_size=1)
    many = table(lm, Intervention.MEAN_POSITIONAL, batch_size=4)
    for values in (one, many):
        values.prepare(["m0", "m2"])
    # Sums are in float64; the float32 passes themselves differ by a few units in the last place of the largest value.
    few_units = 8 * torch.finfo(torch.float32).eps * float(one._values["m2"].abs().max())
    assert torch.allclose(one._values["m2"], many._values["m2"], rtol=0.0, atol=few_units)


@pytest.mark.parametrize("intervention", [Intervention.MEAN_DONOR, Intervention.MEAN_DONOR_POSITIONAL])
def test_donor_values_are_real_values_of_the_same_coordinate(intervention):
    lm = tiny_model("llama")
    donors = table(lm, intervention)
    writes = torch.cat([naive_writes(lm, ids, "m1") for ids in donors.reference_ids])
    values = donors.values("m1", torch.tensor([[2]]), torch.tensor([0]))[0, 0]
    distance = (writes - values).abs().min(0).values
    assert distance.max() < 1e-5


def test_resampling_borrows_from_another_prompt():
    lm = tiny_model("llama")
    resampled = table(lm, Intervention.RESAMPLE, prompts=REFERENCES, seed=1)
    assert all(
        REFERENCES[donor] != prompt for donor, prompt in zip(resampled.donor_of.tolist(), REFERENCES, strict=True)
    )
    donor = resampled.donor_of[0].item()
    expected = naive_writes(lm, resampled.reference_ids[donor], "m1")[1]
    assert torch.allclose(resampled.values("m1", torch.tensor([[1]]), torch.tensor([0]))[0, 0], expected, atol=1e-5)
    with pytest.raises(UserError, match="two different"):
        build_table(lm, Intervention.RESAMPLE, ["1+2="], max_new_tokens=2, prompts=["1+2="])


def test_cache_gives_the_same_values(tmp_path):
    lm = tiny_model("gpt2")
    fresh = table(lm, Intervention.MEAN_POSITIONAL, cache_dir=tmp_path)
    fresh.prepare(["m0", "m1"])
    again = table(lm, Intervention.MEAN_POSITIONAL, cache_dir=tmp_path)
    again.prepare(["m0", "m1"])
    assert len(list(tmp_path.iterdir())) == 1
    assert torch.equal(fresh._values["m1"], again._values["m1"])
