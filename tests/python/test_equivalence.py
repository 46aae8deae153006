"""The same request gives the same tokens however it is scheduled: greedy and seeded sampling."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastllm import LLM, SamplingParams

_BLOCK = 16  # tokens
_NEW_TOKENS = 24
_RANDOM = random.Random(20240607)
# Lengths around block borders, with beginnings shared by several prompts.
_SHARED = [_RANDOM.randrange(256) for _ in range(40)]
PROMPTS = [
    _SHARED[: _RANDOM.choice([0, 16, 33, 40])] + [_RANDOM.randrange(256) for _ in range(length)]
    for length in [1, 15, 16, 17, 31, 32, 33, 5, *[_RANDOM.randrange(1, 60) for _ in range(24)]]
]
PARAMS = [
    SamplingParams(temperature=0, max_tokens=_NEW_TOKENS, ignore_eos=True)
    if i % 2
    else SamplingParams(temperature=0.9, top_k=40, top_p=0.95, seed=i, max_tokens=_NEW_TOKENS, ignore_eos=True)
    for i in range(len(PROMPTS))
]
_TINY_KV = {"num_gpu_blocks_override": 14, "max_num_seqs": 8}

VARIANTS: dict[str, dict[str, Any]] = {
    "chunk of 1": {"long_prefill_token_threshold": 1},
    "chunk of 7": {"long_prefill_token_threshold": 7},
    "small steps": {"max_num_batched_tokens": 32, "max_num_seqs": 16},
    "no prefix cache": {"enable_prefix_caching": False},
    "synchronous": {"async_scheduling": False},
    "recompute": _TINY_KV | {"preemption_mode": "recompute"},
    "swap": _TINY_KV | {"preemption_mode": "swap", "swap_space": 0.01},
    "synchronous swap": _TINY_KV | {"preemption_mode": "swap", "swap_space": 0.01, "async_scheduling": False},
    "TP 2": {"tensor_parallel_size": 2},
    "TP 4": {"tensor_parallel_size": 4},
    "blocks of 32": {"block_size": 32, "num_gpu_blocks_override": 128},
}


def token_ids(llm: LLM) -> list[list[int]]:
    return [o.outputs[0].token_ids for o in llm.generate(PROMPTS, PARAMS, use_tqdm=False)]


@pytest.fixture(scope="module")
def alone(tiny_model: Callable[[str], Path]) -> tuple[Path, list[list[int]]]:
    """The model and what each prompt gives when it has the engine for itself, without a cache."""
    folder = tiny_model("llama4heads")
    llm = LLM(str(folder), dtype="float32", num_gpu_blocks_override=256, enable_prefix_caching=False)
    tokens = [
        llm.generate(prompt, params, use_tqdm=False)[0].outputs[0].token_ids
        for prompt, params in zip(PROMPTS, PARAMS, strict=True)
    ]
    llm.shutdown()
    assert len({tuple(t) for t in tokens}) > len(tokens) // 2, "a model that says one thing would prove nothing"
    return folder, tokens


@pytest.mark.parametrize("variant", ["batch of 32", *VARIANTS])
def test_tokens_do_not_depend_on_scheduling(
    variant: str, alone: tuple[Path, list[list[int]]], make_llm: Callable[..., LLM]
) -> None:
    folder, expected = alone
    llm = make_llm(folder, **{"block_size": _BLOCK, **VARIANTS.get(variant, {})})
    assert token_ids(llm) == expected
    assert token_ids(llm) == expected, "a second round, from a warm prefix cache"
    # Tokens are given out before the statistics of their step.
    deadline = time.monotonic() + 30
    while (stats := llm.stats()).used_blocks and time.monotonic() < deadline:
        pass
    assert (stats.used_blocks, stats.block_leaks) == (0, 0)
    if "num_gpu_blocks_override" in VARIANTS.get(variant, {}) and "max_num_seqs" in VARIANTS[variant]:
        assert stats.num_preemptions > 0, "this variant is meant to preempt"
    if variant == "no prefix cache":
        assert stats.prefix_hits == 0
    elif variant == "batch of 32":
        assert stats.prefix_hits > 0
