"""The whole pipeline, from prompts to neuron-anchored rules: `bash _run_pipeline.sh [<task> <model>] [options]`.

Without a task and a model it runs the built-in example: arithmetic on the packaged SmolLM2-135M-Instruct. Each stage
is a command of its own and returns at once when its finished output still answers the same question, so the same
command continues an interrupted run. A stage that fails stops the pipeline with its exit code.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

from lib.chat_backends import resolve_chat_model
from lib.cli import DEFAULT_MODEL, Report, UserError, positive_int, share, size_or_share, stage_main
from lib.pipeline_plan import METHOD, PipelinePlan, StageCall, run_choices, task_module, task_settings
from lib.run_names import DEFAULT_CIRCUIT_SIZE, DEFAULT_MIN_FLIP_RATE, RunPaths
from lib.task_spec import add_task_settings

REPOSITORY = Path(__file__).resolve().parent.parent
INTERVENTIONS = ("zero", "mean", "mean-positional", "mean-donor", "mean-donor-positional", "resample")

# What `bash _run_pipeline.sh` without a task stands for. Small numbers and two worked examples in the prompt, so that a
# 135M model answers about a third right: both regimes (right and wrong answers) have something to flip.
# Replacing activations by their plain mean moves more than the mean at the same position, which hardly differs between
# prompts this alike; the 2,000 candidates of strongest attribution let it end in minutes.
BUILT_IN_EXAMPLE = ("arithmetic", DEFAULT_MODEL, "--max_operand", "17", "--few_shot", "2", "--max_new_tokens", "3",
                    "--no_llm", "--spectral_circuit_discovery", "--spectral_anchoring_plan", "--fast_anchoring",
                    "--decode_only", "--mlp_neurons_only", "--max_number_of_circuits_to_analyze", "1",
                    "--circuit_size", "2000", "--eval_intervention", "mean")


def add_arguments(parser: argparse.ArgumentParser, experiment: str) -> None:
    """All options, those of the task included; the defaults are those of the experiments, not of the example."""
    parser.prog = "bash _run_pipeline.sh"
    parser.add_argument("experiment", help=f"task: {', '.join(_tasks())}")
    parser.add_argument("model", help="hub id (with @step<N> for a revision), local folder, .gguf file, or "
                        f"{DEFAULT_MODEL}, which is packaged")
    _add_search_arguments(parser.add_argument_group("search"))
    _add_data_arguments(parser.add_argument_group("data and features"))
    group = parser.add_argument_group("machine")
    group.add_argument("--batch_size", type=positive_int, default=256, help="prompts per forward pass")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:<N>")
    group.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="weights' type")
    group.add_argument("--ai_model_cache_dir", default=None, help="folder for downloaded or converted weights")
    group.add_argument("--data_root", default=None, help="folder of results (default: data in the repository)")
    group.add_argument("--cache_root", default=None, help="folder of caches (default: cache in the repository)")
    group.add_argument("--dry_run", action="store_true", help="print the commands and stop")
    add_task_settings(parser, ["--task_module", task_module(experiment)])


def _add_search_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--spectral_splits", action="store_true",
                       help="study clusters of prompts instead of rules; stages 3 and 4 are not needed")
    for name, default in (("circuit_discovery", "random"), ("anchoring_plan", "random")):
        for choice in ("spectral", "random"):
            group.add_argument(f"--{choice}_{name}", dest=name, action="store_const", const=choice, default=default,
                               help=f"datapoints for {name.replace('_', ' ')}: {choice}")
    for choice, meaning in (("fast", "group testing"), ("slow", "one test per neuron")):
        group.add_argument(f"--{choice}_anchoring", dest="anchoring", action="store_const", const=choice,
                           default="fast", help=f"agonists by {meaning}; the last one given wins")
    group.add_argument("--decode_only", action="store_true", help="ablate at answer-producing positions only")
    group.add_argument("--mlp_neurons_only", action="store_true", help="leave attention out")
    group.add_argument("--include_zero_scores", action="store_true", help="candidates may have attribution zero")
    group.add_argument("--incorrect_rules", action="store_true", help="control: rules of shuffled labels, kept apart")
    group.add_argument("--circuit_level", default="neuron", choices=["neuron", "node", "edge"],
                       help="what a unit of attribution is")
    group.add_argument("--circuit_size", type=size_or_share, default=DEFAULT_CIRCUIT_SIZE,
                       help="candidates kept by attribution: a number, or a share of all (0.05)")
    group.add_argument("--max_number_of_circuits_to_analyze", type=int, default=-1,
                       help="rules taken to stages 5 and 6, in file order; -1: all")
    group.add_argument("--max_number_of_circuits_to_search", type=int, default=-1,
                       help="of these, circuits taken to stage 6; -1: all. Unlike the limit above it leaves stage 5's "
                       "files as they are for other runs that share them")
    group.add_argument("--min_flip_rate", type=_rate, default=DEFAULT_MIN_FLIP_RATE,
                       help="smallest flip rate worth finding")
    group.add_argument("--eval_intervention", default="mean-positional", choices=INTERVENTIONS,
                       help="what replaces an ablated activation")


def _add_data_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--feature_model", default="gemma3:27b", help="chat model that proposes features: "
                       "<provider>:<model> with ollama, openai, groq or local, or an Ollama name")
    group.add_argument("--base_url", default="", help="server of the feature model, e.g. any OpenAI-compatible one")
    group.add_argument("--no_llm", action="store_true", help="only the task's own features")
    group.add_argument("--z_thresh", type=int, default=-1,
                       help="drop features whose robust z-score exceeds this; -1: keep them")
    group.add_argument("--min_rule_dataset_coverage", type=share,
                       default=os.environ.get("MIN_RULE_DATASET_COVERAGE", "0.005"),
                       help="smallest share of the rows that a reported rule covers")


def _rate(text: str) -> str:
    """argparse type: a number in (0, 1], kept as text because folder names repeat it."""
    if not 0 < float(text) <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not a rate between 0 and 1")
    return text


def run(args: argparse.Namespace, report: Report) -> int:
    """Run every stage; then the summary and the report."""
    from lib.pipeline_summary import print_summary

    paths = resolve(args)
    calls = PipelinePlan(args, paths).calls()
    if args.dry_run:
        for call in calls:
            report.line(shlex.join(_command(call)))
        return 0
    started = time.monotonic()
    for number, call in enumerate(calls, start=1):
        report.heading(f"{number}/{len(calls)} stage {call.stage}: {call.title}")
        code = _run_stage(_command(call))
        if code != 0:
            sys.stderr.write(f"pipeline stopped: stage {call.stage} ({call.title}) ended with exit code {code}\n"
                             f"the command was: {shlex.join(_command(call))}\n")
            return code
    report.heading(f"done in {time.monotonic() - started:.0f} s")
    paths = replace(paths, data_root=REPOSITORY / paths.data_root)
    print_summary(paths, report)
    _write_report(paths, args.min_rule_dataset_coverage, report)
    return 0


def _write_report(paths: RunPaths, min_coverage: float, report: Report) -> None:
    """The run as one page to look at; its place is the last thing that is printed."""
    from lib.reporting.page.build import open_model, write_page
    from lib.reporting.page.inputs import PageOptions

    options = PageOptions(min_coverage=min_coverage)
    try:
        page = str(write_page(open_model(paths.model_dir), paths.choices.run_name, None, options).path)
    except UserError as error:
        # As with the parts of the summary: the results are there, only showing them failed.
        page = f"not available: {error}"
    report.line(f"\nReport to look at: {page}")


def resolve(args: argparse.Namespace) -> RunPaths:
    """Find the run's folders; local paths on the command line are those of the caller's working folder.

    Raises:
        UserError: contradicting choices, or settings that the task refuses.
    """
    choices = run_choices(args)
    if choices.spectral_splits and (choices.spectral_discovery or choices.spectral_anchoring):
        raise UserError("--spectral_splits uses no rules, so no spectral plan of rules: leave out "
                        "--spectral_circuit_discovery and --spectral_anchoring_plan")
    if choices.spectral_splits and choices.incorrect_rules:
        raise UserError("--spectral_splits uses no rules, so there are none to shuffle: leave out --incorrect_rules")
    if not args.no_llm:
        resolve_chat_model(args.feature_model, args.base_url)
    for name, value in task_settings(args).items():
        if isinstance(value, str) and Path(value).is_file():
            setattr(args, name, str(_within_repository(value)))
    if Path(args.model).expanduser().exists():
        args.model = str(_within_repository(args.model))
    if args.ai_model_cache_dir:
        args.ai_model_cache_dir = str(_within_repository(args.ai_model_cache_dir))
    return RunPaths(_within_repository(args.data_root) if args.data_root else Path("data"),
                    _within_repository(args.cache_root) if args.cache_root else Path("cache"),
                    args.experiment, args.model, METHOD, choices)


def _within_repository(text: str) -> Path:
    """The path as the stages, which run in the repository, should see it: relative when inside it."""
    path = Path(text).expanduser().resolve()
    return path.relative_to(REPOSITORY) if path.is_relative_to(REPOSITORY) else path


def _command(call: StageCall) -> list[str]:
    return [sys.executable, call.script, *call.arguments]


def _run_stage(command: list[str]) -> int:
    """Run one stage in the repository; its exit code, 128 + the signal's number if it was killed."""
    sys.stdout.flush()
    process = subprocess.Popen(command, cwd=REPOSITORY, preexec_fn=_end_with_parent,
                               env={"TOKENIZERS_PARALLELISM": "false", **os.environ})
    try:
        code = process.wait()
    except KeyboardInterrupt:
        # The terminal has sent the stage the same signal: let it end in its own way.
        process.wait()
        raise
    return code if code >= 0 else 128 - code


def _end_with_parent() -> None:
    """A stage whose pipeline was killed ends too (Linux): else it would hold its folder against the next run."""
    if sys.platform == "linux":
        import ctypes

        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


def _tasks() -> list[str]:
    return sorted(path.stem.removesuffix("_task") for path in (REPOSITORY / "lib/tasks").glob("*_task.py"))


def main(argv: list[str] | None = None) -> int:
    """Run the command line; without a task in front, the built-in example with the options given (which win)."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0].startswith("-"):
        argv = [*BUILT_IN_EXAMPLE, *argv]
    return stage_main(partial(add_arguments, experiment=argv[0]), run, description=__doc__)(argv)


if __name__ == "__main__":
    raise SystemExit(main())
