"""The built-in example on a reduced size, with the real packaged model: complete, repeatable, resumable."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lib import pipeline
from lib.artifacts import read_json
from lib.cli import build_parser
from lib.pipeline_plan import PipelinePlan
from lib.run_names import REGIMES, RunPaths
from tests.scripts import REPOSITORY, numbered_scripts

pytestmark = pytest.mark.slow

# Two operators of which the model gets about half right, so that few prompts give both regimes enough datapoints, and
# only the candidates with the strongest attribution.
REDUCED = ["--operators", "+*", "--limit", "200", "--circuit_size", "12", "--quiet"]
EXPECTED = """
    cache/arithmetic/{model}/llm_io_data.pkl
    cache/arithmetic/spectral_reps_*.npy
    {features}/scores.csv
    {features}/features.json
    {features}/dataset_stats.json
    {rules}/association_rules_is_correct.csv
    {rules}/rule_combo_is_correct.csv
    {rules}/optimal_rule_set_is_correct.csv
    {discovery}/spectral_sampling_plan_hidden_for_circuit_discovery.json
    {discovery}/spectral_sampling_plan_hidden_for_neuron_ablation_baseline_positive.json
    {discovery}/spectral_sampling_plan_hidden_for_neuron_ablation_baseline_negative.json
    {discovery}/neural_circuits/manifest.json
    {discovery}/neural_circuits/dataset_info.json
    {agonists}/*/per_rule/is_correct/rule_*.json
    {agonists}/*/rule_knockout.json
    {agonists}/*/neuron_buckets.json
    {agonists}/*/neuron_bucket_stats.json
    {stats}/scores.csv
    {stats}/flip_stats_by_neuron.csv
    {stats}/flip_stats_global.json
    {stats}/flip_stats_*.pdf
    {stats}/rule_combo_metrics_test_*.csv
    {stats}/rule_combo_metrics_all_fit*.csv
    {stats}/high_quality_neuron_flip_coverage.pdf
    {stats}/high_quality_neuron_flip_coverage_by_layer.pdf
"""


def plan_of_run() -> PipelinePlan:
    parser = build_parser(lambda parser: pipeline.add_arguments(parser, "arithmetic"), None)
    args = parser.parse_args([*pipeline.BUILT_IN_EXAMPLE, *REDUCED])
    return PipelinePlan(args, pipeline.resolve(args))


def paths_of_run() -> RunPaths:
    return plan_of_run().paths


def checkout(folder: Path) -> Path:
    """A copy of the code with no results."""
    shutil.copytree(REPOSITORY / "lib", folder / "lib", ignore=shutil.ignore_patterns("__pycache__"))
    for script in numbered_scripts():
        shutil.copy(script, folder)
    return folder


def environment(folder: Path) -> dict[str, str]:
    """The folder's code, and one thread: the other core has tests of its own, and two threads would wait for it."""
    return {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}


def start(folder: Path) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-m", "lib.pipeline", *REDUCED], cwd=folder, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, env=environment(folder))


def run(folder: Path) -> str:
    """Run the pipeline to its end; what it printed."""
    process = start(folder)
    out, err = process.communicate()
    assert process.returncode == 0, f"{out[-3000:]}\n{err[-3000:]}"
    return out


def results(folder: Path) -> dict[str, str]:
    """Digest of every file with results below the folder: all but the run records, which hold times, and locks."""
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*"))
            if path.is_file() and not path.name.endswith(("run_metadata.json", ".lock"))}


def states(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of change of every file below data and cache."""
    return {path.as_posix(): (path.stat().st_size, path.stat().st_mtime_ns)
            for root in ("data", "cache") for path in sorted((folder / root).rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder with an undisturbed run, and what it printed."""
    folder = checkout(tmp_path_factory.mktemp("undisturbed run"))
    return folder, run(folder)


def test_run_leaves_the_promised_files_and_names_an_agonist_with_its_rule(finished):
    folder, printed = finished
    paths = paths_of_run()
    places = {"model": "SmolLM2-135M-Instruct", "features": paths.features_dir, "rules": paths.rules_dir,
              "discovery": paths.discovery_dir, "agonists": paths.agonists_dir, "flips": paths.flip_rules_dir,
              "stats": paths.stats_dir}
    missing = [line for line in EXPECTED.format(**places).split("\n") if line and not any(folder.glob(line.strip()))]
    assert not missing
    agonists = [read_json(folder / paths.regime_dir(regime) / "neuron_buckets.json", "agonists")
                for regime in REGIMES]
    names = [name for found in agonists for name in found["non_catastrophic_agonists"]]
    assert names
    summary = printed[printed.index("==== arithmetic on SmolLM2-135M-Instruct"):]
    assert "200 prompts" in summary
    assert "not available" not in summary
    assert "neurons kept" in summary and "rank agreement with" in summary
    assert any(f"  {name} " in summary for name in names)
    report = Path(summary.rpartition("Report to look at: ")[2].strip())
    page = report.read_text(encoding="utf-8")
    assert report.is_relative_to(folder) and len(page) < 3_000_000
    assert all(name in page for name in names) and "200 prompts" in page
    assert "What this page had to do without" not in page


def test_second_run_changes_no_file(finished):
    folder, _ = finished
    before = states(folder)
    printed = run(folder)
    assert printed.count("up to date") == 10
    assert states(folder) == before


def test_run_killed_in_stage_6_repeats_no_finished_test_and_ends_the_same(finished, tmp_path):
    undisturbed, _ = finished
    paths = paths_of_run()
    folder = checkout(tmp_path)
    later = shutil.ignore_patterns(paths.agonists_dir.name, paths.flip_rules_dir.name)
    for root in ("data", "cache"):
        shutil.copytree(undisturbed / root, folder / root, ignore=later)
    made = paths.regime_dir("positive")
    log = folder / made / "group_tests.jsonl"
    process = start(folder)
    while not log.is_file() or log.read_bytes().count(b"\n") < 12:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    # The pipeline alone is killed: its stage has to end with it, or the next run would meet a locked folder.
    process.send_signal(signal.SIGKILL)
    process.communicate()
    logged = log.read_bytes()
    assert not (log.parent / "run_metadata.json").exists(), "stage 6 had finished before it was killed"
    again = next(call for call in plan_of_run().calls() if call.stage == 6)
    subprocess.run([sys.executable, again.script, *again.arguments], cwd=folder, check=True, capture_output=True,
                   env=environment(folder))
    # The log is only ever added to, and in the end it is the undisturbed run's: what was logged was not done again.
    assert log.read_bytes().startswith(logged[:logged.rindex(b"\n") + 1])
    assert results(folder / made) == results(undisturbed / made)
