"""Every command that users were promised, as it was written, with flags added that make it small; real packaged model.

`M` stands for the model. What the commands leave must be what users expect to find.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.reporting.recount import FinishedRuns
from tests.scripts import REPOSITORY, run_script

pytestmark = pytest.mark.slow

MODEL = "SmolLM2-135M-Instruct"
DISCOVERY = "./data/arithmetic/M/neural_circuit_discovery_results/eap_ig_inputs/by_hand"
CIRCUITS = f"{DISCOVERY}/neural_circuits"
PLAN = f"{DISCOVERY}/spectral_sampling_plan.json"
ANSWERS = "./cache/arithmetic/M/llm_io_data.pkl"
REPORT, RULES = "./data/arithmetic/M/feature_report", "./data/arithmetic/M/rule_extraction_results"
TASK = "--task_module lib.tasks.arithmetic_task"

# What makes them small: few prompts, few candidates, and two operators of which the model gets about half right, so
# that both regimes have enough datapoints.
SMALL_TASK = "--operators +* --limit 200 --max_operand 17 --few_shot 2 --max_new_tokens 3"
SMALL_RUN = f"--no_llm --circuit_size 12 --max_number_of_circuits_to_analyze 1 --eval_intervention mean {SMALL_TASK}"

BY_HAND = {
    "1": (
        f"python 1_generate_prompts_and_answers.py --ai_model M {TASK} --prompts_answers_pkl_file {ANSWERS} "
        "--batch_size 256",
        SMALL_TASK,
    ),
    "2": (
        f"python 2_generate_features.py --ai_model gemma3:27b {TASK} --prompts_answers_pkl_file {ANSWERS} "
        f"--features_scores_dir {REPORT} --cache_dir ./cache/arithmetic/M --num_correct_example_prompts 32 "
        "--num_incorrect_example_prompts 32 --drop_near_duplicate_features --near_duplicate_features_threshold 0.9999 "
        "--drop_low_predictive_power_features --min_delta 0.2",
        "--no_llm --no_plots",
    ),
    "3": (
        f"python 3_extract_rules.py --features_scores_dir {REPORT} --rules_dir {RULES} {TASK} --npermutations 5 "
        "--only_unique_datapoints_in_shap --use_shap_in_xgb --use_shap_in_lasso",
        "--npermutations 1 --stability_resamples 1 --inner_repeats 1",
    ),
    "3, incorrect rules": (
        f"python 3_extract_rules.py --features_scores_dir {REPORT} --rules_dir {RULES} {TASK} --npermutations 5 "
        "--only_unique_datapoints_in_shap --use_shap_in_xgb --use_shap_in_lasso --fake_targets",
        "--npermutations 1 --stability_resamples 1 --inner_repeats 1",
    ),
    "4": (
        f'python 4_spectral_sample_datapoints.py --features_scores_dir {REPORT} --rules_dir {RULES} --rules_glob '
        f'"optimal_rule_set" --ai_model M --spectral_cache_dir ./cache/arithmetic --spectral_space hidden '
        "--rep_hook_name ln_final.hook_normalized --rep_pooling last --spectral_dim 32 --baseline_subset all "
        "--pair_by_similarity_len_matched --pair_similarity_metric euclidean --min_points_per_ablation 128 "
        "--max_points_per_ablation 128 --use_global_clusters --global_n_clusters 32 --batch_size 256 "
        f"{TASK} --output_path {PLAN}",
        "--min_points_per_ablation 20 --max_points_per_ablation 20",
    ),
    "5": (
        f'python 5_discover_circuits.py --rules_dir {RULES} --rules_glob "optimal_rule_set" --features_scores_dir '
        f"{REPORT} --output_data_dir {CIRCUITS} --ai_model M --cache_dir ./cache/arithmetic/M --method EAP-IG-inputs "
        "--intervention patching --eval_intervention mean-positional --circuit_level neuron --circuit_size 100000 "
        f"--max_pairs_per_circuit 128 --sampling_strategy plan --sampling_plan_path {PLAN} {TASK}",
        "--circuit_size 12 --max_pairs_per_circuit 8 --max_n_of_rules_to_analyze 1 --check_units 2 "
        "--points_to_use_for_mean_ablation 32",
    ),
    "6": (
        f"python 6_analyze_bag_of_rules.py --input_data_dir {CIRCUITS} --output_data_dir "
        f"{DISCOVERY}/agonist_neurons-fast-spectral_anchor --scores_path {REPORT}/scores.csv --ai_model M "
        "--intervention mean-positional --points_to_use_for_mean_ablation 256 --sampling_strategy plan "
        f"--sampling_plan_path {PLAN} --n_associated 64 --n_unrelated 64 --search_epsilon 0.2 --fast_ablation "
        f"--decode_only --mlp_neurons_only --sign_split_first {TASK}",
        "--points_to_use_for_mean_ablation 32 --n_associated 20 --n_unrelated 20",
    ),
    "7": ("python 7_refine_neuron_anchored_rules.py --help", ""),
}  # fmt: skip

PIPELINE = (
    "bash _run_pipeline.sh arithmetic M --spectral_circuit_discovery --spectral_anchoring_plan --fast_anchoring "
    "--decode_only --mlp_neurons_only --z_thresh 10 --batch_size 256 --circuit_level neuron --circuit_size 100000 "
    "--max_number_of_circuits_to_analyze 5"
)
# The scripts of the experiments take the pipeline's flags from the environment. The same cell as the pipeline's run, so
# that the grid finds it finished.
GRID = {
    "TASKS": "arithmetic",
    "MODELS": MODEL,
    "MODES": "spectral_plan",
    "BASE_SIZE": "12",
    "SIZES": "12",
    "RATES": "0.2",
    "EXTRA_FLAGS": f"--z_thresh 10 --batch_size 256 --quiet {SMALL_RUN}",
}
SENSITIVITY = {**GRID, "EXTRA_FLAGS": GRID["EXTRA_FLAGS"].replace("--circuit_size 12 ", "")}

EXPECTED = """
    cache/arithmetic/M/llm_io_data.pkl
    cache/arithmetic/spectral_reps_*.npy
    data/arithmetic/M/feature_report/scores.csv
    data/arithmetic/M/feature_report/features.json
    data/arithmetic/M/rule_extraction_results/association_rules_*.csv
    data/arithmetic/M/rule_extraction_results/rule_combo_*.csv
    data/arithmetic/M/rule_extraction_results/optimal_rule_set_*.csv
    data/arithmetic/M/rule_extraction_results/*_fake.csv
    data/arithmetic/M/rule_extraction_results/shap_plots
    data/arithmetic/M/rule_extraction_results/neuron_flip_rules/stats/RUN/scores.csv
    data/arithmetic/M/rule_extraction_results/neuron_flip_rules/stats/RUN/rule_combo_metrics_test_*.csv
    data/arithmetic/M/rule_extraction_results/neuron_flip_rules/stats/RUN/rule_combo_metrics_all_fit.csv
    data/arithmetic/M/rule_extraction_results/neuron_flip_rules/stats/RUN/flip_stats_*.csv
    data/arithmetic/M/rule_extraction_results/neuron_flip_rules/stats/RUN/flip_stats_*.json
    data/arithmetic/M/rule_extraction_results/neuron_flip_rules/stats/RUN/flip_stats_*.pdf
    data/arithmetic/M/rule_extraction_results/neuron_flip_rules/stats/RUN/high_quality_neuron_flip_coverage.pdf
    data/arithmetic/M/rule_extraction_results/neuron_flip_rules/stats/RUN/high_quality_neuron_flip_coverage_by_layer.pdf
    data/arithmetic/M/rule_extraction_results/neuron_flip_rules/*/*/rule_combo_flip_*.csv
    data/arithmetic/M/rule_extraction_results/neuron_flip_rules/*/*/rule_combo_all_fit_*.csv
    data/arithmetic/M/neural_circuit_discovery_results/eap_ig_inputs/*-M12-*/neural_circuits/manifest.json
    data/arithmetic/M/neural_circuit_discovery_results/eap_ig_inputs/*-M12-*/neural_circuits/dataset_info.json
    data/arithmetic/M/neural_circuit_discovery_results/eap_ig_inputs/*-M12-*/agonist_neurons*/*/per_rule/is_correct/rule_*.json
    data/arithmetic/M/neural_circuit_discovery_results/eap_ig_inputs/*-M12-*/agonist_neurons*/*/rule_knockout.json
    data/arithmetic/M/neural_circuit_discovery_results/eap_ig_inputs/*-M12-*/agonist_neurons*/*/neuron_buckets.json
    data/arithmetic/M/neural_circuit_discovery_results/eap_ig_inputs/*-M12-*/agonist_neurons*/*/neuron_bucket_stats.json
    data/arithmetic/M/neural_circuit_discovery_results/eap_ig_inputs/by_hand/neural_circuits/manifest.json
    data/arithmetic/M/neural_circuit_discovery_results/eap_ig_inputs/by_hand/neural_circuits/dataset_info.json
    data/arithmetic/M/neural_circuit_discovery_results/eap_ig_inputs/by_hand/agonist_neurons-fast-spectral_anchor/positive_baseline/rule_knockout.json
    data/arithmetic/M/neural_circuit_discovery_results/eap_ig_inputs/by_hand/agonist_neurons-fast-spectral_anchor/negative_baseline/rule_knockout.json
    data/aggregated_visualizations/aggregated_by_task/threshold_sweep_all_tasks_all_llms.csv
    paper_tables/sensitivity_summary/arithmetic/M/sensitivity_summary_all_scopes.csv
    intervention_shift/arithmetic/M/*/intervention_shift_summary.csv
    paper_tables/table1*.csv
    paper_tables/table2_threshold_sweep_per_run_long.csv
