"""Where artifacts go and how they are written and read: atomically, checked, one reader and one writer per format.

Nothing half-written is ever read as whole: files appear by renaming, and a stage's record, written last, holds the
digest of each output. Pickles are read without allowing any class.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import os
import pickle
import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.atomic_files import atomic_write
from lib.cli import UserError
from lib.plain_pickle import load_plain

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from matplotlib.figure import Figure

SCHEMA_VERSION = 1
# What a spreadsheet takes for a formula; a number is none.
_FORMULA = re.compile(r"(?![-+]?[0-9.]+(?:[eE][-+]?[0-9]+)?\Z)\s*[=+\-@\t\r]")
# Versions that can change numbers; other packages only change speed or looks.
_FINGERPRINTED_PACKAGES = ("torch", "transformers", "xgboost", "scikit-learn", "numpy", "pandas")


# ---------------------------------------------------------------- paths


def model_slug(ai_model: str) -> str:
    """The path piece that stands for a model: `org/model` is kept, a local folder or .gguf gives its base name."""
    if not ai_model.strip():
        raise UserError("the model has no name; give a hub id, a folder or a .gguf file")
    path = Path(ai_model).expanduser()
    is_local = path.exists() or ai_model.endswith(".gguf") or ai_model.startswith(("/", ".", "~"))
    name = (path.resolve().name if is_local else ai_model).removesuffix(".gguf")
    pieces = [re.sub(r"[^0-9A-Za-z._@+-]+", "_", piece) for piece in name.split("/")]
    if not pieces or any(piece in ("", ".", "..") for piece in pieces):
        raise UserError(
            f"cannot make a folder name from the model {ai_model!r}; give a hub id, a folder or a .gguf file"
        )
    return "/".join(pieces)


def path_piece(name: Any, where: str | Path) -> str:
    """A name out of a file, if it can be the name of one file or folder; `where` is the file it stands in.

    Raises:
        UserError: it would lead elsewhere.
    """
    if not isinstance(name, str) or not re.fullmatch(r"(?!\.)[^/\\\x00-\x1f:]{1,120}", name):
        raise UserError(f"{where} holds the name {name!r}, which cannot be part of a file name; nothing was written")
    return name


# ---------------------------------------------------------------- writing and reading


@contextlib.contextmanager
def expecting(what: str, path: str | Path) -> Iterator[None]:
    """Around code that picks a file's content apart: content of another shape becomes one line."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(f"{path} is not {what} ({reason}); run the stage that writes it again") from error


