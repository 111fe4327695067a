"""The grid of experiments: its commands are the pipeline's, finished cells are skipped, failures do not stop it."""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys

import pytest

from lib import grid, grid_plans, grid_runner, pipeline
from lib.cli import Report, UserError
from lib.reporting.naming import RunMode
from lib.run_names import REGIMES
from tests.scripts import REPOSITORY, load_script, only_parsing

SHELLS = (
    "run_mecharule_experiments.sh",
    "run_sensitivity_analysis.sh",
    "run_resample_recheck.sh",
    "run_paper_tables_generation.sh",
)


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in ("TASKS", "MODELS", "MODES", "EXTRA_FLAGS", "SIZES", "RATES", "BASE_SIZE"):
        monkeypatch.delenv(name, raising=False)


def test_grid_is_3_tasks_3_models_5_modes():
    cells = grid.Selection.from_environment({}).cells()
    assert len(cells) == 45 == len({(cell.task, cell.model, cell.mode) for cell in cells})


@pytest.mark.parametrize("cell", grid.Selection.from_environment({}).cells(), ids=lambda cell: cell.title)
def test_pipeline_gives_each_cell_the_folder_of_its_name(cell):
    paths = grid_runner.cell_paths(cell, [])
    assert paths.choices == cell.choices
    assert paths.stats_dir.as_posix() == (
        f"data/{cell.task}/{cell.model}/rule_extraction_results/neuron_flip_rules/stats/{cell.choices.run_name}"
    )


def test_names_of_the_five_modes():
    names = [grid.Cell("arithmetic", "org/model", mode).choices.run_name for mode in RunMode]
    stem, bag = "rule_split-spectral_sample-decode_only", "agonist_neurons-fast"
    assert names == [
        f"{stem}-{bag}-spectral_anchor",
        f"{stem}-{bag}-random_anchor",
        f"{stem}-{bag}-spectral_anchor-fake_targets",
        f"spectral_split-decode_only-{bag}-random_anchor",
        f"{stem}-agonist_neurons-spectral_anchor",
    ]
    hans = grid.Cell("hans_nli", "org/model", RunMode.SPECTRAL_PLAN).choices.run_name
    assert hans == "rule_split-spectral_sample-agonist_neurons-fast-spectral_anchor"


def test_brute_force_leaves_the_shared_manifest_as_it_is():
    def stages(mode):
        arguments = grid.Cell("arithmetic", grid.MODELS[1], mode).pipeline_arguments()
        args = grid_runner.parse_pipeline(arguments)
        return {call.stage: call.arguments for call in pipeline.PipelinePlan(args, pipeline.resolve(args)).calls()}

    main, brute = stages(RunMode.SPECTRAL_PLAN), stages(RunMode.BRUTE_FORCE)
    assert main[5] == brute[5]
    assert "--fast_ablation" in main[6] and "--fast_ablation" not in brute[6]
    assert brute[6][brute[6].index("--max_n_of_rules_to_analyze") + 1] == "1"


def test_environment_restricts_the_grid():
    chosen = grid.Selection.from_environment(
        {"TASKS": "hans_nli,arithmetic", "MODELS": " a/b  c ", "MODES": "brute_force"}
    )
    assert [(cell.task, cell.model, cell.mode) for cell in chosen.cells()] == [
        (task, model, RunMode.BRUTE_FORCE) for task in ("hans_nli", "arithmetic") for model in ("a/b", "c")
    ]
    with pytest.raises(UserError, match="MODES names 'bruteforce'.*brute_force"):
        grid.Selection.from_environment({"MODES": "bruteforce"})


def test_extra_flags_come_last_and_win():
    extra = grid.extra_flags(["--circuit_size", "500"], {"EXTRA_FLAGS": "--z_thresh 3 --feature_model 'a b'"})
    cell = grid.Cell("arithmetic", "org/model", RunMode.RANDOM_PLAN)
    args = grid_runner.parse_pipeline(cell.pipeline_arguments(extra))
    assert (args.circuit_size, args.z_thresh, args.feature_model) == (500, 3, "a b")
    with pytest.raises(UserError, match="EXTRA_FLAGS"):
        grid.extra_flags([], {"EXTRA_FLAGS": "'open"})


