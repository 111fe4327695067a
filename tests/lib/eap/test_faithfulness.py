"""Circuits at their two ends: everything kept is the clean run, nothing kept is the corrupted run."""

import numpy as np
import pytest
import torch

from lib.eap.circuits import Layout
from lib.eap.faithfulness import BatchEvaluation, Keep, evaluate_circuit
from lib.eap.pairs import make_batch
from lib.eap.scores import AttributionIntervention, AttributionSettings
from lib.interventions import Intervention, ReplacementTable
from tests.lib.eap.cases import equal_length_pairs, mixed_pairs
from tests.lib.eap.naive import NaivePair
from tests.models import FAMILIES, tiny_model

PATCHING, ZERO = AttributionIntervention.PATCHING, AttributionIntervention.ZERO


def layout_of(lm):
    return Layout(lm.n_layers, lm.n_heads, lm.d_model, lm.d_head, lm.is_parallel)


def keep(lm, value, *, with_heads=True, embedding=True):
    layout = layout_of(lm)
    return Keep(torch.full((layout.n_rows, layout.d_model), value), with_heads, embedding)


def evaluation(lm, pairs, intervention, *, decode_only=False, with_heads=True, table=None):
    batch = make_batch(pairs, range(len(pairs)), lm.pad_token_id)
    settings = AttributionSettings(intervention=intervention, decode_only=decode_only)
    return BatchEvaluation(lm, batch, layout_of(lm), settings, table, with_heads)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("decode_only", [False, True])
def test_everything_kept_is_the_clean_run(family, decode_only):
    lm = tiny_model(family)
    own = evaluation(lm, mixed_pairs(lm), PATCHING, decode_only=decode_only)
    torch.testing.assert_close(own.ablated_logits(keep(lm, True)), own.clean_logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_kept_is_the_corrupted_run(family):
    lm = tiny_model(family)
    pairs = equal_length_pairs(lm)
    logits = evaluation(lm, pairs, PATCHING).ablated_logits(keep(lm, False, embedding=False))
    expected = []
    for pair in pairs:
        naive = NaivePair(lm, pair, AttributionSettings())
        expected.append(naive.corrupted.logits[naive.scored])
    torch.testing.assert_close(logits, torch.cat(expected), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("decode_only", [False, True])
def test_one_ablated_coordinate_equals_a_naive_hook(family, decode_only):
    lm = tiny_model(family)
    (pair,) = mixed_pairs(lm)[1:2]
    layer, coordinate = 1, 3
    settings = AttributionSettings(intervention=ZERO, decode_only=decode_only)
    naive = NaivePair(lm, pair, settings)
    touched = naive.scored if decode_only else range(len(naive.clean_ids))

    def hook(module, inputs, output):
        output = output.clone()
        for position in touched:
            output[0, position, coordinate] -= lm.write(output)[0, position, coordinate]
        return output

    handle = lm.mlp(layer).register_forward_hook(hook)
    expected = lm.model(naive.clean_ids[None]).logits[0][naive.scored]
    handle.remove()
    kept = keep(lm, True, with_heads=False)
    kept.mask[layout_of(lm).mlp_row(layer), coordinate] = False
    own = evaluation(lm, [pair], ZERO, decode_only=decode_only, with_heads=False)
    torch.testing.assert_close(own.ablated_logits(kept), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("intervention", list(AttributionIntervention))
def test_quality_does_not_depend_on_batches(intervention):
    lm = tiny_model("qwen2")
    pairs = mixed_pairs(lm)
    table = None
    if intervention in (AttributionIntervention.MEAN, AttributionIntervention.MEAN_POSITIONAL):
        ids = [list(side.prompt + side.answer) for pair in pairs for side in pair]
        table = ReplacementTable(lm, Intervention(intervention.value), ids)
    mask = torch.rand(16, 16, generator=torch.Generator().manual_seed(0)) < 0.5
    options = {"decode_only": True, "table": table}
    one, four = (
        evaluate_circuit(lm, pairs, layout_of(lm), Keep(mask, True, True), intervention, batch_size=n, **options)
        for n in (1, 4)
    )
    for left, right in zip(one, four, strict=True):
        np.testing.assert_allclose(left.answer_probability, right.answer_probability, rtol=1e-3)
        np.testing.assert_allclose(left.divergence, right.divergence, rtol=1e-3, atol=1e-5)


def test_faithfulness_runs_from_nothing_to_everything():
    lm = tiny_model("llama")
    options = {"decode_only": True, "batch_size": 4, "table": None}
    full = evaluate_circuit(lm, mixed_pairs(lm), layout_of(lm), keep(lm, True), ZERO, **options).blocks()
    empty = evaluate_circuit(lm, mixed_pairs(lm), layout_of(lm), keep(lm, False), ZERO, **options).blocks()
    assert full["faithfulness"]["ratio_of_means"] == pytest.approx(1.0, abs=1e-4)
    assert full["answer_agreement"]["circuit"] == 1.0
    assert full["kl_from_clean"]["circuit"]["mean"] == pytest.approx(0.0, abs=1e-5)
    assert full["kl_from_clean"]["empty"]["mean"] > 0
    assert empty["faithfulness"]["ratio_of_means"] == pytest.approx(0.0, abs=1e-4)
    assert full["NL_empty"] == empty["NL_empty"]
