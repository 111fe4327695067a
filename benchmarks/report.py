"""Size of the HTML report and the time a headless Chromium needs to open it: of a finished run, and of 5,000 agonists.

The finished run is a model root (`--model_root`, default: that of the built-in example); without one its columns are
NA. The run with 5,000 agonists is made up: 17,280 candidates, two searches, flips on 1,261 prompts (`--quick`: 200),
each agonist with a rule and the prompts it flips. Opening is from asking for the page until its script has finished,
the median of five, on a fresh profile: wall time, and CPU time of the page's process, which other work on the machine
does not lengthen. Making is CPU time too.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from lib.reporting.page.build import open_model, write_page  # noqa: E402
from lib.reporting.page.inputs import PageOptions  # noqa: E402
from tests.browser import MISSING, browser_paths, console, open_browser, open_report  # noqa: E402
from tests.report_tree import ReportWorld  # noqa: E402

N_AGONISTS, N_CANDIDATES, N_LAYERS = 5000, 17280, 30
REPEATS = 5


class Measured(NamedTuple):
    """One page: megabytes, CPU seconds to make it, seconds to open it (median, longest, CPU), console lines."""

    megabytes: float
    made: float
    opened: float
    slowest: float
    opened_cpu: float
    n_messages: int


def measure(driver: Any, model_root: Path, output: Path) -> Measured:
    """Make and open the page of a model root's first run."""
    started = time.process_time()
    path = write_page(open_model(model_root), None, output, PageOptions()).path
    made = time.process_time() - started
    driver.execute_cdp_cmd("Performance.enable", {})
    times, cpu_times = [], []
    for _ in range(REPEATS):
        driver.get("about:blank")
        before, cpu_before = time.perf_counter(), _page_cpu_seconds(driver)
        open_report(driver, path)
        times.append(time.perf_counter() - before)
        cpu_times.append(_page_cpu_seconds(driver) - cpu_before)
    size, cpu = path.stat().st_size / 1e6, statistics.median(cpu_times)
    return Measured(size, made, statistics.median(times), max(times), cpu, len(console(driver)))


def _page_cpu_seconds(driver: Any) -> float:
    """CPU time of the page's process so far."""
    found = driver.execute_cdp_cmd("Performance.getMetrics", {})["metrics"]
    return next(item["value"] for item in found if item["name"] == "ProcessTime")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_root", type=Path, default=REPOSITORY / "data" / "arithmetic" / "SmolLM2-135M-Instruct")
    parser.add_argument("--quick", action="store_true", help="flips on 200 prompts")
    args = parser.parse_args()
    if browser_paths() is None:
        sys.stderr.write(f"error: {MISSING}\n")
        return 2
    with tempfile.TemporaryDirectory(prefix="mecharule_report_") as name, open_browser() as driver:
        folder = Path(name)
        default = measure(driver, args.model_root, folder / "default.html") if args.model_root.is_dir() else None
        world = ReportWorld(N_AGONISTS, 200 if args.quick else 1261, N_CANDIDATES, N_LAYERS)
        many = measure(driver, world.write(folder / "many"), folder / "many.html")
    print("| run | MB | CPU s to make | s to open, median | longest | CPU s to open | console messages |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for title, found in (("finished run", default), (f"{N_AGONISTS:,} agonists", many)):
        if found is not None:
            print(f"| {title} | {found.megabytes:.2f} | {found.made:.1f} | {found.opened:.2f} | {found.slowest:.2f} | "
                  f"{found.opened_cpu:.2f} | {found.n_messages} |")
    shown = ("NA", "NA") if default is None else (f"{default.megabytes:.2f}", f"{default.opened:.2f}")
    print(f"default_mb={shown[0]} default_seconds={shown[1]} agonists5000_mb={many.megabytes:.2f} "
          f"agonists5000_seconds={many.opened:.2f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
