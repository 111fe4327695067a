"""Artifacts are written whole or not at all, and read without running anything."""

from __future__ import annotations

import json
import math
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib.artifacts import (
    StageRecord,
    amend_record,
    atomic_write,
    exclusive,
    file_digest,
    model_slug,
    read_csv,
    read_json,
    read_npz,
    read_pickle,
    record_that_differs,
    save_figure,
    write_csv,
    write_json,
    write_npz,
    write_pickle,
)
from lib.cli import UserError


def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "deep" / "a.txt"
    with atomic_write(path) as handle:
        handle.write("old")
    with pytest.raises(RuntimeError), atomic_write(path) as handle:
        handle.write("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert os.listdir(path.parent) == ["a.txt"]


def test_unwritable_folder_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"), atomic_write(tmp_path / "file" / "a.txt"):
        pass


def test_json_is_strict_and_takes_numpy(tmp_path):
    path = tmp_path / "a.json"
    write_json(
        path, {"a": np.float64(0.1), "b": np.array([1, 2]), "c": math.nan, "d": Path("x/y"), "e": np.bool_(True)}
    )
    assert read_json(path, "x") == {"a": 0.1, "b": [1, 2], "c": None, "d": "x/y", "e": True}
    path.write_text('{"mean": NaN}')
    assert read_json(path, "x") == {"mean": None}
    path.write_text('{"half')
    with pytest.raises(UserError, match="manifest cannot be read"):
        read_json(path, "manifest")


@given(st.lists(st.floats(allow_nan=False), min_size=1, max_size=20))
def test_csv_keeps_every_digit(tmp_path_factory, values):
    path = tmp_path_factory.mktemp("csv") / "a.csv"
    write_csv(path, pd.DataFrame({"x": values}))
    assert read_csv(path, "x")["x"].tolist() == values


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8), min_size=1, max_size=6))
def test_csv_keeps_every_text_in_its_row(tmp_path_factory, texts):
    path = tmp_path_factory.mktemp("csv") / "a.csv"
    for cells in (texts, [*texts, "a\rb"]):
        frame = pd.DataFrame({"text": cells, "x": np.arange(len(cells)) / 3, "is_test": [True] * len(cells)})
        write_csv(path, frame)
        again = read_csv(path, "x", dtype={"text": str}, keep_default_na=False)
        assert again["text"].tolist() == cells
        assert again["x"].tolist() == frame["x"].tolist()
        assert again["is_test"].dtype == bool


def test_npz_bytes_depend_on_content_only(tmp_path):
    arrays = {"b": np.arange(5), "a": np.eye(2)}
    write_npz(tmp_path / "1.npz", **arrays)
    write_npz(tmp_path / "2.npz", **dict(sorted(arrays.items())))
    assert file_digest(tmp_path / "1.npz") == file_digest(tmp_path / "2.npz")
    assert (read_npz(tmp_path / "1.npz", "x")["b"] == np.arange(5)).all()
    (tmp_path / "1.npz").write_bytes(b"PK\x03\x04 not a zip")
    with pytest.raises(UserError, match="cannot be read"):
        read_npz(tmp_path / "1.npz", "x")


class Hostile:
    def __reduce__(self):
        return os.system, ("touch hacked",)


def test_pickles_with_anything_but_plain_data_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_pickle("plain.pkl", {"+": [("1+2=", 3, "3", True, None)]})
    assert read_pickle("plain.pkl", "answers") == {"+": [("1+2=", 3, "3", True, None)]}
    for value in (Hostile(), np.float64(1), Path("x")):
        Path("bad.pkl").write_bytes(pickle.dumps({"a": value}))
        with pytest.raises(UserError, match="answers refused"):
            read_pickle("bad.pkl", "answers")
    assert not Path("hacked").exists()


