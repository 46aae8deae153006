"""Weights computed on while compressed: small differences to dense ones, less memory, the same promises."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastllm import LLM, SamplingParams
from fastllm.engine_args import EngineArgs

_NEW_TOKENS = 24
_GREEDY = SamplingParams(temperature=0, max_tokens=_NEW_TOKENS, ignore_eos=True, logprobs=5)


def prompts(seed: int, count: int, vocab: int = 256) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab, int(rng.integers(1, 70))).tolist() for _ in range(count)]


def prompt_logprobs(llm: LLM, prompt: list[int], top: int) -> list[dict[int, float]]:
    """The log-probabilities of the `top` likeliest tokens after every token of the prompt but the last."""
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=top)
    made = llm.generate(prompt, params, use_tqdm=False)[0].prompt_logprobs
    assert made is not None
    return [{token: p.logprob for token, p in row.items()} for row in made[1:] if row is not None]


def compare(first: LLM, second: LLM, prompt: list[int], top: int, best: int = 1) -> tuple[float, float, float]:
    """Mean and largest difference of log-probabilities, and the share of positions at which the likeliest token of the
    first is among the `best` of the second."""
    differences: list[float] = []
    same = 0
    a, b = (prompt_logprobs(llm, prompt, top) for llm in (first, second))
    for x, y in zip(a, b, strict=True):
        differences += [abs(x[token] - y[token]) for token in x if token in y]
        same += max(x, key=lambda t: x[t]) in sorted(y, key=lambda t: -y[t])[:best]
    return float(np.mean(differences)), max(differences), same / len(a)


# name -> bounds of the mean and the largest difference, and: the likeliest token is among so many, this often. Random
# weights have no outliers and no margin between tokens; log-probabilities spread by about 1.5.
_BOUNDS = {"int8": (0.08, 1.5, 2, 0.95), "int4": (0.6, 8.0, 5, 0.75)}


@pytest.mark.parametrize("quantization", list(_BOUNDS))
@pytest.mark.parametrize("family", ["llama", "llama-tied-biased", "gpt2", "gemma2"])
def test_quantised_layers_stay_near_the_dense_ones(
    family: str, quantization: str, make_llm: Callable[..., LLM], tiny_model: Callable[[str], Path], seed: int
) -> None:
    prompt = np.random.default_rng(seed).integers(0, 256, 250).tolist()
    limits: dict[str, Any] = {"max_logprobs": -1}
    dense = make_llm(tiny_model(family), quantization="none", **limits)
    quantised = make_llm(tiny_model(family), quantization=quantization, **limits)
    most_mean, most, best, least_same = _BOUNDS[quantization]
    mean, worst, same = compare(dense, quantised, prompt, 320, best)
    print(f"{family} {quantization}: differences {mean:.4f} mean, {worst:.4f} at most; {same:.1%} among {best}")
    assert mean < most_mean and worst < most and same > least_same


def answers(llm: LLM, wanted: list[list[int]], alone: bool) -> list[Any]:
    outputs = (
        [llm.generate(p, _GREEDY, use_tqdm=False)[0] for p in wanted]
        if alone
        else llm.generate(wanted, _GREEDY, use_tqdm=False)
    )
    return [
        (o.outputs[0].token_ids, [[(t, p.logprob) for t, p in row.items()] for row in o.outputs[0].logprobs or []])
        for o in outputs
    ]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_batches_and_chunks_change_no_bit(
    quantization: str, dtype: str, make_llm: Callable[..., LLM], llama: Path, seed: int
) -> None:
    wanted = prompts(seed, 8)
    args: dict[str, Any] = {"quantization": quantization, "dtype": dtype, "enable_prefix_caching": False}
    expected = answers(make_llm(llama, **args), wanted, alone=True)
    assert answers(make_llm(llama, **args), wanted, alone=False) == expected
    assert answers(make_llm(llama, long_prefill_token_threshold=7, **args), wanted, alone=False) == expected


def test_ranks_share_quantised_layers(make_llm: Callable[..., LLM], llama: Path, seed: int) -> None:
    """Ranks cut columns inside groups here, so that their codes are others; the numbers stay near."""
    prompt = prompts(seed, 1)[0] * 3
    one = make_llm(llama, quantization="int8")
    two = make_llm(llama, quantization="int8", tensor_parallel_size=2)
    mean, worst, _ = compare(one, two, prompt[:200] + [1, 2], 20)
    assert mean < 0.05 and worst < 0.4


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_gguf_stays_compressed_and_near_its_dense_numbers(
    kind: str,
    tmp_path: Path,
    make_llm: Callable[..., LLM],
    tiny_model: Callable[[str], Path],
    caplog: pytest.LogCaptureFixture,
    seed: int,
) -> None:
    gguf = pytest.importorskip("gguf", reason="the gguf package writes the file")
    from test_gguf import open_config, write_model

    source = tiny_model("llama")
    file = tmp_path / "m.gguf"
    write_model(source, file, open_config(source), gguf.GGMLQuantizationType[kind], None)
    limits: dict[str, Any] = {"max_logprobs": -1, "dtype": "bfloat16"}
    dense = make_llm(file, quantization="none", **limits)
    with caplog.at_level(logging.INFO, logger="fastllm"):
        compressed = make_llm(file, **limits)
    assert f"Weights stay compressed as in the file: {kind}." in caplog.text
    assert 0 < compressed.memory.weights < 0.75 * dense.memory.weights
    prompt = np.random.default_rng(seed).integers(0, 256, 250).tolist()
    mean, worst, same = compare(dense, compressed, prompt, 320, 2)
    share = compressed.memory.weights / dense.memory.weights
    print(f"{kind}: {share:.3f} of the memory; differences {mean:.4f} mean, {worst:.4f} at most; {same:.1%} among 2")
    assert mean < 0.08 and worst < 1.5 and same > 0.95


def test_an_unknown_quantization_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="'int3' is not supported; known are none, int8, int4, gguf, awq"):
        EngineArgs(quantization="int3")


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_gpus_refuse_to_quantise(gpu_count: int, quantization: str, make_llm: Callable[..., LLM], llama: Path) -> None:
    with pytest.raises(ValueError, match=f"quantization '{quantization}' runs on CPUs only"):
        make_llm(llama, device="cuda", quantization=quantization)


def test_demo_model_answers_sensibly_while_compressed(demo_gguf: str, make_llm: Callable[..., LLM]) -> None:
    limits: dict[str, Any] = {"max_model_len": 256, "dtype": "bfloat16"}
    compressed = make_llm(demo_gguf, **limits)
    dense = make_llm(demo_gguf, quantization="none", **limits)
    text = (
        "The capital of France is Paris, and the capital of Italy is Rome. Water boils at 100 degrees Celsius and "
        "freezes at 0 degrees. The sun rises in the east and sets in the west."
    )
    prompt = compressed.get_tokenizer().encode(text)
    mean, worst, same = compare(dense, compressed, prompt, 20)
    share = compressed.memory.weights / dense.memory.weights
    print(f"{share:.3f} of the memory; differences {mean:.4f} mean, {worst:.4f} at most; {same:.1%} same first token")
    assert share < 0.5 and mean < 0.2 and same > 0.8
    greedy = SamplingParams(temperature=0, max_tokens=12)
    assert "Paris" in compressed.generate("The capital of France is", greedy, use_tqdm=False)[0].outputs[0].text
