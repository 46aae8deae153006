"""Fixtures of every folder of tests: a seed to print, tiny models built once per run."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from tiny_models import FAMILIES, save_tiny_model


@pytest.fixture
def seed() -> int:
    """The seed of a random test; FASTLLM_TEST_SEED repeats a run."""
    value = int(os.environ.get("FASTLLM_TEST_SEED", random.SystemRandom().randrange(2**31)))
    print(f"seed {value}; repeat with FASTLLM_TEST_SEED={value}")
    return value


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny fp32 model of a family, see tiny_models.FAMILIES."""
    pytest.importorskip("torch", reason="needs torch as the reference")
    pytest.importorskip("transformers", reason="needs transformers as the reference")
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("models") / name
            save_tiny_model(FAMILIES[name], made[name])
        return made[name]

    return get


@pytest.fixture(scope="session")
def llama(tiny_model: Callable[[str], Path]) -> Path:
    return tiny_model("llama")
