"""check_artifacts.py: names every broken cell with a remedy, on folders and on archives, without any package."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest

import check_artifacts
from tests import published_tree
from tests.scripts import REPOSITORY


def with_landmarks(tree):
    for name in ("README.md", "requirements.txt", "run_paper_tables_generation.sh"):
        (tree.root / name).write_text("")
    return tree


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return with_landmarks(published_tree.build(tmp_path_factory.mktemp("whole"), states={}, scores=False))


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    return with_landmarks(published_tree.build(tmp_path_factory.mktemp("broken"), scores=False))


def check(root, capsys, *flags):
    code = check_artifacts.main(["--root", str(root), *flags])
    return code, capsys.readouterr().out


def as_json(root, capsys, *flags):
    code, text = check(root, capsys, "--json", *flags)
    return code, json.loads(text)


def test_whole_grid_is_fine_even_strictly(whole, capsys):
    code, text = check(whole.root, capsys, "--strict")
    assert code == 0, text
    assert "problem" not in text and "fine: 45 runs of the grid's modes and 10 others" in text


def test_broken_cells_are_named_and_no_other(broken, capsys):
    code, found = as_json(broken.root, capsys)
    assert code == 1
    named = {finding["where"] for finding in found["findings"] if finding["is_problem"]}
    expected = {cell for cell, state in published_tree.STATES.items() if state not in ("empty", "missing_run")}
    assert named == {f"{task}/{llm}/{broken.cells[task, llm, mode].run_name}" for task, llm, mode in expected}
    states = {
        (model["task"], model["llm"], mode): status
        for model in found["models"]
        for mode, status in model["modes"].items()
    }
    assert len(states) == 45
    for cell, status in states.items():
        truth = broken.cells[cell].state
        assert status == {"ok": "ok", "empty": "empty", "missing_run": "missing"}.get(truth, "broken"), cell


def test_missing_runs_are_notes_and_problems_when_strict(broken, capsys):
    where = "hans_nli/EleutherAI/gpt-j-6B/brute_force"
    for flags, is_problem in (((), False), (("--strict",), True)):
        _, found = as_json(broken.root, capsys, *flags)
        assert [f["is_problem"] for f in found["findings"] if f["where"] == where] == [is_problem]


def test_every_problem_is_one_line_with_a_remedy(broken, capsys):
    _, text = check(broken.root, capsys)
    lines = [line for line in text.splitlines() if line.startswith("problem: ")]
    assert len(lines) == 6
    assert all("10.5281/zenodo.20533529" in line and "--force" in line for line in lines)


def test_archives_are_looked_into_without_unpacking(broken, tmp_path, capsys):
    shutil.copytree(broken.root, tmp_path / "zipped")
    zipped = published_tree.PublishedTree(tmp_path / "zipped", broken.cells, broken.sensitivity)
    _, unzipped_report = as_json(broken.root, capsys)
    zipped.zip()
    code, found = as_json(zipped.root, capsys)
    assert code == 1 and found["models"] == unzipped_report["models"]
    packed = [f for f in found["findings"] if f["where"] in ("data.zip", "cache.zip")]
    assert len(packed) == 2 and all("unzip" in f["remedy"] for f in packed)
    assert sorted(path.name for path in zipped.root.iterdir() if path.is_dir()) == []


def test_nested_empty_missing_and_broken_folders_have_a_remedy(tmp_path, capsys):
    tree = with_landmarks(
        published_tree.build(
            tmp_path, tasks=("arithmetic",), models=published_tree.MODELS[:1], states={}, sensitivity=False
        )
    )
    tree.data.rename(tmp_path / "inner")
    tree.data.mkdir()
    (tmp_path / "inner").rename(tree.data / "data")
    code, text = check(tmp_path, capsys)
    assert code == 1 and "mv data data.outer && mv data.outer/data . && rmdir data.outer" in text
    fix = "mv data data.outer && mv data.outer/data . && rmdir data.outer"
    subprocess.run(fix, shell=True, cwd=tmp_path, check=True)
    assert check(tmp_path, capsys)[0] == 0
    shutil.rmtree(tmp_path / "cache")
    code, text = check(tmp_path, capsys)
    assert code == 0 and "note: cache: missing" in text
    shutil.rmtree(tree.data)
    code, text = check(tmp_path, capsys)
    assert code == 1 and "unzip data.zip" in text
    (tmp_path / "data.zip").write_bytes(b"PK\x03\x04 cut off")
    assert "data.zip: cannot be opened" in check(tmp_path, capsys)[1]


def test_a_folder_that_is_not_the_repository_is_said_to_be_so(tmp_path, capsys):
    code, text = check(tmp_path, capsys)
    assert code == 1 and "not the repository" in text


def test_runs_without_any_package(broken):
    # -I -S: neither site-packages nor the environment; what set-up would install cannot be imported.
    program = (
        f"import sys; sys.path.insert(0, {str(REPOSITORY)!r}); import check_artifacts; "
        f"check_artifacts.main(['--root', {str(broken.root)!r}])"
    )
    result = subprocess.run([sys.executable, "-I", "-S", "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "40 runs of the grid" in result.stdout
