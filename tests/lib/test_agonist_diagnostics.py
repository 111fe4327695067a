"""Tables of agonists among their layer, with numbers one can check by hand."""

import numpy as np
import pytest

from lib.agonist_diagnostics import (
    Datapoints,
    LayerValues,
    UnitValues,
    activation_tables,
    describe,
    margin_tables,
    saliency_correlations,
    saliency_metrics,
    saliency_tables,
)
from lib.cli import UserError
from lib.correlation import correlate
from lib.neurons import Neuron

POINTS = Datapoints(np.array(["associated", "associated", "unrelated"]), np.array([0, 1, 0]), np.array([7, 9, 4]))
RECORD = {
    "max_effect": 0.5,
    "accuracy_gap": -0.25,
    "acc_after_knockout_on_associated": 0.5,
    "acc_after_knockout_on_unrelated": 0.75,
}
ACTIVATIONS = np.array([[4.0, 1.0, 2.0, 3.0], [0.0, 1.0, -2.0, 1.0], [-5.0, 1.0, 1.0, 1.0]])
GRADIENTS = np.array([[2.0, -3.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0], [0.5, -2.0, 4.0, 0.0]])
UNIT = UnitValues(
    3,
    Neuron("m2", 0),
    RECORD,
    LayerValues(0, ACTIVATIONS, GRADIENTS, np.array([1.0, 2.0, -5.0]), np.array([6.0, 1.0, 2.0])),
)


def test_activation_is_ranked_among_its_layer_by_value():
    raw = activation_tables([UNIT], POINTS).raw
    assert raw["activation_value"].tolist() == [4.0, 0.0, -5.0]
    # Greater ones: none, two, three of four.
    assert raw["layer_percentile_rank"].tolist() == [1.0, 0.5, 0.25]
    assert raw["is_top1"].tolist() == [True, False, False]
    assert raw["is_top5"].tolist() == [True, True, True]
    assert raw["is_top10pct"].tolist() == [True, False, False]
    assert raw["layer_zscore"][0] == pytest.approx((4 - 2.5) / np.sqrt(1.25))
    assert raw["original_idx"].tolist() == [7, 9, 4]


def test_activation_summary_is_by_side():
    summary = activation_tables([UNIT], POINTS).summary.set_index("split")
    assert summary.loc["associated", "n_examples"] == 2
    assert summary.loc["associated", "mean_activation_value"] == 2.0
    assert summary.loc["associated", "top1_rate"] == 0.5
    assert summary.loc["unrelated", "median_layer_percentile_rank"] == 0.25
    assert summary.loc["unrelated", "max_effect"] == 0.5


def test_predicted_margin_drop_is_minus_gradient_times_change():
    tables = margin_tables([UNIT], POINTS)
    # Changes 1-4, 2-0, -5+5 times gradients 2, 1, 0.5: shifts -6, 2, 0.
    assert tables.raw["predicted_margin_drop"].tolist() == [6.0, -2.0, 0.0]
    summary = tables.summary.set_index("split")
    assert summary.loc["associated", "mean_predicted_margin_drop"] == 2.0
    assert summary.loc["associated", "positive_margin_drop_rate"] == 0.5
    assert summary.loc["associated", "mean_prompt_margin"] == 3.5
    assert "lower the margin by 2" in describe(tables, "margin")["question_answer"][0]


def test_saliency_metrics_are_ranked_each_by_itself():
    raw = saliency_tables([UNIT], POINTS, ["wanda", "gradient", "activation_x_gradient"]).raw.set_index("metric")
    assert raw.loc["wanda", "saliency_value"].tolist() == [4.0, 0.0, 5.0]
    assert raw.loc["gradient", "saliency_value"].tolist() == [2.0, 1.0, 0.5]
    assert raw.loc["activation_x_gradient", "saliency_value"].tolist() == [8.0, 0.0, 2.5]
    # |a g| of the last datapoint: 2.5, 2, 4, 0: one is greater.
    assert raw.loc["activation_x_gradient", "layer_percentile_rank"].tolist()[-1] == 0.75


def test_correlations_of_sides_and_of_their_difference():
    points = [(1.0, 1.0, 0.2), (2.0, 1.0, 0.3), (4.0, 1.0, 0.4)]
    units = [
        UnitValues(
            0,
            Neuron("m0", number),
            RECORD | {"max_effect": effect},
            LayerValues(0, np.array([[high, 0.0], [high, 0.0], [low, 0.0]]), np.ones((3, 2)), np.zeros(3), np.ones(3)),
        )
        for number, (high, low, effect) in enumerate(points)
    ]
    found = saliency_correlations(saliency_tables(units, POINTS, ["wanda"]).summary)
    found = found.set_index(["scope", "feature", "target"])
    key = ("mean_saliency_value", "max_effect")
    assert found.loc[("associated", *key), "spearman"] == pytest.approx(1.0)
    assert found.loc[("associated_minus_unrelated", *key), "n"] == 3
    assert ("unrelated", *key) not in found.index, "a constant feature correlates with nothing"


def test_correlate_by_hand():
    assert correlate(np.array([1, 2]), np.array([1, 2])) is None
    assert correlate(np.array([1, 1, 1]), np.array([1, 2, 3])) is None
    found = correlate(np.array([1.0, 2.0, 3.0, np.nan]), np.array([1.0, 4.0, 9.0, 5.0]))
    assert found.n == 3 and found.spearman == pytest.approx(1.0)
    assert found.pearson == pytest.approx(8 / np.sqrt(2 * 98 / 3))


def test_names_of_saliency_metrics():
    assert saliency_metrics("grad, actgrad,gradient") == ("gradient", "activation_x_gradient")
    with pytest.raises(UserError, match="no such metric"):
        saliency_metrics("wanda,fisher")
    with pytest.raises(UserError):
        saliency_metrics(" , ")
