"""Activation and saliency of agonists against what they flip."""

import numpy as np
import pandas as pd
import pytest

from lib.flip_diagnostic_plots import write_diagnostics
from lib.flip_diagnostics import diagnose


def _statistics():
    rates = [0.1, 0.4, 0.2]
    frame = pd.DataFrame({"layer_key": ["m1", "m1", "a2_h0"], "neuron_id": [3, 4, 5], "flip_any_rate": rates})
    for name in (
        "n_eval",
        "c2i_count",
        "i2c_count",
        "flip_any_count",
        "c2i_rate",
        "i2c_rate",
        "c2i_pct",
        "i2c_pct",
        "flip_any_pct",
    ):
        frame[name] = 1.0
    return frame


def _saliency(folder):
    rows = []
    for label, unit, rank in (("m1", 3, 0.2), ("m1", 4, 0.9), ("a2.h0", 5, 0.5)):
        for split, shift in (("associated", 0.0), ("unrelated", -0.1)):
            rows.append(
                {
                    "circuit_id": 0,
                    "unit_key": f"{label}:{unit}",
                    "layer_label": label,
                    "unit_id": unit,
                    "split": split,
                    "metric": "actgrad",
                    "mean_saliency_value": rank,
                    "median_saliency_value": rank,
                    "max_effect": 0.3,
                    "accuracy_gap": -0.1,
                    "mean_layer_percentile_rank": rank + shift * rank,
                    "top1_rate": 0.0,
                    "top5_rate": 0.0,
                    "top10pct_rate": 0.1,
                }
            )
    folder.mkdir(parents=True)
    pd.DataFrame(rows).to_csv(folder / "rule_0000_agonist_saliency_summary.csv", index=False)


def test_ranks_that_follow_flips_correlate_perfectly(tmp_path):
    _saliency(tmp_path / "positive_baseline" / "is_correct")
    tables = diagnose(tmp_path, _statistics())
    assert set(tables.summary["metric"]) == {"activation_x_gradient"}
    assert tables.delta["delta_mean_layer_percentile_rank"].tolist() == pytest.approx([0.05, 0.02, 0.09])
    found = tables.correlations.set_index(["scope", "feature", "target"])["spearman"]
    # Flip rates 0.1, 0.4, 0.2 and ranks 0.2, 0.9, 0.5 are in one order.
    assert found["associated", "mean_layer_percentile_rank", "flip_any_rate"] == pytest.approx(1.0)
    # The bound is the same for all three: nothing to correlate with.
    assert ("associated", "mean_layer_percentile_rank", "max_effect") not in found
    names = {path.name for path in write_diagnostics(tmp_path / "stats", tables, topk=2)}
    assert {
        "agonist_metric_stats.json",
        "agonist_metric_best_correlations.csv",
        "agonist_metric_correlation_heatmap.pdf",
        "agonist_metric_ablation_scatter.png",
    } <= names


def test_no_summaries_give_no_tables(tmp_path):
    assert diagnose(tmp_path, _statistics()) is None


def test_published_tables_come_out_the_same(tmp_path, test_data):
    folder = test_data / "published_example" / "stage_7" / "stats" / "runA"
    published = pd.read_csv(folder / "agonist_metric_summary.csv")
    derived = [
        "metric",
        "mean_metric_value",
        "median_metric_value",
        "mean_abs_metric_value",
        "neuron_id",
        "layer_key",
        "abs_max_effect",
        "abs_accuracy_gap",
        "metric_display",
    ]
    inputs = published.iloc[:, : list(published.columns).index("n_eval")].drop(columns=derived)
    for (parent, file), rows in inputs.groupby(["source_parent", "source_file"]):
        path = tmp_path / file
        path.parent.mkdir(parents=True, exist_ok=True)
        rows.drop(columns=["source_file", "source_parent"]).to_csv(path, index=False)
        assert path.parent == tmp_path / parent
    tables = diagnose(tmp_path, pd.read_csv(folder / "flip_stats_by_neuron.csv"))
    keys = ["scope", "metric", "feature", "target"]
    theirs = pd.read_csv(folder / "agonist_metric_correlations.csv").set_index(keys)["spearman"]
    ours = tables.correlations.set_index(keys)["spearman"]
    shared = sorted(set(theirs.index) & set(ours.index))
    assert len(shared) == len(theirs)
    assert np.allclose(ours.loc[shared], theirs.loc[shared])
    overall = pd.read_csv(folder / "agonist_metric_global_summary.csv")
    assert np.allclose(tables.by_metric[overall.columns[3:]], overall[overall.columns[3:]])
