"""Every stage is killed, interrupted, starved of space and permissions, run twice at once, and fed damaged files.

Prints a table of how often and with what outcome, each problem in full, and one line of key=value pairs. Kills come in
chains: the same folder is disturbed several times before the command may complete. `--quick` does one mixed chain for
each stage; `--json` writes every trial as a line.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from lib.cli import rng  # noqa: E402 (the environment has to be set first)
from tests.faults import trials  # noqa: E402
from tests.faults.disturb import Fault, Kind  # noqa: E402
from tests.faults.forked import preload  # noqa: E402
from tests.faults.trials import Bench, Trial  # noqa: E402
from tests.faults.worlds import WORLDS  # noqa: E402
from tests.scripts import load_script  # noqa: E402

COLUMNS = ("kill", "Ctrl-C", "full disk", "read-only folder", "two runs at once", "clock", "cut off", "bit flipped")
_YEARS = 30 * 365 * 86400
# What nearly every stage imports; what one stage needs besides is learnt from its first run.
_COMMON = ("numpy", "pandas", "torch", "transformers.models.llama.modeling_llama", "xgboost", "sklearn.linear_model",
           "matplotlib.figure", "matplotlib.backends.backend_agg", "scipy.stats", "filelock",
           "tests.models")  # fmt: skip


def mixed_chain(bench: Bench, seed: int, n_damaged: int) -> Iterator[Trial]:
    """One folder, disturbed in every way one after the other; in the end the command completes, by a wrong clock."""
    random = rng(seed, "chain", bench.world.name)
    bench.fresh()
    yield trials.run_two(bench, random, kill_first=True)
    yield trials.forbid_writing(bench)
    yield trials.kill(bench, random, 0)
    yield trials.fill_disk(bench, random)
    yield trials.kill(bench, random, 2)
    yield trials.interrupt(bench, random, int(random.integers(2)))
    yield trials.kill(bench, random, 1)
    last = Trial(bench.world.name, "clock", "years off while the disturbed run completes", "same result")
    yield bench.complete(last, Fault(Kind.CLOCK, amount=float(random.choice([-_YEARS, _YEARS]))))
    yield from damaged(bench, seed, n_damaged)


def kills(bench: Bench, seed: int, n_kills: int) -> Iterator[Trial]:
    """Chains of up to five kills, until so many have struck; then the command completes."""
    n_struck, chain = 0, 0
    while n_struck < n_kills:
        random = rng(seed, "kills", bench.world.name, chain)
        bench.fresh()
        for number in range(5):
            trial = trials.kill(bench, random, (chain + number) % 3)
            n_struck += trial.outcome == "killed"
            is_last = number == 4 or trial.outcome != "killed" or n_struck == n_kills
            yield bench.complete(trial) if is_last else trial
            if is_last:
                break
        chain += 1


def others(bench: Bench, seed: int) -> Iterator[Trial]:
    """Everything else but damaged files, each also on a folder of its own."""
    random = rng(seed, "others", bench.world.name)
    for _ in range(2):
        bench.fresh()
        yield trials.interrupt(bench, random, 0)
        yield trials.fill_disk(bench, random)
        yield trials.interrupt(bench, random, 1)
        yield bench.complete(trials.fill_disk(bench, random))
    yield trials.fill_real_disk(bench)
    bench.fresh()
    yield bench.complete(trials.forbid_writing(bench))
    for _ in range(2):
        bench.fresh()
        yield trials.run_two(bench, random, kill_first=False)
    for years in (-30, 30):
        yield trials.wrong_clock(bench, years)


def damaged(bench: Bench, seed: int, n_files: int) -> Iterator[Trial]:
    """Files of every format, half of them cut off, half with a flipped bit."""
    random = rng(seed, "damage", bench.world.name)
    for number, name in enumerate(trials.files_to_damage(bench, random, n_files)):
        yield trials.damage(bench, name, random, cut=number % 2 == 0)


def main(argv: list[str] | None = None) -> int:
    """Run the campaign; exit code 1 if anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", nargs="*", default=list(WORLDS), choices=list(WORLDS), help="stages to disturb")
    parser.add_argument("--parts", nargs="*", default=["kills", "others", "damage"], help="parts of the campaign")
    parser.add_argument("--kills", type=int, default=20, help="kills for each stage that must strike")
    parser.add_argument("--damaged", type=int, default=12, help="files that are damaged for each stage")
    parser.add_argument("--seed", type=int, default=0, help="seed of every random moment")
    parser.add_argument("--quick", action="store_true", help="one mixed chain and two damaged files for each stage")
    parser.add_argument("--figures", action="store_true", help="draw figures (they take most of a report's time)")
    parser.add_argument("--json", type=Path, help="write each trial as a line of this file")
    args = parser.parse_args(argv)
    preload(list(_COMMON))
    # Others must be able to read it: one trial runs as somebody else.
    root = Path(tempfile.mkdtemp(prefix="faults_"))
    root.chmod(0o755)
    started, rows = time.monotonic(), []
    try:
        with open(args.json or os.devnull, "a", encoding="utf-8") as log:
            for name in args.stages:
                rows.append(disturb_stage(name, root, args, log))
    finally:
        shutil.rmtree(root, ignore_errors=True)
    _print_table(rows)
    total = Counter()
    for row in rows:
        total.update(row["counts"])
    n_problems = sum(len(row["problems"]) for row in rows)
    pairs = {"stages": len(rows), **{key.replace(" ", "_"): total[key] for key in COLUMNS}, "problems": n_problems}
    cpu = sum(os.times()[:4])  # also of the children that have ended
    pairs |= {"cpu_seconds": round(cpu), "seconds": round(time.monotonic() - started)}
    print(" ".join(f"{key}={value}" for key, value in pairs.items()))
    return 1 if n_problems else 0


