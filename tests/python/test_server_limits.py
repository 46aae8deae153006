"""Limits: where they can be seen and set, and what is refused before it costs anything."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import aiohttp
import pytest

from fastllm.server.args import limits_from, make_parser
from fastllm.server.limits import Limits, flag_name, flags
from fastllm.server.run import describe
from server_fixtures import CONTEXT, RunningServer, ask, running_server

COMPLETIONS = "/v1/completions"
LONG = {"prompt": "Hello", "max_tokens": CONTEXT - 100, "ignore_eos": True, "stream": True}


def test_every_limit_is_a_flag_and_is_shown_at_start_and_in_version() -> None:
    parser = make_parser("serve", positional_model=False)
    assert limits_from(parser.parse_args([])) == Limits()
    for limit in flags():
        given = limits_from(parser.parse_args([f"--{flag_name(limit)}", "7"]))
        assert getattr(given, limit.name) == 7, limit.name
    with running_server(limits=Limits(max_n=3)) as server:
        shown = server.ask("GET", "/version?verbose").json["limits"]
        assert shown["max-n"] == 3 and shown["max-waiting"] == 1024 and shown["max-json-items"] == 100_000
        assert set(shown) == {flag_name(limit) for limit in flags()}
        lines = "\n".join(describe(server.state.llm, server.state))
        assert all(f"{name}=" in lines for name in shown)
        assert "limits" not in server.ask("GET", "/version").json


@pytest.mark.parametrize(
    "body, says",
    [
        (b"[" * 65 + b"]" * 65, "nested 65 levels deep"),
        (b"[" * 100_000, "nested 1024 levels deep or more"),
        (json.dumps({f"k{i}": 0 for i in range(10_001)}).encode(), "10001 keys"),
        (json.dumps({"z": [0] * 100_001}).encode(), "100001 elements"),
        (b'{"z": "' + b"[{" * 100_000 + b'", "y": ' + b"[" * 70, "nested 71"),
    ],
)
def test_shape_of_a_body_is_judged_before_it_is_built(body: bytes, says: str, server: RunningServer) -> None:
    reply = server.ask("POST", COMPLETIONS, body)
    assert reply.status == 400 and says in reply.error["message"], reply.body[:200]
    assert reply.error["code"] == "invalid_json"
    assert reply.error["param"] == {"100001 elements": "z", "nested 71": "y"}.get(says)


@pytest.fixture(scope="module")
def server():
    with running_server({"num_gpu_blocks_override": 64}, limits=Limits(max_logprob_cells=1000)) as running:
        yield running


def test_array_as_long_as_the_context_is_always_accepted() -> None:
    with running_server({"max_model_len": 2000}, limits=Limits(max_json_items=100)) as server:
        assert server.complete(prompt=[5] * 1900, max_tokens=1).status == 200
        assert server.complete(prompt=[5] * 2001, max_tokens=1).error["code"] == "invalid_json"


@pytest.mark.parametrize(
    "fields, says",
    [
        ({"prompt": [5] * 1025}, "needs 65 KV blocks"),
        ({"logprobs": 20, "max_tokens": 48}, "1008 log-probabilities"),
        ({"logprobs": 4, "n": 20, "max_tokens": 11}, "1100 log-probabilities"),
        ({"prompt": ["x" * 30, "y" * 30], "prompt_logprobs": 20, "max_tokens": 1}, "log-probabilities"),
    ],
)
def test_cost_beyond_a_limit_is_a_400(server: RunningServer, fields: dict[str, Any], says: str) -> None:
    for stream in (False, True) if "prompt_logprobs" not in fields else (False,):
        reply = server.complete(**fields, stream=stream)
        assert reply.status == 400 and says in reply.error["message"], reply.body
    server.check_alive()


async def _hold(server: RunningServer, session: aiohttp.ClientSession, count: int) -> list[asyncio.Task[Any]]:
    """Streams of which as many as fit run and the others wait."""
    tasks = [asyncio.ensure_future(session.post(server.url + COMPLETIONS, json=LONG)) for _ in range(count)]
    while server.state.active_sequences < count:
        await asyncio.sleep(0.002)
    return tasks


async def _let_go(tasks: list[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    for result in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(result, aiohttp.ClientResponse):
            result.close()


def test_waiting_prompt_tokens_are_bounded_before_tokenising() -> None:
    with running_server({"max_num_seqs": 1}, limits=Limits(max_waiting_tokens=1000)) as server:

        async def work() -> None:
            async with aiohttp.ClientSession() as session:
                url = server.url + COMPLETIONS
                held = await _hold(server, session, 4)  # one runs, two wait in the engine, one in the queue
                while server.state.gate.waiting_tokens == 0:
                    await asyncio.sleep(0.002)
                for prompt in ("x" * 8000, [7] * 1500):
                    refused = await ask(session, "POST", url, {"prompt": prompt})
                    assert refused.status == 429 and refused.error["code"] == "queue_full"
                    assert "prompt tokens are waiting" in refused.error["message"]
                    assert int(refused.headers["Retry-After"]) >= 1
                await _let_go(held)

        asyncio.run(work())
        server.wait_idle()
        assert server.metric("vllm:admission_rejections_total", reason="max_num_queued_tokens") == 2
        assert server.complete(prompt="x" * 8000, max_tokens=1).status == 200  # need not wait


def test_wait_that_can_be_foreseen_is_refused_at_once() -> None:
    with running_server({"max_num_seqs": 1}, limits=Limits(max_waiting_time_s=30)) as server:

        async def work() -> None:
            async with aiohttp.ClientSession() as session:
                held = await _hold(server, session, 4)
                while server.state.gate.waiting_tokens == 0:
                    await asyncio.sleep(0.002)
                server.state.gate._entry_interval = 31.0  # as if entries had been that rare
                refused = await ask(session, "POST", server.url + COMPLETIONS, {"prompt": "x"})
                assert refused.status == 503 and refused.error["code"] == "queue_timeout"
                assert refused.error["type"] == "overloaded_error" and refused.headers["Retry-After"] == "30"
                await _let_go(held)

        asyncio.run(work())
        server.wait_idle()
        assert server.metric("vllm:admission_rejections_total", reason="queue_time") == 1


def test_request_that_takes_too_long_ends_with_a_504_or_an_error_event() -> None:
    with running_server(limits=Limits(max_request_time_s=0.2)) as server:
        reply = server.complete(**LONG | {"stream": False})
        assert reply.status == 504 and reply.error["code"] == "request_timeout"
        stream = server.complete(**LONG)
        last = stream.body.decode().removesuffix("\n\n").split("\n\n")[-1]
        assert stream.status == 200 and json.loads(last.removeprefix("data: "))["error"]["code"] == "request_timeout"
        server.check_alive()
