"""Stage 6 from manifest to buckets, on a model whose flips are planted and on a tiny real one."""

import json
import shutil
from argparse import Namespace

import numpy as np
import pandas as pd
import pytest

import lib.modeling_and_ablation
import lib.stages.agonist_model
from lib.artifacts import file_digest, write_json
from lib.stages.agonist_inputs import read_circuits
from tests.scripts import run_script
from tests.stages.agonist_world import (
    AGONISTS,
    D_MODEL,
    N_LAYERS,
    RULES,
    SELECTIVE,
    PlantedModel,
    add_tiny_model,
    entry,
    make_world,
    stage_6_arguments,
)

SCRIPT = "6_analyze_bag_of_rules"
POSITIVE = ("--baseline_subset", "positive")
FOUND = {*AGONISTS, SELECTIVE}


@pytest.fixture
def world(tmp_path, monkeypatch):
    monkeypatch.setattr(lib.stages.agonist_model, "AgonistModel", PlantedModel)
    monkeypatch.setattr(lib.modeling_and_ablation, "model_identity", lambda name: {"model": name})
    monkeypatch.setattr(PlantedModel, "pairs", [])
    monkeypatch.setattr(PlantedModel, "disagreeing", frozenset())
    monkeypatch.setattr(PlantedModel, "fragile", frozenset())
    monkeypatch.setattr(PlantedModel, "stop_after", None)
    return make_world(tmp_path)


SKIPPED = tuple(f"--skip_agonist_{kind}_stats" for kind in ("activation", "margin", "saliency"))
"""Diagnostics draw figures, which takes longer than everything else here."""


def run(world, *extra, output="out", flags=SKIPPED):
    return run_script(SCRIPT, stage_6_arguments(world, output, *extra, *flags))


def read(world, name, output="out"):
    return json.loads((world / output / name).read_text())


def tree_of(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in ("run_metadata.json", ".lock")
    }


# ---------------------------------------------------------------- what is found


def test_planted_agonists_are_found_and_confirmed(world):
    assert run(world, *POSITIVE) == 0
    buckets = read(world, "neuron_buckets.json")["non_catastrophic_agonists"]
    assert set(buckets) == FOUND
    record = buckets["m0:3"]["last_record"]
    assert {
        "circuit_id",
        "baseline_subset",
        "layer_label",
        "neuron_id",
        "max_effect",
        "accuracy_gap",
        "accuracy_on_associated",
        "accuracy_on_unrelated",
    } <= set(record)
    assert record["confirmed_low"] <= 0.9 <= record["confirmed_high"]
    assert buckets["m0:3"]["best_abs_gap"] >= record["max_effect"]


def test_rule_file_has_the_published_keys_in_order(world):
    run(world, *POSITIVE, "--full_records")
    rule = read(world, "per_rule/is_correct/rule_0000.json")
    published = [
        "circuit_id",
        "circuit_label",
        "analysis_mode",
        "cluster_index",
        "rule_target",
        "rule_direction",
        "intervention",
        "decode_only",
        "n_associated_positive",
        "n_unrelated_positive",
        "baseline_subset",
        "status",
        "n_associated_tested",
        "n_unrelated_tested",
        "baseline_acc_associated",
        "baseline_acc_unrelated",
        "baseline_gap_neg_minus_pos",
        "sampled_associated_indices",
        "sampled_unrelated_indices",
        "sampling_strategy_used",
        "ablations",
    ]
    assert [key for key in rule if key in published] == published
    for record in rule["ablations"]:
        n = record["n_associated_eval"]
        labels = record["acc_after_knockout_on_associated_all"]
        assert len(labels) == n and record["k_effect_associated"] == n - sum(labels)
        assert record["acc_after_knockout_on_associated"] == pytest.approx(sum(labels) / n)
        assert record["max_effect"] == max(record["delta_on_associated_ucb"], record["delta_on_unrelated_ucb"])
        assert record["group_size"] == sum(map(len, record["layers_neurons_dict"].values()))
    knockout = read(world, "rule_knockout.json")
    assert [item["n_ablation_groups"] for item in knockout] == [
        len(read(world, f"per_rule/is_correct/rule_000{n}.json")["ablations"]) for n in (0, 1)
    ]
    stats = read(world, "neuron_bucket_stats.json")
    assert stats["counts"]["non_catastrophic_agonists"] == len(FOUND)


