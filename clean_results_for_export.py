#!/usr/bin/env python3
"""Copy the results that tables and figures are made from, fit to be published.

Kept are the files that a table or comparison reads; prompts and answers, pickles, caches and local paths are left out.
The input is never changed. export_manifest.json, in the output, lists what was kept, dropped and changed on the way.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from lib.cli import Report, stage_main


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the export."""
    parser.add_argument("data_dir", type=Path, help="folder of results")
    parser.add_argument("output_dir", type=Path, nargs="?", help="default: <data_dir>_filtered_results beside it")
    parser.add_argument("--dry_run", "--dry-run", action="store_true", help="count, but write nothing")
    parser.add_argument("--manifest", type=Path, help="write the manifest here too")
    parser.add_argument("--verbose", action="store_true", help="one line for each file")


def run(args: argparse.Namespace, report: Report) -> None:
    """Export and say how much; `--force` replaces an earlier export."""
    from lib.export import export

    data_dir = args.data_dir
    whole = data_dir.resolve()
    output_dir = args.output_dir or whole.with_name(f"{whole.name}_filtered_results")
    result = export(data_dir, output_dir, args.manifest, force=args.force, dry_run=args.dry_run)
    if args.verbose:
        for record in result.kept:
            report.line(f"keep {record['path']}")
        for record in result.dropped:
            report.line(f"drop {record['path']}: {record['reason']}")
        for record in result.normalised:
            report.line(f"change {record['path']}: {record['change']}")
    size = sum(record["size"] for record in result.kept)
    where = "nothing written (dry run)" if args.dry_run else f"written to {output_dir}"
    report.line(
        f"{len(result.kept)} files kept ({size / 1e6:,.1f} MB), {len(result.dropped)} dropped, "
        f"{len({record['path'] for record in result.normalised})} changed; {where}"
    )


main = stage_main(add_arguments, run, description=__doc__)

if __name__ == "__main__":
    raise SystemExit(main())
