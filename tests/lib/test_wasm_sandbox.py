"""CPython in WebAssembly: workers that are used again, rows in parts, limits that do not depend on the machine."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from lib import wasm_sandbox
from lib.feature_sandbox import Limits
from lib.wasm_sandbox import WasmSandbox
from tests.hostile_features import function

pytestmark = pytest.mark.skipif(not WasmSandbox.is_installed(), reason="the WebAssembly interpreter is not installed")

MEMORY = 160 << 20
ROWS = [("x" * number, {"n": np.float64(number)}) for number in range(45)]


@pytest.fixture
def wasm():
    with WasmSandbox(Limits(seconds_per_batch=0.3, memory_bytes=MEMORY)) as sandbox:
        yield sandbox


def test_rows_in_parts_and_features_in_threads(wasm, monkeypatch):
    # A table of 45 rows goes to three guests; short results follow long ones in the same file of results.
    monkeypatch.setattr(wasm_sandbox, "ROWS_PER_GUEST", 20)
    sources = [function(f"return info['n'] * {factor} + len(re.findall('x', prompt))") for factor in (10**9, 1, 2, 3)]
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda source: wasm.evaluate(source, ROWS), sources))
    for result, factor in zip(results, (10**9, 1, 2, 3), strict=True):
        assert result.rejection is None
        assert result.values.tolist() == [number * (factor + 1) for number in range(45)]


def test_a_message_stays_in_its_row(wasm):
    result = wasm.evaluate(function("if info['n'] == 3:\n    raise ValueError('a\\tb\\n!c')\nreturn 1"), ROWS)
    assert (result.rejection, result.failures) == (None, ((3, "ValueError: a b !c"),))
    assert np.isnan(result.values[3])
    assert np.nansum(result.values) == 44


def test_the_order_of_a_set_is_the_same_in_every_guest(wasm):
    source = function("return hash('some text') % 1000003")
    assert wasm.evaluate(source, ROWS[:3]).rejection is None


def test_a_guest_that_does_not_stop_is_stopped_and_the_next_runs(wasm, monkeypatch):
    honest = function("return len(prompt)")
    assert wasm.evaluate(honest, ROWS).rejection is None
    with monkeypatch.context() as patched:
        # Without a limit on instructions, the clock outside is the last resort.
        patched.setattr(wasm_sandbox, "FUEL_PER_SECOND", 10**15)
        patched.setattr(wasm_sandbox, "SECONDS_TO_START", -2.5)
        assert wasm.evaluate(function("while True:\n    pass"), ROWS).rejection == "time limit exceeded"
    assert wasm.evaluate(honest, ROWS).values.tolist() == list(range(45))


def test_a_feature_has_one_budget_for_all_its_rows(monkeypatch):
    monkeypatch.setattr(wasm_sandbox, "ROWS_PER_GUEST", 5)
    busy = function("return sum(i * i for i in range(2000)) * 0 + info['n']")
    # Each part of five rows is quick enough, all nine together are not.
    for seconds, rejection in ((10.0, None), (0.05, "time limit exceeded")):
        with WasmSandbox(Limits(seconds_per_batch=0.3, seconds_per_feature=seconds, memory_bytes=MEMORY)) as sandbox:
            assert sandbox.evaluate(busy, ROWS).rejection == rejection


@pytest.mark.parametrize("character", ["\0", "\udcff"])
def test_text_that_no_program_has(wasm, character):
    assert "characters" in wasm.evaluate(f"def f(prompt, info):\n    return 1{character}\n", ROWS).rejection
