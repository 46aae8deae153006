"""Clients that leave, queues that fill, keys, loading, draining: the server's life around its requests."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from typing import Any

import aiohttp
import pytest

from fastllm.async_llm import AsyncLLM
from fastllm.server.console.routes import PATHS as CONSOLE_PATHS
from fastllm.server.limits import Limits
from server_fixtures import CONTEXT, Reply, RunningServer, ServerProcess, ask, load_null, running_server, wait_until

LONG = {"prompt": "Hello", "max_tokens": CONTEXT - 100, "ignore_eos": True}
COMPLETIONS = "/v1/completions"


async def _leave_mid_stream(session: aiohttp.ClientSession, url: str) -> None:
    """Reads the first event of a stream that would run for very long and closes the connection."""
    async with session.post(url + COMPLETIONS, json=LONG | {"stream": True}) as response:
        assert response.status == 200
        await response.content.readline()
        response.close()


def test_200_clients_that_leave_mid_stream_free_everything() -> None:
    # 64 run at once, so most of those that leave leave others waiting.
    with running_server({"max_num_seqs": 64, "check_invariants": False}) as server:

        async def work() -> None:
            async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
                for clients in (64, 48, 48, 48):
                    await asyncio.gather(*(_leave_mid_stream(session, server.url) for _ in range(clients)))

        asyncio.run(work())
        server.wait_idle()
        assert server.metric("vllm:request_success_total", finished_reason="abort") == 208
        server.check_alive()


def test_200_clients_that_leave_before_the_answer_free_everything() -> None:
    with running_server({"max_num_seqs": 64, "check_invariants": False}) as server:

        def live() -> float:
            return server.metric("vllm:num_requests_running") + server.metric("vllm:num_requests_waiting")

        async def work() -> None:
            async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
                posts = [asyncio.ensure_future(session.post(server.url + COMPLETIONS, json=LONG)) for _ in range(200)]
                await asyncio.to_thread(wait_until, lambda: live() == 200, 60)
                for post in posts:
                    post.cancel()
                await asyncio.gather(*posts, return_exceptions=True)

        asyncio.run(work())
        server.wait_idle()
        assert server.metric("vllm:request_success_total", finished_reason="abort") == 200
        server.check_alive()


def test_256_concurrent_streams_each_get_their_own_tokens() -> None:
    with running_server({"max_num_seqs": 64, "check_invariants": False}) as server:
        fields = {"max_tokens": 40, "ignore_eos": True, "temperature": 0, "return_token_ids": True}
        alone = {
            index: server.complete(prompt=f"client {index}", **fields).json["choices"][0]["token_ids"]
            for index in range(0, 256, 32)
        }

        async def work() -> list[Any]:
            async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
                url = server.url + COMPLETIONS
                bodies = [{"prompt": f"client {index}", "stream": True, **fields} for index in range(256)]
                return await asyncio.gather(*(ask(session, "POST", url, body) for body in bodies))

        replies = asyncio.run(work())
        for index, reply in enumerate(replies):
            ids = [id for event in reply.events for id in event["choices"][0]["token_ids"]]
            assert len(ids) == 40
            assert index not in alone or ids == alone[index]
        server.wait_idle()


def test_large_batch_does_not_hold_up_others() -> None:
    with running_server({"check_invariants": False}) as server:

        async def work() -> int:
            async with aiohttp.ClientSession() as session:
                body = {"prompt": ["a b c " * 600] * 900, "max_tokens": 1}
                batch = asyncio.ensure_future(ask(session, "POST", server.url + COMPLETIONS, body))
                answers = 0
                while server.state.active_requests == 0:
                    await asyncio.sleep(0)
                while not batch.done():
                    assert (await ask(session, "GET", server.url + "/live")).status == 200
                    answers += 1
                assert (await batch).status == 200
                return answers

        assert asyncio.run(work()) >= 10, "hardly anybody was answered while a batch was tokenised and submitted"


def test_full_queue_is_a_429_with_retry_after() -> None:
    with running_server({"max_num_seqs": 2}, limits=Limits(max_waiting=1)) as server:

        async def work() -> None:
            headers = {"Content-Type": "application/json"}
            async with aiohttp.ClientSession() as session:
                body = json.dumps(LONG | {"stream": True}).encode()
                holders = [session.post(server.url + COMPLETIONS, data=body, headers=headers) for _ in range(3)]
                tasks = [asyncio.ensure_future(holder) for holder in holders]
                while server.state.active_sequences < 3:
                    await asyncio.sleep(0.005)
                refused = await ask(session, "POST", server.url + COMPLETIONS, {"prompt": "x"})
                assert refused.status == 429 and refused.error["type"] == "rate_limit_error"
                assert refused.error["code"] == "queue_full" and int(refused.headers["Retry-After"]) >= 1
                for task in tasks:
                    task.cancel()
                for result in await asyncio.gather(*tasks, return_exceptions=True):
                    if isinstance(result, aiohttp.ClientResponse):
                        result.close()

        asyncio.run(work())
        server.wait_idle()
        assert server.metric("vllm:admission_rejections_total", reason="max_num_queued_reqs") == 1
        server.check_alive()


def test_request_that_waits_too_long_is_a_503() -> None:
    with running_server({"max_num_seqs": 1}, limits=Limits(max_waiting_time_s=0.1)) as server:

        async def work() -> Reply:
            async with aiohttp.ClientSession() as session:
                url = server.url + COMPLETIONS
                holder = asyncio.ensure_future(ask(session, "POST", url, LONG))
                while server.state.llm.stats().num_running == 0:
                    await asyncio.sleep(0.001)
                late = await ask(session, "POST", url, {"prompt": "x", "stream": True})
                holder.cancel()
                return late

        late = asyncio.run(work())
        assert late.status == 503 and late.error["code"] == "queue_timeout" and "Retry-After" in late.headers
        server.check_alive()


def test_keys_protect_everything_but_probes_and_console() -> None:
    with running_server(api_keys=["first", "second"]) as server:
        for path in ("/live", "/health", "/ready"):
            assert server.ask("GET", path).status == 200
        for resource in server.server._runner.app.router.resources():
            path = resource.canonical.replace("{model}", "null")
            if path not in ("/live", "/health", "/ready", *CONSOLE_PATHS):
                assert server.ask("GET", path).status == 401, path
        assert server.ask("GET", "/nope").status == 401
        error = server.complete()
        assert error.status == 401 and error.error["code"] == "invalid_api_key"
        assert error.headers["WWW-Authenticate"] == "Bearer"
        for value in ("Bearer wrong", "Bearer", "Basic first", "first", "Bearer first second", "Bearer \udcff\udcfe"):
            assert server.ask("GET", "/v1/models", headers={"Authorization": value}).status == 401, value
        for value in ({"Authorization": "Bearer first"}, {"Authorization": "bearer second"}, {"X-Api-Key": "second"}):
            assert server.ask("GET", "/v1/models", headers=value).status == 200


def test_live_at_once_and_ready_after_loading() -> None:
    gate = threading.Event()

    def load() -> AsyncLLM:
        gate.wait(30)
        return load_null()()

    server = RunningServer(load, log_requests=False)
    try:
        loading = threading.Thread(target=server.load)
        loading.start()
        assert server.ask("GET", "/live").status == 200
        assert server.ask("GET", "/ready").status == 503 and server.ask("GET", "/health").status == 503
        for reply in (server.complete(), server.ask("GET", "/v1/models"), server.ask("GET", "/metrics")):
            assert reply.status == 503 and reply.error["code"] == "loading" and "Retry-After" in reply.headers
        gate.set()
        loading.join(30)
        assert server.ask("GET", "/ready").status == 200
        server.check_alive()
    finally:
        server.close()


def test_draining_refuses_new_and_finishes_accepted() -> None:
    with running_server() as server:

        async def work() -> None:
            async with aiohttp.ClientSession() as session:
                url = server.url + COMPLETIONS
                body = {"prompt": "Hello", "max_tokens": 2000, "ignore_eos": True}
                accepted = asyncio.ensure_future(ask(session, "POST", url, body))
                while server.state.active_requests == 0:
                    await asyncio.sleep(0.001)
                server.state.begin_drain()
                assert (await ask(session, "GET", server.url + "/ready")).status == 503
                assert (await ask(session, "GET", server.url + "/health")).status == 200
                refused = await ask(session, "POST", url, {"prompt": "x"})
                assert refused.status == 503 and refused.error["code"] == "draining"
                assert "Retry-After" in refused.headers
                finished = await accepted
                assert finished.status == 200 and finished.json["usage"]["completion_tokens"] == 2000

        asyncio.run(work())


@pytest.mark.parametrize("stream", [True, False])
def test_request_that_outlives_the_drain_ends_with_an_error(stream: bool) -> None:
    with running_server() as server:

        async def work() -> Any:
            async with aiohttp.ClientSession() as session:
                task = asyncio.ensure_future(ask(session, "POST", server.url + COMPLETIONS, LONG | {"stream": stream}))
                while server.state.active_requests == 0:
                    await asyncio.sleep(0.001)
                drained = await asyncio.to_thread(server.run, server.server.stop(0.1))
                assert not drained
                return await task

        reply = asyncio.run(work())
        if stream:
            *_, last = reply.body.decode().removesuffix("\n\n").split("\n\n")
            assert reply.status == 200 and json.loads(last.removeprefix("data: "))["error"]["code"] == "draining"
        else:
            assert reply.status == 503 and reply.error["code"] == "draining"


@pytest.mark.parametrize(
    "module", ["fastllm.server", "fastllm.entrypoints.openai.api_server", "fastllm.entrypoints.api_server"]
)
def test_sigterm_under_load_finishes_every_accepted_request(module: str) -> None:
    server = ServerProcess(module, "--max-model-len", "32K", "--disable_log_requests")
    try:
        server.wait_ready()

        async def work() -> list[Any]:
            body = {"prompt": "Hello", "max_tokens": 20_000, "ignore_eos": True}
            async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
                url = server.url + COMPLETIONS
                tasks = [
                    asyncio.ensure_future(ask(session, "POST", url, body | {"seed": i, "stream": i % 2 == 0}))
                    for i in range(8)
                ]
                while (await ask(session, "GET", server.url + "/stats")).json["active_requests"] < 8:
                    assert not any(task.done() for task in tasks), "too fast to be stopped under load"
                server.process.send_signal(signal.SIGTERM)
                return await asyncio.gather(*tasks)

        for index, reply in enumerate(asyncio.run(work())):
            assert reply.status == 200
            if index % 2 == 0:
                assert reply.events[-1]["choices"][0]["finish_reason"] == "length"
            else:
                assert reply.json["usage"]["completion_tokens"] == 20_000
        assert server.process.wait(30) == 0
    finally:
        server.stop()


def test_second_signal_stops_at_once() -> None:
    server = ServerProcess("fastllm.server", "--max-model-len", "1M", "--num-gpu-blocks-override", "65536")
    try:
        server.wait_ready()

        async def work() -> None:
            async with aiohttp.ClientSession() as session:
                body = {"prompt": "Hello", "max_tokens": 900_000, "ignore_eos": True}
                task = asyncio.ensure_future(ask(session, "POST", server.url + COMPLETIONS, body))
                while (await ask(session, "GET", server.url + "/stats")).json["active_requests"] < 1:
                    pass
                server.process.send_signal(signal.SIGINT)
                while (await ask(session, "GET", server.url + "/ready")).status != 503:
                    pass
                server.process.send_signal(signal.SIGINT)
                with suppress(aiohttp.ClientError):
                    await task

        asyncio.run(work())
        assert server.process.wait(10) == 130
    finally:
        server.stop()


def test_start_prints_what_an_operator_needs() -> None:
    server = ServerProcess("fastllm.server", "--served-model-name", "a", "b")
    try:
        server.wait_ready()
        text = "\n".join(server.lines)
        for words in ("loading null", "as a, b", "KV cache: ", "limits: ", "sampling defaults: "):
            assert words in text
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) == 0
    finally:
        server.stop()


def test_model_that_cannot_be_loaded_ends_with_a_sentence() -> None:
    command = [sys.executable, "-m", "fastllm.server", "--model", "/nonexistent/model", "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "model error: There is no model at /nonexistent/model" in done.stderr
