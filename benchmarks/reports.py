"""From archived results to tables: wall time and CPU seconds of each command on a made-up archive.

The archive has the published layout: 45 runs (three tasks, three models, five modes) and ten sensitivity runs, some of
them empty, some broken in a different way each. It is read as a folder and as the zip that is downloaded.
Prints a table and one line of key=value pairs.
"""

from __future__ import annotations

import argparse
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from lib.cli import UserError
from tests import published_tree

REPOSITORY = Path(__file__).resolve().parent.parent
LANDMARKS = ("README.md", "requirements.txt", "run_paper_tables_generation.sh")
MAIN_MODEL = "arithmetic/Qwen/Qwen2-1.5B-Instruct"


def commands(root: Path, out: Path, *, packed: bool, quick: bool) -> Iterator[tuple[str, list[str]]]:
    """(name, command line) of everything that is timed on one form of the archive."""
    data, suffix = (root / "data.zip", ", zip") if packed else (root / "data", "")
    yield f"check_artifacts{suffix}", ["check_artifacts.py", "--root", str(root)]
    yield f"paper tables and stage 10{suffix}", ["-m", "lib.grid_plans", "tables", str(data), str(out / "tables")]
    if packed or quick:
        return
    yield "stage 8, all tasks", ["8_compare_experiments.py", "--stats_path", str(data), "--out_dir", str(out / "8")]
    yield "stage 9, one task", ["9_compare_models.py", "--task_dir", f"{data}/arithmetic", "--out_dir", str(out / "9")]
    script = "11_summarize_sensitivity_analysis.py"
    yield "stage 11, one model", [script, "--stats_root", f"{data}/{MAIN_MODEL}", "--out_dir", str(out / "11")]
    yield "export", ["clean_results_for_export.py", str(data), str(out / "export")]


def measure(command: list[str]) -> tuple[float, float]:
    """(wall seconds, CPU seconds) of a command in the repository.

    Raises:
        UserError: it ended with an exit code that means a failure; 1 is the check's word for problems found.
    """
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    done = subprocess.run([sys.executable, *command], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    wall, after = time.monotonic() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode not in (0, 1 if "check_artifacts.py" in command else 0):
        raise UserError(f"{' '.join(command)} failed: {done.stderr.strip()[-300:]}")
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> int:
    """Build the archive, time every command, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="check and tables only")
    quick = parser.parse_args().quick
    rows = []
    with tempfile.TemporaryDirectory(prefix="mecharule_reports_") as folder:
        root = Path(folder) / "archive"
        tree = published_tree.build(root)
        for name in LANDMARKS:
            shutil.copy(REPOSITORY / name, root / name)
        for packed in (False, True):
            if packed:
                tree.zip()
            for name, command in commands(root, Path(folder) / f"out{packed}", packed=packed, quick=quick):
                rows.append((name, *measure(command)))
    lines = ["| command | wall s | CPU s |", "|---|---:|---:|", *(f"| {n} | {w:.1f} | {c:.1f} |" for n, w, c in rows)]
    sys.stdout.write("\n".join(lines) + "\n")
    pairs = [f"{name.replace(', ', '_').replace(' ', '_')}_cpu_s={cpu:.2f}" for name, _, cpu in rows]
    sys.stdout.write(f"runs={len(tree.cells) + len(tree.sensitivity)} broken={len(published_tree.BROKEN)} ")
    sys.stdout.write(" ".join(pairs) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
