"""The same request gives the same tokens however it is scheduled, greedy or sampled with a seed, on every device; and
the same log-probabilities, bit for bit, from a deterministic engine."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastllm import LLM, SamplingParams
from tiny_models import ENGINE

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
    "no graphs": {"enforce_eager": True},
}
# Other block sizes and ranks may round otherwise, and a deterministic engine has no graphs.
_SAME_BITS = [name for name in ["batch of 32", *VARIANTS] if not name.startswith(("TP", "blocks", "no graphs"))]


Answers = list[tuple[list[int], list[list[tuple[int, float]]]]]


def answers(llm: LLM, *, alone: bool = False, logprobs: int | None = None) -> Answers:
    """Tokens of every prompt, and the best log-probabilities at each of them; alone: one prompt at a time."""
    params = [p.clone() for p in PARAMS]
    for one in params:
        one.logprobs = logprobs
    pairs = list(zip(PROMPTS, params, strict=True))
    outputs = (
        [llm.generate(prompt, one, use_tqdm=False)[0] for prompt, one in pairs]
        if alone
        else llm.generate(PROMPTS, params, use_tqdm=False)
    )
    samples = [output.outputs[0] for output in outputs]
    return [
        (list(s.token_ids), [[(token, p.logprob) for token, p in row.items()] for row in s.logprobs or []])
        for s in samples
    ]


def answers_alone(folder: Path, device: str, *, logprobs: int | None = None, **args: Any) -> Answers:
    """What each prompt gives when it has an engine for itself, without a cache."""
    with LLM(str(folder), **{**ENGINE, "device": device, "enable_prefix_caching": False, **args}) as llm:
        made = answers(llm, alone=True, logprobs=logprobs)
    assert len({tuple(t) for t, _ in made}) > len(made) // 2, "a model that says one thing would prove nothing"
    return made


def check_variant(variant: str, llm: LLM, expected: Answers, logprobs: int | None = None) -> None:
    settings = VARIANTS.get(variant, {})
    assert answers(llm, logprobs=logprobs) == expected
    assert answers(llm, logprobs=logprobs) == expected, "a second round, from a warm prefix cache"
    # Tokens are given out before the statistics of their step.
    deadline = time.monotonic() + 30
    while (stats := llm.stats()).used_blocks and time.monotonic() < deadline:
        pass
    assert (stats.used_blocks, stats.block_leaks) == (0, 0)
    if "num_gpu_blocks_override" in settings and "max_num_seqs" in settings:
        assert stats.num_preemptions > 0, "this variant is meant to preempt"
    if variant == "no prefix cache":
        assert stats.prefix_hits == 0
    elif variant == "batch of 32":
        assert stats.prefix_hits > 0


@pytest.fixture(scope="module")
def alone(device: str, tiny_model: Callable[[str], Path]) -> tuple[Path, Answers]:
    folder = tiny_model("llama4heads")
    return folder, answers_alone(folder, device)


@pytest.mark.parametrize("variant", ["batch of 32", *VARIANTS])
def test_tokens_do_not_depend_on_scheduling(
    variant: str,
    device: str,
    alone: tuple[Path, Answers],
    make_llm: Callable[..., LLM],
    request: pytest.FixtureRequest,
) -> None:
    folder, expected = alone
    settings = VARIANTS.get(variant, {})
    if device == "cuda" and settings.get("tensor_parallel_size", 1) > request.getfixturevalue("gpu_count"):
        pytest.skip("every rank needs a GPU of its own")
    llm = make_llm(folder, **{"block_size": _BLOCK, **settings}, device=device)
    check_variant(variant, llm, expected)


def test_tokens_of_a_gpu_are_those_of_the_cpu(gpu_count: int, tiny_model: Callable[[str], Path]) -> None:
    folder = tiny_model("llama4heads")
    assert answers_alone(folder, "cuda") == answers_alone(folder, "cpu")


# Models, and what their keys and values are kept in.
_CACHES = [("llama4heads", "auto"), ("llama-heads-of-64", "auto"), ("llama-heads-of-128", "auto")]
_CPU_CACHES = [("llama4heads", "float16"), ("llama-heads-of-64", "int8")]


@pytest.fixture(scope="module", params=[*_CACHES, *_CPU_CACHES], ids="-".join)
def bits(
    request: pytest.FixtureRequest, device: str, tiny_model: Callable[[str], Path]
) -> tuple[Path, dict[str, Any], Answers]:
    """A model, settings, and the answers of a deterministic bf16 engine to each prompt alone."""
    if device == "cuda" and request.param in _CPU_CACHES:
        pytest.skip("GPUs have no such cache")
    folder = tiny_model(request.param[0])
    settings = {"dtype": "bfloat16", "deterministic": True, "kv_cache_dtype": request.param[1]}
    return folder, settings, answers_alone(folder, device, logprobs=5, **settings)


@pytest.mark.parametrize("variant", _SAME_BITS)
def test_deterministic_engine_gives_the_same_bits_however_it_schedules(
    variant: str, device: str, bits: tuple[Path, dict[str, Any], Answers], make_llm: Callable[..., LLM]
) -> None:
    folder, fixed, expected = bits
    settings = {**fixed, **VARIANTS.get(variant, {})}
    check_variant(variant, make_llm(folder, **settings, device=device), expected, logprobs=5)
