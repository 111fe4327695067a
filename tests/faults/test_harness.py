"""The harness sees what it is there to see: a stage that writes badly does not pass."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.scripts import REPOSITORY

# A "stage" in a process of its own, because a fault is armed in a fork of it. It writes two files, and badly.
BAD_STAGES = {
    "writes in place": ("open(out / 'a.csv', 'w').write('1,2' * 99); sync(out / 'a.csv')", "not whole: a.csv"),
    "is not repeatable": ("path = out / 'a.csv'; n = len(path.read_text()) if path.exists() else 0\n"
                          "    write_text(path, 'x' * (n + 1)); write_json(out / 'b.json', n)", "other content"),
    "says so in a traceback": ("with open(out / 'a.csv', 'w') as handle: handle.write('1')", "exit code 1, not 2"),
}  # fmt: skip
PROGRAM = """
import os, sys, types
from pathlib import Path
from lib.artifacts import StageRecord, atomic_write, write_json
from tests.faults import trials
from tests.faults.disturb import Fault, Kind
from tests.faults.worlds import World
from tests import scripts

def sync(path):
    with open(path, "a") as handle:
        handle.write("3")
        handle.flush()
        os.fsync(handle.fileno())

def write_text(path, text):
    with atomic_write(path) as handle:
        handle.write(text)

def main(argv):
    out = Path(argv[0])
    BODY
    return 0

def load(name):
    return types.SimpleNamespace(main=main)

import tests.faults.forked as forked
forked.load_script = load
world = World("bad", "bad", lambda folder: (folder / "in").mkdir(), lambda folder: [folder / "out"])
bench = trials.Bench(world, Path(sys.argv[1]), figures=True)
bench.prepare(twice=False)
bench.fresh()
found = []
for fault in [Fault(Kind.TEAR, 0, 0.5), *(Fault(Kind.KILL, n) for n in range(bench.n_changes))]:
    bench.start(fault).ending()
    found += bench.partial()
trial = trials.Trial("bad", "", "")
bench.told(trial, bench.run(Fault(Kind.FULL, 0)), 2, "No space left")
bench.complete(trial)
print(found + trial.problems)
"""


@pytest.mark.parametrize("name", BAD_STAGES)
def test_bad_stages_are_seen(tmp_path, name):
    body, problem = BAD_STAGES[name]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, "-c", PROGRAM.replace("BODY", body), str(tmp_path)], env=environment,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert problem in done.stdout