def campaign(bench: Bench, args: argparse.Namespace) -> Iterator[Trial]:
    """The parts that are asked for."""
    if "kills" in args.parts:
        yield from kills(bench, args.seed, args.kills)
    if "others" in args.parts:
        yield from others(bench, args.seed)
    if "damage" in args.parts:
        yield from damaged(bench, args.seed, args.damaged)


def disturb_stage(name: str, root: Path, args: argparse.Namespace, log) -> dict:  # noqa: ANN001
    """All trials of one stage, each logged at once."""
    load_script(WORLDS[name].script)
    bench = Bench(WORLDS[name], root, figures=args.figures)
    bench.prepare(twice=not args.quick)
    row = {"name": name, "bench": bench, "counts": Counter(), "outcomes": Counter(), "problems": []}
    for trial in mixed_chain(bench, args.seed, 2) if args.quick else campaign(bench, args):
        log.write(json.dumps(trial.to_json()) + "\n")
        log.flush()
        kind = next(column for column in COLUMNS if trial.fault.startswith(column))
        row["counts"][kind] += trial.outcome not in ("finished first", "not possible here")
        row["outcomes"][f"{kind}: {trial.outcome}"] += 1
        row["problems"] += [f"{trial.fault}, {trial.detail}: {problem}" for problem in trial.problems]
    shutil.rmtree(bench.home)
    return row


def _print_table(rows: list[dict]) -> None:
    print(f"{'stage':8}{'CPU s':>7}{'changes':>9}" + "".join(f"{column:>18}" for column in COLUMNS) + "  problems")
    for row in rows:
        counts = "".join(f"{row['counts'][column]:>18}" for column in COLUMNS)
        bench = row["bench"]
        print(f"{row['name']:8}{bench.cpu:7.1f}{bench.n_changes:9}{counts}  {len(row['problems'])}")
    for row in rows:
        print(f"{row['name']}: " + ", ".join(f"{name} {n}" for name, n in sorted(row["outcomes"].items())))
        for problem in row["problems"]:
            print(f"  PROBLEM {row['name']}: {problem}")


if __name__ == "__main__":
    sys.exit(main())
