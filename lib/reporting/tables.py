"""Tables as CSV, Markdown and LaTeX, and the record of what they were made from."""

from __future__ import annotations

import math
import platform
import re
import unicodedata
from argparse import Namespace
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.artifacts import atomic_write, file_digest, without_formulas, write_csv, write_json
from lib.reporting.artifacts import relative_to_any

if TYPE_CHECKING:
    import pandas as pd

_LATEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
}
# What plain LaTeX cannot set, as what it can.
_SYMBOLS = {
    "∪": r"$\cup$",
    "∩": r"$\cap$",
    "→": r"$\to$",
    "τ": r"$\tau$",
    "≥": r"$\ge$",
    "≤": r"$\le$",
    "±": r"$\pm$",
    "–": "--",
    "—": "---",
    "×": r"$\times$",
    "∅": r"$\emptyset$",
    "ε": r"$\varepsilon$",
}
_ASCII = {
    "∪": "union",
    "∩": "and",
    "→": "->",
    "τ": "tau",
    "≥": ">=",
    "≤": "<=",
    "±": "+-",
    "–": "-",
    "—": "-",
    "×": "x",
    "∅": "none",
    "ε": "eps",
}


def latex_escape(text: str) -> str:
    """Text for LaTeX: special characters escaped, symbols in math mode, anything else outside ASCII transliterated."""
    return "".join(_latex_character(character) for character in text)


def _latex_character(character: str) -> str:
    if character in _LATEX or character in _SYMBOLS:
        return _LATEX.get(character) or _SYMBOLS[character]
    if character in "\r\n\t":
        return " "
    return character if character.isascii() else to_ascii(character)


def to_ascii(text: str) -> str:
    """Text with only ASCII characters: symbols by name, accents dropped, anything else as `?`."""
    replaced = "".join(_ASCII.get(character, character) for character in text)
    decomposed = unicodedata.normalize("NFKD", replaced)
    kept = "".join(character for character in decomposed if not unicodedata.combining(character))
    return kept.encode("ascii", "replace").decode()


def cell_text(value: Any, decimals: int = 3) -> str:
    """A cell for people: whole numbers without decimals, others with `decimals`, missing ones as `NA`."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "NA"
    if isinstance(value, bool) or not hasattr(value, "__float__") or isinstance(value, str):
        return "NA" if str(value) in ("<NA>", "NaT") else str(value)
    number = float(value)
    if math.isnan(number):
        return "NA"
    return f"{number:.0f}" if number.is_integer() else f"{number:.{decimals}f}"


@dataclass(frozen=True)
class Table:
    """One table under one name. Cells that are text are shown as they are; the CSV keeps numbers exact.

    heads: column -> how LaTeX shows it, already LaTeX. Columns outside `shown` (default: all) are in the CSV only.
    """

    stem: str
    frame: pd.DataFrame
    caption: str
    label: str = ""
    heads: Mapping[str, str] = field(default_factory=dict)
    shown: tuple[str, ...] = ()
    decimals: int = 3

    @property
    def columns(self) -> list[str]:
        """Columns of the readable forms."""
        return list(self.shown or map(str, self.frame.columns))

    def texts(self) -> list[list[str]]:
        """Cells of the readable forms, row by row."""
        # Column by column: a row of a frame would turn the integers beside floats into floats.
        columns = [[cell_text(value, self.decimals) for value in self.frame[name].tolist()] for name in self.columns]
        return [list(row) for row in zip(*columns, strict=True)] if columns else []

    def markdown(self) -> str:
        """GitHub Markdown with the caption above."""
        head = [_markdown_cell(name) for name in self.columns]
        caption = " ".join(self.caption.split()).replace("<", "&lt;")
        lines = [caption, "", f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
        lines += [f"| {' | '.join(map(_markdown_cell, row))} |" for row in self.texts()]
        return "\n".join(lines) + "\n"

    def latex(self) -> str:
        """A booktabs table float; needs `\\usepackage{booktabs}` and nothing else."""
        heads = [self.heads.get(name) or latex_escape(name) for name in self.columns]
        numeric = [_is_numeric(self.frame[name]) for name in self.columns]
        lines = [
            # On one line: what follows a line break would no longer be a comment.
            f"% {' '.join(to_ascii(self.caption).split())}",
            r"\begin{table}[t]",
            r"\centering",
            rf"\caption{{{latex_escape(self.caption)}}}",
            rf"\label{{tab:{self.label or self.stem}}}",
            rf"\begin{{tabular}}{{{''.join('r' if flag else 'l' for flag in numeric)}}}",
            r"\toprule",
            " & ".join(heads) + r" \\",
            r"\midrule",
        ]
        lines += [" & ".join(map(latex_escape, row)) + r" \\" for row in self.texts()]
        lines += [r"\bottomrule", r"\end{tabular}", r"\end{table}"]
        return "\n".join(lines) + "\n"

    def write(self, out_dir: Path) -> list[Path]:
        """`<stem>.csv`, `<stem>.md`, `<stem>.tex`; texts in none of them can act (see `SECURITY.md`)."""
        paths = [out_dir / f"{self.stem}{suffix}" for suffix in (".csv", ".md", ".tex")]
        write_csv(paths[0], without_formulas(self.frame))
        for path, text in zip(paths[1:], (self.markdown(), self.latex()), strict=True):
            with atomic_write(path) as handle:
                handle.write(text)
        return paths


def _markdown_cell(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")


def _is_numeric(column: pd.Series) -> bool:
    from pandas.api.types import is_bool_dtype, is_numeric_dtype

    return is_numeric_dtype(column) and not is_bool_dtype(column)


# ---------------------------------------------------------------- provenance


def write_provenance(
    out_dir: Path, script: str, args: Namespace, inputs: Iterable[Path], bases: Iterable[Path]
) -> Path:
    """`provenance.json`: what was asked, the files read with size and digest, versions. No absolute path is in it.

    bases: folders against which inputs and path arguments are written; what lies outside keeps only its name.
    """
    roots = list(bases)
    files = sorted({path for path in inputs if path.is_file()})
    write_json(
        out_dir / "provenance.json",
        {
            "script": script,
            "arguments": {name: _argument(value, roots) for name, value in sorted(vars(args).items())},
            "inputs": [
                {"path": relative_to_any(path, roots), "size": path.stat().st_size, "sha256": file_digest(path)}
                for path in files
            ],
            "versions": {
                "python": platform.python_version(),
                **{name: metadata.version(name) for name in ("numpy", "pandas", "scipy", "matplotlib")},
            },
        },
    )
    return out_dir / "provenance.json"


def _argument(value: Any, bases: list[Path]) -> Any:
    if isinstance(value, Path) or (isinstance(value, str) and value.startswith(("/", "~", ".."))):
        path = Path(value).expanduser()
        return relative_to_any(path, bases) if path.is_absolute() or ".." in path.parts else path.as_posix()
    if isinstance(value, list | tuple):
        return [_argument(item, bases) for item in value]
    return value
