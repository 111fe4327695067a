"""The algorithms that need no language model run where PyTorch is not installed."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.scripts import REPOSITORY

BLOCK_TORCH = """
import importlib, sys
class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, NoTorch())
importlib.import_module(sys.argv[1])
"""


@pytest.mark.parametrize("module", ["lib.group_testing", "lib.confidence_bounds", "lib.text_and_rules"])
def test_imports_without_torch(module):
    result = subprocess.run([sys.executable, "-c", BLOCK_TORCH, module], cwd=REPOSITORY, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    "module", ["agonist_search", "behaviour", "flip_anchoring", "rule_extraction", "sampling_plan"]
)
def test_a_stage_that_is_up_to_date_needs_no_torch(module):
    # A second run of the pipeline only compares digests; importing torch or xgboost for that would take longer.
    code = f"import sys, lib.stages.{module}; print(sorted({{'torch', 'xgboost', 'sklearn'}} & set(sys.modules)))"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "[]"
