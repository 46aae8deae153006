"""A KV cache in fp8 computes what the model computes with keys and values rounded to fp8, and nothing worse."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastllm import LLM
from fastllm.errors import FastllmError
from reference import Rows, generate_all_logprobs, logprob_rows, next_logprobs, rms

_NEW_TOKENS = 16
_PROMPT = [(i * 37 + 11) % 256 for i in range(90)]
_ENGINE = {"device": "cuda", "dtype": "bfloat16", "kv_cache_dtype": "fp8", "max_logprobs": -1}


@pytest.fixture
def rounded_logprobs(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Rows]:
    """next_logprobs() of a Llama that attends to fp8 keys and values."""
    torch = pytest.importorskip("torch", reason="needs torch as the reference")
    llama = importlib.import_module("transformers.models.llama.modeling_llama")
    exact = llama.eager_attention_forward

    def rounded(module: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        key, value = (x.to(torch.float8_e4m3fn).to(x.dtype) for x in (key, value))
        return exact(module, query, key, value, *args, **kwargs)

    def logprobs(*args: Any) -> Rows:
        with monkeypatch.context() as patch:
            patch.setattr(llama, "eager_attention_forward", rounded)
            return next_logprobs(*args)

    return logprobs


@pytest.mark.parametrize("chunk", [0, 7])
@pytest.mark.parametrize("name", ["llama", "llama-heads-of-64", "llama-heads-of-128"])
def test_fp8_cache_is_as_near_to_rounded_keys_and_values_as_transformers(
    name: str,
    chunk: int,
    gpu_count: int,
    rounded_logprobs: Callable[..., Rows],
    tiny_model: Callable[[str], Path],
    make_llm: Callable[..., LLM],
) -> None:
    folder = tiny_model(name)
    llm = make_llm(folder, **_ENGINE, long_prefill_token_threshold=chunk)
    output = generate_all_logprobs(llm, [_PROMPT], _NEW_TOKENS)[0]
    ids = _PROMPT + output.outputs[0].token_ids
    wanted = rounded_logprobs(folder, ids)
    ours, theirs = logprob_rows(output) - wanted, rounded_logprobs(folder, ids, "bfloat16") - wanted
    assert rms(theirs) > 0 and rms(wanted - next_logprobs(folder, ids)) > 0, "the reference does not round"
    assert rms(ours) <= 1.2 * rms(theirs)


def test_fp8_cache_survives_preemption_and_sharing(
    gpu_count: int, tiny_model: Callable[[str], Path], make_llm: Callable[..., LLM]
) -> None:
    folder = tiny_model("llama-heads-of-128")
    prompts = [_PROMPT[: 20 + 3 * i] + [i] for i in range(16)]
    settings = _ENGINE | {"deterministic": True}
    expected = generate_all_logprobs(make_llm(folder, **settings), prompts, _NEW_TOKENS, of_prompts=False)
    tiny_kv = {"num_gpu_blocks_override": 24, "preemption_mode": "swap", "swap_space": 0.05}
    llm = make_llm(folder, **settings, **tiny_kv)
    outputs = generate_all_logprobs(llm, prompts, _NEW_TOKENS, of_prompts=False)
    assert llm.stats().num_preemptions > 0
    for output, wanted in zip(outputs, expected, strict=True):
        assert output.outputs[0].token_ids == wanted.outputs[0].token_ids
        assert (logprob_rows(output) == logprob_rows(wanted)).all()


def test_cpus_have_no_fp8_cache(llama: Path, make_llm: Callable[..., LLM]) -> None:
    with pytest.raises(FastllmError, match="kv_cache_dtype 'fp8' needs a GPU"):
        make_llm(llama, kv_cache_dtype="fp8")


def test_fp8_cache_needs_bfloat16(gpu_count: int, llama: Path, make_llm: Callable[..., LLM]) -> None:
    with pytest.raises(FastllmError, match="kv_cache_dtype 'fp8' needs dtype bfloat16"):
        make_llm(llama, device="cuda", dtype="float32", kv_cache_dtype="fp8")
