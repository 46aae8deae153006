"""Every family computes what Transformers computes, in prefill, chunked prefill and decode, in fp32 and bf16."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastllm import LLM
from reference import generate_all_logprobs, greedy_tokens, logprob_rows, next_logprobs, rms
from tiny_models import FAMILIES

NEW_TOKENS = 16
PROMPT = [(i * 37 + 11) % 256 for i in range(90)]


@pytest.mark.parametrize("chunk", [0, 7])
@pytest.mark.parametrize("name", FAMILIES)
def test_family_equals_transformers(
    name: str, chunk: int, device: str, tiny_model: Callable[[str], Path], make_llm: Callable[..., LLM]
) -> None:
    folder = tiny_model(name)
    tokens = greedy_tokens(folder, PROMPT, NEW_TOKENS)
    llm = make_llm(folder, device=device, max_logprobs=-1, long_prefill_token_threshold=chunk)
    output = generate_all_logprobs(llm, [PROMPT], NEW_TOKENS)[0]
    assert output.outputs[0].token_ids == tokens
    rows, expected = logprob_rows(output), next_logprobs(folder, PROMPT + tokens)
    assert rows.shape == expected.shape
    worst = abs(rows - expected).max(axis=1)
    assert worst.max() < 1e-4, f"position {worst.argmax()}: {worst.max()}"


@pytest.mark.parametrize("name", FAMILIES)
def test_family_in_bfloat16_is_nearer_to_float32_than_transformers(
    name: str, device: str, tiny_model: Callable[[str], Path], make_llm: Callable[..., LLM]
) -> None:
    folder = tiny_model(name)
    llm = make_llm(folder, device=device, dtype="bfloat16", max_logprobs=-1)
    output = generate_all_logprobs(llm, [PROMPT], NEW_TOKENS)[0]
    # Both references follow the tokens that our engine chose.
    ids = PROMPT + output.outputs[0].token_ids
    exact = next_logprobs(folder, ids)
    ours, theirs = logprob_rows(output) - exact, next_logprobs(folder, ids, "bfloat16") - exact
    # Our residual stream is fp32, so that about 0.7 of their error is usual.
    assert rms(ours) <= rms(theirs) and abs(ours).max() <= 2 * abs(theirs).max()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"enforce_eager": True, "max_num_batched_tokens": 300},
        {"preemption_mode": "swap", "swap_space": 0.1, "num_gpu_blocks_override": 130, "max_num_seqs": 16},
    ],
    ids=["graphs", "eager-chunks", "swap"],
)
@pytest.mark.parametrize("name", ["llama-heads-of-64", "llama-heads-of-128"])
def test_batch_in_bfloat16_is_nearer_to_float32_than_transformers(
    name: str, settings: dict[str, Any], device: str, tiny_model: Callable[[str], Path], make_llm: Callable[..., LLM]
) -> None:
    folder = tiny_model(name)
    generator = random.Random(7)
    lengths = [1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 500, 1000, *[generator.randrange(1, 200) for _ in range(20)]]
    prompts = [[generator.randrange(256) for _ in range(length)] for length in lengths]
    llm = make_llm(
        folder, **{"num_gpu_blocks_override": 1000, **settings}, device=device, dtype="bfloat16", max_logprobs=-1
    )
    outputs = generate_all_logprobs(llm, prompts, NEW_TOKENS, of_prompts=False)
    if "preemption_mode" in settings:
        assert llm.stats().num_preemptions > 0, "this variant is meant to preempt"
    ours, theirs = [], []
    for prompt, output in zip(prompts, outputs, strict=True):
        ids = prompt + output.outputs[0].token_ids
        exact = next_logprobs(folder, ids)[-NEW_TOKENS:]
        ours.append(logprob_rows(output) - exact)
        theirs.append(next_logprobs(folder, ids, "bfloat16")[-NEW_TOKENS:] - exact)
    usual = rms(theirs)
    assert rms(ours) <= usual
    for length, error in zip(lengths, ours, strict=True):
        assert rms(error) <= 3 * usual, f"the prompt of {length} tokens is off by {rms(error)}, usual is {usual}"
