"""Build the prompts of the bon_jailbreaking task: noisy variants of requests (best-of-N augmentation).

Reads a table of requests (HarmBench and JailbreakBench column names are known) and writes what stage 1 reads. This
repository contains no harmful requests: you bring your own.
"""

from __future__ import annotations

import argparse

from lib.cli import Report, finite, positive_int, require_file, stage_main

DEFAULT_OUTPUT = "./data/bon_jailbreaking/dataset.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the builder."""
    parser.add_argument("--requests", required=True, help="table of requests: .csv, .tsv, .json, .jsonl or .parquet")
    parser.add_argument("--request_col", default="", help="its column; empty: the first known name, such as Behavior")
    parser.add_argument("--output", default=DEFAULT_OUTPUT, help="file to write")
    parser.add_argument("--n_samples", type=positive_int, default=16, help="variants per request")
    parser.add_argument("--sigma", type=finite, nargs="+", default=[0.4], help="strengths of the noise, used in turn")
    for noise in ("scrambling", "capitalization", "perturbation"):
        parser.add_argument(f"--{noise}", action=argparse.BooleanOptionalAction, default=True, help=f"apply {noise}")


def run(args: argparse.Namespace, report: Report) -> None:
    """Read, augment, write."""
    from pathlib import Path

    from lib.artifacts import write_json
    from lib.bon_augmentation import Noise, build_dataset, read_requests
    from lib.cli import UserError

    path, output = require_file(args.requests, "table of requests", "check --requests"), Path(args.output)
    noises = frozenset(noise for noise in Noise if getattr(args, noise.value))
    requests = read_requests(path, args.request_col)
    rows = build_dataset(requests, args.sigma, args.n_samples, noises, args.seed)
    if output.exists() and not args.force:
        raise UserError(f"{output} exists; use --force to replace it, or another --output")
    write_json(output, rows)
    report.line(f"{len(rows)} prompts from {len(set(requests))} requests: {output}")


main = stage_main(add_arguments, run, description=__doc__)

if __name__ == "__main__":
    raise SystemExit(main())
