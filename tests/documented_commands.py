"""The commands of the documentation, found in its pages and taken apart by a real shell.

A command stands in a fenced block, or inline between backticks where it begins with one of `PROGRAMS`. A shell runs
them with stand-ins for every program, which note how they were called: variables, quotes, continued lines and arrays
mean here what they mean to the reader. `<placeholders>` become words.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from lib.reporting.naming import MAIN_RUN
from tests.scripts import REPOSITORY

PAGES = ("README.md", "ARTIFACTS.md", "SECURITY.md", "docs/*.md", "benchmarks/RESULTS.md")
PROGRAMS = ("python", "python3", "bash", "sbatch", "unzip", "brew", "pip", "ollama", ".")
VARIABLES = ("TASKS", "MODELS", "MODES", "EXTRA_FLAGS", "BASE_SIZE", "SIZES", "RATES", "CANDIDATE_INTERVENTION",
             "MEAN_POINTS", "OUT_ROOT", "HF_HUB_OFFLINE")  # fmt: skip
"""What a command may be told in its environment."""
NAMES = {"task": "arithmetic", "model": "Tiny", "run": MAIN_RUN, "name": MAIN_RUN, "name of the run": MAIN_RUN}
"""Placeholders that stand for names."""

_FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.M | re.S)
_INLINE = re.compile(r"`([^`]+)`")
_PLACEHOLDER = re.compile(r"<([^<>\n]+)>")
_COMMAND = re.compile(rf"(\w+=\S+ )*({'|'.join(map(re.escape, PROGRAMS))}) +\S")
_INTERPRETER = re.compile(r"(.*/)?(python[\d.]*|bash)")
_STAND_IN = """#!/bin/sh
for name in VARIABLES; do
    eval "value=\\${$name-}"
    [ -z "$value" ] || printf '%s=%s\\0' "$name" "$value" >>"$CALLS"
done
printf '\\1\\0' >>"$CALLS"
printf '%s\\0' "${0##*/}" "$@" >>"$CALLS"
printf '\\2\\0' >>"$CALLS"
"""


@dataclass(frozen=True)
class Call:
    """One program as a documented command calls it. environment: those of `VARIABLES` that are set."""

    page: str
    words: tuple[str, ...]
    environment: tuple[tuple[str, str], ...] = ()

    @property
    def program(self) -> str:
        """What is run: the script, the shell script or the module behind the interpreter, else the program itself."""
        first, *others = self.words
        if _INTERPRETER.fullmatch(first) and others:
            return others[1] if others[0] == "-m" else others[0]
        return first

    @property
    def arguments(self) -> list[str]:
        """What the program is given."""
        return list(self.words[self.words.index(self.program) + 1 :])

    def __str__(self) -> str:
        return " ".join([*(f"{name}={value}" for name, value in self.environment), *self.words])


def commands_of(text: str) -> list[str]:
    """Shell texts of a page, in order: fenced blocks of commands, then inline commands."""
    blocks = [match for match in _FENCE.finditer(text) if match[2] == "bash" or _is_typed(match[2], match[3])]
    rest = _FENCE.sub("", text)
    inline = [" ".join(match[1].split()) + "\n" for match in _INLINE.finditer(rest)]
    return [match[3] for match in blocks] + [command for command in inline if _COMMAND.match(command)]


def _is_typed(language: str, block: str) -> bool:
    """A block without a language in which each line is a command."""
    return not language and all(_COMMAND.match(line) for line in block.splitlines())


def word_of(placeholder: str) -> str:
    """What stands for `<placeholder>`: a name that the tests' worlds have, else a word made of it."""
    return NAMES.get(placeholder) or re.sub(r"\W+", "_", placeholder).strip("_")


def calls_of(commands: list[str], page: str, folder: Path) -> list[Call]:
    """What a shell calls for these texts; each runs in an own one, with nothing but stand-ins to find.

    Raises:
        AssertionError: the shell finds a mistake, or a program that is no stand-in.
    """
    shims, log, bash = folder / "programs", folder / "calls", shutil.which("bash")
    (folder / ".env/bin").mkdir(parents=True, exist_ok=True)
    (folder / ".env/bin/activate").write_text("activate\n")
    shims.mkdir(exist_ok=True)
    for name in (*PROGRAMS[:-1], "activate"):
        (shims / name).write_text(_STAND_IN.replace("VARIABLES", " ".join(VARIABLES)))
        (shims / name).chmod(0o755)
    log.write_text("")
    environment = {"PATH": str(shims), "CALLS": str(log), "SLURM_ARRAY_TASK_ID": "5"}
    for command in commands:
        text = _PLACEHOLDER.sub(lambda match: word_of(match[1]), command)
        done = subprocess.run([str(bash), "-e", "-u", "-c", text], cwd=folder, env=environment, capture_output=True)
        assert done.returncode == 0, f"{page}: {command}{os.fsdecode(done.stderr)}"
    return [_call(page, record) for record in log.read_text().split("\2\0") if record]


def _call(page: str, record: str) -> Call:
    variables, _, words = record.partition("\1\0")
    pairs = [line.split("=", 1) for line in variables.split("\0") if line]
    return Call(page, tuple(words.split("\0")[:-1]), tuple((name, value) for name, value in pairs))


@cache
def documented_calls(folder: Path) -> tuple[Call, ...]:
    """Every call of every page; equal ones once, under the first page that has it."""
    found: dict[tuple, Call] = {}
    for pattern in PAGES:
        for path in sorted(REPOSITORY.glob(pattern)):
            page = path.relative_to(REPOSITORY).as_posix()
            for call in calls_of(commands_of(path.read_text(encoding="utf-8")), page, folder):
                found.setdefault((call.words, call.environment), call)
    return tuple(found.values())


def documented_module(page: str, name: str) -> str:
    """The Python block that a page marks as the file of that name."""
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    found = re.search(rf"<!-- example: {re.escape(name)} -->\n```python\n(.*?)```", text, re.S)
    assert found, f"{page} has no block {name}"
    return found[1]
