"""Every command of the documentation is run, as written, on a small world, or by a test that is named here.

The flags of every command are read by the command's real parser; pipelines and grids are printed (`--dry_run`), and the
flags of all commands that they print are read in the same way. A command that is in none of the groups below fails.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import re
import runpy
import shlex
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest

from tests import published_tree
from tests.documented_commands import (
    NAMES,
    Call,
    calls_of,
    commands_of,
    documented_calls,
    documented_module,
    word_of,
)
from tests.faults import worlds
from tests.faults.forked import save_undrawn
from tests.report_tree import ReportWorld
from tests.scripts import REPOSITORY, load_script, only_parsing, run_script
from tests.stages.test_stage_3 import make_features_dir

END_TO_END = "tests/end_to_end/test_"
DEFAULT_RUN = f"{END_TO_END}default_run.py::test_run_leaves_the_promised_files_and_names_an_agonist_with_its_rule"
PROMISED = f"{END_TO_END}promised_commands.py::test_every_command_runs_and_leaves_the_files_that_it_names"
ENVIRONMENT = f"{END_TO_END}promised_commands.py::test_environment_is_found_activated_and_everything_compiles"
RECALL = "tests/stages/test_stage_6.py::test_validation_judges_every_mode_by_brute_force"
ARCHIVES = "tests/reporting/test_check_artifacts.py::test_archives_are_looked_into_without_unpacking"
HELP = "tests/test_scripts_help.py::test_help_loads_no_heavy_module"

# Commands that cannot run here, or take too long: why, and the tests that run them. Their flags are read all the same.
RUN_ELSEWHERE = {
    "_run_pipeline.sh": ("minutes with the real model, which only is packaged", [DEFAULT_RUN, PROMISED]),
    "run_mecharule_experiments.sh": ("minutes; as a cluster's job it needs a GPU and a scheduler", [PROMISED]),
    "run_sensitivity_analysis.sh": ("minutes with the real model", [PROMISED]),
    "run_resample_recheck.sh": ("minutes with the real model", [PROMISED]),
    "setup.sh": ("needs a network", [ENVIRONMENT]),
    "activate": ("needs what setup.sh makes", [ENVIRONMENT]),
    "run_tests.sh": ("runs this test", [__file__]),
    "validate_recall.py": ("needs a search of stage 6", [RECALL]),
    "6_analyze_bag_of_rules.py": ("--help only", [HELP]),
    "unzip": ("a program of the system", [ARCHIVES]),
    "brew": ("on macOS only", []),
}
NAMED_IN_PASSING = {"validate_recall.py": "the following arguments are required: --input_data_dir, --output_data_dir"}
"""Commands that a sentence names without what they need, and what they say then."""
MEASURES = "benchmarks."
"""Benchmarks take minutes and are run by hand: their flags are read."""


class Run(NamedTuple):
    """How a documented command runs here. make: writes what it reads below the working folder, and returns what
    placeholders of the command stand for; more: flags that make it small; leaves: files that must be there then."""

    make: Callable[[Path], dict[str, object] | None]
    more: str
    leaves: tuple[str, ...]


def _published(folder: Path, *, sensitivity: bool = False) -> None:
    models = ("Tiny", "Other")
    published_tree.build(folder, tasks=("arithmetic",), models=models, states={}, sensitivity=sensitivity)


def _checkout(folder: Path) -> None:
    _published(folder)
    for name in ("README.md", "requirements.txt", "run_paper_tables_generation.sh"):
        shutil.copy(REPOSITORY / name, folder)


def _long_table(folder: Path) -> dict[str, object]:
    _published(folder)
    assert run_script("make_paper_tables", ["--data_root", "data", "--out_dir", "tables", "--quiet"]) == 0
    return {"long CSV of Table 2, or of stage 8": "tables/table2_threshold_sweep_per_run_long.csv"}


def _report(folder: Path) -> None:
    ReportWorld().write(folder)


def _features(folder: Path) -> None:
    make_features_dir(folder / "data/arithmetic/Tiny/feature_report", 80)


def _agonists(folder: Path) -> dict[str, object]:
    worlds.WORLDS["7"].make(folder)
    return {"stage 6's folder or .zip": folder / "in/discovery/bag", "output": "out",
            "stage 2's folder": folder / "in/feature_report"}  # fmt: skip


def _requests(folder: Path) -> None:
    (folder / "requests.csv").write_text("Behavior\nmake tea\nboil water\n")


RUN_HERE = {
    "1_generate_prompts_and_answers.py": Run(lambda folder: None, "", ()),
    "3_extract_rules.py": Run(
        _features,
        "--npermutations 1 --stability_resamples 1 --inner_repeats 1 --inner_folds 2 --max_rules 1 --max_conditions 2",
        ("data/arithmetic/Tiny/rule_extraction_results/rule_combo_is_correct.csv",),
    ),
    "7_refine_neuron_anchored_rules.py": Run(
        _agonists,
        "--task_module tests.stages.agonist_world --ai_model in/model --batch_size 32 --n_random_neurons 2 "
        "--points_to_use_for_mean_ablation 16 --n_bootstrap 50 --min_train_flips 5 --min_test_flips 3 --max_rules 1 "
        "--jobs 1 --group_col prompt --spectral_cache_dir cache",
        (f"out/stats/{NAMES['run']}/anchored_rules.md",),
    ),
    "8_compare_experiments.py": Run(
        _published,
        "--thr_min 0.7 --thr_max 0.9 --thr_step 0.1",
        ("out/aggregated_by_task/threshold_sweep_all_tasks_all_llms.csv",),
    ),
    "9_compare_models.py": Run(_published, "", ("out/run_summary_by_model.csv",)),
    "10_compute_threshold_sweep_stats.py": Run(_long_table, "--n_boot 50", ("out/*/*.csv",)),
    "11_summarize_sensitivity_analysis.py": Run(
        partial(_published, sensitivity=True), "", ("out/sensitivity_summary_all_scopes.csv",)
    ),
    "run_paper_tables_generation.sh": Run(
        _published, "--n_boot 50", ("paper_tables/table1*.csv", "paper_tables/stats/*/*.csv")
    ),
    "check_artifacts.py": Run(_checkout, "--root .", ()),
    "clean_results_for_export.py": Run(_published, "", ("data_filtered_results/export_manifest.json",)),
    "make_report.py": Run(_report, "", (f"data/arithmetic/Tiny/report/{NAMES['run']}.html",)),
    "build_bon_dataset.py": Run(_requests, "", ("data/bon_jailbreaking/dataset.json",)),
}


@pytest.fixture(scope="module")
def shells(tmp_path_factory) -> Path:
    """Where the shells run that take the pages' commands apart."""
    return tmp_path_factory.mktemp("shells")


