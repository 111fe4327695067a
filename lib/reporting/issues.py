"""What a report could not use and why: collected on the way, written at the end, an error with `--strict`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from lib.artifacts import without_formulas, write_csv
from lib.cli import Report, UserError

ISSUE_COLUMNS = ("task", "llm", "run_name", "artifact", "status", "message")
_N_SHOWN = 12


@dataclass(frozen=True)
class Issue:
    """One file or folder that a table had to do without."""

    task: str
    llm: str
    run_name: str
    artifact: str
    status: str
    message: str

    def __str__(self) -> str:
        place = " ".join(filter(None, (self.task, self.llm, self.run_name)))
        return f"{self.status}: {place}: {self.artifact}: {self.message}"


@dataclass
class IssueLog:
    """Issues in the order found, each once."""

    issues: dict[Issue, None] = field(default_factory=dict)

    def add(self, issue: Issue) -> None:
        """Note an issue."""
        self.issues[issue] = None

    def __iter__(self) -> Iterator[Issue]:
        return iter(self.issues)

    def __len__(self) -> int:
        return len(self.issues)

    def write(self, out_dir: Path) -> Path:
        """`report_issues.csv`; a header only when all went well."""
        import pandas as pd

        path = out_dir / "report_issues.csv"
        frame = pd.DataFrame([asdict(issue) for issue in self.issues], columns=list(ISSUE_COLUMNS))
        write_csv(path, without_formulas(frame))
        return path

    def tell(self, report: Report, out_dir: Path) -> None:
        """Print the first issues and where all of them are."""
        for issue in list(self.issues)[:_N_SHOWN]:
            report.line(str(issue))
        if len(self) > _N_SHOWN:
            report.line(f"... {len(self) - _N_SHOWN} more in {out_dir / 'report_issues.csv'}")

    def finish(self, report: Report, out_dir: Path, *, strict: bool) -> None:
        """Write and print the issues.

        Raises:
            UserError: there are issues and `strict` is set.
        """
        self.write(out_dir)
        self.tell(report, out_dir)
        if strict and self.issues:
            first = next(iter(self.issues))
            raise UserError(
                f"{len(self)} problem(s) with the inputs, the first: {first}; see {out_dir / 'report_issues.csv'}, "
                "mend the runs or leave out --strict"
            )
