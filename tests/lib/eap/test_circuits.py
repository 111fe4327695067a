"""Numbering, choosing and naming units."""

import numpy as np
import pytest

from lib.eap.circuits import CircuitLevel, Layout, ScoreTable, choose_circuit

# Two layers, two heads, four coordinates: input, a0.h0, a0.h1, m0, a1.h0, a1.h1, m1.
LAYOUT = Layout(n_layers=2, n_heads=2, d_model=4, d_head=2, is_parallel=False)


def table(**rows):
    values = np.full((LAYOUT.n_rows, 4), np.nan)
    for row, scores in rows.items():
        values[int(row[1:])] = scores
    return ScoreTable(LAYOUT, values)


def choose(scores, size, level=CircuitLevel.NEURON, *, absolute=True, zeros=False, mlp_only=False):
    return choose_circuit(scores, level, size, absolute=absolute, include_zeros=zeros, mlp_only=mlp_only)


MLP_SCORES = {"r0": [9, 9, 9, 9], "r3": [0.5, -3, 0, 1], "r6": [2, -0.1, 0, 0.2]}


def test_rows_and_labels():
    assert [LAYOUT.label(row) for row in range(7)] == ["input", "a0.h0", "a0.h1", "m0", "a1.h0", "a1.h1", "m1"]
    assert [LAYOUT.mlp_row(0), LAYOUT.mlp_row(1), LAYOUT.head_row(1, 1)] == [3, 6, 5]
    assert LAYOUT.is_mlp().tolist() == [False, False, False, True, False, False, True]


@pytest.mark.parametrize(
    ("shape", "n_edges"), [((28, 12, 1536), 183_555), ((28, 28, 3584), 935_747), ((28, 16, 4096), 316_723)]
)
def test_edges_of_known_models_are_counted(shape, n_edges):
    # Qwen2-1.5B, Qwen2-7B; GPT-J-6B has parallel blocks.
    layout = Layout(*shape, d_head=128, is_parallel=shape[1] == 16)
    assert layout.out_degrees().sum() == n_edges


def test_strongest_first_by_magnitude_input_never():
    circuit = choose(table(**MLP_SCORES), 3)
    meta = circuit.metadata()
    assert list(meta["neuron_label_score"].items()) == [("('m0', 1)", -3.0), ("('m1', 0)", 2.0), ("('m0', 3)", 1.0)]
    assert meta["neurons"] == {"m0": [1, 3], "m1": [0]}
    assert meta["indices"] == [3 * 4 + 1, 6 * 4 + 0, 3 * 4 + 3]
    assert meta["threshold"] == 1.0 and meta["score_range"] == [0.1, 3.0]
    assert meta["num_considered"] == 8 and meta["num_scored"] == 6 and meta["total_entities"] == 28
    assert meta["was_clipped"] is False


def test_signed_ranking():
    assert list(choose(table(**MLP_SCORES), 2, absolute=False).metadata()["neuron_label_score"].values()) == [2.0, 1.0]


def test_zeros_only_on_request_and_ties_by_index():
    assert len(choose(table(**MLP_SCORES), 99).indices) == 6
    everything = choose(table(**MLP_SCORES), 99, zeros=True)
    assert len(everything.indices) == 8
    assert everything.indices[-2:].tolist() == [3 * 4 + 2, 6 * 4 + 2]
    assert everything.metadata()["was_clipped"] is True


def test_a_share_of_all_candidates():
    assert len(choose(table(**MLP_SCORES), 0.25).indices) == 2
    assert len(choose(table(**MLP_SCORES), 0.0001).indices) == 1


def test_heads_are_candidates_unless_left_out():
    scores = table(r1=[5, 0, 0, 0], **MLP_SCORES)
    assert choose(scores, 1).metadata()["neurons"] == {"a0.h0": [0]}
    assert choose(scores, 1, mlp_only=True).metadata()["neurons"] == {"m0": [1]}
    assert choose(scores, 1).n_candidates == 12 and choose(scores, 1, mlp_only=True).n_candidates == 8


def test_nodes_are_sums_of_their_coordinates():
    meta = choose(table(**MLP_SCORES), 2, CircuitLevel.NODE).metadata()
    assert meta["node_label_score"] == {"m1": pytest.approx(2.1), "m0": pytest.approx(-1.5)}
    assert meta["indices"] == [6, 3] and meta["num_considered"] == 2


def test_no_eligible_unit_is_said_and_not_hidden():
    circuit = choose(table(r3=[0, 0, 0, 0], r6=[0, 0, 0, 0]), 5)
    meta = circuit.metadata()
    assert meta["selected_n"] == 0 and "non-zero" in meta["empty_reason"] and meta["threshold"] is None
    assert circuit.edge_counts()["circuit_edges"] == 0


def test_keep_mask_and_edges():
    circuit = choose(table(**MLP_SCORES), 1)
    assert np.argwhere(circuit.keep_mask()).tolist() == [[3, 1]]
    # m0 feeds layer 1's three inputs of each of two heads, its MLP, and the logits.
    assert circuit.edge_counts()["circuit_edges"] == 3 * 2 + 1 + 1
