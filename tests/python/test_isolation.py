"""What one user sends never reaches another: cached prefixes stay within their salt, and two users who fight for a tiny
KV cache get, bit for bit, what each gets from an engine of their own."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from fastllm import LLM, SamplingParams

_USERS = 2
_RANDOM = random.Random(31)
_SHARED = [_RANDOM.randrange(256) for _ in range(48)]  # three blocks that all prompts begin with
# Turns of both users, one after the other: user 0, user 1, user 0, ...
_SECRETS = [[_RANDOM.randrange(256) for _ in range(_RANDOM.randrange(8, 90))] for _ in range(20)]
_PARAMS = [
    SamplingParams(temperature=0.8 * (turn // _USERS % 2), seed=turn, max_tokens=40, ignore_eos=True, logprobs=3)
    for turn in range(len(_SECRETS))
]


def ask(llm: LLM, turns: Sequence[int]) -> list[Any]:
    prompts = [{"prompt_token_ids": _SHARED + _SECRETS[turn], "cache_salt": f"user {turn % _USERS}"} for turn in turns]
    outputs = llm.generate(prompts, [_PARAMS[turn] for turn in turns], use_tqdm=False)
    samples = [output.outputs[0] for output in outputs]
    return [(s.token_ids, [[(t, p.logprob) for t, p in row.items()] for row in s.logprobs or []]) for s in samples]


@pytest.mark.parametrize("mode", ["recompute", "swap"])
@pytest.mark.parametrize("name", ["llama", "llama-heads-of-128"])
def test_users_on_one_engine_get_what_their_own_engines_give(
    name: str, mode: str, device: str, tiny_model: Callable[[str], Path], make_llm: Callable[..., LLM]
) -> None:
    settings = {"device": device, "dtype": "bfloat16", "deterministic": True}
    turns = range(len(_SECRETS))
    expected: dict[int, Any] = {}
    for user in range(_USERS):
        own = turns[user::_USERS]
        expected.update(zip(own, ask(make_llm(tiny_model(name), **settings), own), strict=True))
    tiny_kv = {"num_gpu_blocks_override": 30, "max_num_seqs": 8, "preemption_mode": mode, "swap_space": 0.05}
    shared = make_llm(tiny_model(name), **settings, **tiny_kv)
    for attempt in range(2):
        assert dict(zip(turns, ask(shared, turns), strict=True)) == expected, f"round {attempt}"
    assert shared.stats().num_preemptions > 0, "the cache was meant to be too small"


def test_cached_prefixes_are_not_shared_between_salts(device: str, llama: Path, make_llm: Callable[..., LLM]) -> None:
    llm = make_llm(llama, device=device)

    def cached_tokens(salt: str) -> int:
        prompt = {"prompt_token_ids": [*_SHARED, 1], "cache_salt": salt}
        output = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=2), use_tqdm=False)[0]
        return int(output.num_cached_tokens)

    assert [cached_tokens("a"), cached_tokens("b"), cached_tokens("a"), cached_tokens("b")] == [0, 0, 48, 48]
