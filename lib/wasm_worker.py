"""Child process of `lib.wasm_sandbox`: runs guest programs in WebAssembly, one after another.

Its argument is the compiled interpreter. Each line of standard input is a job as JSON (program, arguments, file of the
rows, file of the result, fuel, memory and largest result in bytes); the answer to each is a line with the error, empty
if the guest ended by itself, and the fuel used. Guests share nothing: each has a store of its own.
"""

from __future__ import annotations

import json
import resource
import sys
from typing import Any

import wasmtime

GUEST_ENVIRONMENT = {"PYTHONHASHSEED": "0"}
"""The only environment of a guest: the order of a set of texts must not change from run to run."""


def main(compiled: str) -> int:
    """Serve jobs until the parent closes the pipe."""
    config = wasmtime.Config()
    config.consume_fuel = True
    engine = wasmtime.Engine(config)
    linker = wasmtime.Linker(engine)
    linker.define_wasi()
    module = wasmtime.Module.deserialize_file(engine, compiled)
    _, hard_limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    for line in sys.stdin:
        job = json.loads(line)
        # The kernel refuses to let any file grow beyond this, so a flood of output cannot fill the disk.
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["max_output"], hard_limit))
        store = _store(engine, job)
        error = _run(store, linker, module)
        reply = {"error": error, "fuel": job["fuel"] - store.get_fuel()}
        store.close()
        sys.stdout.write(json.dumps(reply) + "\n")
        sys.stdout.flush()
    return 0


def _store(engine: wasmtime.Engine, job: dict[str, Any]) -> wasmtime.Store:
    """What one guest lives in: its memory, its files and its limits."""
    wasi = wasmtime.WasiConfig()
    wasi.argv = ["python", "-s", "-S", "-P", "-c", job["program"], *job["arguments"]]
    wasi.env = list(GUEST_ENVIRONMENT.items())
    wasi.stdin_file = job["rows"]
    wasi.stdout_file = job["result"]
    store = wasmtime.Store(engine)
    store.set_wasi(wasi)
    store.set_fuel(job["fuel"])
    store.set_limits(memory_size=job["memory"], instances=8, tables=8, memories=2)
    return store


def _run(store: wasmtime.Store, linker: wasmtime.Linker, module: wasmtime.Module) -> str:
    """Run a guest to its end; why it did not end well, or nothing."""
    try:
        linker.instantiate(store, module).exports(store)["_start"](store)
    except wasmtime.ExitTrap as ended:
        return "the interpreter ended with an error (memory or output limit?)" if ended.code else ""
    except wasmtime.Trap as trap:
        return "time limit exceeded" if "fuel" in str(trap) else f"the interpreter stopped: {trap.message[:100]}"
    except wasmtime.WasmtimeError as error:
        return f"the interpreter stopped: {str(error)[:100]}"
    return ""


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
