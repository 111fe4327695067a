"""10^6 rows through stages 2 to 4 and 8 to 10, and how the cost grows with rows, features, rules and neurons.

Synthetic data: problems of the arithmetic task with made-up answers, a tiny random model, a made-up tree of results
whose flip tables have as many rows. Each stage runs in a process of its own, whose CPU time and peak memory (imports
included) are read when it ends. `growth` is the exponent of the CPU time between the last two sizes: 1 is linear, 2
quadratic. Prints a table and one line of key=value pairs. `--quick` takes a sixteenth of the rows.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

for variable, value in (("OMP_NUM_THREADS", "1"), ("TOKENIZERS_PARALLELISM", "false"), ("HF_HUB_OFFLINE", "1")):
    os.environ.setdefault(variable, value)

import numpy as np  # noqa: E402 (threads have to be limited first)
import pandas as pd  # noqa: E402

from lib.artifacts import StageRecord, write_csv, write_json, write_pickle  # noqa: E402
from lib.cli import rng  # noqa: E402
from tests.faults.forked import Child, Ending, command, preload  # noqa: E402
from tests.scripts import load_script  # noqa: E402

SCRIPTS = {
    "2": "2_generate_features", "3": "3_extract_rules", "4": "4_spectral_sample_datapoints",
    "8": "8_compare_experiments", "9": "9_compare_models", "10": "10_compute_threshold_sweep_stats",
}  # fmt: skip
QUIET_RULES = ("--npermutations", "1", "--stability_resamples", "1", "--inner_repeats", "1", "--inner_folds", "2",
               "--no_emit_all_fit_rules", "--quiet")  # fmt: skip
MODES = ("spectral_plan", "random_plan")


class Measured:
    """One table: a row for each stage and size."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.rows: list[dict[str, object]] = []

    def run(self, what: str, stage: str, size: int, arguments: list[object]) -> None:
        """Run a stage in a process of its own and note what it took."""
        function = command(SCRIPTS[stage], [str(argument) for argument in arguments], figures=False)
        ending = Child(function, self.root, self.root / "notes").ending()
        if ending.code != 0:
            raise RuntimeError(f"stage {stage} at {size} ended with {ending.code}: {ending.err[-2000:]}")
        self.note(what, f"stage {stage}", size, ending)

    def note(self, what: str, name: str, size: int, ending: Ending) -> None:
        """Add a row and print it."""
        earlier = [row for row in self.rows if (row["what"], row["name"]) == (what, name)]
        row = {"what": what, "name": name, "size": size, "cpu": ending.cpu, "peak": ending.peak_mb, "growth": None}
        if earlier:
            row["growth"] = math.log(ending.cpu / earlier[-1]["cpu"]) / math.log(size / earlier[-1]["size"])
        self.rows.append(row)
        growth = "" if row["growth"] is None else f"{row['growth']:.2f}"
        print(f"{what:10}{name:10}{size:>10,}{ending.cpu:>10.1f}{ending.peak_mb:>10.0f}{growth:>8}", flush=True)


# ---------------------------------------------------------------- rows


