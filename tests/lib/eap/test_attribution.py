"""Attribution against a slow, independent implementation, on every supported family."""

import copy
import dataclasses

import pytest
import torch

from lib.cli import UserError
from lib.eap.attribution import attribute_writes
from lib.eap.metrics import Metric, TokenAggregation
from lib.eap.scores import AttributionIntervention, AttributionSettings, GradientSite, Method
from lib.interventions import Intervention, ReplacementTable
from lib.modeling_and_ablation import LanguageModel
from tests.lib.eap.cases import equal_length_pairs, mixed_pairs
from tests.lib.eap.naive import NaivePair, NaiveRun, naive_scores
from tests.models import FAMILIES, tiny_model

PATCHING, ZERO = AttributionIntervention.PATCHING, AttributionIntervention.ZERO
MEAN_POSITIONAL = AttributionIntervention.MEAN_POSITIONAL


def assert_close(actual, expected, tolerance=1e-4):
    scale = expected.abs().max().clamp(min=1e-6)
    assert (actual.cpu().double() - expected.double()).abs().max() <= tolerance * scale


def table_for(lm, settings):
    if settings.intervention is not MEAN_POSITIONAL:
        return None
    ids = [list(side.prompt + side.answer) for pair in mixed_pairs(lm) for side in pair]
    return ReplacementTable(lm, Intervention.MEAN_POSITIONAL, ids)


SETTINGS = [
    AttributionSettings(Method.EAP),
    AttributionSettings(Method.EAP, Metric.LOGIT_DIFF, TokenAggregation.NONE, ZERO),
    AttributionSettings(Method.EAP, intervention=MEAN_POSITIONAL, decode_only=True),
    AttributionSettings(),
    AttributionSettings(metric=Metric.LOGIT_DIFF, decode_only=True),
    AttributionSettings(metric=Metric.KL, decode_only=True, n_steps=2),
    AttributionSettings(metric=Metric.KL, aggregation=TokenAggregation.MAX),
    AttributionSettings(gradient_site=GradientSite.MLP_IN),
    AttributionSettings(aggregation=TokenAggregation.MIN, intervention=MEAN_POSITIONAL),
    AttributionSettings(Method.CLEAN_CORRUPTED, Metric.KL),
]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "settings", SETTINGS, ids=lambda s: f"{s.method.value}-{s.metric.value}-{s.intervention.value}"
)
def test_input_path_methods_equal_naive_hooks(family, settings):
    lm = tiny_model(family)
    settings = dataclasses.replace(settings, with_heads=True)
    table = table_for(lm, settings)
    scores = attribute_writes(lm, mixed_pairs(lm), settings, batch_size=3, table=table)
    mlp, heads, embedding = naive_scores(lm, mixed_pairs(lm), settings, table)
    assert_close(scores.signed.mlp, mlp)
    assert_close(scores.signed.heads, heads)
    assert_close(scores.signed.embedding, embedding)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("decode_only", [False, True])
def test_each_component_on_its_own_path_equals_naive_edits(family, decode_only):
    lm = tiny_model(family)
    pairs = mixed_pairs(lm)[:2]
    settings = AttributionSettings(Method.EAP_IG_ACTIVATIONS, decode_only=decode_only, n_steps=2, with_heads=True)
    scores = attribute_writes(lm, pairs, settings, batch_size=8)
    mlp = torch.zeros(lm.n_layers, lm.d_model)
    heads = torch.zeros(lm.n_layers, lm.n_heads, lm.d_model)
    for pair in pairs:
        naive = NaivePair(lm, pair, settings)
        for layer in range(lm.n_layers):
            own_heads = [naive.head_change(layer, head) for head in range(lm.n_heads)]
            for alpha in settings.alphas:
                for kind, change in (("mlp", naive.mlp_change(layer)), ("attention", sum(own_heads))):
                    step = (alpha * change).requires_grad_()
                    value = naive.metric(NaiveRun(lm, naive.clean.embeddings, {(kind, layer): step}))
                    gradient = torch.autograd.grad(value, step)[0] / len(settings.alphas)
                    if kind == "mlp":
                        mlp[layer] += (change * gradient).sum(0)
                    else:
                        heads[layer] += torch.stack([(own * gradient).sum(0) for own in own_heads])
    assert_close(scores.signed.mlp, mlp)
    assert_close(scores.signed.heads, heads)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("intervention", [PATCHING, ZERO, MEAN_POSITIONAL])
def test_exact_effects_equal_replacing_one_coordinate(family, intervention):
    lm = tiny_model(family)
    pairs = mixed_pairs(lm)[1:3]
    settings = AttributionSettings(Method.EXACT, intervention=intervention, with_heads=True)
    table = table_for(lm, settings)
    scores = attribute_writes(lm, pairs, settings, batch_size=2, table=table)
    layer, head, coordinates = 1, 2, [0, 5, 9, 15]
    found = {"mlp": scores.signed.mlp[layer, coordinates], "attention": scores.signed.heads[layer, head, coordinates]}
    expected = {kind: torch.zeros(len(coordinates)) for kind in found}
    for pair in pairs:
        naive = NaivePair(lm, pair, settings, table)
        clean = naive.metric(naive.clean)
        for kind, change in (("mlp", naive.mlp_change(layer)), ("attention", naive.head_change(layer, head))):
            for place, coordinate in enumerate(coordinates):
                step = torch.zeros_like(change)
                step[:, coordinate] = change[:, coordinate]
                run = NaiveRun(lm, naive.clean.embeddings, {(kind, layer): step})
                expected[kind][place] += (naive.metric(run) - clean).detach()
    for kind, effects in found.items():
        assert_close(effects, expected[kind])