def test_sensitivity_changes_one_factor_at_a_time():
    selection = grid.Selection(("arithmetic",), ("org/model",), tuple(RunMode))
    (cells,) = grid.sensitivity_cells(selection, {})
    assert [(cell.circuit_size, cell.min_flip_rate) for cell in cells] == [
        (100_000, "0.2"), (25_000, "0.2"), (80_000, "0.2"), (100_000, "0.3"), (100_000, "0.4"), (100_000, "0.5")
    ]  # fmt: skip
    assert [cell.more_flags for cell in cells if cell.more_flags] == [("--include_zero_scores",)]
    assert "-M25000-decode_only-" in cells[1].choices.run_name and cells[3].choices.run_name.endswith("-tau0.3")
    (cells,) = grid.sensitivity_cells(selection, {"BASE_SIZE": "900", "SIZES": "500 900", "RATES": "0.2 0.3"})
    assert [(cell.circuit_size, cell.min_flip_rate) for cell in cells] == [(900, "0.2"), (500, "0.2"), (900, "0.3")]
    with pytest.raises(UserError, match="SIZES"):
        grid.sensitivity_cells(selection, {"SIZES": "many"})


def test_sensitivity_refuses_flags_that_would_undo_it():
    with pytest.raises(UserError, match="BASE_SIZE and SIZES"):
        grid_plans.sensitivity(["--circuit_size", "500"])


class Spoken(Report):
    def __init__(self):
        super().__init__()
        self.lines = []

    def line(self, text=""):
        self.lines.append(text)


def test_a_failed_step_does_not_stop_the_others_and_is_listed(tmp_path, capfd):
    done = []
    steps = [
        grid_runner.Step("broken", ["false"], finish=lambda: done.append("broken")),
        grid_runner.Step("fine", ["touch", str(tmp_path / "fine")], finish=lambda: done.append("fine")),
        grid_runner.Step("finished", ["touch", str(tmp_path / "never")], skip_reason=lambda: "finished: there"),
    ]
    report = Spoken()
    assert grid_runner.run_steps(steps, report, dry_run=False) == 1
    assert (tmp_path / "fine").exists() and not (tmp_path / "never").exists()
    assert done == ["fine"] and "finished: there" in report.lines
    errors = capfd.readouterr().err
    assert "1 of 3 steps failed" in errors and "broken (exit code 1): false" in errors
    assert grid_runner.run_steps(steps[1:], report, dry_run=False) == 0


def finished_cell(tmp_path):
    extra = ["--data_root", str(tmp_path / "data"), "--cache_root", str(tmp_path / "cache")]
    cell = grid.Cell("arithmetic", "org/model", RunMode.SPECTRAL_PLAN)
    paths = grid_runner.cell_paths(cell, extra)
    folders = [paths.features_dir, paths.circuits_dir, *map(paths.regime_dir, REGIMES), paths.stats_dir]
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / "run_metadata.json").write_text(json.dumps({"fingerprint": folder.name}))
    return cell, extra, paths


def test_a_finished_cell_is_skipped_until_something_changes(tmp_path):
    cell, extra, paths = finished_cell(tmp_path)
    step = grid_runner.cell_step(cell, extra)
    assert step.skip_reason() is None
    step.finish()
    assert step.skip_reason().startswith("finished")
    assert grid_runner.cell_step(cell, [*extra, "--seed", "7"]).skip_reason() is None
    assert grid_runner.cell_step(cell, [*extra, "--force"]).skip_reason() is None
    (paths.features_dir / "run_metadata.json").write_text(json.dumps({"fingerprint": "other"}))
    assert step.skip_reason() is None