def make_answers(folder: Path, n_rows: int) -> None:
    """Stage 1's files: about `n_rows` problems; sums of small numbers are right, and a fifth of the rest."""
    from lib.tasks.arithmetic_task import TASK_SPEC, ArithmeticSettings

    task = TASK_SPEC.configured(ArithmeticSettings(max_operand=round(math.sqrt(n_rows / 4)) - 1))
    examples = task.examples(0)
    lucky = rng(0, "large").random(len(examples)) < 0.2
    answers = []
    for number, example in enumerate(examples):
        operator = example["operator_group"]
        a, b = map(int, example["prompt"].rstrip("=").split(operator))
        right = {"+": a + b, "-": a - b, "*": a * b}.get(operator, a // b if b else 0)
        answers.append(str(right if lucky[number] or (operator == "+" and a + b < 100) else right + 1))
    path = folder / "llm_io_data.pkl"
    write_pickle(path, task.cache_from_answers(examples, answers))
    settings = {"task_module": "lib.tasks.arithmetic_task", "task_settings": task.settings.identity()}
    record = StageRecord("1_generate_prompts_and_answers", settings, {}, folder / "llm_io_data.run_metadata.json")
    record.finish([path], summary={"task_settings": task.settings.to_json()})


def tiny_model(folder: Path) -> int:
    """A random model of three layers, on disk."""
    from tests.models import tiny_model as make

    make("llama").model.save_pretrained(folder)
    make("llama").tokenizer.save_pretrained(folder)
    return 0


def grow_rows(measured: Measured, sizes: list[int]) -> None:
    """Stages 2 to 4, each on what the one before made; then the reports."""
    model = measured.root / "model"
    Child(lambda: tiny_model(model), measured.root, measured.root / "notes").ending()
    for size in sizes:
        folder = measured.root / f"rows_{size}"
        folder.mkdir()
        made = Child(lambda folder=folder, size=size: make_answers(folder, size) or 0, folder, measured.root / "notes")
        if (ending := made.ending()).code != 0:
            raise RuntimeError(f"no answers: {ending.err[-2000:]}")
        table, rules = folder / "report", folder / "rules"
        measured.run("rows", "2", size, [
            "--prompts_answers_pkl_file", folder / "llm_io_data.pkl", "--features_scores_dir", table, "--no_llm",
            "--no_plots", "--drop_near_duplicate_features", "--drop_low_predictive_power_features", "--min_delta",
            "0.3", "--quiet"])  # fmt: skip
        measured.run("rows", "3", size, ["--features_scores_dir", table, "--rules_dir", rules, *QUIET_RULES])
        measured.run("rows", "4", size, plan_arguments(table, rules, model, folder))
        shutil.rmtree(folder)


def grow_flip_rows(measured: Measured, sizes: list[int]) -> None:
    """Stages 8 to 10 on flip tables of few neurons."""
    for size in sizes:
        reports(measured, "rows", size, n_rows=size, n_neurons=8)


def plan_arguments(table: Path, rules: Path, model: Path, folder: Path) -> list[object]:
    """The promised options of stage 4, on the tiny model."""
    return [
        "--features_scores_dir", table, "--rules_dir", rules, "--ai_model", model, "--spectral_cache_dir",
        folder / "cache", "--rep_pooling", "last", "--spectral_dim", "8", "--baseline_subset", "all",
        "--pair_by_similarity_len_matched", "--min_points_per_ablation", "128", "--max_points_per_ablation", "128",
        "--use_global_clusters", "--global_n_clusters", "32", "--batch_size", "1024", "--output_path",
        folder / "plan.json", "--quiet",
    ]  # fmt: skip


# ---------------------------------------------------------------- features, rules


def grow_features(measured: Measured, sizes: list[int], n_rows: int = 10_000) -> None:
    """Stage 3 on noise with a planted rule, more and more features."""
    for size in sizes:
        folder = measured.root / f"features_{size}"
        write_noise(folder, n_rows, size)
        measured.run("features", "3", size, ["--features_scores_dir", folder, "--rules_dir", folder / "rules",
                                             *QUIET_RULES])  # fmt: skip
        shutil.rmtree(folder)


def write_noise(folder: Path, n_rows: int, n_features: int) -> None:
    """A feature table of random numbers; the label follows the first two, with noise."""
    random = rng(0, "features", n_features)
    values = random.random((n_rows, n_features)).round(3)
    frame = pd.DataFrame(values, columns=[f"f{number}" for number in range(n_features)])
    operands = random.integers(0, 1000, (n_rows, 2))
    frame.insert(0, "prompt", [f"{a}+{b}=" for a, b in operands])
    frame["raw_output"] = "1"
    frame["is_correct"] = ((values[:, 0] > 0.6) & (values[:, 1] < 0.7)) ^ (random.random(n_rows) < 0.05)
    frame["is_test"] = np.arange(n_rows) % 5 == 0
    write_csv(folder / "scores.csv", frame)
    write_json(folder / "features.json", [{"label": f"f{number}"} for number in range(n_features)])


def grow_rules(measured: Measured, sizes: list[int], n_rows: int = 20_000) -> None:
    """Stage 4 for more and more rules over one table."""
    folder = measured.root / "many_rules"
    write_noise(folder, n_rows, 8)
    for size in sizes:
        cuts = (np.arange(size) + 1) / (size + 1)
        rules = [f"f{number % 8} > {cut:.4f}" for number, cut in enumerate(cuts)]
        write_csv(folder / "rules" / "optimal_rule_set_is_correct.csv", pd.DataFrame({"rule_expression": rules}))
        arguments = plan_arguments(folder, folder / "rules", measured.root / "model", folder)
        measured.run("rules", "4", size, [*arguments, "--force"])
    shutil.rmtree(folder)


# ---------------------------------------------------------------- reports


def reports(measured: Measured, what: str, size: int, *, n_rows: int, n_neurons: int) -> None:
    """Stages 8 to 10 on two run modes of two models with flip tables of this size."""
    from tests import published_tree

    root = measured.root / f"tree_{what}_{size}"
    published_tree.build(root, tasks=("arithmetic",), models=published_tree.MODELS[:2], modes=MODES, states={},
                         sensitivity=False, scores=False)  # fmt: skip
    flips = flip_table(n_rows, n_neurons)
    write_csv(root / "flips.csv", flips)
    for stats in sorted(root.rglob("stats/*/")):
        shutil.copy(root / "flips.csv", stats / "scores.csv")
        write_rule_rows(stats, n_neurons)
    out = root / "out"
    thresholds = ["--thr_min", "0.7", "--thr_max", "0.9", "--thr_step", "0.1", "--quiet"]
    measured.run(what, "8", size, ["--stats_path", root / "data", "--out_dir", out / "8", *thresholds])
    measured.run(what, "9", size, ["--task_dir", root / "data/arithmetic", "--out_dir", out / "9", "--quiet"])
    sweep = out / "8/aggregated_by_task/threshold_sweep_all_tasks_all_llms.csv"
    measured.run(what, "10", size, ["--csv", sweep, "--out_dir", out / "10", "--data_root", root / "data", "--n_boot",
                                    "500", "--score_scope", "test", "--quiet"])  # fmt: skip
    shutil.rmtree(root)


def flip_table(n_rows: int, n_neurons: int) -> pd.DataFrame:
    """`scores.csv` in the published form; every run gets the same."""
    random = rng(0, "flips", n_rows, n_neurons)
    is_correct = random.random(n_rows) < 0.5
    columns = {"prompt": [f"p{row}" for row in range(n_rows)], "is_correct": is_correct,
               "is_test": random.random(n_rows) < 0.2}  # fmt: skip
    for key in map(neuron_key, range(n_neurons)):
        hit = random.random(n_rows) < 0.1
        columns |= {f"flip_{key}": hit, f"flip_c2i_{key}": hit & is_correct, f"flip_i2c_{key}": hit & ~is_correct}
    return pd.DataFrame(columns)


def neuron_key(number: int) -> str:
    """Column name of the n-th neuron, layer by layer in turn."""
    return f"m{number % 4}_{number // 4}"


def write_rule_rows(stats: Path, n_neurons: int) -> None:
    """The rule tables of a run, with rows for as many neurons."""
    random = rng(0, "rules", stats.name, n_neurons)
    source = pd.read_csv(stats / "rule_combo_metrics_all_scopes.csv")
    source = source[source["neuron_key"] == source["neuron_key"].iloc[0]]
    rules = []
    for number in range(n_neurons):
        key = neuron_key(number)
        target = source["flip_target"].str.replace(r"m\d+_\d+$", key, regex=True)
        rules.append(source.assign(neuron_key=key, layer_key=key.split("_")[0], neuron_id=number // 4,
                                   MCC=random.uniform(0.5, 1, len(source)).round(4), flip_target=target))  # fmt: skip
    table = pd.concat(rules, ignore_index=True)
    write_csv(stats / "rule_combo_metrics_all_scopes.csv", table)
    for scope in ("test", "all_fit"):
        part = table[table["score_scope"] == scope]
        for name in (f"rule_combo_metrics_{scope}_all.csv", f"rule_combo_metrics_{scope}_best_per_neuron.csv"):
            write_csv(stats / name, part)
    write_csv(stats / "rule_combo_metrics_all.csv", table[table["score_scope"] == "test"])


def main(argv: list[str] | None = None) -> int:
    """Measure and print; exit code 1 if the memory limit is exceeded or a step grows like a square."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000, help="rows of the largest table")
    parser.add_argument("--limit_mb", type=float, default=6144, help="most memory of any stage")
    parts = ["rows", "flips", "features", "rules", "neurons"]
    parser.add_argument("--parts", nargs="*", default=parts, choices=parts, help="what grows")
    parser.add_argument("--quick", action="store_true", help="a sixteenth of the rows")
    args = parser.parse_args(argv)
    preload(["torch", "transformers.models.llama.modeling_llama", "xgboost", "matplotlib.figure", "tests.models"])
    for script in SCRIPTS.values():
        load_script(script)
    started = time.monotonic()
    root = Path(tempfile.mkdtemp(prefix="large_"))
    measured = Measured(root)
    n_rows = args.rows // 16 if args.quick else args.rows
    print(f"{'grows':10}{'step':10}{'size':>10}{'CPU s':>10}{'peak MB':>10}{'growth':>8}")
    try:
        if "rules" in args.parts and "rows" not in args.parts:
            Child(lambda: tiny_model(root / "model"), root, root / "notes").ending()
        if "rows" in args.parts:
            grow_rows(measured, [n_rows // 16, n_rows // 4, n_rows])
        if "flips" in args.parts:
            grow_flip_rows(measured, [n_rows // 16, n_rows // 4, n_rows])
        if "features" in args.parts:
            grow_features(measured, [25, 100, 400])
        if "rules" in args.parts:
            grow_rules(measured, [8, 32, 128])
        if "neurons" in args.parts:
            for size in (100, 400, 1600):
                reports(measured, "neurons", size, n_rows=2000, n_neurons=size)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    peak = max(row["peak"] for row in measured.rows)
    steepest = max(measured.rows[i]["growth"] for i in range(len(measured.rows)) if measured.rows[i]["growth"])
    total = sum(row["cpu"] for row in measured.rows)
    print(f"rows={n_rows} peak_mb={peak:.0f} steepest_growth={steepest:.2f} cpu_seconds={total:.0f} "
          f"seconds={time.monotonic() - started:.0f}")  # fmt: skip
    return 1 if peak > args.limit_mb or steepest > 1.7 else 0


if __name__ == "__main__":
    sys.exit(main())
