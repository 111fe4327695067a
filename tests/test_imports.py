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
