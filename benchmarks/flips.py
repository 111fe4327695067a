"""Stage 7 on the packaged model: flips against the naive hooked loop, rule fitting, and what the rules are worth.

Arithmetic with operands up to 17 (1,261 prompts), 120 MLP neurons: in each layer the two coordinates with the largest
mean write, the rest random. The stage runs end to end; then a random 5 % of the prompts is answered again by the naive
loop under every neuron. Pure noise and planted rules (5 % label noise, 40 features) say what a score means.
Prints a table and one line of key=value pairs.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402 (threads have to be limited first)
import torch  # noqa: E402

from benchmarks.ablation_engine import NaiveLoop  # noqa: E402
from lib.cli import Report, build_parser  # noqa: E402
from lib.flip_answer_log import AnswerLog  # noqa: E402
from lib.flip_fit_pool import fit_all  # noqa: E402
from lib.flip_measuring import LoadedEngine  # noqa: E402
from lib.flip_metrics import QualityCut  # noqa: E402
from lib.flip_rule_tables import RuleRun, collect_rules  # noqa: E402
from lib.flip_rules import FitProblem, FitSettings  # noqa: E402
from lib.neurons import Neuron, parse_neuron  # noqa: E402
from lib.rule_metrics import rule_scores  # noqa: E402
from lib.stages.flip_anchoring import ANSWERS_FILE, FlipAnchoring  # noqa: E402
from lib.stages.flip_options import add_flip_arguments  # noqa: E402
from tests.scripts import run_script  # noqa: E402

N_SHARE = 0.05
PLANTS = {
    "conjunction": lambda x: (x[:, 2] > 10) & (x[:, 7] <= 0.5),
    "disjunction": lambda x: ((x[:, 4] > 14) & (x[:, 9] > 0.3)) | (x[:, 6] <= 2),
    "interval": lambda x: (x[:, 0] > 4) & (x[:, 0] <= 11),
}


class TimedEngine:
    """An engine that counts evaluations and their CPU seconds: other programs on the machine do not distort them."""

    def __init__(self, engine: Any) -> None:
        self.engine, self.baseline_answers = engine, engine.baseline_answers
        self.n_evaluations, self.seconds = 0, 0.0

    def answers(self, groups: Sequence[Sequence[Neuron]], datapoints: Sequence[int]) -> Any:
        """As the engine's."""
        started = time.process_time()
        result = self.engine.answers(groups, datapoints)
        self.seconds += time.process_time() - started
        self.n_evaluations += len(groups) * len(datapoints)
        return result


def prepare(work: Path, limit: int | None) -> dict[str, Path]:
    """Stages 1 and 2 of the arithmetic task in a folder; those already done are kept."""
    answers, features = work / "llm_io_data.pkl", work / "feature_report"
    size = [
        "--max_operand",
        "17",
        "--few_shot",
        "2",
        "--max_new_tokens",
        "3",
        *(["--limit", str(limit)] if limit else []),
    ]
    shared = ["--task_module", "lib.tasks.arithmetic_task", "--prompts_answers_pkl_file", str(answers), "--quiet"]
    for name, flags in (
        ("1_generate_prompts_and_answers", size),
        (
            "2_generate_features",
            ["--features_scores_dir", str(features), "--cache_dir", str(work), "--no_llm_feature_generation"],
        ),
    ):
        if run_script(name, [*shared, *flags]):
            raise SystemExit(f"{name} failed")
    return {"features": features, "agonists": work / "agonists", "rules": work / "neuron_flip_rules"}


def write_candidates(stage: FlipAnchoring, n_neurons: int, folder: Path) -> None:
    """Buckets of stage 6 that name the neurons."""
    from lib.interventions import Intervention, build_table

    lm = stage.model.language_model
    table = build_table(lm, Intervention.MEAN, stage.scores.prompts[:64], max_new_tokens=3)
    labels = [f"m{layer}" for layer in range(lm.n_layers)]
    table.prepare(labels)
    zero = torch.zeros(1, 1, dtype=torch.long)
    largest = {label: table.values(label, zero, zero[0])[0, 0].abs().topk(2).indices.tolist() for label in labels}
    neurons = [Neuron(label, index) for label in reversed(labels) for index in largest[label]][:n_neurons]
    generator = np.random.default_rng(0)
    while len(neurons) < n_neurons:
        neuron = Neuron(labels[len(neurons) % lm.n_layers], int(generator.integers(lm.d_model)))
        if neuron not in neurons:
            neurons.append(neuron)
    entries = {str(neuron): {"last_record": {"baseline_subset": "all", "max_effect": 1.0}} for neuron in neurons}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "neuron_buckets.json").write_text(json.dumps({"non_catastrophic_agonists": entries}))


