"""Engines that hang, fail or are slow: what clients, probes and the supervisor see."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import aiohttp
import pytest

from fastllm.server.limits import Limits
from server_fixtures import CONTEXT, Reply, ServerProcess, ask, running_server

COMPLETIONS = "/v1/completions"
LONG = {"prompt": "Hello", "max_tokens": 20_000, "ignore_eos": True}
ENGINE_FAULT = 70
DETECTED_WITHIN_S = 2.0
STEP_TIMEOUT_S = 0.3


@contextmanager
def faulty_server(fault: str, *flags: str, hooks: str = "1") -> Iterator[ServerProcess]:
    environment = {"FASTLLM_FAULT": fault, "FASTLLM_TEST_HOOKS": hooks}
    server = ServerProcess("fastllm.server", "--max-model-len", "32K", *flags, **environment)
    try:
        server.wait_ready()
        yield server
    finally:
        server.stop()


def check_ended_by_fault(reply: Reply, stream: bool) -> None:
    if reply.status != 200:  # refused or ended before its first byte
        assert reply.status in (500, 503) and reply.error["type"] in ("server_error", "overloaded_error")
        return
    assert stream
    parts = reply.body.decode().removesuffix("\n\n").split("\n\n")
    assert json.loads(parts[-1].removeprefix("data: "))["error"]["type"] == "server_error"
    assert "[DONE]" not in parts[-1]


@pytest.mark.parametrize("fault, status", [("hang@60", "hung"), ("error@60", "failed")])
def test_engine_that_hangs_or_fails_ends_every_request_and_the_process(fault: str, status: str) -> None:
    with faulty_server(fault, "--step-timeout", str(STEP_TIMEOUT_S), "--max-num-seqs", "4") as server:

        async def work() -> tuple[list[Any], list[str], float]:
            async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
                url = server.url + COMPLETIONS
                start = time.monotonic()
                # Four run, two wait in the engine, the others in the queue.
                posts = [
                    asyncio.ensure_future(ask(session, "POST", url, LONG | {"seed": i, "stream": i % 2 == 0}))
                    for i in range(12)
                ]
                seen = []
                with suppress(aiohttp.ClientError):
                    while not all(post.done() for post in posts):
                        seen.append((await ask(session, "GET", server.url + "/health")).json["status"])
                replies = await asyncio.gather(*posts)
                return replies, seen, time.monotonic() - start

        replies, seen, seconds = asyncio.run(work())
        assert seconds < STEP_TIMEOUT_S + DETECTED_WITHIN_S
        for i, reply in enumerate(replies):
            check_ended_by_fault(reply, i % 2 == 0)
        assert set(seen) <= {"ok", status}
        assert server.process.wait(5) == ENGINE_FAULT
        assert any("Every request ends with an error" in line for line in server.lines)
        assert not any("Traceback" in line for line in server.lines)


def test_health_answers_while_the_engine_hangs() -> None:
    with running_server(limits=Limits(step_timeout_s=0.05)) as server:
        watch = server.state.watch
        server.run(_stop(watch))  # nobody acts on it, so that the probes can be asked at leisure
        server.state.llm._client.core.heartbeat()
        assert server.ask("GET", "/health").json == {"status": "ok"}

        class Stuck:
            count, busy, age_s = 7, True, 0.2

        server.state.llm.heartbeat = lambda: Stuck  # type: ignore[assignment,method-assign]
        for path in ("/health", "/ready"):
            reply = server.ask("GET", path)
            assert reply.status == 503 and reply.json == {"status": "hung", "since_s": 0.2}
        assert server.ask("GET", "/live").status == 200
        Stuck.busy = False  # asleep for long, with nothing to do
        assert server.ask("GET", "/health").status == 200


async def _stop(watch: Any) -> None:
    watch.stop()


def test_slow_engine_is_not_taken_for_dead() -> None:
    with faulty_server("slow@1:100", "--step-timeout", "1") as server:

        async def work() -> Reply:
            async with aiohttp.ClientSession() as session:
                body = {"prompt": "Hello", "max_tokens": 15, "ignore_eos": True}
                post = asyncio.ensure_future(ask(session, "POST", server.url + COMPLETIONS, body))
                while not post.done():
                    assert (await ask(session, "GET", server.url + "/health")).status == 200
                return await post

        reply = asyncio.run(work())
        assert reply.status == 200 and reply.json["usage"]["completion_tokens"] == 15


def test_logits_that_are_no_numbers_end_one_request_only() -> None:
    with faulty_server("nan@20") as server:

        async def work() -> list[Reply]:
            async with aiohttp.ClientSession() as session:
                body = {"prompt": "Hello", "max_tokens": 500, "ignore_eos": True}
                url = server.url + COMPLETIONS
                return await asyncio.gather(*(ask(session, "POST", url, body | {"seed": i}) for i in range(4)))

        replies = asyncio.run(work())
        assert sorted(reply.status for reply in replies) == [200, 200, 200, 500]
        failed = next(reply for reply in replies if reply.status == 500)
        assert failed.error["type"] == "server_error" and "not numbers" in failed.error["message"]


def test_faults_need_the_test_hooks() -> None:
    with faulty_server("crash@1", hooks="0") as server:
        body = {"prompt": "Hello", "max_tokens": 5, "ignore_eos": True}

        async def work() -> Reply:
            async with aiohttp.ClientSession() as session:
                return await ask(session, "POST", server.url + COMPLETIONS, body)

        assert asyncio.run(work()).status == 200


def test_sigterm_ends_a_server_whose_engine_hangs() -> None:
    with faulty_server("hang@20", "--step-timeout", "0.5", "--shutdown-timeout", "20") as server:

        async def work() -> Reply:
            async with aiohttp.ClientSession() as session:
                post = asyncio.ensure_future(ask(session, "POST", server.url + COMPLETIONS, LONG))
                while (await ask(session, "GET", server.url + "/stats")).json["active_requests"] < 1:
                    pass
                server.process.send_signal(signal.SIGTERM)
                return await post

        check_ended_by_fault(asyncio.run(work()), stream=False)
        assert server.process.wait(5) == ENGINE_FAULT


def test_ready_falls_when_the_queue_stays_full_and_rises_with_room() -> None:
    with running_server({"max_num_seqs": 1}, limits=Limits(max_waiting=1)) as server:

        async def work() -> None:
            async with aiohttp.ClientSession() as session:
                body = {"prompt": "x", "max_tokens": CONTEXT - 100, "ignore_eos": True, "stream": True}
                held = [asyncio.ensure_future(session.post(server.url + COMPLETIONS, json=body)) for _ in range(2)]
                while server.state.active_sequences < 2:
                    await asyncio.sleep(0.002)
                assert (await ask(session, "GET", server.url + "/ready")).status == 200  # not for a moment's peak
                while (reply := await ask(session, "GET", server.url + "/ready")).status == 200:
                    await asyncio.sleep(0.01)
                assert reply.json == {"status": "queue_full"}
                for task in held:
                    task.cancel()
                for result in await asyncio.gather(*held, return_exceptions=True):
                    if isinstance(result, aiohttp.ClientResponse):
                        result.close()

        asyncio.run(work())
        server.wait_idle()
        while server.ask("GET", "/ready").status != 200:
            pass
