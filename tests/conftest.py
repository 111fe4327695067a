"""Settings and fixtures of all tests."""

from __future__ import annotations

import os
from pathlib import Path

# Before numpy and torch are imported: many threads on few cores slow small work down, and one thread is repeatable.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

# How long an example takes says more about what else the machine does than about the code.
settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder with real data sets; a test that asks for it is skipped where there is none."""
    folder = os.environ.get("MECHARULE_TEST_DATA")
    if not folder:
        pytest.skip("MECHARULE_TEST_DATA is not set: it names a folder with real data sets for tests")
    path = Path(folder)
    if not path.is_dir():
        pytest.fail(f"MECHARULE_TEST_DATA is {folder}, which is not a folder")
    return path
