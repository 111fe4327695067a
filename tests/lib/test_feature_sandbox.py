"""Untrusted feature functions: hostile ones are contained and named, honest ones get CPython's values."""

from __future__ import annotations

import contextlib
import math
import re
import time

import numpy as np
import pytest

from lib.feature_sandbox import (
    Backend,
    FeatureSandbox,
    Limits,
    MontySandbox,
    SandboxChain,
    SandboxError,
    function_name,
    read_values,
    safe_message,
)
from lib.wasm_sandbox import WasmSandbox
from tests.hostile_features import HOSTILE, function

pytest.importorskip("pydantic_monty")

LIMITS = Limits(seconds_per_batch=0.3)
ROWS = [(f"{a}+{a * 7}=", {"operand_a": float(a), "operator": "+", "digits_a": [a, 1], "sub": None}) for a in range(60)]
HONEST = "def feature(prompt: str, info: dict):\n    return len(prompt) + info['operand_a']\n"
HARMLESS = {"sleep", "clock"}
"""Allowed, but without effect: time stands still."""
needs_wasm = pytest.mark.skipif(not WasmSandbox.is_installed(), reason="the WebAssembly interpreter is not installed")


@pytest.fixture(scope="module")
def monty():
    with MontySandbox(LIMITS) as sandbox:
        yield sandbox


@pytest.fixture(scope="module")
def wasm():
    with WasmSandbox(Limits(seconds_per_batch=0.3, memory_bytes=160 << 20)) as sandbox:
        yield sandbox


def hostile_source(name: str, marker: str) -> str:
    source = HOSTILE[name].replace("{{", "{").replace("}}", "}")
    return source.replace("{marker!r}", repr(marker)).replace("{marker}", marker)


def contained(sandbox: FeatureSandbox, name: str, tmp_path) -> None:
    """Run a hostile function, then an honest one; the first must be rejected, the second must not notice."""
    source = hostile_source(name, str(tmp_path / "marker"))
    started = time.monotonic()
    result = sandbox.evaluate(source, ROWS)
    if name in HARMLESS:
        assert len(set(result.values)) == 1 or result.rejection
    else:
        assert result.rejection, f"{name} was accepted: {result.values[:3]}"
        assert len(result.rejection) <= 200 and result.rejection.isprintable()
    # Also without the look at the source that comes first: it is a courtesy, the interpreter is the wall.
    with contextlib.suppress(SandboxError):
        sandbox.run(source, "feature", ROWS[:10])
    assert time.monotonic() - started < 30
    assert list(tmp_path.iterdir()) == []
    honest = sandbox.evaluate(HONEST, ROWS[:5])
    assert honest.rejection is None
    assert honest.values.tolist() == [len(prompt) + info["operand_a"] for prompt, info in ROWS[:5]]


def test_there_are_enough_attacks():
    assert len(HOSTILE) >= 60


@pytest.mark.parametrize("name", HOSTILE)
def test_monty_contains(monty, name, tmp_path):
    contained(monty, name, tmp_path)


@needs_wasm
@pytest.mark.slow
@pytest.mark.parametrize("name", HOSTILE)
def test_wasm_contains(wasm, name, tmp_path):
    contained(wasm, name, tmp_path)


def test_arguments_are_copies(monty):
    source = function("info['digits_a'].append(5)\ninfo['new'] = 1\nreturn len(info['digits_a'])")
    assert monty.evaluate(source, ROWS).values.tolist() == [3.0] * len(ROWS)
    assert all(info["digits_a"][1:] == [1] and "new" not in info for _, info in ROWS)


HONEST_FUNCTIONS = {
    "comprehension": "return sum(int(c) for c in prompt if c.isdigit())",
    "regular expression": "return len(re.findall(r'\\d+', prompt))",
    "math": "return math.gcd(int(info['operand_a']), 12)",
    "helper": "def h(x):\n    return x * 2\nreturn h(info['operand_a'])",
    "lambda": "return sorted(prompt, key=lambda c: -ord(c))[0] == '='",
    "none": "return None if info['operand_a'] % 2 else True",
    "string method": "return prompt.count('+') + prompt.find('=')",
    "try": "try:\n    return 1 / info['operand_a']\nexcept ZeroDivisionError:\n    return None",
    "builtins": "return max(map(int, re.findall('[0-9]', prompt))) + len(set(prompt)) + round(2.5) + divmod(7, 2)[1]",
}


