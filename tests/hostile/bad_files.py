"""What every refusal of a model file promises."""

from __future__ import annotations

import resource
import time
from pathlib import Path

import pytest

from fastllm import LLM, SamplingParams
from fastllm.errors import FastllmError
from tiny_models import ENGINE


def load(model: Path) -> None:
    llm = LLM(str(model), **ENGINE)
    try:
        output = llm.generate([[1, 2, 3]], SamplingParams(max_tokens=2, ignore_eos=True), use_tqdm=False)[0]
        assert len(output.outputs[0].token_ids) == 2
    finally:
        llm.shutdown()


def refusal(model: Path) -> str:
    """What the loader says, once it has been checked for what every refusal promises."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.monotonic()
    with pytest.raises((FastllmError, ValueError)) as caught:
        load(model)
    assert time.monotonic() - start < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 256 << 10  # KiB
    message = str(caught.value)
    assert "\n" not in message and len(message) < 1000
    return message
