"""Wrong commands and wrong files, over all scripts and shells: one line, exit code 2, nothing written, no traceback."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from lib import grid_plans, pipeline
from lib.artifacts import write_csv, write_json
from tests.scripts import REPOSITORY, load_script

ARITHMETIC = [("1+2=", 3, "3", True, True), ("3+4=", 7, "8", False, True)]
TABLE = "lib.tasks.table_task"
BON = "lib.tasks.bon_jailbreaking_task"
CIRCUIT = {
    "circuit_id": 0, "circuit_label": "is_sum > 0.5", "target": "is_correct", "coefficient_sign": "positive",
    "status": "ok", "sampling_strategy": "plan",
    "metadata_topn": {"neurons": {"m0": [1, 2]}, "neuron_label_score": {"('m0', 1)": 0.5}},
}  # fmt: skip
PLAN_RULE = {"rule_target": "is_correct", "rule_id": 0, "rule": "is_sum > 0.5", "status": "ok",
             "associated_indices": [0], "unrelated_indices": [1]}  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Small, whole files of every stage; each case spoils its own copy."""
    import pandas as pd

    folder = tmp_path_factory.mktemp("world")
    rows = [{"prompt": f"{n}+1=", "raw_output": "1", "is_correct": n % 3 == 0, "first": float(n), "is_sum": n % 2,
             "is_test": n % 5 == 4} for n in range(60)]  # fmt: skip
    write_csv(folder / "features/scores.csv", pd.DataFrame(rows))
    write_json(folder / "features/features.json", [{"label": name} for name in ("first", "is_sum")])
    write_csv(folder / "rules/optimal_rule_set_is_correct.csv", pd.DataFrame({"rule_expression": ["is_sum > 0.5"]}))
    write_json(folder / "model/config.json", {"model_type": "llama"})
    write_json(folder / "nc/manifest.json", [CIRCUIT])
    write_json(folder / "nc/dataset_info.json", {"scores_path": "features/scores.csv", "ai_model": "model"})
    write_json(folder / "plan.json", {"baseline_subset": "all", "dataset_size": 48, "rules": [PLAN_RULE]})
    write_json(folder / "bag/positive_baseline/neuron_buckets.json", {
        "catastrophic_zero": {}, "non_catastrophic_agonists": {"m0:1": {"last_record": {"max_effect": 0.5}}}})
    (folder / "answers.pkl").write_bytes(pickle.dumps({"+": ARITHMETIC}))
    (folder / "table.csv").write_text("prompt,answer\n1+1=,2\n")
    (folder / "bon.json").write_text(json.dumps([{
        "prompt": "a", "original_prompt": "a", "augmentation_info": {"sigma": 0.1, "stats": {}}}]))
    (folder / "file").write_text("a file")
    return folder


class Case(NamedTuple):
    """A command, what is spoilt before it (path -> content; None removes), and what its line must say."""

    command: str
    arguments: str
    says: str
    files: dict[str, Any] = {}


S1 = "1_generate_prompts_and_answers --ai_model model --prompts_answers_pkl_file out/answers.pkl --quiet"
S2 = "2_generate_features -i answers.pkl -o out --no_llm --quiet"
S3 = "3_extract_rules --features_scores_dir features --rules_dir out --quiet"
S4 = ("4_spectral_sample_datapoints --ai_model model --features_scores_dir features --rules_dir rules "
      "--output_path out/plan.json --spectral_cache_dir out --quiet")  # fmt: skip
S5 = ("5_discover_circuits --ai_model model --features_scores_dir features --rules_dir rules --output_data_dir out "
      "--cache_dir out --spectral_cache_dir out --quiet")  # fmt: skip
S6 = "6_analyze_bag_of_rules --input_data_dir nc --output_data_dir out --quiet"
S7 = ("7_refine_neuron_anchored_rules --ai_model model --circuit_agonists_path bag --features_scores_dir features "
      "--rules_dir out --quiet")  # fmt: skip
