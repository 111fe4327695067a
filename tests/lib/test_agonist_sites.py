"""Activations and margin gradients at an ablation's first position, against plain hooks and finite differences."""

import pytest
import torch

from lib.ablation_engine import AblationEngine
from lib.agonist_sites import measure_sites
from lib.interventions import DecodeScope, Intervention, build_table
from tests.models import FAMILIES, tiny_model

PROMPTS = ["1+2=", "12+7=3, 9*4=", "5-", "a+b=c 7="]
LABELS = ["m0", "m1", "a1.h2"]


@pytest.fixture(params=FAMILIES)
def measured(request):
    lm = tiny_model(request.param)
    table = build_table(lm, Intervention.MEAN_POSITIONAL, PROMPTS[:2], max_new_tokens=3)
    engine = AblationEngine(lm, PROMPTS, table, max_new_tokens=3)
    sites = engine.sites(range(len(PROMPTS)))
    return lm, table, sites, measure_sites(lm, table, sites, LABELS, batch_size=3)


def margin(lm, site, hook_module=None, hook=None):
    """The margin of one site by a full pass, with an optional hook that changes a module's output."""
    handle = hook_module.register_forward_hook(hook) if hook_module is not None else None
    try:
        with torch.no_grad():
            logits = lm.model(torch.tensor([site.ids])).logits[0, -1].double()
    finally:
        if handle is not None:
            handle.remove()
    others = logits.clone()
    others[site.answer] = -torch.inf
    return float(logits[site.answer] - others.max())


def test_sites_are_the_last_prompt_token_and_the_answer_is_the_models_own(measured):
    lm, _, sites, found = measured
    for number, site in enumerate(sites):
        assert list(site.ids) == lm.tokenize([PROMPTS[number]])[0]
        # The recorded token has the highest logit, up to ties between the stop tokens that one stands for.
        assert found.margins[number] == pytest.approx(margin(lm, site), abs=1e-4)
        assert found.margins[number] >= -1e-4


def test_activation_and_gradient_are_those_of_the_write(measured):
    lm, _, sites, found = measured
    step = 3e-3
    for number, site in enumerate(sites):
        kept = {}
        handle = lm.mlp(1).register_forward_hook(lambda _m, _i, output, kept=kept: kept.update(out=output[0, -1]))
        margin(lm, site)
        handle.remove()
        assert torch.allclose(found.activations["m1"][number], lm.write(kept["out"]), atol=1e-5)
        for coordinate in (0, 5):

            def moved(_m, _i, output, sign, coordinate=coordinate):
                output = output.clone()
                output[0, -1, coordinate] += sign * step
                return output

            up, down = (
                margin(lm, site, lm.mlp(1), lambda m, i, o, sign=sign: moved(m, i, o, sign)) for sign in (1, -1)
            )
            expected = (up - down) / (2 * step)
            assert float(found.gradients["m1"][number, coordinate]) == pytest.approx(expected, abs=2e-2, rel=2e-2)


def test_head_activations_add_up_to_attention_without_its_bias(measured):
    lm, table, sites, _ = measured
    heads = [f"a0.h{head}" for head in range(lm.n_heads)]
    found = measure_sites(lm, table, sites, heads)
    site, module = sites[1], lm.attention_output(0)
    kept = {}
    handle = module.register_forward_hook(lambda _m, _i, output: kept.update(out=output[0, -1]))
    margin(lm, site)
    handle.remove()
    bias = module.bias if getattr(module, "bias", None) is not None else 0.0
    assert torch.allclose(sum(found.activations[head][1] for head in heads), lm.write(kept["out"] - bias), atol=1e-5)


def test_replacements_are_the_tables_values_at_the_sites_position(measured):
    _, table, sites, found = measured
    for number, site in enumerate(sites):
        position = torch.tensor([[len(site.ids) - 1]])
        expected = table.values("m0", position, torch.tensor([site.datapoint]))[0, 0]
        assert torch.equal(found.replacements["m0"][number], expected)


def test_datapoints_without_a_token_in_reach_are_left_out():
    lm = tiny_model("llama")
    table = build_table(lm, Intervention.ZERO, [], max_new_tokens=1)
    engine = AblationEngine(lm, PROMPTS, table, max_new_tokens=1, decode_scope=DecodeScope.GENERATED)
    assert engine.sites(range(len(PROMPTS))) == []
