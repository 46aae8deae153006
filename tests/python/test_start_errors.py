"""An engine that cannot start says in one sentence which setting helps, and following it helps."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fastllm import LLM, SamplingParams
from fastllm.errors import ResourceError

_GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


def advised(message: str, flag: str) -> str:
    found = re.search(rf"{flag} (\d[\d.]*)", message)
    assert found, f"{flag} and a value are missing in: {message}"
    return found.group(1)


def test_too_small_a_share_of_a_gpu_names_one_that_is_enough(
    gpu_count: int, llama: Path, make_llm: Callable[..., LLM]
) -> None:
    with pytest.raises(ResourceError) as error:
        make_llm(llama, device="cuda", num_gpu_blocks_override=None, gpu_memory_utilization=1e-4)
    share = float(advised(str(error.value), "--gpu-memory-utilization"))
    assert 0 < share < 1
    llm = make_llm(llama, device="cuda", num_gpu_blocks_override=None, gpu_memory_utilization=share)
    assert len(llm.generate([[1, 2, 3]], _GREEDY, use_tqdm=False)[0].outputs[0].token_ids) == 8


def test_too_small_a_cache_names_a_length_and_a_size_that_fit(
    device: str, llama: Path, make_llm: Callable[..., LLM]
) -> None:
    settings = {"device": device, "num_gpu_blocks_override": None}
    with pytest.raises(ResourceError) as error:
        make_llm(llama, **settings, kv_cache_memory_bytes=100_000)
    length = int(advised(str(error.value), "--max-model-len"))
    size = int(advised(str(error.value), "--kv-cache-memory-bytes"))
    for changed in ({"kv_cache_memory_bytes": 100_000, "max_model_len": length}, {"kv_cache_memory_bytes": size}):
        llm = make_llm(llama, **settings, **changed)
        assert len(llm.generate([[1, 2, 3]], _GREEDY, use_tqdm=False)[0].outputs[0].token_ids) == 8


def test_too_large_a_cache_names_its_flag_and_leaves_the_device_usable(
    device: str, llama: Path, make_llm: Callable[..., LLM]
) -> None:
    for _ in range(2):
        with pytest.raises(ResourceError, match="--kv-cache-memory-bytes"):
            make_llm(llama, device=device, num_gpu_blocks_override=None, kv_cache_memory_bytes=2**50)
    llm = make_llm(llama, device=device)
    assert len(llm.generate([[1, 2, 3]], _GREEDY, use_tqdm=False)[0].outputs[0].token_ids) == 8


def test_a_gpu_that_is_not_there_is_one_sentence(llama: Path) -> None:
    command = [sys.executable, "-m", "fastllm", "generate", str(llama), "--device", "cuda", "--prompt", "Hello"]
    # On machines with a GPU, too.
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=hidden)
    said = [line for line in done.stderr.splitlines() if "device='cuda' cannot be used" in line]
    assert done.returncode == 1 and done.stdout == "" and "Traceback" not in done.stderr
    assert len(said) == 1 and said[0].endswith("."), done.stderr