S8 = "8_compare_experiments --stats_path features --out_dir out"
S9 = "9_compare_models --task_dir features --out_dir out"
S10 = "10_compute_threshold_sweep_stats --csv features/scores.csv --out_dir out"
S11 = "11_summarize_sensitivity_analysis --stats_root features --out_dir out"
SHIFT = "summarize_intervention_shift --baseline_dir features --candidate_dir rules --output_csv out/a.csv"
PLANNED = "--sampling_strategy plan --sampling_plan_path plan.json"
RECALL = "validate_recall --input_data_dir nc --output_data_dir out --quiet"
BUILD = "build_bon_dataset --requests requests.csv --output out/bon.json"
TABLES = "make_paper_tables --data_root features --out_dir out"
PIPELINE = "pipeline arithmetic model --data_root out --cache_root out"
REQUESTS = {"requests.csv": "Behavior\nmake tea\n"}
JSON_LIST, JSON_TEXT = "[1, 2]", '"text"'

CASES = [
    # stage 1: flags
    Case("1_generate_prompts_and_answers", "", "required: --prompts_answers_pkl_file"),
    Case(S1, "--batch_size 0", "0 is not a positive integer"),
    Case(S1, "--batch_size many", "invalid positive_int value: 'many'"),
    Case(S1, "--batch_size", "expected one argument"),
    Case(S1, "--seed 1.5", "--random_seed: invalid int value"),
    Case(S1, "--dtype float8", "invalid choice: 'float8'"),
    Case(S1, "--batch 3", "unrecognized arguments: --batch"),
    Case(S1, "--task_module lib.tasks.nothing", "no task module 'lib.tasks.nothing'"),
    Case(S1, "--task_module json", "'json' has no TASK_SPEC"),
    Case(S1, "--task_module ../task", "no task module"),
    Case(S1, "--task_module ''", "no task module"),
    Case(S1, "--task_module .", "no task module"),
    Case(S1, "--operators ?", "operators"),
    Case(S1, "--operators ''", "operators"),
    Case(S1, "--max_operand -1", "max_operand"),
    Case(S1, "--few_shot 99", "few_shot"),
    Case(S1, "--few_shot -1", "few_shot"),
    Case(S1, "--limit -1", "limit"),
    Case(S1, "--division_digits 0", "division_digits"),
    Case(S1, "--max_new_tokens 0", "--max_new_tokens 0"),
    Case(S1, "--device tpu", "unknown device 'tpu'"),
    Case(S1, "--ai_model /nowhere/model", "model folder not found"),
    Case(S1, "--ai_model ''", "the model has no name"),
    Case(S1, "--ai_model nothing.gguf", "model file not found"),
    Case(S1, "--ai_model features", "has no config.json"),
    Case(S1, "--ai_model file/x", "model|not found"),
    Case(S1, "--max_operand 2", "cannot load the model"),
    Case(S1, "--max_operand 2", "cannot load the model", {"model/config.json": "not json"}),
    Case(S1, "--max_operand 2 --ai_model bad.gguf --ai_model_cache_dir cache_dir", "not a GGUF model",
         {"bad.gguf": b"GGUF\x00"}),
    # stage 1: files of tasks
    Case(S1, f"--task_module {TABLE}", "--task_file"),
    Case(S1, f"--task_module {TABLE} --task_file nothing.csv", "table not found"),
    Case(S1, f"--task_module {TABLE} --task_file file", "unknown kind of table"),
    Case(S1, f"--task_module {TABLE} --task_file features", "table not found"),
    Case(S1, f"--task_module {TABLE} --task_file empty.csv", "cannot be read as a .csv", {"empty.csv": ""}),
    Case(S1, f"--task_module {TABLE} --task_file head.csv", "holds no rows", {"head.csv": "prompt,answer\n"}),
    Case(S1, f"--task_module {TABLE} --task_file t.csv", "cannot be read", {"t.csv": b"prompt,answer\n\xff\xfe,1\n"}),
    Case(S1, f"--task_module {TABLE} --task_file t.csv", "cannot be read", {"t.csv": "prompt,answer\n1,2\n1,2,3,4\n"}),
    Case(S1, f"--task_module {TABLE} --task_file bad.json", "cannot be read as a .json", {"bad.json": "{"}),
    Case(S1, f"--task_module {TABLE} --task_file n.jsonl", "n.jsonl", {"n.jsonl": "3\n4\n"}),
    Case(S1, f"--task_module {TABLE} --task_file bad.parquet", "as a .parquet", {"bad.parquet": b"PAR1"}),
    Case(S1, f"--task_module {TABLE} --task_file table.csv --prompt_col question", "has no column question"),
    Case(S1, f"--task_module {TABLE} --task_file table.csv --feature_cols x,y", "has no column x, y"),
    Case(S1, f"--task_module {TABLE} --task_file table.csv --prompt_col answer", "are both 'answer'"),
    Case(S1, f"--task_module {TABLE} --task_file table.csv --prompt_template x", "must contain {prompt}"),
    Case(S1, f"--task_module {TABLE} --task_file table.csv --match numeric --tolerance -1", "must not be negative"),
    Case(S1, f"--task_module {TABLE} --task_file table.csv --tolerance nan", "tolerance"),
    Case(S1, f"--task_module {TABLE} --task_file re.csv --match regex", "not a regular expression",
         {"re.csv": "prompt,answer\na,(\n"}),
    Case(S1, f"--task_module {TABLE} --task_file t.csv --match numeric", "is not a number",
         {"t.csv": "prompt,answer\na,b\n"}),
    Case(S1, f"--task_module {TABLE} --task_file t.csv", "prompt of row 1 is empty", {"t.csv": "prompt,answer\n,b\n"}),
    Case(S1, f"--task_module {BON} --judge refusal --augmented_prompts_file none.json", "augmented prompts not found"),
    Case(S1, f"--task_module {BON} --judge refusal --augmented_prompts_file b.json", "not a list", {"b.json": "{}"}),
    Case(S1, f"--task_module {BON} --judge refusal --augmented_prompts_file b.json", "entry 1", {"b.json": "[{}]"}),
    Case(S1, f"--task_module {BON} --judge refusal --augmented_prompts_file b.json", "cannot be", {"b.json": "[" * 9}),
    Case(S1, f"--task_module {BON} --judge groq: --augmented_prompts_file bon.json", "names a provider but no model"),
    Case(S1, f"--task_module {BON} --judge groq:x --augmented_prompts_file bon.json", "GROQ_API_KEY"),
    # stage 1: the cache of answers
    Case(S1, "--prompts_answers_pkl_file features", "features"),
    Case(S1, "--prompts_answers_pkl_file answers.pkl", "not a plain pickle", {"answers.pkl": b"text"}),
    Case(S1, "--prompts_answers_pkl_file answers.pkl", "not a plain pickle", {"answers.pkl": pickle.dumps(Path("x"))}),
    Case(S1, "--prompts_answers_pkl_file answers.pkl", "answers", {"answers.pkl": pickle.dumps([{"prompt": 1}])}),
    Case(S1, "--prompts_answers_pkl_file answers.pkl", "answers", {"answers.pkl": pickle.dumps({"+": [1, 2]})}),
    Case(S1, f"--prompts_answers_pkl_file answers.pkl --task_module {BON} --judge refusal", "best-of-N"),
    Case(S1, "--prompts_answers_pkl_file file/x.pkl --max_operand 2", "file"),
    # stage 2
    Case("2_generate_features", "", "required: --prompts_answers_pkl_file"),
    Case(S2, "-i nothing.pkl", "cache of answers .stage 1. not found"),
    Case(S2, "-i features", "features"),
    Case(S2, "", "not a plain pickle", {"answers.pkl": b"\x80\x04"}),
    Case(S2, f"--task_module {TABLE}", "not a cache of a table"),
    Case(S2, "--z_thresh nan", "not a finite number"),
    Case(S2, "--train_ratio inf", "not a finite number"),
    Case(S2, "--max_number_of_prompts_to_analyze -3", "-3 is negative"),
    Case(S2, "", "record of stage 1", {"answers.run_metadata.json": "{"}),
    Case(S2, "", "record of stage 1", {"answers.run_metadata.json": JSON_LIST}),
    Case(S2, "", "record of stage 1", {"answers.run_metadata.json": '{"settings": 3}'}),
    Case(S2, "", "unknown task settings", {"answers.run_metadata.json": json.dumps({"settings": {
        "task_module": "lib.tasks.arithmetic_task", "task_settings": {"no_such": 1}}})}),
    # stage 3
    Case("3_extract_rules", "", "required: --features_scores_dir"),
    Case(S3, "--features_scores_dir nothing", "not found"),
    Case(S3, "--inner_folds 1", "at least 2"),
    Case(S3, "--rule_alpha 0", "not in .0, 1."),
    Case(S3, "--max_rules 0", "not a positive integer"),
    Case(S3, "--baselines forest", "no such baseline: forest"),
    Case(S3, "", "feature catalogue .stage 2. cannot be read", {"features/features.json": "{"}),
    Case(S3, "", "not a feature catalogue", {"features/features.json": JSON_TEXT}),
    Case(S3, "", "not a feature catalogue", {"features/features.json": JSON_LIST}),
    Case(S3, "", "none of the features", {"features/features.json": '[{"label": "other"}]'}),
    Case(S3, "", "features.json", {"features/features.json": '[{"label": "a", "column": ["x"]}]'}),
    Case(S3, "", "cannot be read", {"features/scores.csv": ""}),
    Case(S3, "", "has no column", {"features/scores.csv": "a,b\n1,2\n"}),
    Case(S3, "", "has no rows", {"features/scores.csv": "prompt,raw_output,is_correct,first\n"}),
    Case(S3, "", "not a yes/no column", {"features/scores.csv": "prompt,raw_output,is_correct,first\na,b,maybe,1\n"}),
    Case(S3, "", "cannot be read", {"features/scores.csv": b"prompt,raw_output,is_correct,first\n\xff,b,1,1\n"}),
    Case(S3, "", "recorded for the task", {"features/task_settings.json": '{"task_module": "other"}'}),
    Case(S3, "", "task_settings.json", {"features/task_settings.json":
                                        '{"task_module": "lib.tasks.arithmetic_task", "settings": 3}'}),
    Case(S3, "", "task_settings.json", {"features/task_settings.json": '{"task_module": "lib.tasks.arithmetic_task"}'}),
    # stage 4
    Case("4_spectral_sample_datapoints", "", "required"),
    Case(S4, "--rules_dir nothing", "rule file .stage 3. not found"),
    Case(S4, "--spectral_dim 0", "not a positive integer"),
    Case(S4, "--coverage_radius inf", "not a finite number"),
    Case(S4, "--pair_similarity_metric miles", "invalid choice: 'miles'"),
    Case(S4, "--pair_len_tolerance -1", "is negative"),
    Case(S4, "", "not a rule", {"rules/optimal_rule_set_is_correct.csv": "rule_expression\nis_sum >\n"}),
    Case(S4, "", "not a rule", {"rules/optimal_rule_set_is_correct.csv": 'rule_expression\n"__import__(""os"")"\n'}),
    Case(S4, "", "no column with rules", {"rules/optimal_rule_set_is_correct.csv": "other\n"}),
    Case(S4, "", "holds no rule", {"rules/optimal_rule_set_is_correct.csv": "rule_expression\n"}),
    Case(S4, "", "coefficient_sign", {"rules/optimal_rule_set_is_correct.csv":
                                      "rule_expression,coefficient_sign\nfirst > 1,up\n"}),
    Case(S4, "", "rule_id", {"rules/optimal_rule_set_is_correct.csv": "rule_expression,rule_id\nfirst > 1,x\n"}),
    Case(S4, "", "rule_id", {"rules/optimal_rule_set_is_correct.csv": "rule_expression,rule_id\nfirst > 1,inf\n"}),
    Case(S4, "", "linear term", {"rules/optimal_rule_set_is_correct.csv":
                                 "rule_expression,component_type\nfirst > 1,linear\n"}),
    # stage 5
    Case("5_discover_circuits", "", "required"),
    Case(S5, "--sampling_strategy plan", "needs --sampling_plan_path"),
    Case(S5, "--sampling_strategy plan --sampling_plan_path nothing.json", "not found"),
    Case(S5, "--circuit_size -5", "circuit_size"),
    Case(S5, "--circuit_size lots", "circuit_size"),
    Case(S5, "--max_ig_steps 0", "not a positive integer"),
    Case(S5, "--check_units -1", "is negative"),
    Case(S5, "--method guess", "invalid choice"),
    # stage 6
    Case("6_analyze_bag_of_rules", "", "required"),
    Case(S6, "--input_data_dir nothing", "not found|dataset_info"),
    Case(S6, "", "dataset_info.json", {"nc/dataset_info.json": JSON_LIST}),
    Case(S6, "", "dataset_info.json", {"nc/dataset_info.json": '{"scores_path": 3, "ai_model": "model"}'}),
    Case(S6, "--scores_path table.csv", "must name a scores.csv"),
    Case(S6, "", "not found", {"features/scores.csv": None}),
    Case(S6, "", "manifest.json not found", {"nc/manifest.json": None}),
    Case(S6, "", "cannot be read", {"nc/manifest.json": "[{]"}),
    Case(S6, "", "not a manifest", {"nc/manifest.json": "{}"}),
    Case(S6, "", "not a manifest", {"nc/manifest.json": JSON_LIST}),
    Case(S6, "", "no rule circuit", {"nc/manifest.json": "[]"}),
    Case(S6, "", "no circuit_id", {"nc/manifest.json": json.dumps([{"status": "ok"}])}),
    Case(S6, "", "part of a file name", {"nc/manifest.json": json.dumps([{**CIRCUIT, "target": "../../up"}])}),
    Case(S6, "", "not a manifest", {"nc/manifest.json": json.dumps([{**CIRCUIT, "circuit_id": "one"}])}),
    Case(S6, "", "not a manifest", {"nc/manifest.json": json.dumps([{**CIRCUIT, "metadata_topn": [1]}])}),
    Case(S6, "", "is not a component", {"nc/manifest.json": json.dumps([
        {**CIRCUIT, "metadata_topn": {"neurons": {"../m0": [1]}}}])}),
    Case(S6, "--cluster_by_spectral", "no cluster circuit"),
    Case(S6, "--sampling_strategy plan", "needs --sampling_plan_path"),
    Case(S6, "--sampling_plan_path plan.json", "give both or neither"),
    Case(f"{S6} {PLANNED}", "", "not a sampling plan", {"plan.json": "{}"}),
    Case(f"{S6} {PLANNED}", "", "not a sampling plan", {"plan.json": JSON_LIST}),
    Case(f"{S6} {PLANNED}", "", "not a sampling plan",
         {"plan.json": json.dumps({"baseline_subset": "some", "dataset_size": 1, "rules": []})}),
    Case(S6, "--search_epsilon 0", "not in .0, 1."),
    Case(S6, "--search_epsilon nan", "not in .0, 1."),
    Case(S6, "--prune_alpha 1.5", "not in .0, 1."),
    Case(S6, "--looks 0 4", "not a positive integer"),
    Case(S6, "--looks", "expected at least one argument"),
    Case(S6, "--n_confirm -1", "is negative"),
    Case(S6, "--intervention magic", "invalid choice: 'magic'"),
    # stage 7
    Case("7_refine_neuron_anchored_rules", "", "required: --features_scores_dir"),
    Case(S7, "--circuit_agonists_path nothing", "agonist neurons not found"),
    Case(S7, "--circuit_agonists_path features", "no neuron_buckets.json"),
    Case(S7, "--circuit_agonists_path bad.zip", "cannot be read as a zip", {"bad.zip": b"PK\x03\x04"}),
    Case(S7, "", "neuron_buckets.json", {"bag/positive_baseline/neuron_buckets.json": "{"}),
    Case(S7, "", "neuron_buckets.json", {"bag/positive_baseline/neuron_buckets.json": JSON_LIST}),
    Case(S7, "", "is not a ", {"bag/positive_baseline/neuron_buckets.json":
                               '{"non_catastrophic_agonists": {"../../m0:1": {}}}'}),
    Case(S7, "--max_neurons 0", "not a positive integer"),
    Case(S7, "--min_confirmed_rate 2", "not between 0 and 1"),
    Case(S7, "--rule_metrics_quantiles low,high --summarize_rule_metrics --extract_rules", "quantiles"),
    Case(S7, "--rule_targets sideways --extract_rules", "sideways"),
    Case(S7, "--features_scores_dir nothing", "not found"),
    # reports and tables
    Case("8_compare_experiments", "", "required"),
    Case(S8, "--stats_path nothing", "no results at nothing"),
    Case(S8, "--stats_path file", "neither a folder nor a zip"),
    Case(S8, "", "give a folder"),
    Case(S8, "--thr_step 0", "thr_step"),
    Case(S8, "--thr_min 0.9 --thr_max 0.1", "thr"),
    Case(S8, "--score_scope nonsense", "nonsense"),
    Case("9_compare_models", "", "required"),
    Case(S9, "--task_dir nothing", "no results at nothing"),
    Case(S9, "", "give a folder"),
    Case("10_compute_threshold_sweep_stats", "", "required"),
    Case(S10, "--csv nothing.csv", "nothing.csv"),
    Case(S10, "", "scores.csv"),
    Case(S10, "--thresholds 0.7 x", "invalid finite value: 'x'"),
    Case(S10, "--n_boot 0", "not a positive integer"),
    Case("11_summarize_sensitivity_analysis", "", "required"),
    Case(S11, "--stats_root nothing", "nothing"),
    Case(S11, "", "give a folder|features"),
    Case(S11, "--baseline_tau 7", "not between 0 and 1"),
    Case("summarize_intervention_shift", "", "required"),
    Case(SHIFT, "--baseline_dir nothing", "nothing"),
    Case(SHIFT, "--candidate_label mean", "both runs are called"),
    Case(SHIFT, "--hq_score_scope nonsense", "nonsense"),
    Case(SHIFT, "--topk 0", "not a positive integer"),
    Case(TABLES, "--data_root nothing", "no results at nothing"),
    Case(TABLES, "--thresholds a,b", "thresholds"),
    Case(TABLES, "--table10_topn 0", "not a positive integer"),
    Case(TABLES, "", "give a folder"),
    Case("make_report", "", "required: model_root"),
    Case("make_report", "nothing", "nothing"),
    Case("make_report", "features --all_runs --run x", "leave out --run"),
    Case("make_report", "features --max_prompts 0", "not a positive integer"),
    # other commands
    Case("validate_recall", "", "required"),
    Case(RECALL, "--modes guess", "invalid choice: 'guess'"),
    Case(RECALL, "--n_candidates 0", "not a positive integer"),
    Case(RECALL, "--input_data_dir nothing", "not found|dataset_info"),
    Case("build_bon_dataset", "", "required: --requests"),
    Case(BUILD, "", "table of requests not found"),
    Case(BUILD, "--request_col nothing", "nothing", REQUESTS),
    Case(BUILD, "--n_samples 0", "not a positive integer", REQUESTS),
    Case(BUILD, "--sigma nan", "not a finite number", REQUESTS),
    Case(BUILD, "--sigma -1", "sigma", REQUESTS),
    Case(BUILD, "--output bon.json", "use --force to replace it", REQUESTS),
    Case("clean_results_for_export", "nothing", "no results at nothing"),
    Case("clean_results_for_export", "features features/out", "overlaps"),
    Case("clean_results_for_export", "features out", "nothing in features is a result"),
    Case("clean_results_for_export", "features out --manifest features/m.json", "written into the input"),
    Case("check_artifacts", "--root nothing", "no such folder"),
    Case("check_artifacts", "--nonsense", "unrecognized arguments"),
    # the pipeline and the grid
    Case("pipeline", "arithmetic", "required: model"),
    Case("pipeline", "nothing model", "lib.tasks.nothing_task"),
    Case("pipeline", "../x model", "no task module"),
    Case(PIPELINE, "--min_flip_rate 2", "not a rate"),
    Case(PIPELINE, "--spectral_splits --incorrect_rules", "leave out --incorrect_rules"),
    Case(PIPELINE, "--circuit_size 0", "neither a positive number of units nor a share"),
    Case(PIPELINE, "--max_number_of_circuits_to_analyze x", "invalid int value"),
    Case(PIPELINE, "--eval_intervention magic", "invalid choice"),
    Case(PIPELINE, "--base_url http://me:secret@host/v1 --feature_model openai:m --dry_run", "must hold no key"),
    Case("grid", "", "required: plan"),
    Case("grid", "nothing", "invalid choice: 'nothing'"),
    Case("grid", "experiments --nonsense", "unknown option: --nonsense"),
    Case("grid", "experiments TASKS=nothing --dry_run", "nothing"),
    Case("grid", "experiments MODES=nothing --dry_run", "MODES names 'nothing'"),
    Case("grid", "sensitivity SIZES=big --dry_run", "'big'"),
    Case("grid", "sensitivity RATES=2 --dry_run", "rate"),
    Case("grid", "experiments EXTRA_FLAGS=' --dry_run", "EXTRA_FLAGS cannot be read"),
    Case("grid", "tables nothing out", "nothing"),
    Case("grid", "tables MIN_RULE_DATASET_COVERAGE=x features out", "invalid share value: 'x'"),
]


