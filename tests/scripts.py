"""Numbered scripts as modules: their names start with a digit, so they cannot be imported by name."""

from __future__ import annotations

import importlib.util
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

REPOSITORY = Path(__file__).resolve().parent.parent


def numbered_scripts() -> list[Path]:
    """Every stage script of the repository, in order."""
    return sorted(REPOSITORY.glob("[0-9]*_*.py"), key=lambda path: (int(path.name.split("_")[0]), path.name))


@cache
def load_script(name: str) -> ModuleType:
    """The script `<name>.py` of the repository root as a module."""
    path = REPOSITORY / f"{name.removesuffix('.py')}.py"
    spec = importlib.util.spec_from_file_location(f"script_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"cannot load {path}")
    module = importlib.util.module_from_spec(spec)
    # Classes defined in a script are found by name (dataclasses, pickling of workers' functions).
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def run_script(name: str, arguments: list[str]) -> int:
    """Run the script in this process; its exit code (also that of argparse)."""
    try:
        return load_script(name).main([str(argument) for argument in arguments])
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1
