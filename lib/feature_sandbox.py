"""Running feature functions that a language model wrote: never in this process, never without limits.

Two backends with one interface. `monty` is a Python interpreter in Rust with a pool of worker processes: no files, no
network, no processes, exact limits of time and memory; it speaks a subset of Python. `wasm` is CPython compiled to
WebAssembly (see `lib.wasm_sandbox`): slower, and complete. `SandboxChain` asks monty first, and wasm where a function
fails only because of the dialect or where the two disagree.

A function is rejected, with the reason, if it does not compile, exceeds a limit, gives something that is no number,
fails on more than a few rows, has no value anywhere, or gives other values when it is asked again.
"""

from __future__ import annotations

import re
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from enum import Enum
from types import TracebackType
from typing import Any, Self

import numpy as np

from lib.cli import UserError

Row = tuple[str, dict[str, Any]]
"""A prompt and its `info`: text, numbers, booleans, None, and lists and dictionaries of them."""

MAX_SOURCE_CHARACTERS = 8_000
MAX_FAILED_SHARE = 0.05
N_CHECKED_ROWS = 50
MAX_MESSAGE_CHARACTERS = 200
_ANNOTATION = r"(?:\[[^\[\]()=]*\]|[^,()=\[\]])*"
_HEADER = re.compile(rf"^def[ \t]+([A-Za-z_]\w*)[ \t]*\([ \t\n]*prompt\b{_ANNOTATION},[ \t\n]*info\b{_ANNOTATION},?"
                     r"[ \t\n]*\)", re.MULTILINE)
_INTERNALS = re.compile(r"__\w*|\.(?:gi|tb|cr|ag|co)_[a-z]+|\.f_(?:back|globals|locals|builtins|code)\b")
"""Names that no feature needs: a clearer reason than the sandbox would give. The sandbox is the boundary, not this."""
_DIALECT = re.compile(r"NotImplementedError|ModuleNotFoundError|ImportError|AttributeError|NameError|SyntaxError|"
                      r"PatternError|not an iterator|not supported|unsupported|unexpected keyword", re.I)


class Backend(Enum):
    """What ran a feature."""

    MONTY = "monty"
    """A Python interpreter in Rust; a subset of Python."""

    WASM = "wasm"
    """CPython in WebAssembly."""


@dataclass(frozen=True)
class Limits:
    """What one feature may use."""

    seconds_per_batch: float = 2.0
    seconds_per_feature: float = 300.0
    rows_per_batch: int = 1000
    memory_bytes: int = 64 << 20
    output_bytes: int = 64 << 10
    """Printed text; results are numbers."""


@dataclass(frozen=True)
class SandboxResult:
    """What a function gave.

    values: float64 [row], NaN where it gave None, failed, or gave NaN or an infinity. failures: row number and message
    of the first few rows where it failed. rejection: why the function cannot be used, or None.
    """

    values: np.ndarray
    n_failed: int
    failures: tuple[tuple[int, str], ...]
    rejection: str | None
    backend: Backend

    @property
    def may_be_dialect(self) -> bool:
        """True if what failed may work in complete Python."""
        messages = [message for _, message in self.failures] + ([self.rejection] if self.rejection else [])
        return any(_DIALECT.search(message) for message in messages)


def function_name(source: str) -> str | None:
    """The name of the last top-level function with the two parameters `prompt` and `info`, or None.

    Read from the text: nothing of an untrusted source is parsed or compiled in this process.
    """
    found = _HEADER.findall(source) if len(source) <= MAX_SOURCE_CHARACTERS else []
    return found[-1] if found else None


def safe_message(text: object) -> str:
    """A message from inside a sandbox, as one short printable line."""
    start = str(text)[:4 * MAX_MESSAGE_CHARACTERS]
    printable = "".join(character if character.isprintable() else " " for character in start)
    return " ".join(printable.split())[:MAX_MESSAGE_CHARACTERS]


class SandboxError(Exception):
    """A function cannot be used; the message is the reason."""


