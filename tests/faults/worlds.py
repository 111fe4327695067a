"""Every stage on a small world: what it reads, its command, and which of its files grow while it runs.

Inputs lie in `in/`, with the record of a stage that made them; outputs and caches go to `out/`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lib.artifacts import StageRecord, write_pickle

LOGS = ("*.jsonl", "*.partial.npy", "*.partial.json")
"""Files that grow while a stage runs; readers know how far they are whole."""


@dataclass(frozen=True)
class World:
    """One command. make: writes `in/` below the folder; runs in a child, so it may use a model."""

    name: str
    script: str
    make: Callable[[Path], None]
    arguments: Callable[[Path], list[str]]
    has_record: bool = True
    """A finished run of it is recognised, and not run again."""
    exports: bool = False
    """Writes a folder that must not be there."""


# ---------------------------------------------------------------- stages 1 to 3


def _tiny_model(folder: Path) -> Path:
    from tests.models import tiny_model

    tiny = tiny_model("llama")
    tiny.model.save_pretrained(folder / "model")
    tiny.tokenizer.save_pretrained(folder / "model")
    return folder / "model"


def _record(folder: Path, *names: str, record: str = "run_metadata.json") -> None:
    """The record that the stage before would have left."""
    paths = [folder / name for name in names] or sorted(path for path in folder.iterdir() if path.is_file())
    StageRecord("the stage before", {}, {}, folder / record).finish(paths)


def _make_1(folder: Path) -> None:
    _tiny_model(folder / "in")


def _arguments_1(folder: Path) -> list[str]:
    return [
        *("--ai_model", folder / "in/model", "--prompts_answers_pkl_file", folder / "out/llm_io_data.pkl"),
        *("--stats_json_out", folder / "out/report", "--max_operand", "7", "--few_shot", "2"),
        *("--max_new_tokens", "3", "--batch_size", "32", "--quiet"),
    ]


def _make_2(folder: Path) -> None:
    from lib.tasks.arithmetic_task import TASK_SPEC, ArithmeticSettings

    task = TASK_SPEC.configured(ArithmeticSettings(max_operand=7))
    examples = task.examples(0)
    answers = ["1" if number % 3 else str(example["prompt"])[:1] for number, example in enumerate(examples)]
    write_pickle(folder / "in/llm_io_data.pkl", task.cache_from_answers(examples, answers))
    record = StageRecord(
        "1_generate_prompts_and_answers",
        {"task_module": "lib.tasks.arithmetic_task", "task_settings": task.settings.identity()},
        {},
        folder / "in/llm_io_data.run_metadata.json",
    )
    record.finish([folder / "in/llm_io_data.pkl"], summary={"task_settings": task.settings.to_json()})


def _arguments_2(folder: Path) -> list[str]:
    return [
        *("--prompts_answers_pkl_file", folder / "in/llm_io_data.pkl", "--features_scores_dir", folder / "out/report"),
        *("--cache_dir", folder / "out/cache", "--no_llm", "--drop_near_duplicate_features", "--quiet"),
    ]


def _make_3(folder: Path) -> None:
    from tests.stages.test_stage_3 import make_features_dir

    make_features_dir(folder / "in", 120)
    _record(folder / "in")


def _arguments_3(folder: Path) -> list[str]:
    return [
        *("--features_scores_dir", folder / "in", "--rules_dir", folder / "out"),
        *("--npermutations", "1", "--stability_resamples", "1", "--inner_repeats", "1", "--inner_folds", "2"),
        *("--max_rules", "1", "--max_conditions", "2", "--quiet"),
    ]


# ---------------------------------------------------------------- stages 4 and 5


def _make_4(folder: Path) -> None:
    from tests.stages.small_world import make_world

    make_world(folder / "in", n_rows=100)
    for name in ("features", "rules"):
        _record(folder / "in" / name)


def _arguments_4(folder: Path) -> list[str]:
    from tests.stages.small_world import stage_4_arguments

    return [
        *stage_4_arguments(folder / "in"),
        *("--spectral_cache_dir", folder / "out/cache", "--output_path", folder / "out/plan.json"),
        *("--pair_by_similarity_len_matched",),
    ]


def _make_5(folder: Path) -> None:
    from tests.scripts import run_script
    from tests.stages.small_world import stage_4_arguments

    _make_4(folder)
    assert run_script("4_spectral_sample_datapoints", stage_4_arguments(folder / "in")) == 0
    shutil.rmtree(folder / "in/cache")


def _arguments_5(folder: Path) -> list[str]:
    from tests.stages.small_world import stage_5_arguments

    out = folder / "out"
    return [
        *stage_5_arguments(folder / "in"),
        *("--cache_dir", out / "cache", "--spectral_cache_dir", out / "cache", "--output_data_dir", out / "disc"),
        *("--max_pairs_per_circuit", "8", "--check_units", "4"),
    ]


# ---------------------------------------------------------------- stages 6 and 7


def _make_6(folder: Path) -> None:
    from tests.stages.agonist_world import add_tiny_model, make_world

    make_world(folder / "in", n_rows=260)
    add_tiny_model(folder / "in")
    _record(folder / "in/features")
    _record(folder / "in/nc")


def _arguments_6(folder: Path) -> list[str]:
    from tests.stages.agonist_world import stage_6_arguments

    return [
        *stage_6_arguments(folder / "in"),
        *("--output_data_dir", folder / "out/agonists", "--cache_dir", folder / "out/cache"),
        *("--ai_model", folder / "in/model", "--intervention", "mean-positional", "--decode_only"),
        *("--points_to_use_for_mean_ablation", "16", "--n_associated", "16", "--n_unrelated", "16"),
        *("--n_confirm", "8"),
    ]


def _make_7(folder: Path) -> None:
    from tests.flip_world import world_frame, write_world
    from tests.models import tiny_model

    _tiny_model(folder / "in")
    frame = world_frame(140)
    frame["prompt"] = [prompt.split(": ")[1] for prompt in frame["prompt"]]
    frame = frame.drop_duplicates("prompt").reset_index(drop=True)
    frame["raw_output"] = [generation.answer for generation in tiny_model("llama").generate(list(frame["prompt"]), 3)]
    frame["is_correct"] = [answer[:1].isdigit() for answer in frame["raw_output"]]
    paths = write_world(folder / "in", frame, {"m1:3": 0.5, "m0:2": 0.4, "m2:7": 0.4})
    _record(paths["features"])
    _record(paths["agonists"] / "positive_baseline", "neuron_buckets.json", "rule_0000.json")


def _arguments_7(folder: Path) -> list[str]:
    return [
        *("--circuit_agonists_path", folder / "in/discovery/bag"),
        *("--features_scores_dir", folder / "in/feature_report"),
        *("--rules_dir", folder / "out/rules", "--stats_dirname", "run", "--spectral_cache_dir", folder / "out/cache"),
        *("--task_module", "tests.stages.agonist_world", "--ai_model", folder / "in/model", "--batch_size", "32"),
        *("--use_spectral_sampling", "--sampling_max_points", "100", "--global_n_clusters", "4", "--decode_only"),
        *("--points_to_use_for_mean_ablation", "16", "--n_random_neurons", "2", "--joint_ablation", "--n_bootstrap"),
        *("50", "--extract_rules", "--summarize_rule_metrics", "--min_train_flips", "5", "--min_test_flips", "3"),
        *("--max_rules", "1", "--jobs", "1", "--group_col", "prompt", "--quiet"),
    ]


# ---------------------------------------------------------------- reports


def _published(folder: Path, *, n_models: int = 1, sensitivity: bool = False) -> None:
    from tests import published_tree

    published_tree.build(
        folder / "in",
        tasks=("arithmetic",),
        models=published_tree.MODELS[:n_models],
        states={},
        sensitivity=sensitivity,
    )
    for stats in sorted((folder / "in").rglob("stats/*/")):
        _record(stats)


def _make_8(folder: Path) -> None:
    _published(folder)


def _arguments_8(folder: Path) -> list[str]:
    return [
        *("--stats_path", folder / "in/data", "--out_dir", folder / "out"),
        *("--thr_min", "0.7", "--thr_max", "0.9", "--thr_step", "0.1", "--quiet"),
    ]


def _make_9(folder: Path) -> None:
    _published(folder, n_models=2)


def _arguments_9(folder: Path) -> list[str]:
    return ["--task_dir", folder / "in/data/arithmetic", "--out_dir", folder / "out", "--quiet"]


def _make_10(folder: Path) -> None:
    from tests.scripts import run_script

    _published(folder, n_models=2)
    tables = ["--data_root", folder / "in/data", "--out_dir", folder / "tables", "--quiet"]
    assert run_script("make_paper_tables", tables) == 0
    name = "table2_threshold_sweep_per_run_long.csv"
    (folder / "in/table2").mkdir()
    (folder / "tables" / name).rename(folder / "in/table2" / name)
    shutil.rmtree(folder / "tables")


def _arguments_10(folder: Path) -> list[str]:
    return [
        *("--csv", folder / "in/table2/table2_threshold_sweep_per_run_long.csv", "--out_dir", folder / "out"),
        *("--data_root", folder / "in/data", "--n_boot", "200", "--quiet"),
    ]


def _make_11(folder: Path) -> None:
    _published(folder, sensitivity=True)


def _arguments_11(folder: Path) -> list[str]:
    from tests.published_tree import MODELS

    stats = folder / "in/data/arithmetic" / MODELS[0] / "rule_extraction_results/neuron_flip_rules/stats"
    return [
        *("--stats_root", stats, "--out_dir", folder / "out", "--quality_thresholds", "0.7", "0.8", "--quiet"),
        *("--score_scope", "test"),
    ]


def _arguments_tables(folder: Path) -> list[str]:
    return ["--data_root", folder / "in/data", "--out_dir", folder / "out", "--quiet"]


def _arguments_export(folder: Path) -> list[str]:
    return [folder / "in/data", folder / "out/exported"]


WORLDS = {
    world.name: world
    for world in (
        World("1", "1_generate_prompts_and_answers", _make_1, _arguments_1),
        World("2", "2_generate_features", _make_2, _arguments_2),
        World("3", "3_extract_rules", _make_3, _arguments_3),
        World("4", "4_spectral_sample_datapoints", _make_4, _arguments_4),
        World("5", "5_discover_circuits", _make_5, _arguments_5),
        World("6", "6_analyze_bag_of_rules", _make_6, _arguments_6),
        World("7", "7_refine_neuron_anchored_rules", _make_7, _arguments_7),
        World("8", "8_compare_experiments", _make_8, _arguments_8, has_record=False),
        World("9", "9_compare_models", _make_9, _arguments_9, has_record=False),
        World("10", "10_compute_threshold_sweep_stats", _make_10, _arguments_10, has_record=False),
        World("11", "11_summarize_sensitivity_analysis", _make_11, _arguments_11, has_record=False),
        World("tables", "make_paper_tables", _make_8, _arguments_tables, has_record=False),
        World("export", "clean_results_for_export", _make_8, _arguments_export, has_record=False, exports=True),
    )
}