"""  # noqa: E501
RUN = "rule_split-spectral_sample-M12-decode_only-agonist_neurons-fast-spectral_anchor"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of the code without results, whose `.env` is this interpreter's environment, seen from another folder."""
    environment = Path(sys.prefix)
    if not (environment / "pyvenv.cfg").is_file():
        pytest.skip("this interpreter is not that of an environment made by setup.sh")
    folder = tmp_path_factory.mktemp("promised commands")
    shutil.copytree(REPOSITORY / "lib", folder / "lib", ignore=shutil.ignore_patterns("__pycache__"))
    for path in REPOSITORY.iterdir():
        if path.is_file() and path.suffix in (".py", ".sh", ".txt", ".md"):
            shutil.copy(path, folder)
    _environment_of(folder, environment)
    # The packaged model is converted once for all tests.
    models = REPOSITORY / "cache" / "models"
    models.mkdir(parents=True, exist_ok=True)
    (folder / "cache").mkdir()
    (folder / "cache" / "models").symlink_to(models)
    return folder


def _environment_of(folder: Path, environment: Path) -> None:
    """`.env` in the folder as setup.sh leaves it: links into the real one, and the stamp of this folder."""
    made = folder / ".env"
    (made / "bin").mkdir(parents=True)
    (made / "lib").symlink_to(environment / "lib")
    shutil.copy(environment / "pyvenv.cfg", made)
    for name in ("python", "python3"):
        (made / "bin" / name).symlink_to((environment / "bin" / name).resolve())
    activate = (environment / "bin" / "activate").read_text()
    (made / "bin" / "activate").write_text(activate.replace(str(environment), str(made)))
    version = ".".join(map(str, sys.version_info[:3]))
    stamp = [f"python {version} in {folder}\n"]
    requirements = ("requirements.txt", "requirements-nodeps.txt", "constraints.txt")
    stamp += [(folder / name).read_text() for name in requirements]
    (made / "installed-requirements.txt").write_text("".join(stamp))