@pytest.mark.parametrize("family", FAMILIES)
def test_exact_effect_of_a_whole_write_is_not_the_sum_over_its_coordinates(family):
    lm = tiny_model(family)
    pairs = mixed_pairs(lm)[1:3]
    settings = AttributionSettings(Method.EXACT, with_heads=True)
    scores = attribute_writes(lm, pairs, settings, batch_size=2, whole_writes=True)
    layer, head = 1, 2
    mlp, heads = [], []
    for pair in pairs:
        naive = NaivePair(lm, pair, settings)
        clean = naive.metric(naive.clean)
        for kind, change, found in (
            ("mlp", naive.mlp_change(layer), mlp),
            ("attention", naive.head_change(layer, head), heads),
        ):
            found.append(float(naive.metric(NaiveRun(lm, naive.clean.embeddings, {(kind, layer): change})) - clean))
    assert scores.signed.mlp.shape == (lm.n_layers, 1)
    assert float(scores.signed.mlp[layer]) == pytest.approx(sum(mlp), rel=1e-4, abs=1e-5)
    assert float(scores.signed.heads[layer, head]) == pytest.approx(sum(heads), rel=1e-4, abs=1e-5)
    assert float(scores.magnitude.mlp[layer]) == pytest.approx(sum(map(abs, mlp)), rel=1e-4, abs=1e-5)
    by_coordinate = attribute_writes(lm, pairs, AttributionSettings(Method.EXACT), batch_size=2).signed.mlp[layer]
    assert float(by_coordinate.sum()) != pytest.approx(sum(mlp), rel=1e-2)


@pytest.mark.parametrize("method", [Method.EAP_IG_INPUTS, Method.EAP_IG_ACTIVATIONS])
def test_first_order_scores_of_whole_writes_are_sums_pair_by_pair(method):
    lm = tiny_model("qwen2")
    settings = AttributionSettings(method, with_heads=True)
    whole = attribute_writes(lm, mixed_pairs(lm), settings, batch_size=4, whole_writes=True)
    alone = [attribute_writes(lm, [pair], settings, batch_size=1).signed.mlp.sum(1) for pair in mixed_pairs(lm)]
    assert_close(whole.signed.mlp[:, 0], sum(alone))
    assert_close(whole.magnitude.mlp[:, 0], sum(values.abs() for values in alone))


def completeness_error(lm, decode_only, n_steps):
    """|sum of all input scores - metric change between the path's ends|, as a share of the pairs' |changes|."""
    settings = AttributionSettings(decode_only=decode_only, n_steps=n_steps)
    scores = attribute_writes(lm, equal_length_pairs(lm), settings, batch_size=4)
    changes = []
    for pair in equal_length_pairs(lm):
        naive = NaivePair(lm, pair, settings)
        with torch.no_grad():
            end = NaiveRun(lm, naive.clean.embeddings + naive.embedding_change())
            changes.append(float(naive.metric(end) - naive.metric(naive.clean)))
    return abs(float(scores.signed.embedding.sum()) - sum(changes)) / sum(map(abs, changes))


def smoother(lm):
    """The model with halved weight matrices: bends like a trained one, not as wildly as the models of these tests."""
    model = copy.deepcopy(lm.model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(0.5)
    return LanguageModel(model, lm.tokenizer, lm.name)


# Completeness of integrated gradients: input scores add up to the metric's change between the path's two ends. What is
# missing is the error of the midpoint rule, which depends on how sharply the metric bends along the path.


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_input_scores_add_up_to_the_metric_change(family, seed):
    for decode_only in (False, True):
        assert completeness_error(smoother(tiny_model(family, seed=seed)), decode_only, n_steps=32) < 0.01


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", [2, 3])
def test_what_is_missing_from_the_sum_vanishes_with_more_steps(family, seed):
    # Seeds with up to 35 % of error at 32 steps.
    for decode_only in (False, True):
        assert completeness_error(tiny_model(family, seed=seed), decode_only, n_steps=512) < 0.001


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("with_bos", [False, True])
@pytest.mark.parametrize("method", [Method.EAP_IG_INPUTS, Method.EAP_IG_ACTIVATIONS])
@pytest.mark.parametrize("decode_only", [False, True])
def test_scores_do_not_depend_on_batches_order_or_padding(family, with_bos, method, decode_only):
    lm = tiny_model(family, with_bos=with_bos)
    pairs = mixed_pairs(lm)
    settings = AttributionSettings(method, decode_only=decode_only, with_heads=True)
    alone = attribute_writes(lm, pairs, settings, batch_size=1)
    together = attribute_writes(lm, pairs[::-1], settings, batch_size=8)
    assert_close(together.signed.mlp, alone.signed.mlp)
    assert_close(together.signed.heads, alone.signed.heads)
    assert_close(together.signed.embedding, alone.signed.embedding)
    assert together.n_pairs == alone.n_pairs == len(pairs)


def test_heads_are_neither_scored_nor_computed_when_not_asked_for():
    lm = tiny_model("llama")
    scores = attribute_writes(lm, mixed_pairs(lm), AttributionSettings(), batch_size=2)
    assert scores.signed.heads is None
    assert "heads" not in scores.arrays()


def test_divergence_with_a_single_gradient_at_the_clean_input_is_refused():
    lm = tiny_model("llama")
    with pytest.raises(UserError, match="no gradient at the clean input"):
        attribute_writes(lm, mixed_pairs(lm), AttributionSettings(Method.EAP, Metric.KL), batch_size=1)


def test_no_hook_stays_behind():
    lm = tiny_model("qwen2")
    attribute_writes(lm, mixed_pairs(lm), AttributionSettings(with_heads=True), batch_size=2)
    hooks = [m for m in lm.model.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert not hooks
