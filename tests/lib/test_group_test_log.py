"""The log of group tests: what is on disk is what was done, whatever happened to its end."""

import numpy as np
import pytest

from lib.group_test_log import CHANGED, FLIPPED, UNCHANGED, UNKNOWN, GroupTestLog, group_name, neuron_code
from lib.neurons import Neuron

ROWS = np.array([10, 20, 30])
OUTCOMES = np.array([[FLIPPED, UNCHANGED, CHANGED], [UNCHANGED, UNCHANGED, UNCHANGED]], dtype=np.int8)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "log.jsonl"


def filled(path):
    log = GroupTestLog(path, "f")
    log.add(["a", "b"], [1, 5], ROWS, OUTCOMES, [{10: "new"}, {}])
    return log


def test_a_second_reader_finds_the_tests(path):
    filled(path)
    log = GroupTestLog(path, "f")
    assert log.outcomes(["a", "b", "c"], np.array([30, 10, 99])).tolist() == [
        [CHANGED, FLIPPED, UNKNOWN],
        [UNCHANGED, UNCHANGED, UNKNOWN],
        [UNKNOWN, UNKNOWN, UNKNOWN],
    ]
    assert log.answers("a") == {10: "new"} and log.answers("b") == {}


def test_more_datapoints_of_a_known_group_are_added(path):
    filled(path)
    log = GroupTestLog(path, "f")
    log.add(["a"], [1], np.array([5, 20]), np.array([[FLIPPED, FLIPPED]], dtype=np.int8), [{}])
    assert GroupTestLog(path, "f").outcomes(["a"], np.array([5, 10, 20])).tolist() == [[FLIPPED, FLIPPED, FLIPPED]]


def test_another_fingerprint_starts_anew(path):
    filled(path)
    assert len(GroupTestLog(path, "g")) == 0
    assert len(GroupTestLog(path, "f")) == 0


def test_every_torn_end_loses_only_its_own_line(path):
    filled(path)
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        n_lines = sum(len(b"".join(lines[: n + 1])) <= length for n in range(len(lines)))
        log = GroupTestLog(path, "f")
        assert len(log) == max(0, n_lines - 2)
        log.add(["z"], [1], ROWS, OUTCOMES[:1], [{}])
        again = GroupTestLog(path, "f")
        assert len(again) == len(log)
        assert again.outcomes(["z"], ROWS).tolist() == OUTCOMES[:1].tolist()


def test_an_altered_line_ends_the_log_there(path):
    filled(path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], lines[2].replace(b'"201"', b'"000"'), lines[3]]))
    assert len(GroupTestLog(path, "f")) == 0


def test_group_names_ignore_order_and_tell_units_apart():
    codes = np.array(
        [neuron_code(Neuron(*unit)) for unit in (("m1", 2), ("a1.h0", 2), ("a1.h1", 2), ("m2", 1), ("m12", 2))]
    )
    assert len(set(codes.tolist())) == 5
    assert group_name(codes) == group_name(codes[::-1])
    assert group_name(codes[:2]) != group_name(codes[1:3])