@pytest.fixture(scope="module")
def calls(shells) -> tuple[Call, ...]:
    """Every documented call."""
    return documented_calls(shells)


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """An empty working folder that the shells' commands take for the repository's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lib.grid_plans.REPOSITORY", tmp_path)
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", save_undrawn)
    for name in ("TASKS", "MODELS", "MODES", "EXTRA_FLAGS"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.fixture
def weekday_task(monkeypatch) -> None:
    """The task that docs/tasks.md writes, where the page says it is saved."""
    module = ModuleType("lib.tasks.weekday_task")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(documented_module("docs/tasks.md", "weekday_task.py"), module.__dict__)


# ---------------------------------------------------------------- flags


def read_flags(call: Call, seen: set[tuple]) -> None:
    """The command's own parser reads its flags; so do those of the commands that it would run. `seen` ones are not
    read again: equal flags of the same program, whatever their values."""
    program, arguments = call.program, call.arguments
    key = (program, *(word for word in arguments if word.startswith("-")))
    if call.page == "" and key in seen:
        return
    seen.add(key)
    if program.endswith(".sh") and program != "setup.sh":
        module, *first = _started_by(program)
        if module == "pytest":
            _read_flags_of_pytest([*first, *arguments])
            return
        for line in _printed_commands(module, first, arguments):
            read_flags(Call("", tuple(shlex.split(line))), seen)
    elif program.startswith(MEASURES):
        with only_parsing(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [program, *arguments])
            patch.delitem(sys.modules, program, raising=False)
            runpy.run_module(program, run_name="__main__")
    elif program.endswith(".py"):
        with only_parsing():
            load_script(program).main(arguments)
    else:
        assert program in RUN_ELSEWHERE and not any(word.startswith("-") for word in arguments), call


def _started_by(shell: str) -> list[str]:
    """The module that a shell script of the repository starts, and what it gives it before the user's arguments."""
    (found,) = re.findall(r'python" -m (.*)"\$@"|python -m (.*)"\$@"', (REPOSITORY / shell).read_text())
    return shlex.split("".join(found).replace('"${MECHARULE_TEST_WORKERS:-2}"', "2"))