def stage_arguments(paths: dict[str, Path], jobs: int) -> Namespace:
    """Flags of stage 7."""
    argv = [
        "--circuit_agonists_path",
        str(paths["agonists"]),
        "--features_scores_dir",
        str(paths["features"]),
        "--rules_dir",
        str(paths["rules"]),
        "--stats_dirname",
        "benchmark",
        "--decode_only",
        "--extract_rules",
        "--summarize_rule_metrics",
        "--jobs",
        str(jobs),
        "--joint_ablation",
        "--batch_size",
        "256",
    ]
    return build_parser(add_flip_arguments, None).parse_args(argv)


def against_naive(engine: TimedEngine, answers: AnswerLog, prompts: Sequence[str], share: float) -> dict[str, Any]:
    """Answer a random share of the prompts under every neuron by the naive loop; compare texts and speed."""
    rows = np.sort(np.random.default_rng(1).choice(len(prompts), max(32, int(share * len(prompts))), replace=False))
    naive = NaiveLoop(engine.engine.lm, [prompts[row] for row in rows], engine.engine.table)
    groups = [[parse_neuron(key)] for key in answers.runs]
    started = time.process_time()
    expected = [naive.answers(group) for group in groups]
    naive_rate = len(groups) * len(rows) / (time.process_time() - started)
    n_unlike = 0
    for group, texts in zip(groups, expected, strict=True):
        run = answers.runs[str(group[0])]
        changed = dict(zip(run.rows.tolist(), run.answers, strict=True))
        n_unlike += sum(
            changed.get(int(row), answers.baseline[row]) != text for row, text in zip(rows, texts, strict=True)
        )
    late = [[neuron] for group in groups for neuron in group if neuron.layer >= 0.8 * naive.lm.n_layers]
    started = time.process_time()
    engine.engine.answers(late, range(len(prompts)))
    late_rate = len(late) * len(prompts) / (time.process_time() - started)
    return {
        "naive_rate": naive_rate,
        "engine_rate": engine.n_evaluations / engine.seconds,
        "late_rate": late_rate,
        "n_compared": len(groups) * len(rows),
        "n_unlike": n_unlike,
    }


def problem(n_rows: int, seed: int) -> FitProblem:
    """Random features, half of them whole numbers, a quarter of the rows held out."""
    random = np.random.default_rng(seed)
    features = np.where(np.arange(40) % 2, random.random((n_rows, 40)), random.integers(0, 20, (n_rows, 40)))
    is_test = random.random(n_rows) < 0.25
    return FitProblem(features, tuple(f"f{i}" for i in range(40)), random.random(n_rows) < 0.5, ~is_test, is_test)


def fit(folder: Path, some: FitProblem, flips: np.ndarray, jobs: int) -> Any:
    """Held-out rows of the rules fitted to `any` flips, [neuron, row]."""
    neurons = [Neuron("m0", number) for number in range(len(flips))]
    fit_all(
        some,
        neurons,
        flips,
        np.ones_like(flips),
        FitSettings(targets=("any",), emit_all_fit=False),
        folder / "p",
        jobs=jobs,
        force=True,
        progress=iter,
    )
    rules = collect_rules(RuleRun(folder, "p", tuple(neurons)), QualityCut())
    return rules[rules["score_scope"] == "test"]


