"""Stage 5 from plan to manifest."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest

from lib.artifacts import read_json, read_npz, write_json
from lib.cli import size_or_share
from lib.flip_candidates import discovery_rows
from lib.scores_table import load_scores
from lib.stages.pair_jobs import check_plan
from lib.task_spec import resolve_task_spec
from tests.scripts import run_script
from tests.stages.small_world import make_world, stage_4_arguments, stage_5_arguments

SCRIPT = "5_discover_circuits"
PLAN = "4_spectral_sample_datapoints"
PAIRED = ["--pair_by_similarity_len_matched", "--pair_similarity_metric", "euclidean"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = make_world(tmp_path_factory.mktemp("world"))
    assert run_script(PLAN, [*stage_4_arguments(folder), *PAIRED]) == 0
    return folder


@pytest.fixture(scope="module")
def finished(world):
    assert run_script(SCRIPT, stage_5_arguments(world)) == 0
    return world / "disc"


def manifest_of(folder):
    return json.loads((folder / "manifest.json").read_text())


def run_elsewhere(world, name, *extra):
    """Run into a folder of its own; returns its manifest."""
    arguments = [*stage_5_arguments(world), "--output_data_dir", str(world / name), *extra]
    assert run_script(SCRIPT, arguments) == 0
    return manifest_of(world / name)


def test_manifest_has_the_published_keys(world, finished):
    entries = manifest_of(finished)
    assert [entry["status"] for entry in entries] == ["ok", "ok", "skipped"]
    first = entries[0]
    assert {
        "status",
        "n_pairs",
        "scores_csv",
        "eval_json",
        "metadata_topn",
        "sampling_strategy",
        "pairing_meta",
        "circuit_edges",
        "NL_full",
        "NL_empty",
        "NL_c",
        "faithfulness",
        "target",
        "circuit_id",
        "circuit_label",
        "coefficient_sign",
    } <= set(first)
    assert first["circuit_label"] == "is_sum > 0.5" and first["target"] == "is_correct" and first["circuit_id"] == 0
    meta = first["metadata_topn"]
    assert list(meta)[:13] == [
        "level",
        "absolute",
        "include_special",
        "requested_n",
        "selected_n",
        "num_scored",
        "num_considered",
        "total_entities",
        "was_clipped",
        "score_range",
        "threshold",
        "empty_reason",
        "include_zero_scores",
    ]
    assert meta["selected_n"] == 20 and meta["num_considered"] == 3 * 16
    assert entries[2]["reason"] == "no associated datapoints"


def test_units_keep_their_published_spelling_and_rank_order(finished):
    meta = manifest_of(finished)[0]["metadata_topn"]
    scores = meta["neuron_label_score"]
    assert len(scores) == 20
    assert all(label.startswith("('m") for label in scores)
    magnitudes = meta["neuron_label_magnitude"]
    assert meta["ranked_by"] == "magnitude" and list(magnitudes) == list(scores)
    assert list(magnitudes.values()) == sorted(magnitudes.values(), reverse=True)
    assert all(abs(scores[label]) <= magnitude * (1 + 1e-6) for label, magnitude in magnitudes.items())
    assert meta["threshold"] == list(magnitudes.values())[-1]
    units = [f"('{label}', {i})" for label, members in meta["neurons"].items() for i in members]
    assert set(units) == set(scores)
    # indices = component row * d_model + coordinate, rows counting the input first and 4 heads before each MLP.
    label, coordinate = eval(list(scores)[0])
    assert meta["indices"][0] == (1 + int(label[1:]) * 5 + 4) * 16 + coordinate


def test_big_tables_are_arrays_beside_a_short_json(finished):
    entry = manifest_of(finished)[0]
    folder = next((finished / "is_correct").glob("rule_0_*"))
    assert folder.name == "rule_0_is-sum-0-5"
    stored = read_npz(folder / "scores.npz", "scores")
    assert set(stored) == {"mlp", "embedding", "mlp_magnitude", "embedding_magnitude"}
    scores = {eval(label): value for label, value in entry["metadata_topn"]["neuron_label_score"].items()}
    for (label, coordinate), value in scores.items():
        assert stored["mlp"][int(label[1:]), coordinate] == pytest.approx(value, rel=1e-8)
    short = json.loads((folder / "scores.json").read_text())
    assert "indices" not in short and short["mlp_grad_site"] == "mlp_out" and short["n_pairs"] == 16
    assert 0 < short["order_check"]["p_value"] <= 1


def test_the_rows_of_the_pairs_are_known_to_stage_7(world, finished):
    table = load_scores(world / "features", resolve_task_spec("lib.tasks.arithmetic_task", world / "features"))
    used = set()
    for entry in (entry for entry in manifest_of(finished) if entry["status"] == "ok"):
        rows = {*entry["associated_original_idx"], *entry["unrelated_original_idx"]}
        assert len(rows) == 2 * entry["n_pairs"] > 0
        used |= rows
    found = discovery_rows([finished], table)
    assert set(found) == used and not table.is_test[found].any()


def test_skipped_jobs_say_why(finished):
    skipped = json.loads(next((finished / "is_correct").glob("rule_2_*/skipped.json")).read_text())
    assert skipped == {"reason": "no associated datapoints", "n_pos": 0, "n_neg": 96, "skip_type": "insufficient"}


def test_dataset_info_leads_stage_6_to_the_data(world, finished):
    info = json.loads((finished / "dataset_info.json").read_text())
    assert info["scores_path"] == str(world / "features" / "scores.csv")
    assert info["ai_model"] == str(world / "model")
    assert info["prompt_col"] == "prompt" and info["target_col"] == "is_correct" and info["analysis_mode"] == "rule"
    assert info["cluster_base_subset"] is None


def test_second_run_is_idle_and_a_lost_job_is_redone_alone(world, finished, capsys):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert run_script(SCRIPT, stage_5_arguments(world)) == 0
    assert "up to date" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()} == before
    first, second = (next((finished / "is_correct").glob(f"rule_{n}_*")) for n in (0, 1))
    manifest = (finished / "manifest.json").read_bytes()
    stamp, scores = (first / "scores.npz").stat().st_mtime_ns, (second / "scores.npz").read_bytes()
    shutil.rmtree(second)
    assert run_script(SCRIPT, stage_5_arguments(world)) == 0
    assert (first / "scores.npz").stat().st_mtime_ns == stamp
    assert (second / "scores.npz").read_bytes() == scores
    assert (finished / "manifest.json").read_bytes() == manifest


def test_changed_settings_are_noticed(world):
    one = run_elsewhere(world, "changing")
    two = run_elsewhere(world, "changing", "--method", "EAP")
    assert one[0]["metadata_topn"]["neuron_label_score"] != two[0]["metadata_topn"]["neuron_label_score"]
    assert two[0]["metadata_topn"]["method"] == "EAP"


def test_published_ranking_is_by_the_signed_sum(world):
    meta = run_elsewhere(world, "by_score", "--rank_by", "score")[0]["metadata_topn"]
    strengths = [abs(score) for score in meta["neuron_label_score"].values()]
    assert meta["ranked_by"] == "score" and "neuron_label_magnitude" not in meta
    assert strengths == sorted(strengths, reverse=True)


def test_a_share_of_the_candidates(world):
    meta = run_elsewhere(world, "share", "--circuit_size", "0.25")[0]["metadata_topn"]
    assert meta["selected_n"] == meta["requested_n"] == 12 and meta["kept_share"] == 0.25


def test_everything_kept_is_the_clean_run(world):
    entry = run_elsewhere(world, "everything", "--circuit_size", "100000", "--include_zero_scores")[0]
    assert entry["metadata_topn"]["was_clipped"] is True
    assert entry["NL_c"]["data"] == pytest.approx(entry["NL_full"]["data"], rel=1e-4)
    assert entry["NL_empty"]["data"] != pytest.approx(entry["NL_full"]["data"], rel=1e-2)


def test_heads_share_the_index_space_of_writes(world):
    arguments = [a for a in stage_5_arguments(world) if a != "--mlp_neurons_only"]
    arguments += ["--output_data_dir", str(world / "heads"), "--circuit_size", "1.0", "--include_zero_scores"]
    assert run_script(SCRIPT, arguments) == 0
    meta = manifest_of(world / "heads")[0]["metadata_topn"]
    assert meta["num_considered"] == 3 * (4 + 1) * 16
    labels = {eval(label) for label in meta["neuron_label_score"]}
    assert ("a2.h3", 15) in labels and ("m2", 15) in labels
    assert not any(label == "input" for label, _ in labels)


def test_whole_components_as_units(world):
    meta = run_elsewhere(world, "nodes", "--circuit_level", "node", "--circuit_size", "2")[0]["metadata_topn"]
    neurons = run_elsewhere(world, "all", "--circuit_size", "48", "--include_zero_scores")[0]["metadata_topn"]
    sums = {}
    for label, score in neurons["neuron_label_score"].items():
        sums[eval(label)[0]] = sums.get(eval(label)[0], 0.0) + score
    assert len(meta["node_label_score"]) == 2
    for label, score in meta["node_label_score"].items():
        assert score == pytest.approx(sums[label], rel=1e-5)
    magnitudes = list(meta["node_label_magnitude"].values())
    assert meta["ranked_by"] == "magnitude" and magnitudes == sorted(magnitudes, reverse=True)


def test_the_order_of_whole_components_is_checked_by_ablating_whole_components(world):
    # The judge's own scores, under the ablation that judges: |score| and mean |effect| agree on every unit.
    arguments = ["--method", "exact", "--intervention", "mean-positional", "--eval_intervention", "mean-positional"]
    entry = run_elsewhere(world, "judge", "--circuit_level", "node", "--max_pairs_per_circuit", "8", *arguments)[0]
    assert entry["order_check"]["n_units"] == 3
    assert entry["order_check"]["spearman"] == pytest.approx(1.0)


@pytest.mark.parametrize("method", ["EAP-IG-inputs", "information-flow-routes"])
def test_edges_as_units(world, method):
    arguments = [a for a in stage_5_arguments(world) if a != "--mlp_neurons_only"]
    arguments += ["--output_data_dir", str(world / "edges"), "--circuit_level", "edge", "--method", method]
    assert run_script(SCRIPT, arguments) == 0
    entry = manifest_of(world / "edges")[0]
    assert len(entry["metadata_topn"]["edge_label_score"]) == 20
    assert all("->" in label for label in entry["metadata_topn"]["edge_label_score"])
    magnitudes = list(entry["metadata_topn"]["edge_label_magnitude"].values())
    assert magnitudes == sorted(magnitudes, reverse=True)
    assert entry["circuit_edges"]["circuit_edges"] == 20
    stored = read_npz(next((world / "edges" / "is_correct").glob("rule_0_*")) / "scores.npz", "scores")
    assert stored["edges"].shape == (1 + 3 * 5, 3 * 13 + 1)


@pytest.mark.parametrize("level", ["neuron", "edge"])
def test_pictures_on_request(world, level):
    run_elsewhere(world, "drawn", "--draw_circuits", "--circuit_level", level)
    folder = next((world / "drawn" / "is_correct").glob("rule_0_*"))
    for name in ("circuit_map.pdf", "circuit_map.png", "circuit_map.csv", "circuit.dot"):
        assert (folder / name).stat().st_size > 0
    table = pd.read_csv(folder / "circuit_map.csv")
    assert table.n_units.sum() <= 20 and table.component.unique().tolist() == (
        ["mlp"] if level == "neuron" else ["h0", "h1", "h2", "h3", "mlp"]
    )
    assert (folder / "circuit.dot").read_text().startswith("digraph circuit {")


def test_signed_ranking_on_request(world):
    meta = run_elsewhere(world, "signed", "--no-absolute_value_attributions")[0]["metadata_topn"]
    scores = list(meta["neuron_label_score"].values())
    assert scores == sorted(scores, reverse=True) and meta["absolute"] is False


def test_decode_mode_all_means_every_position_again(world):
    everywhere = run_elsewhere(world, "everywhere", "--decode_mode", "all", "--stop_regex", "\\n")[0]
    arguments = [a for a in stage_5_arguments(world) if a != "--decode_only"]
    assert run_script(SCRIPT, [*arguments, "--output_data_dir", str(world / "whole")]) == 0
    whole = manifest_of(world / "whole")[0]
    assert everywhere["metadata_topn"] == whole["metadata_topn"] and everywhere["NL_c"] == whole["NL_c"]
    assert everywhere["decode_only"] is False


def test_random_pairs(world):
    entry = run_elsewhere(world, "random", "--sampling_strategy", "random", "--max_pairs_per_circuit", "10")[0]
    assert entry["sampling_strategy"] == "random" and entry["n_pairs"] == 10
    assert len(entry["pairing_meta"]["pair_meta"]) == 10


def test_clusters_with_their_members(world):
    entries = run_elsewhere(
        world,
        "clusters",
        "--cluster_by_spectral",
        "--global_n_clusters",
        "3",
        "--cluster_base_subset",
        "positive",
        "--min_pairs_per_circuit",
        "2",
    )
    members = [row for entry in entries for row in entry["member_original_idx"]]
    assert len(members) == len(set(members))
    done = [entry for entry in entries if entry["status"] == "ok"]
    assert done and done[0]["sampling_strategy"] == "spectral_clusters" and done[0]["coefficient_sign"] is None
    assert done[0]["circuit_label"] == f"spectral_cluster_{done[0]['circuit_id']}"
    info = json.loads((world / "clusters" / "dataset_info.json").read_text())
    assert info["analysis_mode"] == "spectral_cluster" and info["cluster_base_subset"] == "positive"


def test_same_command_same_bytes(world, finished):
    run_elsewhere(world, "again")
    folders = [next((folder / "is_correct").glob("rule_0_*")) for folder in (finished, world / "again")]
    for name in ("scores.npz", "scores.json", "eval.json"):
        first, second = ((folder / name).read_bytes() for folder in folders)
        assert first == second, name


def test_batch_size_does_not_matter(world, finished):
    other = run_elsewhere(world, "batch1", "--batch_size", "1")[0]["metadata_topn"]["neuron_label_score"]
    own = manifest_of(finished)[0]["metadata_topn"]["neuron_label_score"]
    assert list(other.values()) == pytest.approx(list(own.values()), rel=1e-3)


def failing(*_, **__):
    raise RuntimeError("no gradient today")


def test_a_failed_attribution_fails_the_run(world, monkeypatch):
    import lib.stages.circuit_discovery as stage

    monkeypatch.setattr(stage, "attribute_writes", failing)
    arguments = [*stage_5_arguments(world), "--output_data_dir", str(world / "failing")]
    with pytest.raises(RuntimeError, match="no gradient today"):
        run_script(SCRIPT, arguments)
    assert not (world / "failing" / "manifest.json").exists()


def test_full_network_only_when_asked_for(world, monkeypatch):
    import lib.stages.circuit_discovery as stage

    monkeypatch.setattr(stage, "attribute_writes", failing)
    entry = run_elsewhere(world, "fallback", "--fallback_to_full_network", "--circuit_size", "100000")[0]
    assert entry["status"] == "full_network_fallback"
    assert entry["metadata_topn"]["fallback_full_network"] is True
    assert set(entry["metadata_topn"]["neuron_label_score"].values()) == {1.0}


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--method", "EAP", "--metric", "kl"], "no gradient at the clean input"),
        (["--method", "information-flow-routes"], "--circuit_level edge"),
        (["--sampling_plan_path", "/nowhere.json"], "not found"),
        (["--rules_dir", "/nowhere"], "not found|no rules"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(world, capsys, extra, message):
    import re

    assert run_script(SCRIPT, [*stage_5_arguments(world), "--output_data_dir", str(world / "wrong"), *extra]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_plan_without_a_digest_of_the_table_is_taken(world):
    plan = read_json(world / "plan.json", "plan")
    task = resolve_task_spec("lib.tasks.arithmetic_task")
    table = load_scores(world / "features", task)
    for change in ({"scores_sha256": None}, {}):
        check_plan({**plan, **change}, world / "plan.json", table, table.train_rows, plan["ai_model"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores_sha256": "0" * 64}, "other contents of"),
        ({"ai_model": "someone/else"}, "was made for the model someone/else"),
        ({"dataset_size": 7}, "was made for 7 TRAIN rows"),
        ({"rules": [{"rule_id": 0}]}, "sampling plan"),
        ({"rules": 3}, "sampling plan"),
    ],
)
def test_a_plan_of_other_data_is_refused(world, capsys, change, message):
    plan = read_json(world / "plan.json", "plan")
    write_json(world / "other.json", {**plan, **change})
    arguments = [*stage_5_arguments(world), "--sampling_plan_path", str(world / "other.json")]
    assert run_script(SCRIPT, [*arguments, "--output_data_dir", str(world / "refused")]) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


def test_a_plan_of_another_subset_is_refused(world, capsys):
    assert run_script(PLAN, stage_4_arguments(world, subset="positive", output="positive.json")) == 0
    arguments = [*stage_5_arguments(world), "--sampling_plan_path", str(world / "positive.json")]
    assert run_script(SCRIPT, [*arguments, "--output_data_dir", str(world / "wrong")]) == 2
    assert "--baseline_subset all" in capsys.readouterr().err


def test_circuit_size_is_a_number_or_a_share():
    assert size_or_share("100000") == 100000 and size_or_share("0.05") == 0.05
    assert isinstance(size_or_share("1.0"), float)
    for wrong in ("0", "-3", "1.5"):
        with pytest.raises(Exception, match="neither"):
            size_or_share(wrong)


def test_scores_are_sums_over_pairs(world, finished):
    half = run_elsewhere(world, "half", "--max_pairs_per_circuit", "8")[0]
    assert half["n_pairs"] == 8 and manifest_of(finished)[0]["n_pairs"] == 16
    own = read_npz(next((finished / "is_correct").glob("rule_0_*")) / "scores.npz", "scores")["mlp"]
    first = read_npz(next((world / "half" / "is_correct").glob("rule_0_*")) / "scores.npz", "scores")["mlp"]
    assert np.abs(own).sum() > np.abs(first).sum()