def plain(value: Any) -> Any:
    """`value` with numpy scalars and arrays as Python ones, paths as text, NaN and infinities as None: strict JSON."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, bool | int | str) or value is None:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Path):
        return value.as_posix()
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    raise TypeError(f"{type(value).__name__} has no JSON form: {value!r}")


def json_text(value: Any, *, indent: int | None = 2) -> str:
    """Strict JSON text of `value` (see `plain`), keys in the order given."""
    separators = (",", ":") if indent is None else (",", ": ")
    return json.dumps(plain(value), indent=indent, ensure_ascii=False, allow_nan=False, separators=separators)


def write_json(path: str | Path, value: Any, *, indent: int | None = 2) -> None:
    """Write strict JSON, atomically."""
    with atomic_write(path) as handle:
        handle.write(json_text(value, indent=indent) + "\n")


def read_json(path: str | Path, what: str) -> Any:
    """Read JSON; bare NaN tokens of older writers become None. `what` names the file in error messages."""
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda _: None)
    except FileNotFoundError:
        raise UserError(f"{what} not found: {path}; run the stage that writes it") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{what} cannot be read: {path} ({error}); delete it and run the stage that writes it"
        ) from None


def write_jsonl(path: str | Path, records: Iterable[Any]) -> None:
    """Write one strict JSON value per line, atomically."""
    with atomic_write(path) as handle:
        for record in records:
            handle.write(json_text(record, indent=None) + "\n")


def read_jsonl(path: str | Path, what: str) -> list[Any]:
    """Read one JSON value per line. `what` names the file in error messages."""
    path = Path(path)
    try:
        with open(path, encoding="utf-8", newline="\n") as handle:
            return [json.loads(line) for line in handle]
    except FileNotFoundError:
        raise UserError(f"{what} not found: {path}; run the stage that writes it") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{what} cannot be read: {path} ({error}); delete it and run the stage that writes it"
        ) from None


def write_csv(path: str | Path, frame: pd.DataFrame) -> None:
    """Write a table: no index, "\\n" line ends, floats with all their digits, atomically."""
    import csv

    # Up to Python 3.12 a carriage return alone does not make the csv module quote a cell, and would end its row.
    texts = frame.select_dtypes(exclude=["number", "bool"])
    has_return = any(isinstance(cell, str) and "\r" in cell for name in texts for cell in texts[name])
    quoting = csv.QUOTE_NONNUMERIC if has_return else csv.QUOTE_MINIMAL
    with atomic_write(path) as handle:
        frame.to_csv(handle, index=False, lineterminator="\n", quoting=quoting)


def without_formulas(frame: pd.DataFrame) -> pd.DataFrame:
    """The table for people: a text that a spreadsheet would run as a formula gets an apostrophe in front.

    For tables that no stage reads again. What stages exchange stays as it is, to the last byte.
    """

    def harmless(cell: Any) -> Any:
        return f"'{cell}" if isinstance(cell, str) and _FORMULA.match(cell) else cell

    safe = frame.rename(columns=harmless)
    for place, kind in enumerate(frame.dtypes):
        if kind.kind not in "biufcmM":
            safe.isetitem(place, frame.iloc[:, place].map(harmless))
    return safe


def read_csv(path: str | Path, what: str, **options: Any) -> pd.DataFrame:
    """Read a table with `pandas.read_csv` options; floats come back exactly as written."""
    import pandas as pd

    path = Path(path)
    try:
        return pd.read_csv(path, **options)
    except FileNotFoundError:
        raise UserError(f"{what} not found: {path}; run the stage that writes it") from None
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{what} cannot be read: {path} ({reason}); delete it and run the stage that writes it"
        ) from None


def read_npy(path: str | Path, what: str, *, mmap: bool = False) -> np.ndarray:
    """Read a `.npy` file without allowing objects; `mmap` leaves the data on disk."""
    import numpy as np

    with _array_errors(path, what):
        return np.load(path, mmap_mode="r" if mmap else None, allow_pickle=False)


def write_npz(path: str | Path, **arrays: np.ndarray) -> None:
    """Write named arrays, compressed, byte for byte the same for the same content."""
    import zipfile

    import numpy as np

    with atomic_write(path, "wb") as handle, zipfile.ZipFile(handle, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sorted(arrays):
            buffer = io.BytesIO()
            np.lib.format.write_array(buffer, np.asanyarray(arrays[name]), allow_pickle=False)
            # A fixed date: numpy's own writer stamps the current time.
            archive.writestr(
                zipfile.ZipInfo(f"{name}.npy", (1980, 1, 1, 0, 0, 0)),
                buffer.getvalue(),
                compress_type=zipfile.ZIP_DEFLATED,
            )


def read_npz(path: str | Path, what: str) -> dict[str, np.ndarray]:
    """Read all arrays of a `.npz` file without allowing objects."""
    import numpy as np

    with _array_errors(path, what), np.load(path, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


@contextlib.contextmanager
def _array_errors(path: str | Path, what: str) -> Iterator[None]:
    import zipfile
    import zlib

    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{what} not found: {path}; run the stage that writes it") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{what} cannot be read: {path} ({reason}); delete it and run the stage that writes it"
        ) from None


def write_pickle(path: str | Path, value: Any) -> None:
    """Write built-in containers and scalars as a pickle (the published format of stage 1), atomically."""
    with atomic_write(path, "wb") as handle:
        pickle.dump(value, handle, protocol=4)


def read_pickle(path: str | Path, what: str) -> Any:
    """Read a pickle of built-in containers and scalars; anything else in it is refused, nothing of it is run."""
    path = Path(path)
    try:
        return load_plain(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{what} not found: {path}; run the stage that writes it") from None
    except (OSError, MemoryError, pickle.UnpicklingError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{what} refused: {path} is not a plain pickle ({reason})") from None


def file_digest(path: str | Path) -> str:
    """SHA-256 of a file's bytes, as hex."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def text_digest(value: Any) -> str:
    """SHA-256 of the canonical JSON of `value`, as hex."""
    text = json.dumps(plain(value), sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def save_figure(stem: str | Path, figure: Figure, data: pd.DataFrame) -> list[Path]:
    """Write a figure as PDF and PNG with the data behind it as CSV; same content, same bytes. Closes the figure."""
    import matplotlib.pyplot as plt

    stem = Path(stem)
    paths = [stem.with_name(stem.name + suffix) for suffix in (".pdf", ".png", ".csv")]
    with plt.rc_context({"pdf.fonttype": 42, "svg.hashsalt": "mecharule", "text.parse_math": False}):
        for path, dated in zip(paths[:2], ("CreationDate", "Software"), strict=True):
            with atomic_write(path, "wb") as handle:
                figure.savefig(handle, format=path.suffix[1:], dpi=200, bbox_inches="tight", metadata={dated: None})
    write_csv(paths[2], data)
    plt.close(figure)
    return paths


# ---------------------------------------------------------------- records of finished stages


@dataclass(frozen=True)
class StageRecord:
    """What a stage was asked and given: decides whether finished output still answers the question.

    settings: the flags that change the result. inputs: label -> file read. The record of a finished run holds the
    digests of its outputs and is written last; it is the only file that differs between two equal runs (times).
    """

    stage: str
    settings: dict[str, Any]
    inputs: dict[str, Path]
    metadata_path: Path

    @property
    def fingerprint(self) -> str:
        """SHA-256 over stage, settings, input digests, schema and package versions."""
        cached = self.__dict__.get("_fingerprint")
        if cached is None:
            cached = text_digest(self._identity())
            self.__dict__["_fingerprint"] = cached
        return cached

    def _identity(self) -> dict[str, Any]:
        inputs = {}
        for label in sorted(self.inputs):
            path = Path(self.inputs[label])
            if not path.is_file():
                raise UserError(f"{label} not found: {path}; run the stage that writes it")
            inputs[label] = file_digest(path)
            if differing := record_that_differs(path, inputs[label]):
                raise UserError(
                    f"{label} was changed after its stage had written it: {path}; run that stage again, or delete "
                    f"{differing} to use the file as it is"
                )
        return {
            "stage": self.stage,
            "schema_version": SCHEMA_VERSION,
            "settings": plain(self.settings),
            "inputs": inputs,
            "packages": {name: _package_version(name) for name in _FINGERPRINTED_PACKAGES},
        }

    def stored(self) -> dict[str, Any] | None:
        """The metadata of the last finished run in this place, or None (absent or unreadable)."""
        try:
            stored = json.loads(self.metadata_path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return stored if isinstance(stored, dict) else None

    def is_complete(self) -> bool:
        """True if a run with this fingerprint finished here and each of its outputs is there, unchanged."""
        fingerprint = self.fingerprint
        stored = self.stored()
        if stored is None or stored.get("fingerprint") != fingerprint:
            return False
        base = self.metadata_path.parent
        outputs = stored.get("outputs", {})
        return all((base / name).is_file() and file_digest(base / name) == digest for name, digest in outputs.items())

    def finish(
        self, outputs: Iterable[str | Path], *, started: float | None = None, summary: dict[str, Any] | None = None
    ) -> None:
        """Declare the outputs complete. `started` is the run's `time.time()`; `summary` is kept for later display."""
        base = self.metadata_path.parent
        digests = {Path(os.path.relpath(path, base)).as_posix(): file_digest(path) for path in outputs}
        now = time.time()
        write_json(
            self.metadata_path,
            {
                "fingerprint": self.fingerprint,
                **self._identity(),
                "input_paths": {label: Path(path).as_posix() for label, path in sorted(self.inputs.items())},
                "outputs": dict(sorted(digests.items())),
                "summary": summary or {},
                "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now)),
                "seconds": round(now - started, 3) if started is not None else None,
                "peak_memory_mb": _peak_memory_mb(),
            },
        )

    def summary(self) -> dict[str, Any]:
        """The summary that the finished run stored."""
        return (self.stored() or {}).get("summary", {})


def amend_record(metadata_path: Path, outputs: Iterable[str | Path]) -> None:
    """Some outputs were made again in another way: the record says so, and no longer that the run is complete."""
    try:
        stored = json.loads(metadata_path.read_text(encoding="utf-8"))
        recorded = dict(stored["outputs"])
    except (OSError, ValueError, KeyError, TypeError):
        return
    base = metadata_path.parent
    amended = recorded | {Path(os.path.relpath(path, base)).as_posix(): file_digest(path) for path in outputs}
    if amended != recorded:
        write_json(metadata_path, {**stored, "fingerprint": "amended", "outputs": amended})


def record_that_differs(path: str | Path, digest: str | None = None) -> Path | None:
    """The record of a stage that gives the file another content: it was cut off or damaged, or its run did not finish.

    Records are looked for beside the file and up to three folders above. A file of which no record speaks (an archived
    or hand-made one) is taken as it is: None. digest: the file's SHA-256, where that is known already.
    """
    path = Path(path).absolute()
    for folder in list(path.parents)[:4]:
        for record_path in sorted(folder.glob("*run_metadata*.json")):
            try:
                outputs = json.loads(record_path.read_text(encoding="utf-8")).get("outputs", {})
                recorded = outputs.get(path.relative_to(folder).as_posix())
            except (OSError, ValueError, AttributeError):
                continue
            if recorded is not None and recorded != (digest or file_digest(path)):
                return record_path
    return None


def _package_version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _peak_memory_mb() -> float:
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (1024 * 1024 if sys.platform == "darwin" else 1024), 1)


@contextlib.contextmanager
def exclusive(folder: str | Path, name: str = ".lock", *, wait_seconds: float = 0) -> Iterator[None]:
    """Hold the folder's write lock; a second writer gets a `UserError` after waiting. Freed even by `kill -9`.

    A folder that was made for the lock, and into which nothing was written, is removed again. name: of the lock's file,
    where a folder is for several writers.
    """
    from filelock import FileLock, Timeout

    folder = Path(folder)
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / name, timeout=wait_seconds)
        lock.acquire()
    except Timeout:
        raise UserError(f"another run is writing to {folder}; wait for it or choose another folder") from None
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror or error}; check its permissions") from error
    try:
        yield
    finally:
        if made and os.listdir(folder) == [name]:
            with contextlib.suppress(OSError):
                (folder / name).unlink()
                for place in made:
                    place.rmdir()
        lock.release()
