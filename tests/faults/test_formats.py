"""Damaged files of the formats that no stage's small world has: archives, GGUF models, the cache of model calls.

Each is cut off or has one bit flipped at seeded places. Allowed are one line, or what the whole file gives.
"""

from __future__ import annotations

import sqlite3
from collections import Counter
from pathlib import Path

import pytest

from lib.caching_and_prompting import CACHE_FILE, CallCache
from lib.cli import UserError, rng


def flipped(content: bytes, place: int, bit: int) -> bytes:
    """The content with one bit the other way round."""
    return content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :]


def damages(content: bytes, n_cut: int, n_flipped: int, label: str, below: int | None = None):
    """Damaged contents, each with what was done; flips lie `below` that many bytes."""
    random = rng(0, "formats", label)
    for _ in range(n_cut):
        size = int(random.integers(len(content)))
        yield f"cut off after {size}", content[:size]
    for _ in range(n_flipped):
        place, bit = int(random.integers(below or len(content))), int(random.integers(8))
        yield f"bit {bit} of byte {place}", flipped(content, place, bit)


# ---------------------------------------------------------------- the cache of model calls


def reply_of(number: int) -> str:
    return f"def feature_{number}(prompt, info):\n    return len(prompt) > {number}\n" * 2


@pytest.fixture(scope="module")
def whole_cache(tmp_path_factory) -> bytes:
    folder = tmp_path_factory.mktemp("cache")
    cache = CallCache(folder)
    for number in range(40):
        cache.put(f"key {number}", "{}", reply_of(number))
    cache.close()
    return (folder / CACHE_FILE).read_bytes()


def read_all(folder: Path) -> list[str | None]:
    """Every answer, None where there is none.

    Raises:
        UserError: the file cannot be used.
    """
    cache = CallCache(folder)
    try:
        return [cache.get(f"key {number}") for number in range(40)]
    finally:
        cache.close()


def test_a_damaged_cache_of_calls_never_gives_another_answer(whole_cache, tmp_path):
    outcomes = Counter()
    for number, (what, content) in enumerate(damages(whole_cache, 40, 400, "calls")):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / CACHE_FILE).write_bytes(content)
        try:
            answers = read_all(folder)
        except UserError as error:
            assert "delete it" in str(error), what
            outcomes["refused"] += 1
            continue
        lost = sum(answer is None for answer in answers)
        assert [answer or reply_of(i) for i, answer in enumerate(answers)] == [reply_of(i) for i in range(40)], what
        outcomes["asked again" if lost else "whole"] += 1
    # Every kind of ending was met; that many flips hit answers which the cache would have given altered.
    assert outcomes["refused"] >= 20 and outcomes["asked again"] >= 50 and outcomes["whole"] >= 50, outcomes


def test_a_cache_of_calls_from_before_there_were_checksums_is_asked_again(tmp_path):
    with sqlite3.connect(tmp_path / CACHE_FILE) as database:
        database.execute("CREATE TABLE calls (key TEXT PRIMARY KEY, request TEXT NOT NULL, reply TEXT NOT NULL, "
                         "finished TEXT NOT NULL)")  # fmt: skip
        database.execute("INSERT INTO calls VALUES ('key', '{}', 'old', 'then')")
    cache = CallCache(tmp_path)
    assert cache.get("key") is None
    cache.put("key", "{}", "new")
    assert cache.get("key") == "new"
    cache.close()
