"""Files from strangers: pickles, zip files, names inside of files. Nothing runs, leads outside or floods."""

from __future__ import annotations

import os
import pickle
import pickletools
import stat
import struct
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import pytest

from lib import zip_files
from lib.artifact_check import Check
from lib.artifacts import expecting, path_piece, read_npy, read_npz, read_pickle, write_pickle
from lib.cli import UserError
from lib.flip_candidates import read_candidates
from lib.plain_pickle import load_plain
from lib.reporting.artifacts import open_tree
from tests.scripts import REPOSITORY

MARKER = "was_here"
PLAIN = {"+": [("1+2=", 3, "3", True, None, 0.5, -(2**70), "é" * 300, b"x", {1, 2}, frozenset({3}), ())], "x" * 70: {}}


class Runs:
    """Pickles itself as a call of a function with its arguments."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


HOSTILE_PICKLES = {
    "os.system": lambda: pickle.dumps([Runs(os.system, f"touch {MARKER}")]),
    "subprocess": lambda: pickle.dumps({"a": Runs(subprocess.call, ["touch", MARKER])}),
    "eval": lambda: pickle.dumps((Runs(eval, f"open({MARKER!r}, 'w')"),)),
    "exec": lambda: pickle.dumps(Runs(exec, f"open({MARKER!r}, 'w')")),
    "a path": lambda: pickle.dumps(Path("x")),
    "a nested class, protocol 0": lambda: pickle.dumps([Runs(os.system, f"touch {MARKER}")], protocol=0),
    "a copyreg extension": lambda: b"\x80\x02\x82\x01.",
    "inst": lambda: b"(S'touch " + MARKER.encode() + b"'\nios\nsystem\n.",
    "obj": lambda: b"(cos\nsystem\nS'touch " + MARKER.encode() + b"'\no.",
    "stack global": lambda: b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x0etouch was_here\x85R.",
    "persistent id": lambda: b"\x80\x02X\x01\x00\x00\x00aQ.",
    "build on a dictionary": lambda: b"\x80\x02}}b.",
    "memo that asks for 64 GB": lambda: b"\x80\x02]r\xff\xff\xff\xff.",
    "text memo that asks for 64 GB": lambda: b"(lp4294967295\n.",
    "bytearray of 2^62 bytes": lambda: b"\x80\x05\x96" + struct.pack("<Q", 2**62) + b".",
    "text of 2^62 bytes": lambda: b"\x80\x04\x8d" + struct.pack("<Q", 2**62) + b"ab.",
    "frame of 2^62 bytes": lambda: b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"K\x01.",
    "no end": lambda: b"\x80\x04]" * 3,
    "nothing": lambda: b"",
    "cut off": lambda: pickle.dumps(PLAIN, 4)[:-20],
}


@pytest.mark.parametrize("name", HOSTILE_PICKLES)
def test_a_pickle_that_is_more_than_data_is_refused_and_nothing_of_it_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.pkl").write_bytes(HOSTILE_PICKLES[name]())
    with pytest.raises(UserError, match="answers refused: a.pkl is not a plain pickle"):
        read_pickle("a.pkl", "answers")
    assert os.listdir() == ["a.pkl"]


def test_the_attacks_work_on_an_ordinary_reader(tmp_path, monkeypatch):
    # Otherwise the test above would show nothing.
    monkeypatch.chdir(tmp_path)
    for name in ("os.system", "subprocess", "eval", "exec", "inst", "obj", "stack global"):
        pickle.loads(HOSTILE_PICKLES[name]())
        assert Path(MARKER).exists(), name
        Path(MARKER).unlink()


def test_the_memory_of_a_hostile_pickle_is_bounded_by_its_size(tmp_path):
    # In a process of its own, whose peak may grow by 50 MB; an ordinary reader would take 8 GB.
    (tmp_path / "a.pkl").write_bytes(b"\x80\x02]r\xff\xff\xff\x1f.")
    code = ("import resource, sys\nfrom lib.artifacts import read_pickle\nfrom lib.cli import UserError\n"
            "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
            "try:\n    read_pickle(sys.argv[1], 'answers')\nexcept UserError as error:\n    print(error)\n"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000)")  # fmt: skip
    command = [sys.executable, "-c", code, tmp_path / "a.pkl"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert "remembers more values than it can hold" in done.stdout and done.stdout.endswith("True\n"), done.stderr


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_pickles_of_other_writers_are_read(protocol):
    # Before protocol 4 sets were written as calls of `set`, and before 3 bytes as calls of `codecs.encode`.
    value = PLAIN if protocol >= 4 else {"+": PLAIN["+"][0][:8], "x" * 70: {}}
    assert load_plain(pickle.dumps(value, protocol)) == value


def test_shared_values_stay_shared_and_the_writer_uses_allowed_instructions_only(tmp_path):
    labels = ["yes", "no"]
    write_pickle(tmp_path / "a.pkl", [{"labels": labels}, {"labels": labels}])
    first, second = read_pickle(tmp_path / "a.pkl", "answers")
    assert first["labels"] is second["labels"]
    assert not {"GLOBAL", "STACK_GLOBAL", "REDUCE"} & {op.name for op, _, _ in pickletools.genops(
        (tmp_path / "a.pkl").read_bytes())}  # fmt: skip


@pytest.mark.parametrize("read", [read_npy, read_npz])
def test_arrays_hold_no_pickles(read, tmp_path):
    import numpy as np

    path = tmp_path / "a.npy"
    array = np.array([Runs(os.system, f"touch {tmp_path / MARKER}")], dtype=object)
    if read is read_npy:
        np.save(path, array, allow_pickle=True)
    else:
        with open(path, "wb") as handle:
            np.savez(handle, a=array)
    with pytest.raises(UserError, match="cannot be read"):
        read(path, "array")
    assert not (tmp_path / MARKER).exists()


# ---------------------------------------------------------------- zip files

READERS = {
    "reports": lambda path: open_tree(path).__enter__(),
    "stage 7": lambda path: read_candidates(path),
    "check": lambda path: next(
        (_ for _ in ()).throw(UserError(finding.message))
        for finding in Check(path.parent).run().findings
        if finding.where == "data.zip" and "cannot be opened" in finding.message
    ),
}


def make_zip(path: Path, *members: tuple[str, bytes], **attributes: int) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members:
            info = zipfile.ZipInfo(name)
            info.compress_type = zipfile.ZIP_DEFLATED
            for key, value in attributes.items():
                setattr(info, key, value)
            archive.writestr(info, content)
    return path


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", ["../x.json", "a/../../x.json", "/etc/x.json", "..\\x.json", "C:\\x.json", "c:x.json"])
def test_members_cannot_lead_outside(reader, name, tmp_path):
    path = make_zip(tmp_path / "data.zip", ("stats/run/scores.csv", b"a\n1\n"), (name, b"{}"))
    with pytest.raises(UserError, match="leads outside"):
        READERS[reader](path)
    assert not list(tmp_path.rglob("x.json"))


@pytest.mark.parametrize("reader", READERS)
def test_links_in_a_zip_are_refused(reader, tmp_path):
    path = make_zip(tmp_path / "data.zip", ("neuron_buckets.json", b"/etc/passwd"),
                    external_attr=(stat.S_IFLNK | 0o777) << 16)  # fmt: skip
    with pytest.raises(UserError, match="is a link"):
        READERS[reader](path)


@pytest.mark.parametrize("reader", READERS)
def test_a_bomb_is_refused_before_it_is_unpacked(reader, tmp_path, monkeypatch):
    # The limits are made small: 1 MB of zeros stands for 200 GB of them.
    monkeypatch.setattr(zip_files, "_SMALL_BYTES", 1000)
    path = make_zip(tmp_path / "data.zip", ("neuron_buckets.json", b"0" * 1_000_000))
    with pytest.raises(UserError, match="times its size"):
        READERS[reader](path)
    monkeypatch.setattr(zip_files, "MAX_UNPACKED_BYTES", 999_999)
    with pytest.raises(UserError, match="would unpack to more"):
        READERS[reader](path)
    monkeypatch.setattr(zip_files, "MAX_MEMBERS", 0)
    with pytest.raises(UserError, match="members"):
        READERS[reader](path)


def test_a_member_is_never_larger_than_it_says(tmp_path):
    # The directory says 10 bytes, the compressed stream holds a million: reading stops at 10 and the checksum is wrong.
    path = make_zip(tmp_path / "data.zip", ("neuron_buckets.json", b"0" * 1_000_000))
    content = bytearray(path.read_bytes())
    for signature, offset in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):
        place = content.find(signature) + offset
        content[place : place + 4] = struct.pack("<I", 10)
    path.write_bytes(content)
    with zipfile.ZipFile(path) as archive, pytest.raises(zipfile.BadZipFile):
        archive.read("neuron_buckets.json")
    with pytest.raises(UserError, match="cannot be read as a zip"):
        read_candidates(path)


def test_a_disk_too_small_is_said_before_unpacking(tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 3})
    monkeypatch.setattr("lib.reporting.artifacts.shutil.disk_usage", lambda place: usage)
    path = make_zip(tmp_path / "data.zip", ("stats/run/scores.csv", b"a\n1\n"))
    with pytest.raises(UserError, match="TMPDIR"), open_tree(path):
        pass


@pytest.mark.parametrize("reader", ["reports", "stage 7"])
def test_a_zip_with_any_byte_flipped_is_read_or_refused(reader, tmp_path):
    whole = make_zip(tmp_path / "whole.zip", ("stats/run/neuron_buckets.json", os.urandom(40) + b"{}")).read_bytes()
    path = tmp_path / "data.zip"
    n_refused = 0
    for place in range(0, len(whole), 2):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        try:
            with open_tree(path) if reader == "reports" else zip_files.open_zip(path) as opened:
                _ = [opened.read(name) for name in opened.namelist()] if reader != "reports" else None
        except UserError:
            n_refused += 1
    assert n_refused > len(whole) // 4


def test_a_corrupt_deflate_stream_is_one_line(tmp_path):
    path = make_zip(tmp_path / "data.zip", ("stats/run/scores.csv", b"a,b\n1,2\n" * 50))
    content = bytearray(path.read_bytes())
    start = 30 + len("stats/run/scores.csv")
    content[start : start + 4] = b"\xff\xff\xff\xff"
    path.write_bytes(content)
    with zipfile.ZipFile(path) as archive, pytest.raises(zlib.error):
        archive.read("stats/run/scores.csv")
    with pytest.raises(UserError, match="cannot be read as a zip"), open_tree(path):
        pass


# ---------------------------------------------------------------- names inside of files


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".", "..", ".hidden", "a\\b", "c:x", "a\x00b", "x" * 200, None, 3])
def test_a_name_from_a_file_leads_nowhere_else(name):
    with pytest.raises(UserError, match="cannot be part of a file name"):
        path_piece(name, "manifest.json")


def test_a_content_of_another_shape_is_one_line():
    with pytest.raises(UserError, match="m.json is not a manifest .KeyError: 'a'."), expecting("a manifest", "m.json"):
        _ = {}["a"]
