"""The pipeline driver: names, commands, stopping, the built-in example."""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from lib import pipeline
from lib.artifacts import write_json
from lib.cli import Report, build_parser
from lib.pipeline_plan import PipelinePlan, StageCall
from tests.scripts import REPOSITORY, load_script, only_parsing


def parse(*argv: str) -> argparse.Namespace:
    add_arguments = partial(pipeline.add_arguments, experiment="arithmetic")
    return build_parser(add_arguments, None).parse_args(["arithmetic", "org/model", *argv])


def paths_of(*argv: str):
    return pipeline.resolve(parse(*argv))


@pytest.mark.parametrize("argv, name", [
    ("", "rule_split-random_sample-agonist_neurons-fast-random_anchor"),
    ("--spectral_circuit_discovery --spectral_anchoring_plan --fast_anchoring --decode_only --mlp_neurons_only "
     "--z_thresh 10 --circuit_size 100000 --max_number_of_circuits_to_analyze 5",
     "rule_split-spectral_sample-decode_only-agonist_neurons-fast-spectral_anchor"),
    ("--spectral_circuit_discovery --decode_only",
     "rule_split-spectral_sample-decode_only-agonist_neurons-fast-random_anchor"),
    ("--spectral_circuit_discovery --spectral_anchoring_plan --decode_only --incorrect_rules",
     "rule_split-spectral_sample-decode_only-agonist_neurons-fast-spectral_anchor-fake_targets"),
    ("--spectral_circuit_discovery --spectral_anchoring_plan --decode_only --fast_anchoring --slow_anchoring",
     "rule_split-spectral_sample-decode_only-agonist_neurons-spectral_anchor"),
    ("--circuit_size 25000 --decode_only",
     "rule_split-random_sample-M25000-decode_only-agonist_neurons-fast-random_anchor"),
    ("--circuit_size 0.10", "rule_split-random_sample-M0.1-agonist_neurons-fast-random_anchor"),
    ("--spectral_splits --decode_only", "spectral_split-decode_only-agonist_neurons-fast-random_anchor"),
    ("--min_flip_rate 0.3", "rule_split-random_sample-agonist_neurons-fast-random_anchor-tau0.3"),
    ("--min_flip_rate 0.20", "rule_split-random_sample-agonist_neurons-fast-random_anchor"),
    ("--eval_intervention mean", "rule_split-random_sample-agonist_neurons-fast-random_anchor"),
    ("--eval_intervention mean-donor",
     "rule_split-random_sample-eval_mean-donor-agonist_neurons-fast-random_anchor"),
])
def test_run_names_are_those_of_archived_results(argv, name):
    assert paths_of(*argv.split()).choices.run_name == name


def test_paths_of_a_run():
    paths = paths_of("--spectral_circuit_discovery", "--decode_only", "--incorrect_rules")
    assert paths.answers == Path("cache/arithmetic/org/model/llm_io_data.pkl")
    assert paths.circuits_dir == Path("data/arithmetic/org/model/neural_circuit_discovery_results_fake_targets/"
                                      "eap_ig_inputs/rule_split-spectral_sample-decode_only/neural_circuits")
    assert paths.stats_dir == Path("data/arithmetic/org/model/rule_extraction_results/neuron_flip_rules/stats/"
                                   "rule_split-spectral_sample-decode_only-agonist_neurons-fast-random_anchor-fake_targets")


def test_stages_run_in_order_and_random_plans_are_not_sampled():
    def stages(*argv: str) -> list[int]:
        args = parse(*argv)
        return [call.stage for call in PipelinePlan(args, pipeline.resolve(args)).calls()]

    assert stages() == [1, 2, 3, 5, 6, 6, 7]
    assert stages("--spectral_splits") == [1, 2, 5, 6, 6, 7]
    assert stages("--spectral_circuit_discovery") == [1, 2, 3, 4, 5, 6, 6, 7]
    assert stages("--spectral_circuit_discovery", "--spectral_anchoring_plan") == [1, 2, 3, 4, 4, 4, 5, 6, 6, 7]


@pytest.mark.parametrize("argv", [
    "", "--max_operand 9 --operators +- --few_shot 2 --limit 50 --max_new_tokens 3",
    "--spectral_circuit_discovery --spectral_anchoring_plan --decode_only --mlp_neurons_only --z_thresh 10 --force",
    "--quiet",
    "--slow_anchoring --max_number_of_circuits_to_search 1",
    "--incorrect_rules --slow_anchoring --include_zero_scores --ai_model_cache_dir weights",
    "--spectral_splits --max_number_of_circuits_to_analyze 1 --decode_only",
    "--feature_model openai:some-model --base_url http://localhost:8000/v1", "--no_llm",
    "--circuit_size 0.00001", "--circuit_level edge --eval_intervention resample",
    "--circuit_level node --eval_intervention mean-donor",
])
def test_every_stage_accepts_its_command(argv):
    args = parse(*argv.split())
    for call in PipelinePlan(args, pipeline.resolve(args)).calls():
        with only_parsing():
            load_script(call.script).main(call.arguments)


