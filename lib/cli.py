"""What every command of the pipeline shares: flags, errors, progress, logging, random streams.

Only the standard library is imported here, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

if TYPE_CHECKING:
    import numpy as np

Item = TypeVar("Item")

DEFAULT_MODEL = "SmolLM2-135M-Instruct"
DEFAULT_SEED = 42


class UserError(Exception):
    """A mistake the user can mend: says what is wrong, where, and what to do. Printed as one line, exit code 2."""


class Report:
    """What a command tells its user: lines on stdout, progress bars on stderr."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet

    def line(self, text: str = "") -> None:
        """Print one line (also with `--quiet`: results are not chatter)."""
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()

    def heading(self, text: str) -> None:
        """Print a title line."""
        self.line(f"==== {text} ====")

    def progress(
        self, iterable: Iterable[Item], *, total: int | None = None, unit: str = "it", desc: str | None = None
    ) -> Iterator[Item]:
        """Iterate with a progress bar and an estimate of the time left, silent with `--quiet`."""
        return progress(iterable, total=total, unit=unit, desc=desc, quiet=self.quiet)

    @contextmanager
    def counter(
        self, *, total: int | None = None, unit: str = "it", desc: str | None = None
    ) -> Iterator[Callable[[int], None]]:
        """A progress bar that grows by what its caller reports, for work that is done in pieces of any size."""
        from tqdm import tqdm

        with tqdm(total=total, unit=unit, desc=desc, disable=self.quiet, mininterval=0.5, dynamic_ncols=True) as bar:

            def advance(n: int) -> None:
                bar.update(n)

            yield advance


def progress(
    iterable: Iterable[Item],
    *,
    total: int | None = None,
    unit: str = "it",
    desc: str | None = None,
    quiet: bool = False,
) -> Iterator[Item]:
    """Iterate with a tqdm bar on stderr."""
    from tqdm import tqdm

    return iter(tqdm(iterable, total=total, unit=unit, desc=desc, disable=quiet, mininterval=0.5, dynamic_ncols=True))


def derived_seed(seed: int, *labels: object) -> int:
    """A 31-bit seed that depends on `seed` and the labels only, for libraries that take an integer."""
    text = "\x1f".join([str(int(seed)), *map(str, labels)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") & 0x7FFFFFFF


def rng(seed: int, *labels: object) -> np.random.Generator:
    """An independent random stream for (seed, labels): adding a rule or a neuron changes no other's stream."""
    import numpy as np

    text = "\x1f".join([str(int(seed)), *map(str, labels)])
    words = np.frombuffer(hashlib.sha256(text.encode()).digest(), dtype=np.uint32)
    return np.random.default_rng(np.random.SeedSequence(words.tolist()))


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """`--seed`, `--force`, `--quiet`: in every command."""
    group = parser.add_argument_group("run")
    group.add_argument(
        "--seed", "--random_seed", dest="seed", type=int, default=DEFAULT_SEED, help="seed of every random choice"
    )
    group.add_argument("--force", action="store_true", help="run again even when matching output is there")
    group.add_argument("--quiet", action="store_true", help="no progress bars")


def add_model_arguments(parser: argparse.ArgumentParser, *, default_batch_size: int = 64) -> None:
    """The analysed model and how it is run."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--ai_model",
        default=DEFAULT_MODEL,
        help="hub id (with @step<N> for a revision), local folder, .gguf file, or the packaged default",
    )
    group.add_argument("--ai_model_cache_dir", default=None, help="folder for downloaded or converted weights")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:<N>")
    group.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="weights' type")
    group.add_argument(
        "--batch_size",
        type=positive_int,
        default=default_batch_size,
        help="prompts per forward pass; changes speed and memory, not results",
    )


def add_task_arguments(parser: argparse.ArgumentParser) -> None:
    """The task whose behaviour is studied."""
    group = parser.add_argument_group("task")
    group.add_argument("--task_module", default="lib.tasks.arithmetic_task", help="module that exposes TASK_SPEC")


def positive_int(text: str) -> int:
    """argparse type: an integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a positive integer")
    return value


def count(text: str) -> int:
    """argparse type: an integer of at least 0."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is negative")
    return value


def finite(text: str) -> float:
    """argparse type: a number that is neither infinite nor NaN."""
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number")
    return value


def share(text: str) -> float:
    """argparse type: a number from 0 to 1."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def size_or_share(text: str) -> int | float:
    """argparse type: a number of units, or a share of all candidates such as 0.05 (with a point: 1.0 is all)."""
    value = float(text) if "." in text else int(text)
    if value <= 0 or (isinstance(value, float) and not value <= 1):
        raise argparse.ArgumentTypeError(f"{text} is neither a positive number of units nor a share between 0 and 1")
    return value


def positive_share(text: str) -> float:
    """argparse type: a number above 0, at most 1."""
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not in (0, 1]")
    return value


def require_file(path: str | Path, what: str, hint: str) -> Path:
    """The path, if a file is there; else a `UserError` naming `what` and giving the `hint`."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{what} not found: {path}; {hint}")
    return path


def require_dir(path: str | Path, what: str, hint: str) -> Path:
    """The path, if a folder is there; else a `UserError` naming `what` and giving the `hint`."""
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{what} not found: {path}; {hint}")
    return path


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults after each flag, the description as written."""


class CommandParser(argparse.ArgumentParser):
    """Refuses abbreviated flags, and says a mistake in one line instead of after a screen of usage."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **options})

    def error(self, message: str) -> NoReturn:
        """End the command with exit code 2."""
        self.exit(2, f"error: {' '.join(message.split())}; see --help\n")


def build_parser(
    add_arguments: Callable[[argparse.ArgumentParser], None], description: str | None
) -> argparse.ArgumentParser:
    """The parser of one command: its own flags and the shared run flags; abbreviations are refused."""
    parser = CommandParser(description=description, formatter_class=_Formatter)
    add_arguments(parser)
    add_run_arguments(parser)
    return parser


def stage_main(
    add_arguments: Callable[[argparse.ArgumentParser], None],
    run: Callable[[argparse.Namespace, Report], int | None],
    *,
    description: str | None,
) -> Callable[[list[str] | None], int]:
    """A command's `main(argv=None)`: parses, runs, turns a `UserError` into one line and exit code 2."""

    def main(argv: list[str] | None = None) -> int:
        def parse_and_run() -> int | None:
            args = build_parser(add_arguments, description).parse_args(argv)
            logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
            return run(args, Report(quiet=args.quiet))

        return exit_code(parse_and_run)

    return main


def exit_code(action: Callable[[], int | None]) -> int:
    """The exit code of a command's action; a `UserError` or Ctrl-C is told in one line."""
    try:
        return int(action() or 0)
    except UserError as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; run the same command again to continue\n")
        return 130
    except BrokenPipeError:
        # The reader of our output (head, less) has left: nobody to tell.
        sys.stderr.close()
        return 141
