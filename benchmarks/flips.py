"""Stage 7 on the packaged model: flips against the naive hooked loop, rule fitting, and what the rules are worth.

Arithmetic with operands up to 17 (1,261 prompts), 120 MLP neurons: in each layer the two coordinates with the largest
mean write, the rest random. The stage runs end to end; then a random 5 % of the prompts is answered again by the naive
loop under every neuron. Pure noise and planted rules (5 % label noise, 40 features) say what a score means.
Prints a table and one line of key=value pairs. With `--work_dir` every part is kept when it is done, so that the
benchmark can be interrupted, and `--parts` measures some parts only.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402 (threads have to be limited first)
import torch  # noqa: E402

from benchmarks.ablation_engine import NaiveLoop  # noqa: E402
from lib.artifacts import write_json  # noqa: E402
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


@dataclass(frozen=True)
class Size:
    """How much is measured. share: of the prompts, answered by the naive loop too."""

    n_neurons: int
    limit: int | None
    share: float
    n_targets: int
    n_noise: int
    n_noise_rows: int
    n_seeds: int


FULL = Size(n_neurons=120, limit=None, share=0.05, n_targets=60, n_noise=200, n_noise_rows=1261, n_seeds=10)
QUICK = Size(n_neurons=16, limit=240, share=0.2, n_targets=12, n_noise=12, n_noise_rows=600, n_seeds=1)
PLANTS = {
    "conjunction": lambda x: (x[:, 2] > 10) & (x[:, 7] <= 0.5),
    "disjunction": lambda x: ((x[:, 4] > 14) & (x[:, 9] > 0.3)) | (x[:, 6] <= 2),
    "interval": lambda x: (x[:, 0] > 4) & (x[:, 0] <= 11),
}


class TimedEngine:
    """An engine that counts evaluations and their CPU seconds: other programs on the machine do not distort them.

    The counts are kept in a file, beside the answers that an interrupted run keeps.
    """

    def __init__(self, engine: Any, path: Path) -> None:
        self.engine, self.baseline_answers, self.path = engine, engine.baseline_answers, path

    def prepare(self, groups: Sequence[Sequence[Neuron]]) -> None:
        """As the engine's."""
        started = time.process_time()
        self.engine.prepare(groups)
        self._add(0, time.process_time() - started)

    def answers(
        self,
        groups: Sequence[Sequence[Neuron]],
        datapoints: Sequence[int],
        progress: Callable[[int], object] | None = None,
    ) -> Any:
        """As the engine's."""
        started = time.process_time()
        result = self.engine.answers(groups, datapoints, progress)
        self._add(len(groups) * len(datapoints), time.process_time() - started)
        return result

    def _add(self, n_evaluations: int, seconds: float) -> None:
        known = json.loads(self.path.read_text()) if self.path.is_file() else {"n_evaluations": 0, "seconds": 0.0}
        known = {
            "n_evaluations": known["n_evaluations"] + n_evaluations,
            "seconds": known["seconds"] + seconds,
        }
        write_json(self.path, known)


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


def measure_flips(work: Path, size: Size, args: argparse.Namespace) -> dict[str, Any]:
    """The stage end to end; engine evaluations per CPU second, controls and joint groups included."""
    paths = prepare(work, size.limit)
    stage = FlipAnchoring(stage_arguments(paths, args.jobs), Report(quiet=True))
    timing = work / "engine_timing.json"

    def make(prompts: Sequence[str], references: Sequence[str]) -> LoadedEngine:
        loaded = stage.model.engine(prompts, references)
        return LoadedEngine(TimedEngine(loaded.engine, timing), loaded.d_model)

    if not (paths["agonists"] / "neuron_buckets.json").is_file():
        write_candidates(stage, size.n_neurons, paths["agonists"])
    timed = FlipAnchoring(stage.args, Report(quiet=True), make)
    started = time.perf_counter()
    timed.run()
    counted = json.loads(timing.read_text())
    return {
        "n_prompts": AnswerLog.read(timed.stats_dir / ANSWERS_FILE).n_rows,
        "n_neurons": size.n_neurons,
        "wall": time.perf_counter() - started,
        "engine_rate": counted["n_evaluations"] / counted["seconds"],
    }