class FeatureSandbox(ABC):
    """One way to run untrusted feature functions. Use as a context manager."""

    backend: Backend

    def __init__(self, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        """Stop what runs."""
        return None

    @abstractmethod
    def run(self, source: str, name: str, rows: Sequence[Row]) -> list[Any]:
        """What the driver gives per row: a number, None, or a text that tells why there is none.

        Raises:
            SandboxError: the source does not compile or a limit was exceeded.
        """

    def evaluate(self, source: str, rows: Sequence[Row]) -> SandboxResult:
        """Values of the function in `source` on all rows, and whether it can be used."""
        nothing = np.full(len(rows), np.nan)
        if len(source) > MAX_SOURCE_CHARACTERS:
            return self._rejected(nothing, f"longer than {MAX_SOURCE_CHARACTERS} characters")
        name = function_name(source)
        if name is None:
            return self._rejected(nothing, "no top-level function with the parameters (prompt, info)")
        internals = _INTERNALS.search(source)
        if internals:
            return self._rejected(nothing, f"reaches for Python's internals ({internals[0]})")
        try:
            result = self._judged(*read_values(self.run(source, name, rows)))
            if result.rejection is None:
                self._check_repeatable(source, name, rows, result.values)
        except SandboxError as error:
            return self._rejected(nothing, str(error))
        return result

    def _rejected(self, values: np.ndarray, reason: str) -> SandboxResult:
        return SandboxResult(values, 0, (), safe_message(reason), self.backend)

    def _judged(self, values: np.ndarray, failures: list[tuple[int, str]]) -> SandboxResult:
        """The result with its rejection, if the values are not good enough."""
        rejection = None
        if len(failures) > MAX_FAILED_SHARE * len(values):
            rejection = safe_message(f"failed on {len(failures)} of {len(values)} rows, first: {failures[0][1]}")
        elif not np.isfinite(values).any():
            rejection = "gave no finite number on any row"
        return SandboxResult(values, len(failures), tuple(failures[:5]), rejection, self.backend)

    def _check_repeatable(self, source: str, name: str, rows: Sequence[Row], values: np.ndarray) -> None:
        """Ask again for some rows, backwards and in a fresh interpreter: only a function of its row gives the same.

        Raises:
            SandboxError: it gave other values.
        """
        chosen = checked_rows(len(rows))[::-1]
        again, _ = read_values(self.run(source, name, [rows[index] for index in chosen]))
        if not np.array_equal(again, values[chosen], equal_nan=True):
            raise SandboxError("gave other values when asked again: not a function of its row")


def checked_rows(n_rows: int) -> np.ndarray:
    """Up to `N_CHECKED_ROWS` row numbers, evenly spread."""
    return np.unique(np.linspace(0, n_rows - 1, min(N_CHECKED_ROWS, n_rows)).astype(int))


def read_values(raw: Sequence[Any]) -> tuple[np.ndarray, list[tuple[int, str]]]:
    """Values [row] and failures from what a driver gave; nothing about its content is trusted.

    Raises:
        SandboxError: a result is no number.
    """
    values = np.full(len(raw), np.nan)
    failures: list[tuple[int, str]] = []
    for index, item in enumerate(raw):
        if isinstance(item, bool | int | float):
            try:
                value = float(item)
            except OverflowError:
                continue
            values[index] = value if np.isfinite(value) else np.nan
        elif isinstance(item, str):
            if item.startswith("type:"):
                raise SandboxError(f"gave a result of type {safe_message(item[5:])} instead of a number")
            failures.append((index, safe_message(item)))
        elif item is not None:
            raise SandboxError("gave a result that is no number")
    return values, failures


# The driver runs inside a sandbox, behind the untrusted source, which may have redefined any name: it can only spoil
# its own results, which `read_values` checks.
DRIVER = """
def __feature_driver(rows):
    results = []
    for prompt, info in rows:
        try:
            value = {name}(prompt, info)
            if value is None or isinstance(value, (bool, float)):
                results.append(value)
            elif isinstance(value, int):
                results.append(float(value))
            else:
                results.append('type:' + type(value).__name__)
        except OverflowError:
            results.append(None)
        except Exception as error:
            try:
                text = type(error).__name__ + ': ' + str(error)[:200]
            except Exception:
                text = 'an error without a text'
            results.append(text)
    return results
"""
PRELUDE = "import math\nimport re\n"


class MontySandbox(FeatureSandbox):
    """Functions in worker processes of `pydantic_monty`; a fresh interpreter for each call of `run`."""

    backend = Backend.MONTY

    def __init__(self, limits: Limits | None = None) -> None:
        super().__init__(limits)
        try:
            import pydantic_monty
        except ImportError:
            raise UserError("the sandbox for proposed features is not installed; run: bash setup.sh") from None
        self._monty = pydantic_monty
        # The parent's own deadline: a worker that does not stop by itself is killed.
        self._pool = pydantic_monty.Monty(request_timeout=self.limits.seconds_per_batch + 5)

    def __enter__(self) -> Self:
        self._pool.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self._pool.__exit__(kind, error, trace)

    def run(self, source: str, name: str, rows: Sequence[Row]) -> list[Any]:
        """Evaluate in batches, so that one slow row costs little."""
        results: list[Any] = []
        limits = {"max_feed_duration_secs": self.limits.seconds_per_batch, "max_memory": self.limits.memory_bytes}
        # Time stands still and chance is fixed: what a feature gives must not depend on when it is asked. A sleep would
        # not count as running, so there is none.
        policy = {"sleep": "zero", "datetime": datetime(2000, 1, 1), "random_start": {"seed": 0}}
        started = time.monotonic()
        try:
            with self._pool.checkout(limits=limits, os_policy=policy) as session:
                self._feed(session, PRELUDE + source)
                self._feed(session, DRIVER.format(name=name))
                for start in range(0, len(rows), self.limits.rows_per_batch):
                    batch = list(map(list, rows[start:start + self.limits.rows_per_batch]))
                    got = self._feed(session, "__feature_driver(__rows)", {"__rows": batch})
                    if not isinstance(got, list) or len(got) != len(batch):
                        raise SandboxError("tampered with its results")
                    results += got
                    if time.monotonic() - started > self.limits.seconds_per_feature:
                        raise SandboxError(f"more than {self.limits.seconds_per_feature:g} s on all rows")
        except self._monty.MontyError as error:
            raise SandboxError(safe_message(error)) from None
        return results

    def _feed(self, session: Any, code: str, inputs: dict[str, Any] | None = None) -> Any:
        printed = self._monty.CollectString(max_bytes=self.limits.output_bytes)
        return session.feed_run(code, inputs=inputs, print_callback=printed)


class SandboxChain:
    """Monty first; complete Python for what fails only on the dialect, and where the two disagree."""

    def __init__(self, first: FeatureSandbox, second: FeatureSandbox | None) -> None:
        self.first, self.second = first, second

    def evaluate(self, source: str, rows: Sequence[Row]) -> SandboxResult:
        """The better of the two backends' results."""
        result = self.first.evaluate(source, rows)
        if self.second is None:
            return result
        if result.rejection is not None or result.failures:
            if not result.may_be_dialect:
                return result
            complete = self.second.evaluate(source, rows)
            # What neither can run keeps the first reason: it is the one that names the function's own mistake.
            return result if complete.rejection is not None and result.rejection is not None else complete
        return result if self._agree(source, rows, result) else self.second.evaluate(source, rows)

    def _agree(self, source: str, rows: Sequence[Row], result: SandboxResult) -> bool:
        """True if the second backend gives the same values on some rows."""
        chosen = checked_rows(len(rows))
        try:
            values, _ = read_values(self.second.run(source, function_name(source), [rows[index] for index in chosen]))
        except SandboxError:
            return False
        return bool(np.allclose(values, result.values[chosen], rtol=1e-9, atol=1e-12, equal_nan=True))


def with_fallback(limits: Limits | None = None) -> tuple[MontySandbox, FeatureSandbox | None]:
    """Monty, and WebAssembly if it is installed; both still to be entered."""
    from lib.wasm_sandbox import WasmSandbox

    limits = limits or Limits()
    # The complete interpreter needs memory of its own before a function is run.
    wasm_limits = replace(limits, memory_bytes=limits.memory_bytes + WasmSandbox.OWN_MEMORY_BYTES)
    return MontySandbox(limits), WasmSandbox(wasm_limits) if WasmSandbox.is_installed() else None
