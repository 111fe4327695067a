#!/usr/bin/env python3
"""Check that data/ and cache/ are there, whole, and enough for the tables; run it before anything else.

Needs Python 3.10 or newer and nothing installed. Exit code 0: everything that is there can be used. Exit code 1: there
are problems, one line each, with what to do. Runs that are missing altogether are only noted, unless --strict.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from lib.artifact_check import Check, ModelReport
from lib.cli import CommandParser

SIGNS = {"ok": "ok", "empty": "ok (no rules)", "broken": "BROKEN", "missing": "-"}


def main(argv: list[str] | None = None) -> int:
    """Look, print, and say with the exit code whether there are problems."""
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parent, help="the repository's folder")
    parser.add_argument("--strict", action="store_true", help="every run of the 3 x 3 x 5 grid must be there")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    args = parser.parse_args(argv)
    if not args.root.is_dir():
        parser.error(f"--root: no such folder: {args.root}")
    check = Check(args.root, args.strict).run()
    say(json.dumps(check.to_json(), indent=2) if args.json else as_text(check))
    return 0 if check.is_fine else 1


def as_text(check: Check) -> str:
    """The report for people."""
    lines = [f"{name}: {size / 1e6:,.1f} MB" for name, size in check.sizes.items()]
    lines += table_of(check.models)
    lines += [str(finding) for finding in sorted(check.findings, key=lambda finding: not finding.is_problem)]
    n_problems = sum(finding.is_problem for finding in check.findings)
    n_modes, n_others = (
        sum(status in ("ok", "empty") for model in check.models for status in getattr(model, kind).values())
        for kind in ("modes", "others")
    )
    usable = f"{n_modes} runs of the grid's modes and {n_others} others can be used"
    if check.is_fine:
        lines.append(f"fine: {usable}; next: bash run_paper_tables_generation.sh")
    else:
        lines.append(f"{n_problems} problem(s); {usable}; tables leave out what is broken")
    return "\n".join(lines)


def table_of(models: list[ModelReport]) -> list[str]:
    """One line for each task and model: the state of each run mode, and how many other runs there are."""
    if not models:
        return []
    rows = [["task / model", *models[0].modes, "other runs"]]
    for model in models:
        n_broken = sum(status == "broken" for status in model.others.values())
        others = f"{len(model.others)}" + (f" ({n_broken} BROKEN)" if n_broken else "")
        rows.append([f"{model.task} / {model.llm}", *(SIGNS[status] for status in model.modes.values()), others])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def say(text: str) -> None:
    """Print, whatever the terminal's alphabet."""
    sys.stdout.write(text.encode(sys.stdout.encoding or "utf-8", "replace").decode(sys.stdout.encoding or "utf-8"))
    sys.stdout.write("\n")


if __name__ == "__main__":
    raise SystemExit(main())