def test_a_cell_is_finished_for_every_script_of_the_grid(tmp_path):
    # The sensitivity script asks for its main run with --circuit_size in another place than an extra flag has.
    folders = ["--data_root", str(tmp_path / "data"), "--cache_root", str(tmp_path / "cache")]
    by_flag = grid.Cell("arithmetic", "org/model", RunMode.SPECTRAL_PLAN), ["--circuit_size", "500", *folders]
    by_size = grid.Cell("arithmetic", "org/model", RunMode.SPECTRAL_PLAN, circuit_size=500), [*folders, "--quiet"]
    paths = grid_runner.cell_paths(*by_flag)
    for folder in (paths.features_dir, paths.circuits_dir, *map(paths.regime_dir, REGIMES), paths.stats_dir):
        folder.mkdir(parents=True)
        (folder / "run_metadata.json").write_text(json.dumps({"fingerprint": folder.name}))
    grid_runner.cell_step(*by_flag).finish()
    assert grid_runner.cell_step(*by_size).skip_reason().startswith("finished")
    other = grid.Cell("arithmetic", "org/model", RunMode.SPECTRAL_PLAN, circuit_size=500, min_flip_rate="0.3")
    assert grid_runner.cell_step(other, folders).skip_reason() is None


def test_archived_results_are_left_as_they_are(tmp_path):
    cell, extra, paths = finished_cell(tmp_path)
    (paths.stats_dir / "run_metadata.json").unlink()
    (paths.stats_dir / "rule_combo_metrics_manifest.json").write_text("{}")
    assert "archived" in grid_runner.cell_step(cell, extra).skip_reason()


def test_recheck_changes_the_intervention_only():
    titles = [step.title for step in grid_plans.resample([])]
    steps = grid_plans.resample([])
    assert len(steps) == 6 and "arithmetic / Qwen/Qwen2-7B-Instruct" in titles[0]
    stage_6, stage_7 = steps[1].command, steps[3].command
    main = grid_runner.cell_paths(grid.Cell("arithmetic", grid.MODELS[1], RunMode.SPECTRAL_PLAN), [])
    run = main.choices.run_name
    assert value(stage_6, "--input_data_dir") == str(main.circuits_dir)
    assert value(stage_6, "--output_data_dir") == f"{main.agonists_dir}-mean-donor/positive_baseline"
    assert value(stage_6, "--sampling_plan_path") == str(main.anchoring_plan("positive"))
    assert value(stage_6, "--intervention") == "mean-donor"
    assert value(stage_6, "--points_to_use_for_mean_ablation") == "256"
    assert value(stage_7, "--rules_dir").endswith("rule_extraction_results/neuron_flip_rules_mean-donor")
    assert value(stage_7, "--stats_dirname") == f"{run}-mean-donor"
    assert value(steps[4].command, "--candidate_dir").endswith(f"neuron_flip_rules_mean-donor/stats/{run}-mean-donor")
    assert [value(step.command, "--hq_score_scope") for step in steps[4:]] == ["test", "all_fit"]


def test_recheck_names_the_intervention_that_the_main_run_had():
    # The label of the comparison said mean-positional even where the pipeline was told otherwise.
    shift = grid_plans.resample(["--eval_intervention", "mean"])[-1].command
    assert value(shift, "--baseline_label") == "mean"
    assert "/mean_vs_mean-donor/" in value(shift, "--output_csv")


def value(command, flag):
    return command[command.index(flag) + 1]


def steps_of_every_plan(tmp_path):
    steps = [step for plan in grid_plans.PLANS.values() for step in plan([])]
    parser = argparse.ArgumentParser()
    grid_plans.add_tables_arguments(parser)
    return steps + grid_plans.tables(parser.parse_args([]), tmp_path)


def test_every_script_understands_its_command(tmp_path):
    steps = [step for step in steps_of_every_plan(tmp_path) if step.command[0] == grid_plans.PYTHON]
    seen = {step.command[1]: step.command[2:] for step in steps}
    assert len(seen) == 8
    for script, arguments in seen.items():
        with only_parsing():
            load_script(script).main(arguments)