def test_vectors_take_one_line_each(world):
    run(world, *POSITIVE)
    text = (world / "out" / "per_rule" / "is_correct" / "rule_0000.json").read_text()
    rule = json.loads(text)
    assert len(text.splitlines()) <= len(rule) + len(rule["ablations"]) + len(rule["agonists"]) + 10


def test_sampled_rows_are_train_rows_of_the_slice(world):
    run(world, *POSITIVE)
    import pandas as pd

    frame = pd.read_csv(world / "features" / "scores.csv")
    rule = read(world, "per_rule/is_correct/rule_0000.json")
    for side, inside in (("associated", True), ("unrelated", False)):
        search, fresh = rule[f"sampled_{side}_original_idx"], rule[f"confirmation_{side}_original_idx"]
        assert not set(search) & set(fresh)
        chosen = frame.iloc[search + fresh]
        assert not chosen["is_test"].any() and chosen["is_correct"].all()
        assert ((chosen["is_sum"] > 0.5) == inside).all()
        # The published index counts TRAIN rows of the regime.
        subset = frame[~frame["is_test"] & frame["is_correct"]].index
        assert subset[rule[f"sampled_{side}_indices"]].tolist() == search


def test_selectivity_can_be_asked_for(world):
    run(world, *POSITIVE, "--min_selectivity", "0.5")
    rule = read(world, "per_rule/is_correct/rule_0000.json")
    found = {item["neuron"]: item for item in rule["agonists"]}
    assert found[SELECTIVE]["selectivity"] == 1.0
    assert found["m0:3"]["selectivity_low"] < 0 < found["m0:3"]["selectivity_high"] + 0.3
    assert set(read(world, "neuron_buckets.json")["non_catastrophic_agonists"]) == {SELECTIVE}
    # Answers say what the model said instead.
    assert set(rule["answers_after_ablation"]) == {SELECTIVE}
    assert set(rule["answers_after_ablation"][SELECTIVE].values()) == {f"by {SELECTIVE}"}


def test_rules_do_not_depend_on_each_other(world):
    run(world, *POSITIVE)
    first = read(world, "per_rule/is_correct/rule_0001.json")
    manifest = json.loads((world / "nc" / "manifest.json").read_text())
    (world / "nc" / "manifest.json").write_text(json.dumps(manifest[::-1]))
    run(world, *POSITIVE, output="swapped")
    second = read(world, "per_rule/is_correct/rule_0001.json", output="swapped")
    for rule in (first, second):
        rule.pop("config_fingerprint")
    assert first == second


def test_neuron_that_flips_everything_is_kept_and_flagged(world, monkeypatch):
    monkeypatch.setitem(AGONISTS, "m1:2", 1.0)
    run(world, *POSITIVE, "--catastrophic_n_runs", "2")
    buckets = read(world, "neuron_buckets.json")
    assert set(buckets["catastrophic_zero"]["confirmed"]) == {"m1:2"}
    assert buckets["non_catastrophic_agonists"]["m1:2"]["last_record"]["catastrophic"]
    assert not buckets["non_catastrophic_agonists"]["m0:3"]["last_record"]["catastrophic"]


# ---------------------------------------------------------------- brute force and the published search


def test_brute_force_and_full_search_record_the_same_singles(world):
    arguments = [argument for argument in stage_6_arguments(world, "slow", *POSITIVE) if argument != "--fast_ablation"]
    assert run_script(SCRIPT, arguments) == 0
    run(world, *POSITIVE, "--full_records", "--audit_members", "0")
    slow, fast = (
        read(world, "per_rule/is_correct/rule_0000.json", output=name)["ablations"] for name in ("slow", "out")
    )
    assert len(slow) == N_LAYERS * D_MODEL
    by_unit = {json.dumps(record["layers_neurons_dict"]): record for record in slow}
    singles = [record for record in fast if record["group_size"] == 1]
    assert len(singles) > 3
    for record in singles:
        expected = by_unit[json.dumps(record["layers_neurons_dict"])]
        assert {key: record[key] for key in expected} == expected