def spoil(folder: Path, files: dict[str, Any]) -> None:
    for name, content in files.items():
        path = folder / name
        if content is None:
            path.unlink()
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def tree_of(folder: Path) -> dict[str, bytes]:
    """Every file but lock files, which are empty."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*")
            if path.is_file() and path.name != ".lock"}  # fmt: skip


def words_of(text: str) -> list[str]:
    return ["" if word == "''" else word for word in text.split()]


def call(name: str, arguments: list[str]) -> int:
    try:
        if name == "pipeline":
            return pipeline.main(arguments)
        return (grid_plans if name == "grid" else load_script(name)).main(arguments)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1


def ids() -> list[str]:
    return [f"{number}-{case.command.split()[0]} {case.arguments}"[:70] for number, case in enumerate(CASES)]


@pytest.mark.parametrize("case", CASES, ids=ids())
def test_one_line_exit_2_and_nothing_written(case, world, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "copy"
    shutil.copytree(world, folder)
    spoil(folder, case.files)
    monkeypatch.chdir(folder)
    for name in ("GROQ_API_KEY", "OPENAI_API_KEY", "TASKS", "MODELS", "MODES", "RATES", "SIZES", "EXTRA_FLAGS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("lib.chat_backends._credentials", dict)
    command, *arguments = words_of(f"{case.command} {case.arguments}")
    for word in [word for word in arguments if "=" in word and word[0].isupper()]:
        arguments.remove(word)
        monkeypatch.setenv(*word.split("=", 1))
    before = tree_of(folder)
    code = call(command, arguments)
    out, err = capsys.readouterr()
    assert code == 2, out + err
    assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n"), err
    assert re.search(case.says, err), err
    assert "Traceback" not in out + err
    assert tree_of(folder) == before


def test_the_table_is_large_and_covers_every_command():
    assert len(CASES) >= 80 and len(set(map(str, CASES))) == len(CASES)
    scripts = {path.stem for path in REPOSITORY.glob("*.py")}
    assert scripts <= {case.command.split()[0] for case in CASES}


# ---------------------------------------------------------------- through the shells

SHELLS = {
    "_run_pipeline.sh": ("arithmetic", "required: model"),
    "run_mecharule_experiments.sh": ("--nonsense", "unknown option: --nonsense"),
    "run_paper_tables_generation.sh": ("nothing out", "nothing"),
    "run_resample_recheck.sh": ("--nonsense", "unknown option: --nonsense"),
    "run_sensitivity_analysis.sh": ("--nonsense", "unknown option: --nonsense"),
}


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The repository's shells in a folder where the environment is set up, with a space in its name."""
    root = tmp_path_factory.mktemp("with space")
    for path in REPOSITORY.glob("*.sh"):
        shutil.copy(path, root)
    (root / "setup.sh").write_text("exit 0\n")
    for path in (REPOSITORY / "lib", *REPOSITORY.glob("*.py")):
        (root / path.name).symlink_to(path)
    (root / ".env/bin").mkdir(parents=True)
    python = root / ".env/bin/python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    return root