def test_tables_are_made_from_the_working_folder_of_the_caller(tmp_path):
    (tmp_path / "mine").mkdir()
    result = subprocess.run(
        ["bash", str(REPOSITORY / "run_paper_tables_generation.sh"), "mine", "out", "--dry-run", "--n-boot", "7"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    first, second = [shlex.split(line) for line in result.stdout.splitlines()]
    assert value(first, "--data_root") == str(tmp_path / "mine") and value(first, "--out_dir") == str(tmp_path / "out")
    assert value(first, "--score_scopes") == "test,all_fit"
    assert value(second, "--n_boot") == "7" and value(second, "--score_scope") == "both"
    result = subprocess.run(
        ["bash", str(REPOSITORY / "run_paper_tables_generation.sh"), "nowhere"], cwd=tmp_path, capture_output=True,
        text=True,
    )  # fmt: skip
    assert result.returncode == 2 and "ARTIFACTS.md" in result.stderr


def test_summaries_go_where_they_are_told(tmp_path, monkeypatch):
    monkeypatch.setenv("OUT_ROOT", str(tmp_path))
    for plan, flag in ((grid_plans.sensitivity, "--out_dir"), (grid_plans.resample, "--output_csv")):
        assert value(plan([])[-1].command, flag).startswith(f"{tmp_path}/")


@pytest.mark.parametrize("shell", SHELLS)
def test_shells_are_correct_bash(shell):
    subprocess.run(["bash", "-n", shell], cwd=REPOSITORY, check=True)


def dry_run(plan, *arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "lib.grid_plans", plan, "--dry_run", *arguments],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", **environment},
    )


def test_dry_run_prints_every_command_and_runs_none(tmp_path):
    result = dry_run(
        "experiments",
        "--",
        "--data_root",
        str(tmp_path / "d"),
        "--cache_root",
        str(tmp_path / "c"),
        TASKS="arithmetic",
        MODELS="SmolLM2-135M-Instruct",
        EXTRA_FLAGS="--no_llm",
    )
    assert result.returncode == 0, result.stderr
    commands = [shlex.split(line) for line in result.stdout.splitlines()]
    assert [command[1] for command in commands] == ["_run_pipeline.sh"] * 5 + [
        "8_compare_experiments.py",
        "9_compare_models.py",
        "8_compare_experiments.py",
        "10_compute_threshold_sweep_stats.py",
    ]
    assert all("--no_llm" in command for command in commands[:5]) and list(tmp_path.iterdir()) == []
    assert value(commands[5], "--stats_path") == f"{tmp_path}/d/arithmetic"


def test_jobs_that_share_the_grid_leave_the_comparisons_to_the_last_call():
    result = dry_run(
        "experiments", "--runs_only", TASKS="arithmetic", MODELS="a/b c/d", MODES="spectral_plan,brute_force"
    )
    assert result.returncode == 0, result.stderr
    commands = [shlex.split(line) for line in result.stdout.splitlines()]
    assert [(command[1], command[3]) for command in commands] == [
        ("_run_pipeline.sh", model) for model in ("a/b", "a/b", "c/d", "c/d")
    ]
    assert "unknown option" in dry_run("sensitivity", "--runs_only").stderr


def test_wrong_choices_are_one_line_and_exit_2():
    result = dry_run("experiments", MODES="fast")
    assert result.returncode == 2
    assert result.stderr.startswith("error: MODES names 'fast'") and result.stderr.count("\n") == 1


def test_options_of_the_pipeline_without_dashes_are_explained():
    result = dry_run("experiments", "--circuit_size", "500")
    assert result.returncode == 2 and "options for the pipeline come after --" in result.stderr


def test_sensitivity_summary_starts_from_the_main_run():
    result = dry_run("sensitivity", TASKS="arithmetic", MODELS="org/model", SIZES="500", RATES="0.3")
    commands = [shlex.split(line) for line in result.stdout.splitlines()]
    assert len(commands) == 4 and commands[-1][1] == "11_summarize_sensitivity_analysis.py"
    assert value(commands[-1], "--out_dir") == "paper_tables/sensitivity_summary/arithmetic/org_model"
    assert (
        value(commands[-1], "--baseline_run_name")
        == grid.Cell("arithmetic", "org/model", RunMode.SPECTRAL_PLAN).choices.run_name
    )