def test_published_search_has_one_root_per_layer_split_by_sign(world):
    run(world, *POSITIVE, "--search", "bisect", "--fixed_n", "--audit_members", "0")
    rule = read(world, "per_rule/is_correct/rule_0000.json")
    roots = [record for record in rule["ablations"] if record["depth"] == 0]
    assert [list(root["layers_neurons_dict"]) for root in roots] == [[f"m{layer}"] for layer in range(N_LAYERS)]
    assert all(record["n_associated_eval"] == 40 for record in rule["ablations"])
    split = [root for root in roots if root["split"]]
    assert split and all(
        root["split_strategy"] == "score_sign" and root["split_left_size"] + root["split_right_size"] == D_MODEL
        for root in split
    )
    pruned = [record for record in rule["ablations"] if record.get("stop_reason") == "max_effect_below_epsilon"]
    assert pruned and all(record["max_effect"] < 0.2 for record in pruned)
    assert {record["stop_reason"] for record in rule["ablations"] if record["group_size"] == 1} == {"single_neuron"}


def test_candidates_are_ordered_by_magnitude_where_stage_5_gives_it(tmp_path):
    make_world(tmp_path)
    path = tmp_path / "nc" / "manifest.json"
    manifest = json.loads(path.read_text())
    scores = manifest[0]["metadata_topn"]["neuron_label_score"]
    manifest[0]["metadata_topn"]["neuron_label_magnitude"] = {key: float(n) for n, key in enumerate(scores)}
    write_json(path, manifest)
    options = Namespace(cluster_by_spectral=False, mlp_neurons_only=True, last_k_layers=None, top_k_neurons=3,
                        max_n_of_rules_to_analyze=None)
    with_magnitude, without = read_circuits(path, options)
    assert [str(neuron) for neuron in with_magnitude.neurons] == ["m2:17", "m2:18", "m2:19"]
    assert with_magnitude.strengths.tolist() == [57, 58, 59]
    assert (np.abs(without.scores) == without.strengths).all() and without.strengths.min() > 1


def test_fewer_circuits_can_be_searched_than_stage_5_has_analysed(tmp_path):
    make_world(tmp_path)
    path = tmp_path / "nc" / "manifest.json"
    common = {"cluster_by_spectral": False, "mlp_neurons_only": True, "last_k_layers": None, "top_k_neurons": None}
    numbers = [
        [circuit.circuit_id for circuit in read_circuits(path, Namespace(**common, max_n_of_rules_to_analyze=limit))]
        for limit in (None, 1)
    ]
    assert len(numbers[0]) == 2 and numbers[1] == numbers[0][:1]


def test_audit_reports_recall_with_interval(world):
    run(world, *POSITIVE, "--audit_members", "1000")
    audit = read(world, "per_rule/is_correct/rule_0000.json")["audit"]
    assert audit["n_audited"] == audit["n_pruned_members"] > 0
    assert audit["estimated_recall"] == audit["estimated_recall_low"] == 1.0


# ---------------------------------------------------------------- datapoints


def test_a_datapoint_that_answers_differently_now_is_replaced(world, monkeypatch):
    run(world, *POSITIVE)
    before = read(world, "per_rule/is_correct/rule_0000.json")["sampled_associated_original_idx"]
    monkeypatch.setattr(PlantedModel, "disagreeing", frozenset(before[3:6]))
    run(world, *POSITIVE, output="moved")
    rule = read(world, "per_rule/is_correct/rule_0000.json", output="moved")
    assert sorted(rule["replaced_associated_original_idx"]) == sorted(before[3:6])
    assert rule["n_associated_tested"] == 40
    assert rule["sampled_associated_original_idx"][:3] == before[:3]
    assert not set(before[3:6]) & set(rule["sampled_associated_original_idx"])


def test_too_few_datapoints_skip_the_rule_with_a_reason(world):
    manifest = [entry(0, RULES[0]), entry(1, "first > 28.5")]
    (world / "nc" / "manifest.json").write_text(json.dumps(manifest))
    assert run(world, *POSITIVE) == 0
    skipped = read(world, "per_rule/is_correct/rule_0001.json")
    assert (
        skipped["status"] == "skipped" and "associated datapoints" in skipped["reason"] and skipped["ablations"] == []
    )
    assert [item["status"] for item in read(world, "rule_knockout.json")] == ["ok", "skipped"]


def test_plan_decides_the_search_datapoints(world):
    plan = ("--sampling_strategy", "plan", "--sampling_plan_path", str(world / "plan_positive.json"))
    run(world, *POSITIVE, *plan)
    rule = read(world, "per_rule/is_correct/rule_0000.json")
    planned = json.loads((world / "plan_positive.json").read_text())["rules"][0]
    assert sorted(rule["sampled_associated_indices"]) == planned["associated_indices"]
    assert sorted(rule["sampled_unrelated_indices"]) == planned["unrelated_indices"]
    assert read(world, "per_rule/is_correct/rule_0001.json")["reason"] == "no datapoints planned: too few"


