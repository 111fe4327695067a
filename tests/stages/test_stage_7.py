"""Stage 7 as a whole, on a small world with planted flips."""

import json

import numpy as np
import pandas as pd
import pytest

from lib.artifacts import read_csv, write_csv
from lib.cli import Report, UserError
from lib.neuron_intervention import measure_answers
from lib.stages.flip_anchoring import FlipAnchoring
from lib.text_and_rules import parse_rule
from tests.flip_world import TASK_SPEC, engine_factory, stage_arguments, world_frame, write_world
from tests.models import tiny_model
from tests.scripts import run_script

FRAME = world_frame(500)
NOISE = np.random.default_rng(3).random(500) < 0.3
PLANTED = {
    "m1:3": lambda f: f.operand_a > 60,
    "m2:5": lambda f: (f.operand_a > 50) & (f.operand_b <= 40),
    "a2.h1:7": lambda f: NOISE[f.prompt.str.split(":").str[0].astype(int)],
}
EFFECTS = {"m1:3": 0.5, "m2:5": 0.4, "a2.h1:7": 0.3, "m0:1": 0.1}
POLICY = "is_correct_mean_positional_decode_only"


def _run(paths, *flags, planted=PLANTED, made=None, frame=FRAME):
    stage = FlipAnchoring(
        stage_arguments(paths, "--n_bootstrap", "100", *flags), Report(quiet=True), engine_factory(frame, planted, made)
    )
    return stage.run()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run with everything switched on."""
    root = tmp_path_factory.mktemp("world")
    discovery = FRAME.index[~FRAME["is_test"]][:30].tolist()
    paths = write_world(root, FRAME, EFFECTS, discovery)
    assert _run(paths, "--joint_ablation", "--emit_test_selected") == 0
    return paths


@pytest.fixture(autouse=True)
def quick_figures(monkeypatch):
    """Only the data of figures, except in the run of `finished`, which is made before this takes effect."""

    def save(stem, figure, data):
        write_csv(stem.with_name(stem.name + ".csv"), data)
        return [stem.with_name(stem.name + ".csv")]

    monkeypatch.setattr("lib.flip_plots.save_figure", save)


def _files(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in (".lock", "run_metadata.json")
    }


def _data(folder):
    return {name: data for name, data in _files(folder).items() if not name.endswith((".pdf", ".png"))}


def test_planted_rules_are_found_and_noise_is_not(finished):
    anchored = read_csv(finished["rules"] / "stats" / "run" / "anchored_rules.csv", "rules")
    assert anchored["neuron"].tolist() == ["m1:3", "m2:5"]
    assert anchored["rule"].iloc[0] == "operand_a > 60.5"
    assert set(parse_rule(anchored["expression"].iloc[1]).features) == {"operand_a", "operand_b"}
    assert (anchored["MCC"] > 0.9).all()
    assert anchored["badge"].all()
    example = anchored.iloc[0]
    row = FRAME.loc[example["original_idx"]]
    assert row["is_test"] and row["prompt"] == example["prompt"] and row["operand_a"] > 60
    assert {example["answer_before"], example["answer_after"]} == {"right", "wrong"}


def test_the_table_holds_the_planted_flips(finished):
    table = pd.read_csv(finished["rules"] / "stats" / "run" / "scores.csv")
    assert len(table) == 500
    assert (table["flip_m1_3"] == (FRAME["operand_a"] > 60)).all()
    assert (table["flip_c2i_m2_5"] == (PLANTED["m2:5"](FRAME) & FRAME["is_correct"])).all()
    assert table["flip_a2_h1_7"].tolist() == NOISE.tolist()
    assert table["_role"].value_counts()["discovery"] == 30
    assert set(table.loc[table["_role"] == "test", "is_test"]) == {True}


def test_promised_files_are_there(finished):
    names = {path.name for path in (finished["rules"] / "stats" / "run").iterdir()}
    scopes = [
        f"rule_combo_metrics_{scope}_{kind}.csv"
        for scope in ("test", "test_selected", "all_fit")
        for kind in ("all", "best_per_neuron", "top_50")
    ]
    figures = [
        f"{stem}.{suffix}"
        for suffix in ("pdf", "png", "csv")
        for stem in (
            "flip_stats_top3",
            "high_quality_neuron_flip_coverage",
            "high_quality_neuron_flip_coverage_by_layer",
            "rule_metrics_distributions_test",
            "rule_metrics_distributions_all_fit",
        )
    ]
    assert {
        *scopes,
        *figures,
        "scores.csv",
        "rule_combo_metrics_all_fit.csv",
        "rule_combo_metrics_all_scopes.csv",
        "rule_combo_metrics_manifest.json",
        "rule_combo_metrics_all.csv",
        "flip_stats_by_neuron.csv",
        "flip_stats_global.json",
        "high_quality_neuron_flip_coverage.json",
        "rule_metrics_summary.json",
        "rule_metrics_summary_all_fit.json",
        "high_quality_neuron_flip_coverage_by_layer.json",
        "joint_ablation.json",
        "neuron_target_status.csv",
        "candidates.csv",
        "anchored_rules.md",
    } <= names


def test_controls_and_joint_ablation(finished):
    stats = finished["rules"] / "stats" / "run"
    controls = json.loads((stats / "flip_stats_global.json").read_text())["controls"]
    assert controls["no_op"] == {"n_changed_answers": 0, "n_flips": 0}
    assert controls["random_neurons"]["n_neurons"] == 8
    assert controls["random_neurons"]["max_flip_any_rate"] == 0.0
    joint = json.loads((stats / "joint_ablation.json").read_text())
    together = PLANTED["m1:3"](FRAME) | PLANTED["m2:5"](FRAME) | NOISE
    held_out = FRAME["is_test"] & FRAME["is_correct"]
    assert joint["n_neurons"] == 3
    assert joint["test"]["share_positive_lost"] == pytest.approx(together[held_out].mean())
    assert joint["test"]["share_positive_lost_random"] == [0.0, 0.0, 0.0]


def test_a_second_run_needs_no_model_and_changes_nothing(finished):
    before = _data(finished["rules"])
    times = {path: path.stat().st_mtime_ns for path in finished["rules"].rglob("*") if path.is_file()}
    made = []
    assert _run(finished, "--joint_ablation", "--emit_test_selected", made=made) == 0
    assert not made
    assert {path: path.stat().st_mtime_ns for path in times} == times
    # Forced: everything is derived again from the stored answers, byte for byte, still without a model.
    assert _run(finished, "--joint_ablation", "--emit_test_selected", "--force", made=made) == 0
    assert not made
    assert _data(finished["rules"]) == before


def test_statistics_and_summaries_from_finished_files(finished):
    before = _data(finished["rules"])
    made = []
    assert _run(finished, "--stats_only", "--summarize_rule_metrics", made=made) == 0
    assert _run(finished, "--summarize_rule_metrics_only", made=made) == 0
    after = _data(finished["rules"])
    assert not made
    assert after == before


def test_the_page_shows_rules_examples_and_controls(finished):
    page = (finished["rules"] / "stats" / "run" / "anchored_rules.md").read_text()
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("|")]
    assert "3 neurons, each ablated alone on 500 prompts (30 discovery, 314 train, 156 test)" in page
    assert "An edit that changes nothing flips 0 labels." in page
    assert "8 random neurons of the same components flip 0.0 % of the prompts" in page
    (rule,) = [row for row in rows if row[0] == "m1:3" and "`operand_a > 60.5`" in row]
    held_out = FRAME["is_test"]
    n_flips = (PLANTED["m1:3"](FRAME) & held_out).sum()
    assert rule[1] == "change its label" and rule[3] == f"{n_flips} of {held_out.sum()}"
    assert rule[4] == "1.00 [1.00, 1.00]" and rule[-1] == "badge"
    (example,) = [row for row in rows if row[0] == "m1:3" and len(row) == 4]
    assert {example[2], example[3]} == {"`right`", "`wrong`"}
    together = (PLANTED["m1:3"](FRAME) | PLANTED["m2:5"](FRAME) | NOISE)[held_out & FRAME["is_correct"]].mean()
    (joint,) = [row for row in rows if row[0] == "the 3 neurons"]
    assert joint[1] == f"{100 * together:.1f} %"
    assert [row[1] for row in rows if "mean (range) of 3 draws" in row[0]] == ["0.0 % (0.0 % to 0.0 %)"]


def test_summaries_refuse_rules_that_another_run_fitted(finished):
    path = finished["rules"] / POLICY / "m1_3" / "rule_combo_flip_m1_3.csv"
    content, before = path.read_bytes(), _data(finished["rules"] / "stats" / "run")
    path.write_bytes(content.replace(b"operand_a", b"operand_b"))
    try:
        with pytest.raises(UserError, match="another run"):
            _run(finished, "--summarize_rule_metrics_only")
    finally:
        path.write_bytes(content)
    assert _data(finished["rules"] / "stats" / "run") == before


def test_a_run_leaves_nothing_of_an_earlier_one_in_its_folder(tmp_path):
    # A world of its own: other tests count on the rules of the shared one.
    paths = write_world(tmp_path, FRAME, EFFECTS)
    flags = ("--stats_dirname", "twice", "--rule_targets", "any", "--max_neurons", "1")
    stats = paths["rules"] / "stats" / "twice"
    assert _run(paths, *flags, "--joint_ablation", "--emit_test_selected") == 0
    assert (stats / "joint_ablation.json").is_file() and list(stats.glob("*test_selected*"))
    assert _run(paths, *flags) == 0
    assert not (stats / "joint_ablation.json").exists() and not list(stats.glob("*test_selected*"))
    assert "All neurons at once" not in (stats / "anchored_rules.md").read_text()


def test_a_run_without_agonists_has_zero_coverage_in_every_scope(tmp_path, finished):
    paths = write_world(tmp_path, FRAME, {})
    assert _run(paths) == 0
    stats = paths["rules"] / "stats" / "run"
    coverage = json.loads((stats / "high_quality_neuron_flip_coverage.json").read_text())
    assert coverage["available_score_scopes"] == ["test", "all_fit"]
    assert [block["n_neurons_high_quality"] for block in coverage["score_scopes"].values()] == [0, 0]
    for scope in ("test", "all_fit"):
        output = tmp_path / scope
        flags = ["--output_dir", output, "--output_csv", output / "summary.csv", "--hq_score_scope", scope, "--quiet"]
        sides = ["--baseline_dir", finished["rules"] / "stats" / "run", "--candidate_dir", stats]
        assert run_script("summarize_intervention_shift", [*sides, *flags]) == 0
        assert json.loads((output / "intervention_shift_report.json").read_text())["neuron_sets"]["n_lost"] == 3


def test_a_dry_run_counts_and_writes_nothing(tmp_path, finished, capsys):
    paths = write_world(tmp_path, FRAME, EFFECTS)
    made = []
    assert _run(paths, "--dry_run", "--joint_ablation", made=made) == 0
    # 3 candidates, 8 random neurons, the no-op edit, all at once and 3 controls; 500 prompts.
    assert "16 ablations x 500 prompts; 8000 answers are not stored yet" in capsys.readouterr().out
    assert not made and not paths["rules"].exists()
    assert _run(finished, "--dry_run", "--joint_ablation", made=made) == 0
    assert "; 0 answers are not stored yet" in capsys.readouterr().out


def test_two_runs_are_byte_identical(tmp_path):
    results = []
    for name in ("a", "b"):
        paths = write_world(tmp_path / name, FRAME, EFFECTS)
        assert _run(paths, "--rule_targets", "any", "--max_neurons", "2") == 0
        results.append(_files(paths["rules"]))
    # Paths are written as given, and the two folders have different names.
    a, b = (
        {name: data.replace(str(tmp_path / which).encode(), b"") for name, data in files.items()}
        for which, files in zip("ab", results, strict=True)
    )
    assert {name for name in a if a[name] != b[name]} == set()
    assert set(a) == set(b)


def test_another_threshold_reuses_answers_and_rules(finished):
    rules = finished["rules"] / POLICY / "m1_3" / "rule_combo_flip_m1_3.csv"
    before, made = rules.stat().st_mtime_ns, []
    assert (
        _run(
            finished,
            "--joint_ablation",
            "--emit_test_selected",
            "--rule_quality_threshold",
            "0.99",
            "--stats_dirname",
            "other",
            made=made,
        )
        == 0
    )
    assert not made
    assert rules.stat().st_mtime_ns == before


def test_a_changed_scorer_changes_labels_without_a_model(finished, monkeypatch):
    from tests import flip_world

    score = flip_world.WorldTask.score_answers

    def strict(self, rows, answers):
        labels = score(self, rows, answers)
        return [
            label._replace(label=False) if row["operand_a"] > 90 and not row["is_correct"] else label
            for row, label in zip(rows, labels, strict=True)
        ]

    monkeypatch.setattr(flip_world.WorldTask, "score_answers", strict)
    made = []
    assert _run(finished, "--stats_dirname", "strict", "--rule_targets", "any", made=made) == 0
    table = pd.read_csv(finished["rules"] / "stats" / "strict" / "scores.csv")
    assert not made
    assert (
        table["flip_i2c_m1_3"].sum()
        == ((FRAME["operand_a"] > 60) & (FRAME["operand_a"] <= 90) & ~FRAME["is_correct"]).sum()
    )


def test_a_killed_run_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setitem(measure_answers.__kwdefaults__, "chunk", 40)
    paths = write_world(tmp_path, FRAME, EFFECTS)

    class Killed(Exception):
        pass

    def dying(prompts, references):
        loaded = engine_factory(FRAME, PLANTED)(prompts, references)
        answers, calls = loaded.engine.answers, []

        def limited(groups, datapoints, progress=None):
            calls.append(groups)
            if len(calls) == 2:
                raise Killed
            return answers(groups, datapoints)

        loaded.engine.answers = limited
        return loaded

    with pytest.raises(Killed):
        FlipAnchoring(stage_arguments(paths, "--n_random_neurons", "70"), Report(quiet=True), dying).run()
    made = []
    assert _run(paths, "--n_random_neurons", "70", made=made) == 0
    # 3 candidates, 70 random neurons and the no-op edit, in two chunks of equal size; the first was stored.
    assert sum(len(call) for call in made[0].calls) == 74 // 2


def test_labels_unlike_stage_one_are_left_out_and_counted(tmp_path):
    frame = FRAME.copy()
    frame.loc[[3, 4], "is_correct"] = ~frame.loc[[3, 4], "is_correct"]
    paths = write_world(tmp_path, frame, EFFECTS)
    assert _run(paths, "--rule_targets", "any", frame=FRAME) == 0
    stats = paths["rules"] / "stats" / "run"
    assert len(pd.read_csv(stats / "scores.csv")) == 498
    baseline = json.loads((stats / "flip_stats_global.json").read_text())["controls"]["baseline"]
    assert baseline["original_idx_left_out"] == [3, 4]


def test_no_candidate_gives_an_empty_result_not_a_stale_one(tmp_path):
    paths = write_world(tmp_path, FRAME, {"m0:1": 0.1})
    assert _run(paths, "--joint_ablation") == 0
    stats = paths["rules"] / "stats" / "run"
    assert json.loads((stats / "flip_stats_global.json").read_text())["n_neurons"] == 0
    assert len(pd.read_csv(stats / "rule_combo_metrics_test_best_per_neuron.csv")) == 0
    assert pd.read_csv(stats / "candidates.csv")["verdict"].tolist() == ["below_search_epsilon"]


def test_discovery_rows_can_be_kept_out(finished):
    flags = (
        "--exclude_discovery_rows_from_training",
        "--exclude_discovery_rows_from_final_stats",
        "--stats_dirname",
        "apart",
        "--rule_targets",
        "any",
    )
    assert _run(finished, *flags) == 0
    stats = finished["rules"] / "stats" / "apart"
    statistics = pd.read_csv(stats / "flip_stats_by_neuron.csv")
    assert set(statistics["n_eval"]) == {470}
    status = pd.read_csv(stats / "neuron_target_status.csv")
    assert set(status["n_train"]) == {(~FRAME["is_test"]).sum() - 30}
    excluded = json.loads((stats / "final_stats_exclusion.json").read_text())
    assert excluded["n_rows_excluded_from_scores_out"] == 30


def test_a_sample_of_rows_keeps_the_others_empty(tmp_path):
    paths = write_world(tmp_path, FRAME, EFFECTS)
    assert (
        _run(
            paths,
            "--row_sampling",
            "stratified",
            "--sampling_max_points",
            "200",
            "--keep_unsampled_rows",
            "--rule_targets",
            "any",
        )
        == 0
    )
    table = pd.read_csv(paths["rules"] / "stats" / "run" / "scores.csv")
    assert len(table) == 500
    assert table["_evaluated"].sum() == 200
    assert table.loc[~table["_evaluated"], "flip_m1_3"].isna().all()
    assert table.loc[table["_evaluated"], "flip_m1_3"].notna().all()


def test_an_edit_that_should_change_nothing_but_flips_is_an_error(tmp_path):
    def noisy(prompts, references):
        loaded = engine_factory(FRAME, PLANTED)(prompts, references)
        answers = loaded.engine.answers

        def shaky(groups, datapoints, progress=None):
            result = answers(groups, datapoints)
            for number, group in enumerate(groups):
                if not group:
                    result.changed[number, 0] = True
                    result.texts[number, 0] = "unlike"
            return result

        loaded.engine.answers = shaky
        return loaded

    frame = FRAME.copy()
    frame["raw_output"] = "right"
    frame["is_correct"] = True
    paths = write_world(tmp_path, frame, EFFECTS)
    with pytest.raises(UserError, match="changes nothing"):
        FlipAnchoring(stage_arguments(paths), Report(quiet=True), noisy).run()


def test_failed_fits_are_listed_and_make_the_exit_code_non_zero(tmp_path, monkeypatch, capsys):
    paths = write_world(tmp_path, FRAME, EFFECTS)
    monkeypatch.setattr("lib.ruleshap.RuleSHAP.fit", lambda *args, **kwargs: 1 / 0)
    assert _run(paths, "--rule_targets", "any") == 1
    assert "failed: flip_m1_3: ZeroDivisionError" in capsys.readouterr().out
    monkeypatch.undo()
    assert _run(paths, "--rule_targets", "any") == 0


def test_a_real_model_is_sampled_spectrally_and_ablated(tmp_path):
    lm = tiny_model("qwen2")
    lm.model.save_pretrained(tmp_path / "model")
    lm.tokenizer.save_pretrained(tmp_path / "model")
    frame = world_frame(120)
    prompts = [prompt.split(": ")[1] for prompt in frame["prompt"]]
    frame["prompt"] = prompts
    frame["raw_output"] = [generation.answer for generation in lm.generate(prompts, TASK_SPEC.MAX_NEW_TOKENS)]
    # The task calls an answer right if it is `right`: this model is always wrong, and stays so.
    frame["is_correct"] = False
    paths = write_world(tmp_path, frame, {"m1:3": 0.5, "a2.h1:7": 0.4})
    flags = [
        "--ai_model", str(tmp_path / "model"), "--use_spectral_sampling", "--sampling_max_points", "60",
        "--global_n_clusters", "5", "--spectral_cache_dir", str(tmp_path / "cache"), "--batch_size", "16",
        "--points_to_use_for_mean_ablation", "32", "--joint_ablation",
    ]  # fmt: skip
    assert FlipAnchoring(stage_arguments(paths, *flags), Report(quiet=True)).run() == 0
    stats = paths["rules"] / "stats" / "run"
    table = pd.read_csv(stats / "scores.csv")
    assert len(table) == 60
    assert table["_spectral_sampled_center"].all()
    assert table["flip_m1_3"].sum() == 0
    controls = json.loads((stats / "flip_stats_global.json").read_text())["controls"]
    assert controls["baseline"]["n_answers_unlike_stage_1"] == 0
    assert controls["no_op"]["n_changed_answers"] == 0
    assert pd.read_csv(stats / "flip_stats_by_neuron.csv")["changed_answer_rate"].max() > 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--circuit_agonists_path", "nowhere"], "nowhere"),
        (["--features_scores_dir", "nowhere"], "nowhere"),
        (["--rule_metrics_quantiles", "a,b"], "rule_metrics_quantiles"),
        (["--rule_targets", "losses"], "losses"),
        (["--stats_only", "--stats_dirname", "never_run"], "never_run"),
    ],
)
def test_user_mistakes_are_one_line_and_exit_code_two(tmp_path, capsys, flags, message):
    paths = write_world(tmp_path, world_frame(40), {"m0:1": 0.5})
    argv = [
        "--circuit_agonists_path",
        paths["agonists"],
        "--features_scores_dir",
        paths["features"],
        "--rules_dir",
        paths["rules"],
        "--task_module",
        "tests.flip_world",
        "--summarize_rule_metrics",
        *flags,
    ]
    assert run_script("7_refine_neuron_anchored_rules", argv) == 2
    error = capsys.readouterr().err.strip()
    assert error.count("\n") == 0 and message in error
