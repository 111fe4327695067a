"""One report being made: where it writes, what it read, what it had to do without; and the flags all reports share."""

from __future__ import annotations

import argparse
import contextlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.cli import Report, UserError, share
from lib.reporting.issues import IssueLog

if TYPE_CHECKING:
    import pandas as pd

    from lib.reporting.artifacts import Reading, RunFolder


@dataclass
class Session:
    """The state of one report. bases: folders against which paths are written, so that none is absolute."""

    out_dir: Path
    report: Report
    bases: list[Path] = field(default_factory=list)
    issues: IssueLog = field(default_factory=IssueLog)
    inputs: set[Path] = field(default_factory=set)
    written: list[Path] = field(default_factory=list)

    def take(self, run: RunFolder, reading: Reading, artifact: str) -> Reading:
        """The reading, entered as input or, if it cannot be used, as an issue."""
        if reading.path is not None:
            self.inputs.add(reading.path)
        run.note(self.issues, reading, artifact)
        return reading

    def csv(self, name: str | Path, frame: pd.DataFrame) -> Path:
        """Write a CSV below the output folder."""
        from lib.artifacts import without_formulas, write_csv

        path = self.out_dir / name
        write_csv(path, without_formulas(frame))
        self.written.append(path)
        return path

    def finish(self, script: str, args: argparse.Namespace) -> None:
        """Write `provenance.json` and `report_issues.csv`, and say how much there is.

        Raises:
            UserError: there are issues and `--strict` is set.
        """
        from lib.reporting.tables import write_provenance

        write_provenance(self.out_dir, script, args, self.inputs, [*self.bases, self.out_dir, Path.cwd()])
        self.issues.finish(self.report, self.out_dir, strict=args.strict)
        self.report.line(f"{len(self.written)} tables and figures: {self.out_dir}")


def writing_to(out_dir: str | Path | None) -> contextlib.AbstractContextManager[None]:
    """Held while a report is written; a second report into the same folder is refused. Nothing without a folder."""
    from lib.artifacts import exclusive

    return contextlib.nullcontext() if out_dir is None else exclusive(out_dir)


def flag(parser: argparse.ArgumentParser | argparse._ArgumentGroup, name: str, **options: Any) -> None:
    """Add a flag that may be spelled with dashes or underscores."""
    name = name.removeprefix("--")
    spellings = dict.fromkeys((f"--{name.replace('-', '_')}", f"--{name.replace('_', '-')}"))
    parser.add_argument(*spellings, dest=name.replace("-", "_"), **options)


def add_report_arguments(parser: argparse.ArgumentParser, *, scopes: str) -> None:
    """`--score_scope`, `--min_rule_dataset_coverage`, `--strict`: in every report."""
    group = parser.add_argument_group("rules")
    flag(
        group,
        "score_scope",
        default=scopes,
        help="comma list of test (chosen on TRAIN, held out), all_fit (descriptive), and, on request, test_selected "
        "(chosen on TEST: optimistic); both = test,all_fit",
    )
    flag(
        group,
        "min_rule_dataset_coverage",
        type=share,
        default=0.005,
        help="rules that cover a smaller share of the datapoints do not count",
    )
    flag(parser, "strict", action="store_true", help="missing or broken inputs are an error (exit 2), not a note")


def nothing_found(place: str | Path, what: str) -> UserError:
    """The error of a report without input."""
    return UserError(f"no {what} below {place}; give a folder (or .zip) with finished runs: data/, a task or a model")