def test_without_a_regime_both_are_run_in_folders_of_their_own(world):
    plan = ("--sampling_strategy", "plan", "--sampling_plan_path", str(world / "plan_all.json"))
    assert run(world, *plan) == 0
    for regime in ("positive", "negative"):
        rule = read(world, f"{regime}_baseline/per_rule/is_correct/rule_0000.json")
        assert rule["baseline_subset"] == regime and rule["baseline_acc_associated"] == (regime == "positive")
        assert set(read(world, f"{regime}_baseline/neuron_buckets.json")["non_catastrophic_agonists"]) == FOUND


def test_clusters_of_stage_5_can_be_searched(world):
    import pandas as pd

    members = pd.read_csv(world / "features" / "scores.csv").query("is_sum > 0.5").index.tolist()
    cluster = entry(
        0,
        "spectral_cluster_0",
        sampling_strategy="spectral_clusters",
        coefficient_sign=None,
        cluster_index=0,
        member_original_idx=members,
    )
    (world / "nc" / "manifest.json").write_text(json.dumps([cluster]))
    assert run(world, *POSITIVE, "--cluster_by_spectral") == 0
    rule = read(world, "spectral_clusters/cluster_0000.json")
    assert rule["analysis_mode"] == "spectral_cluster" and set(rule["sampled_associated_original_idx"]) <= set(members)


# ---------------------------------------------------------------- again, and again after a kill


def test_two_runs_write_the_same_bytes(world):
    run(world, *POSITIVE)
    run(world, *POSITIVE, output="again")
    assert tree_of(world / "out") == tree_of(world / "again")


def test_a_finished_run_returns_at_once_and_changes_nothing(world, capsys):
    run(world, *POSITIVE)
    before, asked = tree_of(world / "out"), len(PlantedModel.pairs)
    metadata = (world / "out" / "run_metadata.json").read_bytes()
    capsys.readouterr()
    assert run(world, *POSITIVE) == 0
    assert "up to date" in capsys.readouterr().out
    assert (tree_of(world / "out"), len(PlantedModel.pairs)) == (before, asked)
    assert (world / "out" / "run_metadata.json").read_bytes() == metadata


