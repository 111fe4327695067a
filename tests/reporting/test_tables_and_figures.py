"""Tables as text, and figures that are the same bytes each time."""

from __future__ import annotations

import shutil
import subprocess
from argparse import Namespace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from lib.artifacts import read_csv
from lib.reporting.plots import ecdf_points, heatmap, label_colours, line_plot
from lib.reporting.tables import Table, cell_text, latex_escape, to_ascii, write_provenance
from tests.reporting.conftest import provenance


def table(**more):
    frame = pd.DataFrame({"Task & co": ["a_b", "50 % | <x>"], "∪(1→0)": [0.5, float("nan")], "n": [3, 0]})
    return Table("t", frame, "Flips ∪ of m1:5 & others", **more)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.4, "0.400"),
        (2.0, "2"),
        (float("nan"), "NA"),
        (None, "NA"),
        ("2/3 (66.7%)", "2/3 (66.7%)"),
        (True, "True"),
        (np.int64(7), "7"),
        (np.float64(0.125), "0.125"),
        (pd.NA, "NA"),
    ],
)
def test_cells(value, text):
    assert cell_text(value) == text


def test_the_csv_keeps_numbers_and_the_texts_agree(tmp_path):
    paths = table(decimals=1).write(tmp_path)
    assert [path.name for path in paths] == ["t.csv", "t.md", "t.tex"]
    assert read_csv(paths[0], "table")["n"].tolist() == [3, 0]
    assert paths[1].read_text().splitlines()[2:] == [
        "| Task & co | ∪(1→0) | n |",
        "|---|---|---|",
        "| a_b | 0.5 | 3 |",
        "| 50 % \\| &lt;x> | NA | 0 |",
    ]
    assert r"a\_b & 0.5 & 3 \\" in paths[2].read_text()


def test_latex_is_ascii_and_escaped():
    text = table(heads={"n": "$n$"}).latex()
    assert text.isascii()
    assert r"Task \& co & $\cup$(1$\to$0) & $n$ \\" in text
    assert r"50 \% \textbar{} \textless{}x\textgreater{} & NA & 0 \\" in text
    assert r"\begin{tabular}{lrr}" in text and r"\toprule" in text and r"\label{tab:t}" in text


def test_hostile_text_stays_text():
    assert latex_escape("\\input{/etc/passwd}\n%") == r"\textbackslash{}input\{/etc/passwd\} \%"
    assert to_ascii("τ ≥ 0.2 – é 漢") == "tau >= 0.2 - e ?"


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="LaTeX is not installed")
def test_latex_compiles(tmp_path):
    document = r"\documentclass{article}\usepackage{booktabs}\begin{document}" + table().latex() + r"\end{document}"
    (tmp_path / "t.tex").write_text(document)
    subprocess.run(["pdflatex", "-interaction=batchmode", "-halt-on-error", "t.tex"], cwd=tmp_path, check=True)


def test_provenance_names_files_below_the_roots_only(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "x.csv").write_text("a\n1\n")
    outside = Path(__file__)
    args = Namespace(data_root=str(tmp_path / "data"), out_dir="out", seed=1, csv=tmp_path / "elsewhere" / "y.csv")
    write_provenance(tmp_path, "s.py", args, [tmp_path / "data" / "x.csv", outside], [tmp_path / "data"])
    stored = provenance(tmp_path)
    assert sorted((entry["path"], entry["size"]) for entry in stored["inputs"]) == sorted(
        [("x.csv", 4), (outside.name, outside.stat().st_size)]
    )
    assert stored["arguments"] == {"csv": "y.csv", "data_root": ".", "out_dir": "out", "seed": 1}


def test_figures_are_the_same_bytes_each_time(tmp_path):
    data = pd.DataFrame({"x": [0.1, 0.2, 0.1, 0.2], "y": [1, 2, 3, 4.0], "s": ["a", "a", "b", "b"]})
    counts = pd.DataFrame({"0.2": [1.0, np.nan], "0.3": [0.0, 5.0]}, index=pd.Index(["p", "q"], name="threshold"))
    for name in ("one", "two"):
        line_plot(tmp_path / name / "l", data, x="x", y="y", series="s", x_label="x", y_label="y")
        heatmap(tmp_path / name / "h", counts, x_label="x", y_label="y", bar_label="n")
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == ["h.csv", "h.pdf", "h.png", "l.csv", "l.pdf", "l.png"]
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_an_ecdf_ends_at_one():
    x, share = ecdf_points(np.array([3.0, np.nan, 1.0, 2.0]))
    assert x.tolist() == [1, 2, 3] and share.tolist() == pytest.approx([1 / 3, 2 / 3, 1])
    assert len(ecdf_points(np.array([]))[0]) == 0


def test_every_series_has_its_own_colour():
    labels = ["Spectral split", "Spectral split [M25000]", "Qwen", "GPT-J", "Rule split + Random plan"]
    assert len(set(label_colours(labels).values())) == len(labels)
