"""SECURITY.md names tests that exist."""

from __future__ import annotations

import re

import pytest

from tests.scripts import REPOSITORY

PAGE = (REPOSITORY / "SECURITY.md").read_text()
ROWS = [line for line in PAGE.splitlines() if line.startswith("| **")]
NAMED = sorted(set(re.findall(r"`((?:tests/)?[\w/]*(?:test_\w+|fuzzing|hostile_features)(?:\.py)?(?:::\w+)?)`", PAGE)))


def test_every_threat_names_its_test():
    assert len(ROWS) >= 17 and len(NAMED) >= 12
    earlier = ""
    for row in ROWS:
        shown = row.rsplit("|", 2)[1]
        assert "test" in shown or (shown.strip() == "the same" and "test" in earlier), row
        earlier = earlier if shown.strip() == "the same" else shown


@pytest.mark.parametrize("name", NAMED)
def test_a_test_that_is_named_is_there(name):
    file, _, function = name.partition("::")
    parts = ("security", "reporting", "lib", ".")
    places = [REPOSITORY / file, *(REPOSITORY / "tests" / part / file for part in parts)]
    found = [path for path in places if path.exists()]
    assert found, name
    assert not function or f"def {function}(" in found[0].read_text()