def test_a_killed_run_goes_on_where_it_stopped(world, monkeypatch):
    run(world, *POSITIVE)
    expected, asked = tree_of(world / "out"), list(PlantedModel.pairs)
    assert len(asked) == len(set(asked))
    resumed: list = []
    monkeypatch.setattr(PlantedModel, "pairs", resumed)
    for stop_after in (len(asked) // 5, len(asked) // 2, 4 * len(asked) // 5):
        monkeypatch.setattr(PlantedModel, "stop_after", stop_after)
        assert run(world, *POSITIVE, output="killed") == 130
        in_flight = len(resumed)
        # The killed process was writing its next line.
        with open(world / "killed" / "group_tests.jsonl", "ab") as log:
            log.write(b'1234abcd {"p":0,"g":"torn')
        finished = finished_pairs(world / "killed" / "group_tests.jsonl")
        del resumed[finished:in_flight]  # the batch in flight is lost
    monkeypatch.setattr(PlantedModel, "stop_after", None)
    assert run(world, *POSITIVE, output="killed") == 0
    # No finished test was done twice: what was asked over all runs is what one run asks.
    assert sorted(resumed) == sorted(asked)
    assert tree_of(world / "killed") == expected


def finished_pairs(path):
    """(group, datapoint) pairs in the whole lines of a log."""
    pairs = 0
    for line in path.read_bytes().splitlines(keepends=True):
        if line.endswith(b"\n"):
            pairs += len(json.loads(line[9:]).get("v", ""))
    return pairs


def test_other_flags_reuse_the_tests_but_not_the_result(world):
    run(world, *POSITIVE)
    asked = len(PlantedModel.pairs)
    run(world, *POSITIVE, "--search_epsilon", "0.6")
    assert set(read(world, "neuron_buckets.json")["non_catastrophic_agonists"]) < FOUND
    new = PlantedModel.pairs[asked:]
    assert not set(new) & set(PlantedModel.pairs[:asked])


def test_force_forgets_the_log(world):
    run(world, *POSITIVE)
    asked = len(PlantedModel.pairs)
    run(world, *POSITIVE, "--force")
    assert len(PlantedModel.pairs) == 2 * asked


# ---------------------------------------------------------------- mistakes


def test_dry_run_loads_and_writes_nothing(world, capsys):
    assert run(world, "--dry_run") == 0
    assert "60 candidates" in capsys.readouterr().out
    assert not (world / "out").exists() and not PlantedModel.pairs


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--sampling_strategy", "plan"), "--sampling_plan_path"),
        (("--sampling_strategy", "plan", "--sampling_plan_path", "nowhere.json"), "run stage 4"),
        (("--input_data_dir", "nowhere"), "run stage 5"),
        (("--scores_path", "nowhere/scores.csv"), "stage 2"),
        (("--cluster_by_spectral",), "no cluster circuit"),
        (("--search_epsilon", "1"), "--search_epsilon"),
        (("--prune_alpha", "0"), "--prune_alpha"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(world, capsys, arguments, words):
    assert run(world, *POSITIVE, *arguments) == 2
    error = capsys.readouterr().err.strip()
    assert words in error and len(error.splitlines()) == 1


def test_a_plan_of_the_other_regime_is_refused(world, capsys):
    plan = ("--sampling_strategy", "plan", "--sampling_plan_path", str(world / "plan_positive.json"))
    assert run(world, "--baseline_subset", "negative", *plan) == 2
    assert "--baseline_subset positive" in capsys.readouterr().err


def test_a_plan_of_another_feature_table_is_refused(world, capsys):
    # Its indices would name other datapoints. A plan without the digest, as published ones are, is taken as it is.
    path = world / "plan_positive.json"
    plan = json.loads(path.read_text())
    flags = (*POSITIVE, "--sampling_strategy", "plan", "--sampling_plan_path", str(path), "--dry_run")
    for digest, code in ((file_digest(world / "features" / "scores.csv"), 0), ("0" * 64, 2)):
        write_json(path, plan | {"scores_sha256": digest})
        assert run(world, *flags) == code
    error = capsys.readouterr().err.strip()
    assert "made from other contents of" in error and len(error.splitlines()) == 1


# ---------------------------------------------------------------- noisy datapoints


def test_datapoints_that_flip_under_anything_are_replaced(world, monkeypatch):
    run(world, *POSITIVE, "--max_noise", "1")
    before = read(world, "per_rule/is_correct/rule_0000.json")["sampled_associated_original_idx"]
    # These flip whatever is ablated: no group could be pruned on them.
    monkeypatch.setattr(PlantedModel, "fragile", frozenset(before[:8]))
    run(world, *POSITIVE, "--max_noise", "1", output="kept")
    run(world, *POSITIVE, output="calm")
    kept, calm = (read(world, "per_rule/is_correct/rule_0000.json", output=name) for name in ("kept", "calm"))
    assert sorted(calm["noisy_associated_original_idx"]) == sorted(before[:8])
    assert not set(calm["sampled_associated_original_idx"]) & set(before[:8]) and calm["n_associated_tested"] == 40
    assert kept["sampled_associated_original_idx"] == before
    assert {item["neuron"] for item in calm["agonists"]} == FOUND
    assert len(kept["agonists"]) == N_LAYERS * D_MODEL
    assert calm["search_cost"]["n_noise_evaluations"] > 0 == kept["search_cost"]["n_noise_evaluations"]


# ---------------------------------------------------------------- validation against brute force


def judge(world, *extra):
    arguments = [argument for argument in stage_6_arguments(world, "judge", *POSITIVE) if argument != "--fast_ablation"]
    return run_script("validate_recall", [*arguments, *extra])


def test_validation_judges_every_mode_by_brute_force(world, capsys):
    import pandas as pd

    assert judge(world, "--max_rules", "1") == 0
    table = pd.read_csv(world / "judge" / "validate_recall.csv").set_index("mode")
    brute = table.loc["brute_force"]
    assert brute["n_tests"] == N_LAYERS * D_MODEL and brute["n_agonists"] == len(FOUND)
    assert (table["recall_all"] == 1.0).all()
    assert table.loc["bisect_fixed_n", "n_evaluations"] == 80 * table.loc["bisect_fixed_n", "n_tests"]
    assert table.loc["attribution", "n_evaluations"] < table.loc["attribution_fixed_n", "n_evaluations"]
    figures = dict(pair.split("=") for pair in capsys.readouterr().out.strip().splitlines()[-1].split())
    assert figures["recall_strong"] == figures["recall_all"] == "1.0000"
    assert float(figures["cost_share"]) == pytest.approx(table.loc["attribution", "cost_share"], abs=1e-4)


def test_validation_counts_what_a_mode_misses(world, monkeypatch):
    import pandas as pd

    from lib.stages import recall_validation

    # Nothing that flips less than 0.8 of a slice is looked for: two of the four are pruned.
    monkeypatch.setitem(recall_validation.MODES, "attribution", {"search": "attribution", "search_epsilon": 0.8})
    assert judge(world, "--max_rules", "1", "--modes", "attribution") == 0
    row = pd.read_csv(world / "judge" / "validate_recall.csv").set_index("mode").loc["attribution"]
    assert row["n_true_all"] == 4 and row["recall_all"] == 0.5


def test_validation_resumes_its_brute_force(world):
    assert judge(world, "--max_rules", "1", "--modes", "attribution") == 0
    alone = [pair for pair in PlantedModel.pairs if len(pair[0]) == 1]
    asked = len(PlantedModel.pairs)
    assert judge(world, "--max_rules", "1", "--modes", "attribution") == 0
    again = PlantedModel.pairs[asked:]
    assert len(alone) > 80 * N_LAYERS * D_MODEL > len([pair for pair in again if len(pair[0]) == 1])


# ---------------------------------------------------------------- a real, tiny model


def test_tiny_model_from_files_to_files(tmp_path):
    folder = make_world(tmp_path)
    add_tiny_model(folder)
    arguments = stage_6_arguments(
        folder,
        "real",
        "--ai_model",
        str(folder / "model"),
        "--intervention",
        "mean-positional",
        "--points_to_use_for_mean_ablation",
        "20",
        "--decode_only",
    )
    assert run_script(SCRIPT, arguments) == 0
    for regime in ("positive", "negative"):
        rule = json.loads(
            (folder / "real" / f"{regime}_baseline" / "per_rule" / "is_correct" / "rule_0000.json").read_text()
        )
        assert rule["status"] == "ok" and len(rule["ablations"]) > 10
        # A neuron's flips in the search are those of its own answers.
        for agonist in rule["agonists"]:
            answers = rule["answers_after_ablation"][agonist["neuron"]]
            fresh = set(map(str, rule["confirmation_associated_original_idx"]))
            flipped = sum(
                answer[:1].isdigit() != (regime == "positive") for row, answer in answers.items() if row in fresh
            )
            assert flipped == agonist["k_confirm_associated"]
    assert any(
        rule["agonists"]
        for rule in (json.loads(path.read_text()) for path in (folder / "real").rglob("rule_0000.json"))
    )
    shutil.copytree(folder / "real", folder / "copy")
    assert run_script(SCRIPT, [*arguments, "--batch_size", "7", "--force"]) == 0
    assert tree_of(folder / "real") == tree_of(folder / "copy")


# ---------------------------------------------------------------- diagnostics of agonists


def test_diagnostics_are_written_per_rule_and_for_all_rules(world):
    run(world, *POSITIVE, flags=())
    rule = read(world, "per_rule/is_correct/rule_0000.json")
    folder = world / "out" / "per_rule" / "is_correct"
    for kind in ("activation", "margin", "saliency"):
        block = rule[f"agonist_{kind}_stats"]
        assert block["n_agonists"] == len(rule["agonists"])
        assert all((folder / name).is_file() for name in block["files"].values())
        assert block["files"]["plot_png"] == f"rule_0000_agonist_{kind}_stats.png"
    for name in ("activation_raw.csv", "activation_stats.json", "saliency_summary.csv", "saliency_stats.png"):
        assert (world / "out" / f"agonist_{name}").is_file()
    raw = pd.read_csv(folder / "rule_0000_agonist_activation_raw.csv")
    sampled = {side: rule[f"sampled_{side}_original_idx"] for side in ("associated", "unrelated")}
    for row in raw.itertuples():
        assert sampled[row.split][row.example_local_index] == row.original_idx


def test_diagnostics_can_be_skipped_and_unknown_metrics_are_refused(world):
    assert run(world, *POSITIVE) == 0
    assert not list((world / "out").rglob("*_agonist_*")) and not list((world / "out").glob("agonist_*"))
    assert read(world, "per_rule/is_correct/rule_0000.json")["agonist_margin_stats"] is None
    assert run(world, *POSITIVE, "--agonist_saliency_metrics", "fisher", output="other") == 2
    assert not (world / "other").exists()
