"""Every command answers --help at once and every mistake with one line and exit code 2."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.scripts import REPOSITORY, numbered_scripts, run_script

# Each costs between a tenth of a second and several seconds to import.
HEAVY = {"torch", "transformers", "transformer_lens", "numpy", "pandas", "scipy", "sklearn", "xgboost", "shap",
         "matplotlib", "numba", "sentence_transformers", "openai", "groq", "ollama"}
SCRIPTS = [path.stem for path in numbered_scripts()]
LIST_MODULES = """
import json, runpy, sys
path = sys.argv[1]
sys.argv = [path, "--help"]
try:
    runpy.run_path(path, run_name="__main__")
except SystemExit as stop:
    assert not stop.code, stop.code
print("\\n" + json.dumps(sorted({name.split(".")[0] for name in sys.modules})))
"""


def test_there_is_a_script_for_each_stage():
    assert [int(name.split("_")[0]) for name in SCRIPTS][:7] == [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("script", [*(f"{name}.py" for name in SCRIPTS), "make_report.py", "lib/pipeline.py"])
def test_help_loads_no_heavy_module(script):
    result = subprocess.run([sys.executable, "-c", LIST_MODULES, script], cwd=REPOSITORY, capture_output=True,
                            text=True, env={**os.environ, "PYTHONPATH": str(REPOSITORY)})
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("usage:")
    assert not HEAVY & set(json.loads(result.stdout.splitlines()[-1]))


@pytest.mark.parametrize("script", SCRIPTS)
def test_unknown_flag_is_one_error_and_exit_2(script, capsys):
    assert run_script(script, ["--no_such_flag"]) == 2
    assert "error:" in capsys.readouterr().err