def main() -> None:
    """Run everything."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer prompts, neurons and targets: under two minutes")
    parser.add_argument(
        "--work_dir", type=Path, default=None, help="keep files here; finished parts are not timed again"
    )
    parser.add_argument("--jobs", type=int, default=2, help="processes that fit rules")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        measure(args.work_dir or Path(scratch), args)


def measure(work: Path, args: argparse.Namespace) -> None:
    """The whole benchmark in a folder."""
    n_neurons, limit, n_targets, n_noise, n_seeds = (16, 240, 12, 12, 1) if args.quick else (120, None, 60, 200, 10)
    paths = prepare(work, limit)
    made: list[TimedEngine] = []
    stage = FlipAnchoring(stage_arguments(paths, args.jobs), Report(quiet=True))

    def make(prompts: Sequence[str], references: Sequence[str]) -> LoadedEngine:
        loaded = stage.model.engine(prompts, references)
        made.append(TimedEngine(loaded.engine))
        return LoadedEngine(made[-1], loaded.d_model)

    write_candidates(stage, n_neurons, paths["agonists"])
    timed = FlipAnchoring(stage.args, Report(quiet=True), make)
    started = time.perf_counter()
    timed.run()
    wall = time.perf_counter() - started
    answers = AnswerLog.read(timed.stats_dir / ANSWERS_FILE)
    results = against_naive(made[0], answers, stage.scores.prompts, 0.2 if args.quick else N_SHARE)
    results |= {"n_prompts": answers.n_rows, "n_neurons": n_neurons, "wall": wall, "n_targets": n_targets}
    results["seconds_per_target"] = fitting_seconds(timed, work, n_targets, args.jobs)
    some = problem(600 if args.quick else 1261, 1)
    chance = np.random.default_rng(2).random((n_noise, len(some.baseline))) < 0.15
    results["noise"] = fit(work / "noise", some, chance, args.jobs)
    results["planted"] = {name: planted_shortfall(work / name, name, n_seeds, args.jobs) for name in PLANTS}
    tell(results)


def tell(results: dict[str, Any]) -> None:
    """Print the table and the line."""
    naive, noise = results["naive_rate"], results["noise"]
    ratio, late_ratio = results["engine_rate"] / naive, results["late_rate"] / naive
    n_badges, n_called = int(noise["badge"].sum()), int((noise["q_value"] <= 0.05).sum())
    rows = [
        ("prompts x neurons", f"{results['n_prompts']} x {results['n_neurons']} (and controls)"),
        ("stage 7, seconds", f"{results['wall']:.1f}"),
        ("naive hooked loop, evaluations per CPU second", f"{naive:.0f}"),
        ("engine, evaluations per CPU second", f"{results['engine_rate']:.0f} ({ratio:.1f} x)"),
        ("engine, last fifth of the layers", f"{results['late_rate']:.0f} ({late_ratio:.1f} x)"),
        ("answers compared, unlike", f"{results['n_compared']}, {results['n_unlike']}"),
        ("targets fitted, seconds each", f"{results['n_targets']}, {results['seconds_per_target']:.2f}"),
        (f"{len(noise)} noise targets: badges, q <= 0.05", f"{n_badges}, {n_called}"),
    ]
    for name, values in results["planted"].items():
        label = f"planted {name}: TEST MCC below its own"
        rows.append((label, f"mean {np.mean(values):.3f}, largest {max(values):.3f}"))
    print("\n".join(f"{label:52} {value}" for label, value in rows))
    shortfall = np.mean([value for values in results["planted"].values() for value in values])
    print(
        f"ratio={ratio:.2f} equal={results['n_unlike'] == 0} seconds_per_target={results['seconds_per_target']:.2f} "
        f"late_ratio={late_ratio:.1f} noise_badges={n_badges} noise_share_q05={n_called / len(noise):.3f} "
        f"planted_shortfall={shortfall:.3f}"
    )


def fitting_seconds(stage: FlipAnchoring, work: Path, n_targets: int, jobs: int) -> float:
    """Wall seconds per target to choose and score rules (TRAIN and ALL-FIT) on the task's own features.

    The flips follow two features of the table with 5 % noise, as those of a neuron with a rule would.
    """
    scores, random = stage.scores, np.random.default_rng(3)
    features = scores.features()
    names, is_test = tuple(scores.feature_names), scores.is_test
    some = FitProblem(features, names, scores.target(), ~is_test, is_test)
    flips = []
    while len(flips) < n_targets:
        first, second = features[:, random.choice(features.shape[1], 2, replace=False)].T
        planted = (first > np.median(first)) | (second > np.quantile(second, 0.9))
        if 0.05 < planted.mean() < 0.6:
            flips.append(planted ^ (random.random(len(planted)) < 0.05))
    neurons = [Neuron("m0", number) for number in range(n_targets)]
    started = time.perf_counter()
    fit_all(
        some,
        neurons,
        np.array(flips),
        np.ones((n_targets, len(features)), dtype=bool),
        FitSettings(targets=("any",)),
        work / "fits",
        jobs=jobs,
        force=True,
        progress=iter,
    )
    return (time.perf_counter() - started) / n_targets


def planted_shortfall(folder: Path, name: str, n_seeds: int, jobs: int) -> list[float]:
    """Planted rule's own TEST MCC minus that of the rule found, per seed."""
    missing = []
    for seed in range(n_seeds):
        some = problem(2000, seed)
        planted = PLANTS[name](some.features)
        flips = planted ^ (np.random.default_rng(seed).random(len(planted)) < 0.05)
        own = float(rule_scores(planted[some.is_test], flips[some.is_test]).mcc)
        missing.append(own - float(fit(folder / str(seed), some, flips[None], jobs)["MCC"].item()))
    return missing


if __name__ == "__main__":
    main()