def run_pipeline(*argv: str, cwd: Path = REPOSITORY) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "lib.pipeline", *argv], cwd=cwd, capture_output=True, text=True,
                          env={"PYTHONPATH": str(REPOSITORY), "PATH": "/usr/bin:/bin"})


def test_without_a_task_the_built_in_example_runs_and_options_win(tmp_path):
    result = run_pipeline("--dry_run", "--few_shot", "3", "--data_root", "out", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    commands = [shlex.split(line) for line in result.stdout.splitlines()]
    assert len(commands) == 10
    first = dict(zip(commands[0][2::2], commands[0][3::2], strict=False))
    assert first["--few_shot"] == "3"
    assert first["--max_operand"] == "17"
    # Folders named on the command line are those of the caller, others those of the repository.
    assert first["--stats_json_out"] == str(tmp_path / "out/arithmetic/SmolLM2-135M-Instruct/feature_report")
    assert first["--prompts_answers_pkl_file"] == "cache/arithmetic/SmolLM2-135M-Instruct/llm_io_data.pkl"


def test_a_file_of_the_task_is_that_of_the_working_folder(tmp_path):
    (tmp_path / "questions.csv").write_text("prompt,answer\n1+1=,2\n")
    result = run_pipeline("table", "org/model", "--task_file", "questions.csv", "--dry_run", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert f"--task_file {tmp_path / 'questions.csv'}" in result.stdout.splitlines()[0]


@pytest.mark.parametrize("argv, complaint", [
    (["arithmetic"], "required: model"),
    (["no_such_task", "org/model"], "lib.tasks.no_such_task_task"),
    (["../task", "org/model"], "lib.tasks.../task_task"),
    (["arithmetic", "org/model", "--max_new_tokens", "0"], "--max_new_tokens"),
    (["arithmetic", "org/model", "--operators", "?"], "operators"),
    (["arithmetic", "org/model", "--spectral_splits", "--incorrect_rules"], "--incorrect_rules"),
    (["arithmetic", "org/model", "--spectral_splits", "--spectral_anchoring_plan"], "--spectral_anchoring_plan"),
    (["arithmetic", "org/model", "--min_flip_rate", "2"], "--min_flip_rate"),
    (["arithmetic", "org/model", "--batch_size"], "--batch_size"),
    (["arithmetic", "org/model", "--no_such_option"], "--no_such_option"),
])
def test_mistakes_are_told_and_exit_2(argv, complaint):
    result = run_pipeline(*argv)
    assert result.returncode == 2
    assert complaint in result.stderr
    assert "Traceback" not in result.stderr


@pytest.fixture
def three_stages(monkeypatch, tmp_path):
    """A pipeline of three small programs that note that they ran; the second one's body is given by the test."""
    log = tmp_path / "log"

    def build(second: str) -> Path:
        calls = []
        for stage, body in ((1, ""), (2, second), (3, "")):
            script = tmp_path / f"stage_{stage}.py"
            script.write_text(f"import os, sys\nopen({str(log)!r}, 'a').write('{stage}')\n{body}\n")
            calls.append(StageCall(stage, f"part {stage}", str(script), []))
        monkeypatch.setattr(PipelinePlan, "calls", lambda self: calls)
        return log

    return build


@pytest.mark.parametrize("body, code", [("sys.exit(7)", 7), ("os.kill(os.getpid(), 9)", 137)])
def test_first_failing_stage_stops_the_pipeline_with_its_code(three_stages, capfd, body, code):
    log = three_stages(body)
    assert pipeline.run(parse(), Report()) == code
    assert log.read_text() == "12"
    assert "stage 2 (part 2)" in capfd.readouterr().err


def test_summary_tells_attribution_that_is_no_better_than_chance(three_stages, tmp_path, capfd):
    three_stages("")
    args = parse("--data_root", str(tmp_path / "data"))
    line = "rule 0: 8 pairs, 3 of 48 neurons kept (6.2%), rank agreement 0.01 (NO BETTER THAN CHANCE)"
    folder = pipeline.resolve(args).circuits_dir
    write_json(folder / "run_metadata.json", {"summary": {"lines": ["  " + line]}})
    assert pipeline.run(args, Report()) == 0
    assert f"Candidate neurons\n  {line}\n" in capfd.readouterr().out


def test_summary_after_stages_that_left_nothing_says_so(three_stages, tmp_path, capfd):
    three_stages("")
    assert pipeline.run(parse("--data_root", str(tmp_path / "data")), Report()) == 0
    out = capfd.readouterr().out
    assert "3/3 stage 3: part 3" in out
    assert out.count("not available:") >= 3