@pytest.mark.parametrize("shell", SHELLS)
def test_shells_pass_the_line_and_the_code_on(shell, installed, tmp_path):
    arguments, says = SHELLS[shell]
    before = {path.name for path in installed.iterdir()}
    done = subprocess.run(["bash", installed / shell, *arguments.split()], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and says in done.stderr
    assert {path.name for path in installed.iterdir()} - {"__pycache__"} == before and not list(tmp_path.iterdir())


def test_every_shell_is_tried():
    tried = {*SHELLS, "setup.sh", "run_tests.sh"}
    assert {path.name for path in REPOSITORY.glob("*.sh")} == tried


@pytest.mark.parametrize("arguments, environment, says", [
    (["--nonsense"], {}, "unknown option --nonsense"),
    (["--environment_only"], {"PYTHON": "/nowhere/python"}, "PYTHON=/nowhere/python does not run"),
])
def test_setup_says_what_is_wrong(arguments, environment, says, tmp_path):
    for name in ("setup.sh", "requirements.txt", "requirements-nodeps.txt", "constraints.txt"):
        shutil.copy(REPOSITORY / name, tmp_path)
    before = tree_of(tmp_path)
    done = subprocess.run(["bash", tmp_path / "setup.sh", *arguments], capture_output=True, text=True,
                          env={**os.environ, **environment})  # fmt: skip
    assert done.returncode == 2 and says in done.stderr and tree_of(tmp_path) == before


def test_a_zip_of_results_that_is_broken_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with zipfile.ZipFile("data.zip", "w") as archive:
        archive.writestr("../up.csv", "a\n1\n")
    for command in ("8_compare_experiments --stats_path", "make_paper_tables --data_root", "grid tables"):
        name, *arguments = [*command.split(), "data.zip", *(["out"] if "grid" in command else ["--out_dir", "out"])]
        assert call(name, arguments) == 2
        assert "leads outside" in capsys.readouterr().err
    assert os.listdir() == ["data.zip"]