def against_naive(work: Path, size: Size, args: argparse.Namespace) -> dict[str, Any]:
    """Answer a random share of the prompts under every neuron by the naive loop; compare texts and speed.

    The naive loop keeps the prompts' keys and values between neurons; `plain_rate` is that of hooked generation without
    this, on some of the neurons.
    """
    stage = FlipAnchoring(stage_arguments(prepare(work, size.limit), args.jobs), Report(quiet=True))
    answers, prompts = AnswerLog.read(stage.stats_dir / ANSWERS_FILE), stage.scores.prompts
    engine = stage.model.engine(prompts, stage._measurer()._references).engine
    rows = np.sort(
        np.random.default_rng(1).choice(len(prompts), max(32, int(size.share * len(prompts))), replace=False)
    )
    naive = NaiveLoop(engine.lm, [prompts[row] for row in rows], engine.table)
    groups = [[parse_neuron(key)] for key in answers.runs]
    engine.prepare(groups)
    started = time.process_time()
    expected = [naive.answers(group) for group in groups]
    naive_rate = len(groups) * len(rows) / (time.process_time() - started)
    some = groups[:: len(groups) // 8]
    started = time.process_time()
    for group in some:
        NaiveLoop(engine.lm, [prompts[row] for row in rows], engine.table).answers(group)
    plain_rate = len(some) * len(rows) / (time.process_time() - started)
    n_unlike = 0
    for group, texts in zip(groups, expected, strict=True):
        run = answers.runs[str(group[0])]
        changed = dict(zip(run.rows.tolist(), run.answers, strict=True))
        n_unlike += sum(
            changed.get(int(row), answers.baseline[row]) != text for row, text in zip(rows, texts, strict=True)
        )
    late = [[neuron] for group in groups for neuron in group if neuron.layer >= 0.8 * naive.lm.n_layers]
    started = time.process_time()
    engine.answers(late, range(len(prompts)))
    late_rate = len(late) * len(prompts) / (time.process_time() - started)
    return {
        "naive_rate": naive_rate,
        "plain_rate": plain_rate,
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


def measure_fits(work: Path, size: Size, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds per target of choosing and scoring rules on the task's own features."""
    stage = FlipAnchoring(stage_arguments(prepare(work, size.limit), args.jobs), Report(quiet=True))
    seconds = fitting_seconds(stage, work, size.n_targets, args.jobs)
    return {"n_targets": size.n_targets, "seconds_per_target": seconds}


def measure_noise(work: Path, size: Size, args: argparse.Namespace) -> dict[str, Any]:
    """What targets get whose flips are pure chance."""
    some = problem(size.n_noise_rows, 1)
    chance = np.random.default_rng(2).random((size.n_noise, size.n_noise_rows)) < 0.15
    held_out = fit(work / "noise", some, chance, args.jobs)
    return {
        "n_noise": len(held_out),
        "n_badges": int(held_out["badge"].sum()),
        "n_high_quality": int(held_out["high_quality"].sum()),
        "n_called": int((held_out["q_value"] <= 0.05).sum()),
        "n_with_rule": int((held_out["rule_len_atoms"] > 0).sum()),
        "largest_mcc": float(held_out["MCC"].max()),
    }


def measure_planted(work: Path, size: Size, args: argparse.Namespace) -> dict[str, Any]:
    """TEST MCC that planted rules lose to label noise in being found."""
    return {"planted": {name: planted_shortfall(work / name, name, size.n_seeds, args.jobs) for name in PLANTS}}


PARTS = {
    "flips": measure_flips,
    "naive": against_naive,
    "fits": measure_fits,
    "noise": measure_noise,
    "planted": measure_planted,
}


def main() -> None:
    """Run what is not yet measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer prompts, neurons and targets: under two minutes")
    parser.add_argument("--work_dir", type=Path, default=None, help="keep files here; finished parts are kept")
    parser.add_argument("--parts", nargs="*", choices=list(PARTS), default=list(PARTS), help="measure these only")
    parser.add_argument("--jobs", type=int, default=2, help="processes that fit rules")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        work = args.work_dir or Path(scratch)
        measured = {name: measure_part(name, work, args) for name in args.parts}
        if set(measured) == set(PARTS):
            tell({key: value for part in measured.values() for key, value in part.items()})
        else:
            print(json.dumps(measured, indent=1))


def measure_part(name: str, work: Path, args: argparse.Namespace) -> dict[str, Any]:
    """The figures of one part, from its file if they are there."""
    path = work / f"measured_{name}.json"
    if not path.is_file():
        write_json(path, PARTS[name](work, QUICK if args.quick else FULL, args))
    return json.loads(path.read_text())


def tell(results: dict[str, Any]) -> None:
    """Print the table and the line."""
    naive = results["naive_rate"]
    ratio, late_ratio = results["engine_rate"] / naive, results["late_rate"] / naive
    n_noise, n_called = results["n_noise"], results["n_called"]
    rows = [
        ("prompts x neurons", f"{results['n_prompts']} x {results['n_neurons']} (and controls)"),
        ("stage 7, seconds", f"{results['wall']:.1f}"),
        ("hooked generation, evaluations per CPU second", f"{results['plain_rate']:.0f}"),
        ("hooked loop with kept prompts, evaluations per CPU second", f"{naive:.0f}"),
        ("engine, evaluations per CPU second", f"{results['engine_rate']:.0f} ({ratio:.1f} x)"),
        ("engine, last fifth of the layers", f"{results['late_rate']:.0f} ({late_ratio:.1f} x)"),
        ("answers compared, unlike", f"{results['n_compared']}, {results['n_unlike']}"),
        ("targets fitted, seconds each", f"{results['n_targets']}, {results['seconds_per_target']:.2f}"),
        (
            f"{n_noise} noise targets: with a rule, largest TEST MCC",
            f"{results['n_with_rule']}, {results['largest_mcc']:.2f}",
        ),
        (f"{n_noise} noise targets: badges, q <= 0.05", f"{results['n_badges']}, {n_called}"),
    ]
    for name, values in results["planted"].items():
        label = f"planted {name}: TEST MCC below its own"
        rows.append((label, f"mean {np.mean(values):.3f}, largest {max(values):.3f}"))
    print("\n".join(f"{label:58} {value}" for label, value in rows))
    shortfall = np.mean([value for values in results["planted"].values() for value in values])
    print(
        f"ratio={ratio:.2f} plain_ratio={results['engine_rate'] / results['plain_rate']:.1f} "
        f"equal={results['n_unlike'] == 0} seconds_per_target={results['seconds_per_target']:.2f} "
        f"late_ratio={late_ratio:.1f} noise_badges={results['n_badges']} noise_share_q05={n_called / n_noise:.3f} "
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