def bash(command: str, folder: Path, **variables: str) -> str:
    """Run in a shell, as typed; what it printed."""
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHON", "VIRTUAL_ENV")}
    command = command.replace("arithmetic M ", f"arithmetic {MODEL} ")
    done = subprocess.run(
        ["bash", "-c", command], cwd=folder, env={**clean, **variables}, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def finished(checkout) -> Path:
    """The folder after all commands that take long, in the order in which a user would come to them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(checkout)
        patch.setattr("lib.modeling_and_ablation.MODELS_DIR", checkout / "cache" / "models")
        for title, (command, small) in BY_HAND.items():
            words = [word.replace("/M/", f"/{MODEL}/") if word != "M" else MODEL for word in shlex.split(command)]
            assert words[0] == "python"
            assert run_script(words[1], words[2:] + shlex.split(small)) == 0, f"stage {title}"
    bash(f"{PIPELINE} --quiet {SMALL_RUN}", checkout)
    bash("bash run_mecharule_experiments.sh", checkout, **GRID)
    bash("bash run_sensitivity_analysis.sh", checkout, **SENSITIVITY)
    bash("bash run_resample_recheck.sh", checkout, **GRID)
    bash(". .env/bin/activate && python check_artifacts.py", checkout)
    bash("bash run_paper_tables_generation.sh", checkout)
    return checkout


def test_every_command_runs_and_leaves_the_files_that_it_names(finished):
    names = EXPECTED.replace("/M/", f"/{MODEL}/").replace("RUN", RUN).split()
    assert [name for name in names if not any(finished.glob(name))] == []


def test_every_figure_of_the_tables_is_what_the_raw_files_say(finished):
    runs = FinishedRuns(finished)
    runs.check_tables(finished / "paper_tables")
    summary = finished / "paper_tables/sensitivity_summary/arithmetic" / MODEL / "sensitivity_summary_all_scopes.csv"
    runs.check_sensitivity(summary, MODEL)
    runs.check_models(finished / "data/aggregated_visualizations/arithmetic/run_summary_by_model.csv")
    assert runs.n_compared >= 30


def test_environment_is_found_activated_and_everything_compiles(checkout):
    assert "ollama" in bash("bash setup.sh", checkout) or shutil.which("ollama")
    found = bash(". .env/bin/activate && python -c 'import sys, torch; print(sys.prefix)'", checkout)
    assert Path(found.strip()) == checkout / ".env"
    compile_all = "find . -name '*.py' -not -path './.env/*' -print0 | xargs -0 python -m py_compile"
    bash(f". .env/bin/activate && {compile_all}", checkout)
