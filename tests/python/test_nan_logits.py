"""A model whose weights are not all numbers: the request that meets one ends with an error, whether before its first
token or in the middle, and nothing that it left behind changes what another request gets."""

from __future__ import annotations

import asyncio
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from server_fixtures import Reply, RunningServer, ask, running_server

_BAD = "#"  # the token whose embedding is not numbers
_WORDS = "the quick brown fox jumps over the lazy dog and runs away "
_HEALTHY: list[dict[str, Any]] = [
    {"prompt": _WORDS * 2, "temperature": 0},
    {"prompt": _WORDS + "once", "temperature": 0.9, "seed": 1, "logprobs": 3},
    {"prompt": "x", "temperature": 1, "top_p": 0.8, "seed": 2, "presence_penalty": 0.5},
    {"prompt": _WORDS[:37], "temperature": 0.7, "top_k": 20, "seed": 3, "n": 2},
    {"prompt": _WORDS[3:50], "temperature": 0, "structured_outputs": {"regex": "[a-z ]{24}"}},
]
_FORCED = {str(ord(_BAD)): 100}
# Some begin like healthy ones, which read what these computed until the fault is known.
_POISONED: list[dict[str, Any]] = [
    {"prompt": _WORDS * 2 + _BAD, "temperature": 0},
    {"prompt": _BAD + _WORDS * 3, "temperature": 1, "top_p": 0.5},
    {"prompt": _BAD, "temperature": 1, "min_p": 0.1},
    {"prompt": _WORDS[3:50] + _BAD, "structured_outputs": {"regex": "[a-z ]{24}"}},
    {"prompt": _WORDS, "temperature": 1, "logit_bias": _FORCED},  # its own first token is the bad one
    {"prompt": _WORDS * 2 + _BAD, "temperature": 0.5, "logprobs": 2, "n": 2, "presence_penalty": 1},
]


@pytest.fixture(scope="module", params=[math.nan, math.inf])
def server(
    request: pytest.FixtureRequest, device: str, llama: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServer]:
    torch, files = pytest.importorskip("torch"), pytest.importorskip("safetensors.torch")
    folder = tmp_path_factory.mktemp("poisoned")
    shutil.copytree(llama, folder, dirs_exist_ok=True)
    weights = files.load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][ord(_BAD)] = torch.full((64,), request.param)
    files.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    # So few blocks that what the poisoned requests leave is used again.
    settings = {"model": str(folder), "device": device, "max_model_len": 256, "num_gpu_blocks_override": 64}
    deterministic = device == "cuda"  # or a row's last bits would depend on the others
    with running_server(
        {**settings, "deterministic": deterministic, "dtype": "float32", "served_model_name": "null"}
    ) as running:
        yield running


async def _complete(server: RunningServer, bodies: list[dict[str, Any]]) -> list[Reply]:
    async with aiohttp.ClientSession() as session:
        common = {"model": "null", "max_tokens": 24, "ignore_eos": True}
        url = server.url + "/v1/completions"
        return list(await asyncio.gather(*(ask(session, "POST", url, common | body) for body in bodies)))


def _answers(replies: list[Reply]) -> list[Any]:
    assert [reply.status for reply in replies] == [200] * len(replies), [reply.body for reply in replies]
    return [[(choice["text"], choice["logprobs"]) for choice in reply.json["choices"]] for reply in replies]


def test_requests_beside_and_after_poisoned_ones_get_what_they_get_alone(server: RunningServer) -> None:
    alone = [_answers(asyncio.run(_complete(server, [body])))[0] for body in _HEALTHY]
    before = server.metric("fastllm:nan_rows_total")
    for _ in range(3):
        mixed = [body for pair in zip(_POISONED, [*_HEALTHY, _HEALTHY[0]], strict=True) for body in pair]
        replies = asyncio.run(_complete(server, mixed))
        assert _answers(replies[1::2]) == [*alone, alone[0]]
        for reply in replies[0::2]:
            assert reply.status == 500
            assert reply.error["type"] == "server_error" and "not numbers" in reply.error["message"]
        assert _answers(asyncio.run(_complete(server, _HEALTHY))) == alone
    assert server.metric("fastllm:nan_rows_total") == before + 3 * len(_POISONED)
    server.wait_idle()
    assert server.ask("GET", "/health").status == 200


def test_a_stream_ends_with_an_error_event(server: RunningServer) -> None:
    body = {"prompt": _WORDS, "structured_outputs": {"regex": f"[a-z]{{150}}{_BAD}[a-z]"}, "stream": True}
    (reply,) = asyncio.run(_complete(server, [body | {"max_tokens": 190}]))
    *chunks, error = [json.loads(part[6:]) for part in reply.body.decode().split("\n\n")[:-1]]
    assert len("".join(chunk["choices"][0]["text"] for chunk in chunks)) in (150, 151)
    assert error["error"]["type"] == "server_error" and "not numbers" in error["error"]["message"]


def test_blocks_of_a_poisoned_request_are_not_matched_again(server: RunningServer) -> None:
    prompt = f"{'unlike the others':20}{_BAD}{_WORDS}"  # the second of its blocks holds the token
    hits = server.metric("vllm:prefix_cache_hits_total")
    for _ in range(2):
        (reply,) = asyncio.run(_complete(server, [{"prompt": prompt}]))
        assert reply.status == 500
    assert server.metric("vllm:prefix_cache_hits_total") == hits
