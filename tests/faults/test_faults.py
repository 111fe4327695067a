"""Every stage survives being disturbed: killed, interrupted, out of space, forbidden to write, run twice, fed damage.

One process runs a mixed chain of disturbances for each stage (see `benchmarks/faults.py`, which does many more); here
are its verdicts, stage by stage.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter

import pytest

from tests.faults.worlds import WORLDS
from tests.scripts import REPOSITORY

KINDS = {"Ctrl-C", "full disk", "read-only folder", "two runs at once", "clock", "cut off", "bit flipped"}


@pytest.fixture(scope="module")
def campaign(tmp_path_factory, request) -> tuple[dict[str, list[dict]], str]:
    """Trials by stage, of the stages that are asked for; and what the process printed."""
    wanted = [item.callspec.params["stage"] for item in request.session.items if "stage" in _parameters(item)]
    path = tmp_path_factory.mktemp("faults") / "trials.jsonl"
    command = [sys.executable, "-m", "benchmarks.faults", "--quick", "--json", str(path), "--stages", *wanted]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    trials: dict[str, list[dict]] = {}
    for line in path.read_text().splitlines() if path.is_file() else ():
        trial = json.loads(line)
        trials.setdefault(trial["world"], []).append(trial)
    return trials, done.stdout[-4000:] + done.stderr[-4000:]


def _parameters(item: pytest.Item) -> dict:
    return item.callspec.params if hasattr(item, "callspec") else {}


@pytest.mark.parametrize("stage", WORLDS)
def test_a_disturbed_stage_completes_with_the_undisturbed_result(campaign, stage):
    trials, printed = campaign
    assert stage in trials, printed
    assert [trial for trial in trials[stage] if trial["problems"]] == []
    kinds = Counter(trial["fault"] for trial in trials[stage])
    assert KINDS <= kinds.keys() and sum(n for kind, n in kinds.items() if kind.startswith("kill")) == 3
    outcomes = {trial["fault"]: trial["outcome"] for trial in trials[stage]}
    assert outcomes["two runs at once"] == "second refused"
    assert outcomes["read-only folder"] == "refused"