@pytest.mark.parametrize("name", HONEST_FUNCTIONS)
def test_honest_functions_get_cpythons_values(monty, name):
    source = function(HONEST_FUNCTIONS[name])
    namespace = {"re": re, "math": math}
    exec(source, namespace)  # our own source
    expected = [namespace["feature"](prompt, dict(info)) for prompt, info in ROWS]
    result = monty.evaluate(source, ROWS)
    assert result.rejection is None
    np.testing.assert_array_equal(result.values, [np.nan if value is None else float(value) for value in expected])


def test_a_few_failures_are_missing_values_and_many_reject(monty):
    few = monty.evaluate(function("return 1 / (info['operand_a'] - 3)"), ROWS)
    assert (few.rejection, few.n_failed, few.failures[0][0]) == (None, 1, 3)
    assert np.isnan(few.values[3])
    many = monty.evaluate(function("return 1 / (0 if info['operand_a'] < 9 else 1)"), ROWS)
    assert "failed on 9 of 60 rows, first: ZeroDivisionError" in many.rejection


def test_batches_do_not_show(monty):
    small = MontySandbox(Limits(seconds_per_batch=0.3, rows_per_batch=7))
    with small:
        np.testing.assert_array_equal(small.evaluate(HONEST, ROWS).values, monty.evaluate(HONEST, ROWS).values)


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("def f(prompt: str, info: dict) -> float:\n    return 1", "f"),
        ("def f(prompt,info):\n    return 1", "f"),
        ("def helper(x):\n    return x\n\ndef feature(prompt: str, info: dict):\n    return 1", "feature"),
        ("def f(\n    prompt: str,\n    info: dict[str, int],\n):\n    return 1", "f"),
        ("def f(x, y):\n    return 1", None),
        ("f = lambda prompt, info: 1", None),
        ("def f(prompt, info, more):\n    return 1", None),
        ("", None),
        ("x" * 9000, None),
    ],
)
def test_the_function_is_found_by_its_parameters(source, name):
    assert function_name(source) == name


def test_results_are_read_without_trust():
    values, failures = read_values([1, True, 2.5, None, float("inf"), 10**400, "ValueError: x\n\x1b[31m"])
    np.testing.assert_array_equal(values, [1, 1, 2.5, np.nan, np.nan, np.nan, np.nan])
    assert failures == [(6, "ValueError: x [31m")]
    for bad in (["type:str"], [[1]], [{"a": 1}], [b"x"]):
        with pytest.raises(SandboxError):
            read_values(bad)
    assert len(safe_message("x" * 10_000)) == 200


@needs_wasm
@pytest.mark.parametrize(
    "body", ["return sum(map(str.isdigit, prompt))", "return next((i for i, c in enumerate(prompt)), -1)"]
)
def test_what_fails_only_on_the_dialect_runs_in_complete_python(monty, wasm, body):
    assert monty.evaluate(function(body), ROWS).rejection
    result = SandboxChain(monty, wasm).evaluate(function(body), ROWS)
    assert (result.rejection, result.backend) == (None, Backend.WASM)


@needs_wasm
def test_complete_python_is_preferred_where_the_two_disagree(monty, wasm):
    # The decimal 2.675 is slightly below 2.675 in binary: CPython rounds down.
    result = SandboxChain(monty, wasm).evaluate(function("return round(2.675, 2)"), ROWS)
    assert (result.backend, result.values[0]) == (Backend.WASM, 2.67)


@needs_wasm
def test_the_fast_one_is_kept_where_they_agree(monty, wasm):
    result = SandboxChain(monty, wasm).evaluate(HONEST, ROWS)
    assert (result.backend, result.rejection) == (Backend.MONTY, None)


def test_a_chain_of_one(monty):
    assert SandboxChain(monty, None).evaluate(HONEST, ROWS).rejection is None
    assert SandboxChain(monty, None).evaluate(function("return 1 / 0"), ROWS).rejection
