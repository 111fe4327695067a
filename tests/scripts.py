"""Numbered scripts as modules: their names start with a digit, so they cannot be imported by name."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

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


@contextmanager
def only_parsing() -> Iterator[None]:
    """A command called inside stops when its flags are understood, or has printed its help; others are refused.

    Raises:
        AssertionError: flags that the command does not know.
        SystemExit: any other mistake in the flags, told on stderr as always.
    """

    class Parsed(Exception):
        """The flags are understood; the command need not run."""

    def parse_and_stop(parser: argparse.ArgumentParser, argv: list[str] | None = None) -> None:
        _, unknown = parser.parse_known_args(argv)
        raise Parsed if not unknown else AssertionError(f"unknown to the command: {unknown}")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
        try:
            yield
        except Parsed:
            return
        except SystemExit as stop:
            if stop.code:
                raise
            return
    raise AssertionError("the command has parsed nothing")
