"""SmolLM2 135M gives the CPU's tokens on every device: in fp32 all of them, in bf16 up to near-ties; weights dense
everywhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from fastllm import LLM, SamplingParams
from tiny_models import ENGINE

_PROMPTS = [
    "The capital of France is",
    "def quicksort(numbers):\n    ",
    "Once upon a time, in a village by the sea,",
    "Water boils at 100 degrees Celsius because",
    "1, 1, 2, 3, 5, 8, 13,",
    "Dear Sir or Madam,\n\nI am writing to " + "complain about the noise, the smell and the heat; " * 12,
]
_PARAMS = SamplingParams(temperature=0, max_tokens=48, ignore_eos=True, logprobs=20)
# Rounding to bf16 moves the log-probabilities of this model by this much, so that choices nearer than it are ties.
_NOISE_RMS = 0.1
_TIE = 0.25


def answers(llm: LLM) -> list[Any]:
    return [output.outputs[0] for output in llm.generate(_PROMPTS, _PARAMS, use_tqdm=False)]


@pytest.fixture(scope="module")
def expected(demo_gguf: str) -> list[Any]:
    """The CPU's, in fp32."""
    with LLM(demo_gguf, **{**ENGINE, "max_model_len": 512, "cpu_threads": 0, "quantization": "none"}) as llm:
        return answers(llm)


def test_float32_tokens_of_a_gpu_are_the_cpus(
    gpu_count: int, demo_gguf: str, expected: list[Any], make_llm: Callable[..., LLM]
) -> None:
    llm = make_llm(demo_gguf, device="cuda", max_model_len=512)
    for prompt, ours, theirs in zip(_PROMPTS, answers(llm), expected, strict=True):
        assert ours.token_ids == theirs.token_ids, prompt


def test_bfloat16_tokens_differ_only_at_ties(
    device: str, demo_gguf: str, expected: list[Any], make_llm: Callable[..., LLM]
) -> None:
    llm = make_llm(demo_gguf, device=device, dtype="bfloat16", quantization="none", max_model_len=512, cpu_threads=0)
    errors, equal = [], 0
    for prompt, ours, theirs in zip(_PROMPTS, answers(llm), expected, strict=True):
        for i, (token, wanted) in enumerate(zip(ours.token_ids, theirs.token_ids, strict=True)):
            row, exact = ours.logprobs[i], theirs.logprobs[i]
            errors += [(p.logprob - exact[t].logprob) ** 2 for t, p in row.items() if t in exact]
            if token != wanted:
                assert token in exact, f"{prompt!r}, token {i}: {token} is not among fp32's best 20"
                gap = exact[wanted].logprob - exact[token].logprob
                assert gap < _TIE, f"{prompt!r}, token {i}: {token} instead of {wanted}, which is {gap} likelier"
                break
            equal += 1
    noise = (sum(errors) / len(errors)) ** 0.5
    print(f"{equal} tokens equal; log-probabilities differ by {noise:.4f} (rms)")
    assert noise < _NOISE_RMS and equal > len(_PROMPTS) * 16
