"""Texts of strangers in tables, LaTeX, Markdown, figures and graphs; patterns and temporary files."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.artifacts import atomic_write, read_csv, save_figure, without_formulas, write_csv
from lib.cli import Report, UserError
from lib.eap.circuits import Layout
from lib.reporting.issues import Issue, IssueLog
from lib.reporting.session import Session
from lib.reporting.tables import Table
from lib.tasks.table_task import TASK_SPEC, Match, TableSettings
from tests.scripts import REPOSITORY

FORMULAS = ["=1+1", "+1+1", "-1+1", "@SUM(A1)", "=HYPERLINK(\"x\")", "\t=1", "\r=1", " =cmd|' /C calc'!A0", "\n=1"]
HARMLESS = ["-1", "+0.5", "-1e-05", "a=1", "1-1", "", "(a <= 1)", "m12:3", "-.5"]


@pytest.mark.parametrize("text", FORMULAS)
def test_tables_for_people_hold_no_formula(text, tmp_path):
    frame = pd.DataFrame({"name": [text, "b"], text: [1.5, -2.0]})
    Table("table", frame, "A caption").write(tmp_path)
    Session(tmp_path, Report(quiet=True)).csv("session.csv", frame)
    issues = IssueLog()
    issues.add(Issue(text, "m", "r", "a", "invalid", text))
    issues.write(tmp_path)
    for name in ("table.csv", "session.csv", "report_issues.csv"):
        read = pd.read_csv(tmp_path / name, dtype=str, keep_default_na=False)
        cells = [*read.columns, *read.to_numpy().ravel()]
        assert not [cell for cell in cells if str(cell).strip()[:1] in ("=", "@") or cell == text], name
        assert any(f"'{text}".replace("\r", "\n") == cell.replace("\r", "\n") for cell in cells), name
    assert read_csv(tmp_path / "table.csv", "table").iloc[1, 1] == -2.0


@pytest.mark.parametrize("text", HARMLESS)
def test_what_is_no_formula_stays_as_it_is(text):
    frame = pd.DataFrame({"name": [text], "n": [-1]})
    pd.testing.assert_frame_equal(without_formulas(frame), frame)


@settings(derandomize=True)
@given(st.lists(st.text(max_size=12) | st.sampled_from(FORMULAS), min_size=1, max_size=5))
def test_what_stages_exchange_is_not_changed(tmp_path_factory, texts):
    # The tables between stages keep every character: a prompt that begins with = is that prompt.
    texts = [text.replace("\x00", "").encode("utf-8", "ignore").decode() + "." for text in texts]
    path = tmp_path_factory.mktemp("csv") / "scores.csv"
    write_csv(path, pd.DataFrame({"prompt": texts}))
    assert read_csv(path, "table", keep_default_na=False, dtype=str)["prompt"].tolist() == texts


HOSTILE = ["\\input{/etc/passwd}", "\\immediate\\write18{touch x}", "$\\frac{", "a_b & c % d # e ~ f ^ g {h}",
           "|x|\n|y|", "![a](http://x)", "\x1b[31mred", "<script>alert(1)</script>", "</td>", "`x`",
           "x\n\\input{y}", "x\r\\input{y}"]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE)
def test_latex_and_markdown_show_and_do_nothing(text, tmp_path):
    table = Table("table", pd.DataFrame({"name": [text], text: ["x"]}), text)
    latex = "\n".join(line for line in table.latex().split("\n") if not line.startswith("%"))
    for command in ("\\input", "\\immediate", "\\write", "\\frac"):
        assert command not in latex
    body = latex.split("\\midrule\n")[1].split("\n")[0]
    assert body.count(" & ") == 1 and body.endswith(r" \\")
    caption, _, *below = table.markdown().split("\n")
    rows = [line for line in below if line]
    assert "<" not in caption
    assert len(rows) == 3 and "<script" not in "".join(rows) and "</td" not in "".join(rows)


@pytest.mark.parametrize("text", ["$\\frac{$", "costs $5 or $6", "$$", "\\alpha", "$x^{$"])
def test_a_dollar_in_a_name_is_no_formula_of_a_figure(text, tmp_path):
    from lib.reporting.plots import bar_plot, label_colours, report_style  # noqa: F401 (the style is what is tested)
    from lib.rule_plots import plt

    for style in (report_style(), plt.rc_context()):
        with style:
            figure, axes = plt.subplots(figsize=(2, 2))
            axes.set_title(text)
            axes.bar([text, "b"], [1, 2], label=text)
            axes.legend()
        assert save_figure(tmp_path / "figure", figure, pd.DataFrame({"a": [1]}))


def test_a_graph_holds_only_names_that_the_layout_makes():
    layout = Layout(n_layers=2, n_heads=2, d_model=4, d_head=2, is_parallel=False)
    labels = [layout.label(row) for row in range(layout.n_rows)]
    labels += [layout.column_label(column) for column in range(4)]
    assert not [label for label in labels if not re.fullmatch(r"[a-z0-9.<>]+", label)]


# ---------------------------------------------------------------- patterns of tables


@pytest.mark.parametrize("pattern", ["(a+)+$", "(a|aa)+$", "(.*a){30}$", "^(([a-z])+.)+[A-Z]([a-z])+$"])
def test_a_pattern_without_end_is_stopped(pattern, monkeypatch):
    monkeypatch.setattr("lib.tasks.table_task.SEARCH_SECONDS", 0.2)
    task = TASK_SPEC.configured(TableSettings(match=Match.REGEX))
    try:
        score = task.score_answers([{"expected_answer": pattern}], ["a" * 60 + "!"])
    except UserError as error:
        assert "nested repetitions" in str(error)
    else:
        assert score[0].label is False


# ---------------------------------------------------------------- temporary files


@pytest.mark.parametrize("plant", ["symlink", "hard link", "fifo", "folder"])
def test_what_waits_under_the_temporary_name_is_not_written_into(plant, tmp_path):
    other, waiting = tmp_path / "other", tmp_path / ".a.json.tmp"
    other.write_text("kept")
    if plant == "symlink":
        waiting.symlink_to(other)
    elif plant == "hard link":
        os.link(other, waiting)
    elif plant == "fifo":
        os.mkfifo(waiting)
    else:
        waiting.mkdir()
    with atomic_write(tmp_path / "a.json") as handle:
        handle.write("new")
    assert other.read_text() == "kept"
    assert (tmp_path / "a.json").read_text() == "new" and not (tmp_path / "a.json").is_symlink()


def test_a_link_left_in_the_way_is_replaced_not_followed(tmp_path):
    (tmp_path / "other").write_text("kept")
    (tmp_path / "a.json").symlink_to(tmp_path / "other")
    with atomic_write(tmp_path / "a.json") as handle:
        handle.write("new")
    assert (tmp_path / "other").read_text() == "kept" and not (tmp_path / "a.json").is_symlink()


@pytest.mark.parametrize("umask, mode", [("022", 0o644), ("077", 0o600), ("002", 0o664)])
def test_files_have_the_rights_that_the_user_asked_for(umask, mode, tmp_path):
    code = "import sys\nfrom lib.artifacts import write_json\nwrite_json(sys.argv[1], {})"
    command = f'umask {umask}; exec "$0" -c "$1" "$2"'
    subprocess.run(["sh", "-c", command, sys.executable, code, tmp_path / "a.json"], cwd=REPOSITORY, check=True)
    assert stat.S_IMODE((tmp_path / "a.json").stat().st_mode) == mode


def test_an_unpacked_archive_is_private_and_gone_afterwards(tmp_path):
    import zipfile

    from lib.reporting.artifacts import open_tree

    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        archive.writestr("stats/run/scores.csv", "a\n1\n")
    with open_tree(tmp_path / "data.zip") as folder:
        assert stat.S_IMODE(folder.parent.stat().st_mode) == 0o700
    assert not folder.parent.exists()
