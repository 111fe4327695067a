"""Edges: against naive hooks on single readers, and at the two ends of a circuit."""

import dataclasses

import numpy as np
import pytest
import torch

from lib.cli import UserError
from lib.eap.attribution import attribute_writes
from lib.eap.circuits import CircuitLevel, Layout, ScoreTable, choose_circuit
from lib.eap.edge_faithfulness import EdgeEvaluation
from lib.eap.edges import attribute_edges
from lib.eap.faithfulness import Keep
from lib.eap.metrics import Metric
from lib.eap.pairs import make_batch
from lib.eap.scores import AttributionIntervention, AttributionSettings, Method
from lib.eap.split_inputs import norm_gradient, split_inputs
from tests.lib.eap.cases import equal_length_pairs, mixed_pairs
from tests.lib.eap.naive import NaivePair, NaiveRun, mlp_norm
from tests.models import FAMILIES, tiny_model

PATCHING, ZERO = AttributionIntervention.PATCHING, AttributionIntervention.ZERO
HEADS = AttributionSettings(with_heads=True)


def layout_of(lm):
    return Layout(lm.n_layers, lm.n_heads, lm.d_model, lm.d_head, lm.is_parallel)


def edges_of(lm, pairs, settings, batch_size=4):
    return attribute_edges(lm, pairs, settings, layout_of(lm), batch_size=batch_size).signed


def query_head_hook(lm, layer, head, change):
    """Hooks that move one query head's residual input by `change`, and the handle to undo them."""
    attention, block = lm.attention(layer), lm.blocks[layer]
    norm = block.ln_1 if hasattr(block, "ln_1") else block.input_layernorm
    seen = {}
    own = slice(head * lm.d_head, (head + 1) * lm.d_head)
    module = attention.c_attn if hasattr(attention, "c_attn") else attention.q_proj

    def keep(m, inputs):
        seen["x"] = inputs[0]

    def move(m, inputs, output):
        moved = m.forward(norm.forward(seen["x"] + change[None]))
        output = output.clone()
        output[..., own] = moved[..., own]
        return output

    return [norm.register_forward_pre_hook(keep), module.register_forward_hook(move)]


def mlp_hook(lm, layer, change):
    norm, seen = mlp_norm(lm, layer), {}

    def keep(m, inputs):
        seen["x"] = inputs[0]

    def move(m, inputs):
        return (norm.forward(seen["x"] + change[None]),)

    return [norm.register_forward_pre_hook(keep), lm.mlp(layer).register_forward_pre_hook(move, prepend=True)]


def logits_hook(lm, change):
    return [lm.final_norm.register_forward_pre_hook(lambda m, inputs: (inputs[0] + change[None],))]


def naive_value(naive, handles):
    run = NaiveRun(naive.lm, naive.clean.embeddings.detach())
    for handle in handles:
        handle.remove()
    return naive.metric(run)


# (source row maker, reader column maker, hooks of the naive run)
def some_edges(lm, naive):
    layout = layout_of(lm)
    query = layout.reader_columns("q", 2).start + 1
    return [
        (0, layout.reader_columns("m", 1).start, naive.embedding_change(), lambda c: mlp_hook(lm, 1, c)),
        (layout.mlp_row(0), layout.reader_columns("m", 2).start, naive.mlp_change(0), lambda c: mlp_hook(lm, 2, c)),
        (layout.mlp_row(1), layout.n_columns - 1, naive.mlp_change(1), lambda c: logits_hook(lm, c)),
        (layout.head_row(1, 3), query, naive.head_change(1, 3), lambda c: query_head_hook(lm, 2, 1, c)),
        (layout.head_row(2, 0), layout.n_columns - 1, naive.head_change(2, 0), lambda c: logits_hook(lm, c)),
    ]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("decode_only", [False, True])
def test_first_order_and_exact_edges_equal_naive_hooks(family, decode_only):
    lm = tiny_model(family)
    (pair,) = mixed_pairs(lm)[1:2]
    settings = AttributionSettings(Method.EAP, decode_only=decode_only, with_heads=True)
    first_order = edges_of(lm, [pair], settings)
    exact = edges_of(lm, [pair], dataclasses.replace(settings, method=Method.EXACT))
    naive = NaivePair(lm, pair, settings)
    clean = float(naive.metric(naive.clean))
    for row, column, change, hooks in some_edges(lm, naive):
        change = change.detach()
        effect = float(naive_value(naive, hooks(change))) - clean
        assert exact[row, column] == pytest.approx(effect, abs=1e-4 * np.abs(exact).max())
        factor = torch.zeros((), requires_grad=True)
        slope = torch.autograd.grad(naive_value(naive, hooks(factor * change)), factor)[0]
        assert first_order[row, column] == pytest.approx(float(slope), abs=1e-4 * np.abs(first_order).max())


