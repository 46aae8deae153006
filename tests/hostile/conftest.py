"""Shares the server fixtures and tiny models with the ordinary tests, and one server among the tables of rows."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "python"))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from harness import Target  # noqa: E402

from model_fixtures import llama, seed, tiny_model  # noqa: E402, F401


@pytest.fixture(scope="session")
def target() -> Iterator[Target]:
    running = Target()
    yield running
    try:
        running.check_well(float("inf"))
        running.check_memory()
    finally:
        running.stop()
