"""Child process of `lib.wasm_sandbox`: runs one guest program in WebAssembly.

Arguments: compiled interpreter, job file (the guest's standard input), result file (its standard output), fuel, memory
in bytes, largest result in bytes, program.
"""

from __future__ import annotations

import resource
import sys

import wasmtime


def main(compiled: str, job: str, result: str, fuel: str, memory: str, max_output: str, program: str) -> int:
    """Run the guest; 0 if it ended by itself."""
    # The kernel refuses to let any file grow beyond this, so a flood of output cannot fill the disk.
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(max_output), int(max_output)))
    config = wasmtime.Config()
    config.consume_fuel = True
    engine = wasmtime.Engine(config)
    linker = wasmtime.Linker(engine)
    linker.define_wasi()
    wasi = wasmtime.WasiConfig()
    wasi.argv = ["python", "-I", "-S", "-c", program]
    wasi.stdin_file = job
    wasi.stdout_file = result
    store = wasmtime.Store(engine)
    store.set_wasi(wasi)
    store.set_fuel(int(fuel))
    store.set_limits(memory_size=int(memory), instances=8, tables=8, memories=2)
    try:
        instance = linker.instantiate(store, wasmtime.Module.deserialize_file(engine, compiled))
        instance.exports(store)["_start"](store)
    except wasmtime.ExitTrap as ended:
        return _say("the interpreter ended with an error (memory or output limit?)") if ended.code else 0
    except wasmtime.Trap as trap:
        return _say("time limit exceeded" if "fuel" in str(trap) else f"the interpreter stopped: {trap.message[:100]}")
    except wasmtime.WasmtimeError as error:
        return _say(f"the interpreter stopped: {str(error)[:100]}")
    return 0


def _say(text: str) -> int:
    sys.stderr.write(text)
    return 1


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
