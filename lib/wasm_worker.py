"""Child process of `lib.wasm_sandbox`: runs one guest program in WebAssembly and hands on its output.

Arguments: compiled interpreter, job file (the guest's standard input), fuel, memory in bytes, output in bytes, program.
"""

from __future__ import annotations

import sys

import wasmtime


class _TooMuch(Exception):
    """The guest wrote more than it may."""


def main(compiled: str, job: str, fuel: str, memory: str, max_output: str, program: str) -> int:
    """Run the guest; 0 if it ended by itself."""
    output, limit = bytearray(), int(max_output)

    def collect(data: bytes) -> int:
        if len(output) + len(data) > limit:
            raise _TooMuch
        output.extend(data)
        return len(data)

    config = wasmtime.Config()
    config.consume_fuel = True
    engine = wasmtime.Engine(config)
    linker = wasmtime.Linker(engine)
    linker.define_wasi()
    wasi = wasmtime.WasiConfig()
    wasi.argv = ["python", "-I", "-S", "-c", program]
    wasi.stdin_file = job
    wasi.stdout_custom = collect
    wasi.stderr_custom = lambda data: len(data)
    store = wasmtime.Store(engine)
    store.set_wasi(wasi)
    store.set_fuel(int(fuel))
    store.set_limits(memory_size=int(memory), instances=8, tables=8, memories=2)
    try:
        instance = linker.instantiate(store, wasmtime.Module.deserialize_file(engine, compiled))
        instance.exports(store)["_start"](store)
    except wasmtime.ExitTrap as ended:
        if ended.code:
            return _say("the interpreter ended with an error (memory limit?)")
    except wasmtime.Trap as trap:
        return _say("time limit exceeded" if "fuel" in str(trap) else f"the interpreter stopped: {trap.message[:100]}")
    except _TooMuch:
        return _say("output limit exceeded")
    except wasmtime.WasmtimeError as error:
        return _say(f"the interpreter stopped: {str(error)[:100]}")
    sys.stdout.buffer.write(output)
    return 0


def _say(text: str) -> int:
    sys.stderr.write(text)
    return 1


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