@given(st.binary(max_size=200))
def test_no_bytes_crash_the_pickle_reader(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("pickle") / "a.pkl"
    path.write_bytes(data)
    try:
        read_pickle(path, "answers")
    except UserError:
        pass


@pytest.mark.parametrize(("model", "slug"), [
    ("Qwen/Qwen2-1.5B-Instruct", "Qwen/Qwen2-1.5B-Instruct"), ("/a/b/My Model", "My_Model"), ("./x/m.Q4.gguf", "m.Q4"),
    ("EleutherAI/pythia-70m@step3000", "EleutherAI/pythia-70m@step3000"),
    ("SmolLM2-135M-Instruct", "SmolLM2-135M-Instruct"),
])  # fmt: skip
def test_model_slug(model, slug):
    assert model_slug(model) == slug


@pytest.mark.parametrize("model", ["a/../b", "a//b", ""])
def test_model_slug_stays_inside_its_folder(model):
    with pytest.raises(UserError):
        model_slug(model)


def record(folder, **settings):
    return StageRecord("stage", settings, {"table": folder / "in.csv"}, folder / "run_metadata.json")


def test_a_stage_is_complete_only_with_the_same_settings_inputs_and_outputs(tmp_path):
    (tmp_path / "in.csv").write_text("a\n1\n")
    (tmp_path / "out.json").write_text("{}")
    first = record(tmp_path, epsilon=0.2)
    assert not first.is_complete()
    first.finish([tmp_path / "out.json"], summary={"n": 3})
    assert record(tmp_path, epsilon=0.2).is_complete()
    assert record(tmp_path, epsilon=0.2).summary() == {"n": 3}
    assert not record(tmp_path, epsilon=0.3).is_complete()
    (tmp_path / "out.json").write_text("{ ")
    assert not record(tmp_path, epsilon=0.2).is_complete()
    (tmp_path / "out.json").write_text("{}")
    (tmp_path / "in.csv").write_text("a\n2\n")
    assert not record(tmp_path, epsilon=0.2).is_complete()
    stored = json.loads((tmp_path / "run_metadata.json").read_text())
    assert str(tmp_path) not in json.dumps(stored["outputs"])


def test_missing_input_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="table not found"):
        record(tmp_path).is_complete()


def test_second_writer_is_told(tmp_path):
    code = f"from lib.artifacts import exclusive\nwith exclusive({str(tmp_path)!r}): print('in', flush=True); input()"
    other = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "in\n"
    with pytest.raises(UserError, match="another run is writing"), exclusive(tmp_path):
        pass
    other.kill()
    other.wait()
    with exclusive(tmp_path):
        pass


def test_a_second_writer_may_wait(tmp_path):
    code = f"from lib.artifacts import exclusive\nwith exclusive({str(tmp_path)!r}): print('in', flush=True); input()"
    other = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "in\n"
    threading.Timer(0.3, other.kill).start()
    with exclusive(tmp_path, wait_seconds=20):
        assert other.wait() != 0


def test_figures_are_the_same_bytes_twice(tmp_path):
    import matplotlib.pyplot as plt

    for name in ("a", "b"):
        figure, axes = plt.subplots()
        axes.plot([1, 2], [3, 4])
        save_figure(tmp_path / name, figure, pd.DataFrame({"x": [1, 2]}))
    for suffix in (".pdf", ".png", ".csv"):
        assert file_digest(tmp_path / f"a{suffix}") == file_digest(tmp_path / f"b{suffix}")


def test_what_a_killed_writer_left_is_used_by_the_next_and_never_taken_from_a_living_one(tmp_path):
    path = tmp_path / "a.txt"
    (tmp_path / ".a.txt.tmp").write_text("left by a killed writer, longer than what comes")
    with atomic_write(path) as outer:
        outer.write("outer")
        with atomic_write(path) as inner:
            inner.write("inner")
        assert path.read_text() == "inner"
    assert path.read_text() == "outer"
    assert [found.name for found in tmp_path.iterdir()] == ["a.txt"]


def test_a_link_in_place_of_the_temporary_file_is_not_followed(tmp_path):
    (tmp_path / "precious").write_text("years")
    (tmp_path / ".a.txt.tmp").symlink_to(tmp_path / "precious")
    write_json(tmp_path / "a.txt", [])
    assert (tmp_path / "precious").read_text() == "years"


def test_a_folder_made_only_for_the_lock_is_removed_again(tmp_path):
    with pytest.raises(UserError), exclusive(tmp_path / "new" / "out"):
        raise UserError("bad input")
    assert not (tmp_path / "new").exists()


def test_an_input_that_is_not_as_its_stage_wrote_it_is_refused(tmp_path):
    made = tmp_path / "stage" / "table.csv"
    write_csv(made, pd.DataFrame({"a": range(9)}))
    StageRecord("before", {}, {}, tmp_path / "stage" / "run_metadata.json").finish([made])
    after = StageRecord("after", {}, {"table": made}, tmp_path / "run_metadata.json")
    assert not after.is_complete()
    # Cut off between two lines: still a table, and no longer the one that was written.
    made.write_bytes(made.read_bytes()[:-4])
    with pytest.raises(UserError, match=r"table was changed .* run that stage again"):
        StageRecord("after", {}, {"table": made}, tmp_path / "run_metadata.json").is_complete()
    (tmp_path / "stage" / "run_metadata.json").unlink()
    assert not StageRecord("after", {}, {"table": made}, tmp_path / "run_metadata.json").is_complete()


def test_outputs_made_again_in_another_way_are_recorded_and_the_run_is_not_complete(tmp_path):
    made = tmp_path / "table.csv"
    made.write_text("a\n1\n")
    run = StageRecord("stage", {}, {}, tmp_path / "run_metadata.json")
    run.finish([made])
    amend_record(run.metadata_path, [made])
    assert run.is_complete()
    made.write_text("a\n2\n")
    amend_record(run.metadata_path, [made])
    assert not run.is_complete() and record_that_differs(made) is None
