"""What a CPU keeps keys and values in: fp16 and fp32 change no token, int8 changes little and takes half the memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest

from fastllm import LLM, SamplingParams
from reference import generate_all_logprobs, greedy_tokens, logprob_rows, next_logprobs, rms

_NEW_TOKENS = 16
_PROMPT = [(i * 37 + 11) % 256 for i in range(90)]
_MODELS = ["llama", "llama-heads-of-64"]


@pytest.mark.parametrize("name", _MODELS)
@pytest.mark.parametrize("cache", ["float32", "float16"])
def test_greedy_tokens_are_those_of_transformers(
    cache: str, name: str, tiny_model: Callable[[str], Path], make_llm: Callable[..., LLM]
) -> None:
    pytest.importorskip("torch", reason="needs torch as the reference")
    folder = tiny_model(name)
    params = SamplingParams(temperature=0, max_tokens=_NEW_TOKENS, ignore_eos=True)
    output = make_llm(folder, kv_cache_dtype=cache).generate(_PROMPT, params, use_tqdm=False)[0]
    assert list(output.outputs[0].token_ids) == greedy_tokens(folder, _PROMPT, _NEW_TOKENS)


@pytest.mark.parametrize("chunk", [0, 7])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", _MODELS)
def test_int8_cache_adds_little_to_the_error(
    name: str, dtype: str, chunk: int, tiny_model: Callable[[str], Path], make_llm: Callable[..., LLM]
) -> None:
    pytest.importorskip("torch", reason="needs torch as the reference")
    folder = tiny_model(name)
    settings = {"dtype": dtype, "max_logprobs": -1, "long_prefill_token_threshold": chunk}
    error = {}
    for cache in ["auto", "int8"]:
        llm = make_llm(folder, kv_cache_dtype=cache, **settings)
        output = generate_all_logprobs(llm, [_PROMPT], _NEW_TOKENS)[0]
        wanted = next_logprobs(folder, _PROMPT + list(output.outputs[0].token_ids))
        error[cache] = rms(logprob_rows(output) - wanted)
        spread = rms(wanted - wanted.mean())
    assert error["int8"] != error["auto"], "the cache is not int8"
    assert error["int8"] < math.hypot(error["auto"], 0.02 * spread)


def test_the_same_memory_holds_nearly_twice_the_blocks_in_int8(
    tiny_model: Callable[[str], Path], make_llm: Callable[..., LLM]
) -> None:
    folder = tiny_model("llama-heads-of-128")
    blocks = {}
    for cache in ["bfloat16", "float32", "int8"]:
        settings = {"dtype": "bfloat16", "num_gpu_blocks_override": None, "kv_cache_memory_bytes": 16 << 20}
        blocks[cache] = make_llm(folder, kv_cache_dtype=cache, **settings).stats().total_blocks
    assert blocks["float32"] == pytest.approx(blocks["bfloat16"] / 2, rel=0.02)
    assert blocks["int8"] == pytest.approx(blocks["bfloat16"] * 256 / 132, rel=0.02)
