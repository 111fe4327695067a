"""House rules that a machine can check: sizes of modules and functions, docstrings, no function twice.

Dead code, types and where imports point are looked at by vulture, mypy and import-linter: see `.ci/run`.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.scripts import REPOSITORY

MAX_SCRIPT_LINES = 200
MAX_MODULE_LINES = 500
MAX_TEST_LINES = 600
"""A test module is a list: it may be a little longer."""
MAX_FUNCTION_LINES = 60
SCRIPTS = sorted(REPOSITORY.glob("*.py"))
LIBRARY = sorted((REPOSITORY / "lib").rglob("*.py"))
BENCHMARKS = sorted((REPOSITORY / "benchmarks").glob("*.py"))
TESTS = sorted((REPOSITORY / "tests").rglob("*.py"))


def named(path: Path) -> str:
    return path.relative_to(REPOSITORY).as_posix()


@pytest.mark.parametrize("paths, limit", [(SCRIPTS, MAX_SCRIPT_LINES), (LIBRARY, MAX_MODULE_LINES),
                                          (BENCHMARKS, MAX_MODULE_LINES), (TESTS, MAX_TEST_LINES)])  # fmt: skip
def test_modules_are_small(paths, limit):
    assert paths
    lines = {named(path): path.read_text().count("\n") for path in paths}
    assert {name: n for name, n in lines.items() if n > limit} == {}


def test_functions_fit_on_a_screen():
    too_long = {}
    for path in [*SCRIPTS, *LIBRARY, *BENCHMARKS, *TESTS]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                n_lines = node.end_lineno - node.lineno + 1
                if n_lines > MAX_FUNCTION_LINES:
                    too_long[f"{named(path)}:{node.name}"] = n_lines
    assert too_long == {}


def test_everything_public_in_lib_says_what_it_is():
    bare = []
    for path in LIBRARY:
        tree = ast.parse(path.read_text())
        for node in [tree, *(child for child in tree.body if isinstance(child, ast.FunctionDef | ast.ClassDef))]:
            name = getattr(node, "name", "")
            if not name.startswith("_") and ast.get_docstring(node) is None and (name or path.stat().st_size):
                bare.append(f"{named(path)}:{name}")
    assert bare == []


def test_no_function_of_lib_is_defined_twice_word_for_word():
    # By the text of what it does, its own name and docstring apart; four lines and more.
    places: dict[str, list[str]] = {}
    for path in [*SCRIPTS, *LIBRARY]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 4:
                body = node.body[1:] if ast.get_docstring(node) else node.body
                text = ast.unparse(ast.Module(body, []))
                if text.count("\n") >= 2:
                    places.setdefault(f"{ast.unparse(node.args)}\n{text}", []).append(f"{named(path)}:{node.name}")
    assert [found for found in places.values() if len(found) > 1] == []
