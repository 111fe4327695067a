"""A folder with everything that stages 4 and 5 read: a tiny model on disk, a feature table, rules."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from lib.artifacts import write_csv, write_json
from lib.cli import rng
from tests.models import tiny_model

RULES = ("is_sum > 0.5", "second > 4.5 & is_sum <= 0.5", "first > 99")


def make_world(folder: Path, *, n_rows: int = 120, rules: tuple[str, ...] = RULES) -> Path:
    """Writes `model/`, `features/` and `rules/` below the folder. Answers are random digits, labels a coin's."""
    lm = tiny_model("llama")
    lm.model.save_pretrained(folder / "model")
    lm.tokenizer.save_pretrained(folder / "model")
    write_table(folder, n_rows)
    write_rules(folder, rules)
    return folder


def write_table(folder: Path, n_rows: int) -> None:
    """`features/scores.csv` with every fifth row held out, and `features/features.json`."""
    stream = rng(0, "small world")
    rows = []
    for number in range(n_rows):
        first, second, is_sum = stream.integers(0, 30), stream.integers(0, 10), stream.integers(0, 2)
        rows.append(
            {
                "prompt": f"{first}{'+' if is_sum else '-'}{second}=",
                "raw_output": "".join(map(str, stream.integers(0, 10, stream.integers(0, 4)))),
                "is_correct": bool(stream.integers(0, 2)),
                "first": float(first),
                "second": float(second),
                "is_sum": float(is_sum),
                "is_test": number % 5 == 4,
            }
        )
    write_csv(folder / "features" / "scores.csv", pd.DataFrame(rows))
    write_json(folder / "features" / "features.json", [{"label": name} for name in ("first", "second", "is_sum")])


def write_rules(folder: Path, rules: tuple[str, ...]) -> None:
    """`rules/optimal_rule_set_is_correct.csv`."""
    write_csv(folder / "rules" / "optimal_rule_set_is_correct.csv", pd.DataFrame({"rule_expression": rules}))


def stage_4_arguments(folder: Path, *, subset: str = "all", output: str = "plan.json") -> list[str]:
    """A small run of stage 4."""
    return [
        *("--features_scores_dir", str(folder / "features"), "--rules_dir", str(folder / "rules")),
        *("--ai_model", str(folder / "model"), "--spectral_cache_dir", str(folder / "cache")),
        *("--rep_pooling", "last", "--spectral_dim", "8", "--use_global_clusters", "--global_n_clusters", "6"),
        *("--min_points_per_ablation", "16", "--max_points_per_ablation", "16", "--baseline_subset", subset),
        *("--output_path", str(folder / output), "--quiet"),
    ]


def stage_5_arguments(folder: Path) -> list[str]:
    """A small run of stage 5 on the plan."""
    return [
        *("--features_scores_dir", str(folder / "features"), "--rules_dir", str(folder / "rules")),
        *("--ai_model", str(folder / "model"), "--cache_dir", str(folder / "cache")),
        *("--output_data_dir", str(folder / "disc"), "--sampling_strategy", "plan"),
        *("--sampling_plan_path", str(folder / "plan.json"), "--circuit_level", "neuron", "--circuit_size", "20"),
        *("--mlp_neurons_only", "--decode_only", "--points_to_use_for_mean_ablation", "16", "--quiet"),
        *("--spectral_cache_dir", str(folder / "cache")),
    ]