def _printed_commands(module: str, first: list[str], arguments: list[str]) -> list[str]:
    """What `--dry_run` prints."""
    argv = [*first, "--dry_run", *arguments] if first else [*arguments, "--dry_run"]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        try:
            code = importlib.import_module(module).main(argv)
        except SystemExit as stop:
            code = stop.code
    assert not code, f"{module} {shlex.join(argv)}: exit code {code}"
    return [] if "--help" in arguments else printed.getvalue().splitlines()


def _read_flags_of_pytest(arguments: list[str]) -> None:
    from _pytest.config import get_config

    config = get_config()
    config.pluginmanager.consider_preparse(["-p", "xdist.plugin", "-p", "xdist.looponfail"])
    known, unknown = config._parser.parse_known_and_unknown_args(arguments)
    assert unknown == [] and all((REPOSITORY / name).exists() for name in known.file_or_dir), arguments


def _environment_of(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in call.environment:
        monkeypatch.setenv(name, value)


def _with_files(page: str, folder: Path) -> None:
    """The table that a page shows and its commands read."""
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    for block in re.findall(r"```\n(question,gold.*?)```", text, re.S):
        for name in ("capitals.csv", "my.csv"):
            (folder / name).write_text(block)


@pytest.mark.usefixtures("weekday_task")
def test_every_flag_of_every_command_is_known(calls, place, capsys):
    seen: set[tuple] = set()
    _published(place)
    for call in calls:
        with pytest.MonkeyPatch.context() as patch:
            _environment_of(call, patch)
            _with_files(call.page, place)
            try:
                read_flags(call, seen)
            except (AssertionError, SystemExit) as error:
                said = capsys.readouterr().err
                if call.arguments or NAMED_IN_PASSING.get(call.program, said) not in said:
                    pytest.fail(f"{call.page}: {call}\n{error!r}\n{said[-1500:]}")
    # The pipelines and grids were looked into: every stage is among what they print.
    assert {f"{number}_" for number in range(1, 12)} <= {re.match(r"\d*_?", key[0])[0] for key in seen}
    assert len(calls) >= 50 and len(seen) >= 60


@pytest.mark.parametrize("command", [
    "python 3_extract_rules.py --features_scores_dir a --rules_dir b --no_such_flag",
    "bash _run_pipeline.sh arithmetic SmolLM2-135M-Instruct --no_such_flag",
    "bash run_mecharule_experiments.sh --no_such_flag",
    "TASKS=arithmetic MODELS=a bash run_mecharule_experiments.sh -- --no_such_flag",
    "EXTRA_FLAGS=--no_such_flag bash run_sensitivity_analysis.sh",
    "EXTRA_FLAGS='--circuit_size some' bash run_resample_recheck.sh",
    "bash run_paper_tables_generation.sh --no_such_flag",
    "bash run_tests.sh --no_such_flag",
    "bash run_tests.sh tests/no_such_folder",
    "bash setup.sh --no_such_flag",
    "python -m benchmarks.faults --no_such_flag",
    "python -m benchmarks.spectral_sampling --no_such_flag",
    "python make_report.py",
])  # fmt: skip
def test_unknown_flags_are_noticed(command, place, shells, monkeypatch, capsys):
    _published(place)
    (call,) = calls_of([command], "a page", shells)
    _environment_of(call, monkeypatch)
    with pytest.raises((AssertionError, SystemExit)):
        read_flags(call, set())


# ---------------------------------------------------------------- runs


def test_every_command_runs_here_or_in_a_test_that_is_there(calls):
    programs = {call.program for call in calls if not call.program.startswith(MEASURES)}
    known = {**RUN_ELSEWHERE, **RUN_HERE}
    assert sorted(programs - known.keys()) == []
    assert sorted(known.keys() - programs) == [], "these are in no page any more"
    for _, tests in RUN_ELSEWHERE.values():
        for test in tests:
            file, _, function = test.partition("::")
            assert not function or f"def {function}(" in (REPOSITORY / file).read_text(), test


@pytest.mark.usefixtures("weekday_task")
@pytest.mark.parametrize("program", RUN_HERE)
def test_documented_commands_run(program, calls, place):
    run = RUN_HERE[program]
    commands = [call for call in calls if call.program == program]
    assert commands
    values = {word_of(name): str(value) for name, value in (run.make(place) or {}).items()}
    for call in commands:
        words = [values.get(word, word) for word in call.arguments] + shlex.split(run.more)
        assert _run(program, words) == 0, str(call)
        for pattern in run.leaves:
            assert any(place.glob(pattern)), f"{call} has not written {pattern}"
            for path in place.glob(pattern):
                path.unlink()
        shutil.rmtree(place / "out", ignore_errors=True)


def _run(program: str, arguments: list[str]) -> int:
    """Run a script; of a shell script, the scripts that it would run, one after the other."""
    if not program.endswith(".sh"):
        return run_script(program, arguments)
    module, *first = _started_by(program)
    commands = [shlex.split(line) for line in _printed_commands(module, first, arguments)]
    return max(run_script(command[1], command[2:]) for command in commands)


def test_a_table_goes_through_its_first_stages_as_documented(calls, place):
    from tests.models import tiny_model

    # With the real model these commands take minutes; what they ask of a table is the work of stages 1 and 2.
    model = tiny_model("llama")
    for part in (model.model, model.tokenizer):
        part.save_pretrained(place / "model")
    for call in calls:
        if call.program != "_run_pipeline.sh" or call.arguments[:1] != ["table"]:
            continue
        _with_files(call.page, place)
        folders = ["--data_root", str(place / call.page), "--cache_root", str(place / call.page)]
        printed = _printed_commands("lib.pipeline", [], [*call.arguments, *folders])
        first, second = [shlex.split(line) for line in printed[:2]]
        assert run_script(first[1], [*first[2:], "--ai_model", str(place / "model")]) == 0
        assert run_script(second[1], [*second[2:], "--no_plots"]) == 0
        (scores,) = (place / call.page).rglob("scores.csv")
        assert scores.read_text().count("capital of") == 2 and "continent" in scores.read_text().split("\n")[0]


# ---------------------------------------------------------------- finding commands


def test_commands_are_found_as_a_reader_would_find_them(tmp_path):
    page = """
Inline: `python a.py --x
<some file>`, `a.py`, `bash`, `X=1 bash b.sh`, `bash c.sh -q 'two words'`.

```bash
#!/bin/bash
names=(one two)
export TASKS=${names[SLURM_ARRAY_TASK_ID - 4]}   # the second
bash b.sh "$TASKS" \\
  --more
```

```
python make.py      # typed
```

```
what it prints: python no.py
```

```python
bash = "not a command"
```
"""
    found = calls_of(commands_of(page), "page", tmp_path)
    assert [(call.words, call.environment) for call in found] == [
        (("bash", "b.sh", "two", "--more"), (("TASKS", "two"),)),
        (("python", "make.py"), ()),
        (("python", "a.py", "--x", "some_file"), ()),
        (("bash", "b.sh"), ()),
        (("bash", "c.sh", "-q", "two words"), ()),
    ]
    assert [call.program for call in found] == ["b.sh", "make.py", "a.py", "b.sh", "c.sh"]
    assert found[-1].arguments == ["-q", "two words"]
    with pytest.raises(AssertionError, match="frobnicate"):
        calls_of(["frobnicate --all"], "page", tmp_path)
