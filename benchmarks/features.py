"""Stage 2 at full size, and feature functions through the sandbox.

Prints a table and one line of key=value pairs. `seed_seconds` is everything from the cache to the written table:
359,401 arithmetic prompts, 86 seed features, split, filters and files (without figures). Beside each wall-clock figure
stands the processor's time, which other work on the machine changes less.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

QUICK_OPERAND, FULL_OPERAND = 29, 299


def cpu_seconds() -> float:
    """Processor time of this process and of its finished children."""
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(part.ru_utime + part.ru_stime for part in usage)


def seeds(max_operand: int, folder: str) -> dict[str, float]:
    """Seconds of the features alone and of all of stage 2, and peak memory in MB."""
    from lib.artifacts import write_pickle
    from lib.cli import Report
    from lib.feature_rows import prepare_rows
    from lib.feature_scoring import score_seeds
    from lib.tasks.arithmetic_task import TASK_SPEC, ArithmeticSettings
    from tests.scripts import run_script

    task = TASK_SPEC.configured(ArithmeticSettings(max_operand=max_operand))
    examples = task.examples(0)
    # Made-up answers: right where the prompt's length is even.
    answers = ["0" if len(example["prompt"]) % 2 else str(index % 97) for index, example in enumerate(examples)]
    cache = task.cache_from_answers(examples, answers)
    started = time.process_time()
    score_seeds(prepare_rows(task.dataset_from_cache(cache), task, 0, 0), task, Report(quiet=True))
    features_seconds = time.process_time() - started
    path = Path(folder) / "llm_io_data.pkl"
    write_pickle(path, cache)
    n_rows = len(examples)
    del cache, examples, answers
    started, started_cpu = time.perf_counter(), cpu_seconds()
    flags = ["--no_llm", "--no_plots", "--quiet", "--drop_near_duplicate_features"]
    code = run_script("2_generate_features", ["-i", path, "-o", Path(folder) / "report", *flags])
    if code:
        raise SystemExit(code)
    return {"prompts": n_rows, "seed features alone, CPU s": features_seconds,
            "stage 2, s": time.perf_counter() - started, "stage 2, CPU s": cpu_seconds() - started_cpu,
            "peak memory, MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def sandbox(n_rows: int, n_features: int) -> dict[str, float]:
    """Calls per second of each backend with the row functions of the seed features, on all cores."""
    from lib.feature_sandbox import FeatureSandbox, with_fallback
    from lib.tasks.arithmetic_task import TASK_SPEC, ArithmeticSettings
    from lib.wasm_sandbox import compiled_interpreter

    task = TASK_SPEC.configured(ArithmeticSettings(limit=n_rows))
    rows = [(example["prompt"], task.parse_prompt_row(example)) for example in task.examples(0)]
    sources = [feature.python_src for feature in task.SEED_FEATURES[:n_features]]

    def rates(name: str, box: FeatureSandbox, chosen: list[str]) -> dict[str, float]:
        started, started_cpu = time.perf_counter(), cpu_seconds()
        with box, ThreadPoolExecutor(os.cpu_count()) as pool:
            results = list(pool.map(lambda source: box.evaluate(source, rows), chosen))
        failed = [result.rejection for result in results if result.rejection]
        if failed:
            raise SystemExit(f"{name} rejects an honest feature: {failed[0]}")
        n_calls = len(rows) * len(chosen)
        return {f"{name}, calls/s": n_calls / (time.perf_counter() - started),
                f"{name}, calls/CPU s": n_calls / (cpu_seconds() - started_cpu)}

    monty, wasm = with_fallback()
    found = rates("monty", monty, sources)
    if wasm is not None:
        compiled_interpreter()  # Made once per machine, in about ten seconds.
        found |= rates("wasm", wasm, sources)
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true",
                        help="operands up to 29; 20 functions on 1,000 rows in the sandbox")
    args = parser.parse_args()
    # In a child process, so that its peak memory is its own.
    with tempfile.TemporaryDirectory() as folder, multiprocessing.get_context("spawn").Pool(1) as pool:
        found = pool.apply(seeds, (QUICK_OPERAND if args.quick else FULL_OPERAND, folder))
    found |= sandbox(1_000, 20) if args.quick else sandbox(10_000, 86)
    print(f"{'part':<30}{'value':>12}")
    for name, value in found.items():
        print(f"{name:<30}{value:>12,.1f}" if value < 1000 else f"{name:<30}{value:>12,.0f}")
    print(f"seed_seconds={found['stage 2, s']:.1f} seed_peak_mb={found['peak memory, MB']:.0f} "
          f"sandbox_calls_per_second={found['monty, calls/s']:.0f} "
          f"wasm_calls_per_second={found.get('wasm, calls/s', 0):.0f}")


if __name__ == "__main__":
    main()