def assert_equal_sums(edges, nodes):
    expected = nodes.values.sum(axis=1)
    np.testing.assert_allclose(edges.sum(axis=1), expected, rtol=0, atol=1e-4 * np.nanmax(np.abs(expected)))


@pytest.mark.parametrize("family", FAMILIES)
def test_edges_of_a_source_add_up_to_its_node(family):
    # To first order, a write acts through its readers: the sum over them is the node's own score.
    lm = tiny_model(family)
    layout = layout_of(lm)
    for method in (Method.EAP, Method.EAP_IG_INPUTS):
        settings = AttributionSettings(method, Metric.LOGIT_DIFF, with_heads=True)
        edges = edges_of(lm, mixed_pairs(lm), settings)
        nodes = ScoreTable.from_arrays(layout, attribute_writes(lm, mixed_pairs(lm), settings, batch_size=4).arrays())
        assert_equal_sums(edges, nodes)


@pytest.mark.parametrize("family", FAMILIES)
def test_moving_one_component_scores_only_its_own_edges(family):
    lm = tiny_model(family)
    layout = layout_of(lm)
    settings = AttributionSettings(Method.EAP_IG_ACTIVATIONS, with_heads=True, n_steps=2)
    edges = edges_of(lm, mixed_pairs(lm)[:2], settings)
    nodes = ScoreTable.from_arrays(layout, attribute_writes(lm, mixed_pairs(lm)[:2], settings, batch_size=4).arrays())
    assert_equal_sums(edges, nodes)


@pytest.mark.parametrize("method", [Method.EAP_IG_INPUTS, Method.CLEAN_CORRUPTED, Method.INFORMATION_FLOW_ROUTES])
@pytest.mark.parametrize("decode_only", [False, True])
def test_edges_do_not_depend_on_batches(method, decode_only):
    for family in FAMILIES:
        lm = tiny_model(family)
        settings = AttributionSettings(method, with_heads=True, decode_only=decode_only)
        one, four = (edges_of(lm, mixed_pairs(lm), settings, batch_size) for batch_size in (1, 4))
        np.testing.assert_allclose(one, four, rtol=0, atol=1e-4 * np.abs(one).max())


def test_flow_shares_of_each_reader_add_up_to_one():
    lm = tiny_model("qwen2")
    edges = edges_of(lm, equal_length_pairs(lm), AttributionSettings(Method.INFORMATION_FLOW_ROUTES, with_heads=True))
    np.testing.assert_allclose(edges.sum(axis=0), 3, atol=1e-4)
    assert not edges[~layout_of(lm).edges()].any()


@pytest.mark.parametrize("family", FAMILIES)
def test_flow_routes_equal_plain_norms(family):
    lm = tiny_model(family)
    layout = layout_of(lm)
    (pair,) = mixed_pairs(lm)[1:2]
    settings = AttributionSettings(Method.INFORMATION_FLOW_ROUTES, with_heads=True)
    edges = edges_of(lm, [pair], settings)
    seen = {}
    handles = [
        module.register_forward_pre_hook(lambda _, inputs, name=name: seen.update({name: inputs[0][0]}))
        for name, module in (("first", lm.blocks[0]), ("last", lm.final_norm))
    ]
    run = NaiveRun(lm, NaivePair(lm, pair, settings).clean.embeddings)
    for handle in handles:
        handle.remove()
    writes = {0: lm.write(seen["first"])}
    for layer in range(lm.n_layers):
        writes[layout.mlp_row(layer)] = lm.write(run.mlp_out[layer][0])
        for head in range(lm.n_heads):
            own = slice(head * lm.d_head, (head + 1) * lm.d_head)
            mix = run.mix[layer][0][:, own]
            writes[layout.head_row(layer, head)] = lm.write(mix @ lm.head_output_weight(layer)[head])
    readers = {layout.reader_columns("m", 1).start: run.norm_in[1][0], layout.n_columns - 1: seen["last"]}
    for column, residual in readers.items():
        total = lm.write(residual).abs().sum(-1)
        rows = np.flatnonzero(layout.edges()[:, column])
        near = [(total - (lm.write(residual) - writes[row]).abs().sum(-1)).clamp(min=0) for row in rows]
        shares = torch.stack(near) / torch.stack(near).sum(0)
        np.testing.assert_allclose(edges[rows, column], shares.mean(1).detach().numpy(), atol=1e-4)


def test_flow_routes_of_neurons_are_refused():
    lm = tiny_model("llama")
    with pytest.raises(UserError, match="circuit_level edge"):
        attribute_writes(lm, mixed_pairs(lm), AttributionSettings(Method.INFORMATION_FLOW_ROUTES), batch_size=1)


def evaluation(lm, pairs, intervention=PATCHING, decode_only=False):
    batch = make_batch(pairs, range(len(pairs)), lm.pad_token_id)
    settings = AttributionSettings(intervention=intervention, decode_only=decode_only)
    return EdgeEvaluation(lm, batch, layout_of(lm), settings, None, True)


def keep(lm, value, embedding=True):
    layout = layout_of(lm)
    return Keep(torch.full((layout.n_rows, layout.n_columns), value), True, embedding)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_edges_are_the_clean_run_and_none_the_corrupted_run(family):
    lm = tiny_model(family)
    pairs = equal_length_pairs(lm)
    own = evaluation(lm, pairs)
    torch.testing.assert_close(own.ablated_logits(keep(lm, True)), own.clean_logits, rtol=1e-4, atol=1e-4)
    expected = []
    for pair in pairs:
        naive = NaivePair(lm, pair, AttributionSettings())
        expected.append(naive.corrupted.logits[naive.scored])
    none = own.ablated_logits(keep(lm, False, embedding=False))
    torch.testing.assert_close(none, torch.cat(expected), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_removing_one_edge_is_its_exact_effect(family):
    lm = tiny_model(family)
    layout, (pair,) = layout_of(lm), mixed_pairs(lm)[1:2]
    settings = AttributionSettings(Method.EXACT, with_heads=True, intervention=ZERO)
    exact = edges_of(lm, [pair], settings)
    row, column = layout.head_row(0, 1), layout.reader_columns("v", 2).start + 2
    kept = keep(lm, True)
    kept.mask[row, column] = False
    own = evaluation(lm, [pair], ZERO)
    before, after = (own.yardstick.measure(logits) for logits in (own.clean_logits, own.ablated_logits(kept)))
    assert float((after - before).sum()) == pytest.approx(exact[row, column], rel=1e-3, abs=1e-4)


def test_labels_and_choice_of_edges():
    lm = tiny_model("llama")
    layout = layout_of(lm)
    scores = np.zeros((layout.n_rows, layout.n_columns))
    scores[layout.head_row(0, 2), layout.reader_columns("v", 2).start + 1] = -4
    scores[0, layout.reader_columns("m", 1).start] = 3
    scores[layout.mlp_row(1), -1] = 2
    table = ScoreTable.from_arrays(layout, {"edges": scores})
    options = {"absolute": True, "include_zeros": False}
    meta = choose_circuit(table, CircuitLevel.EDGE, 10, mlp_only=False, **options).metadata()
    assert meta["edge_label_score"] == {"a0.h2->a2.h1<v>": -4.0, "input->m1": 3.0, "m1->logits": 2.0}
    assert meta["num_considered"] == meta["total_entities"] == int(layout.edges().sum())
    assert meta["indices"][0] == layout.head_row(0, 2) * layout.n_columns + layout.reader_columns("v", 2).start + 1
    mlp = choose_circuit(table, CircuitLevel.EDGE, 10, mlp_only=True, **options).metadata()
    assert list(mlp["edge_label_score"]) == ["input->m1", "m1->logits"]


@pytest.mark.parametrize("parallel", [False, True])
def test_edge_mask_agrees_with_the_degrees(parallel):
    layout = Layout(3, 4, 16, 4, parallel)
    assert layout.edges().sum(axis=1).tolist() == layout.out_degrees().tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_norm_gradient_is_the_derivative(family):
    norm = tiny_model(family).final_norm
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(0), requires_grad=True)
    g = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(norm_gradient(norm, x.detach(), g), torch.autograd.grad(norm(x), x, g)[0])


def test_nothing_stays_changed():
    lm = tiny_model("llama")
    groups = [lm.attention(layer).num_key_value_groups for layer in range(lm.n_layers)]
    with pytest.raises(ZeroDivisionError), split_inputs(lm):
        raise ZeroDivisionError
    assert [lm.attention(layer).num_key_value_groups for layer in range(lm.n_layers)] == groups == [2, 2, 2]
    assert not [m for m in lm.model.modules() if m._forward_hooks or m._forward_pre_hooks]
