"""Flags that change answers: usage without being asked, comments in silent streams, gathered starts, fewer updates."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

import aiohttp
import pytest

from fastllm.server.batch_window import BatchWindow
from server_fixtures import RunningServer, running_server, wait_until


@pytest.mark.parametrize("kind", ["completions", "chat"])
def test_streams_end_with_usage_without_being_asked(kind: str) -> None:
    with running_server(force_include_usage=True) as server:
        ask = server.complete if kind == "completions" else server.chat
        *_, last = ask(stream=True, max_tokens=3, ignore_eos=True).events
        assert last["choices"] == [] and last["usage"]["completion_tokens"] == 3


def lines_until(server: RunningServer, enough: Any, **fields: Any) -> list[bytes]:
    """The lines of a stream up to the one for which enough(lines) is true."""

    async def read() -> list[bytes]:
        body = {"prompt": "Hello", "stream": True, "ignore_eos": True, **fields}
        lines: list[bytes] = []
        async with aiohttp.ClientSession() as session, session.post(server.url + "/v1/completions", json=body) as reply:
            assert reply.status == 200
            async for line in reply.content:
                lines.append(line)
                if enough(lines):
                    break
        return lines

    return asyncio.run(read())


def occupy(server: RunningServer) -> tuple[asyncio.Task[Any], asyncio.AbstractEventLoop]:
    """A request that runs until its task is cancelled, on the server's own loop."""

    async def hold() -> None:
        body = {"prompt": "Hello", "max_tokens": 32_000, "ignore_eos": True, "stream": True}
        async with aiohttp.ClientSession() as session, session.post(server.url + "/v1/completions", json=body) as reply:
            with suppress(aiohttp.ClientError):
                async for _ in reply.content:
                    pass

    async def start() -> asyncio.Task[Any]:
        return asyncio.ensure_future(hold())

    task = server.run(start())
    wait_until(lambda: server.state.llm.stats().num_running == 1, 10)
    return task, server._loop


def test_silent_streams_get_comments_while_they_wait_and_between_tokens() -> None:
    # The first request takes the only place, so that the second one waits in line.
    with running_server({"max_num_seqs": 1}, sse_keep_alive_s=0.02) as server:
        task, loop = occupy(server)

        def enough(lines: list[bytes]) -> bool:
            if lines.count(b": keep-alive\n") == 3 and not task.done():
                loop.call_soon_threadsafe(task.cancel)
            return lines[-1] == b"data: [DONE]\n"

        lines = lines_until(server, enough, max_tokens=3)
        assert lines[0] == b": keep-alive\n" and lines.count(b": keep-alive\n") >= 3
        assert len([line for line in lines if line.startswith(b"data: {")]) >= 1
        server.check_alive()


def test_a_refusal_after_the_stream_was_opened_is_an_event() -> None:
    from fastllm.server.limits import Limits

    limits = Limits(max_waiting_time_s=0.1)
    with running_server({"max_num_seqs": 1}, sse_keep_alive_s=0.02, limits=limits) as server:
        task, loop = occupy(server)
        lines = lines_until(server, lambda lines: b'"error"' in lines[-1], max_tokens=3)
        assert lines[0] == b": keep-alive\n" and b"queue_timeout" in lines[-1]
        loop.call_soon_threadsafe(task.cancel)
        server.wait_idle()


def test_a_client_that_leaves_while_it_waits_is_noticed() -> None:
    with running_server({"max_num_seqs": 1}, sse_keep_alive_s=0.02) as server:
        task, loop = occupy(server)
        lines_until(server, lambda lines: True, max_tokens=3)
        wait_until(lambda: server.state.active_requests == 1, 10)
        loop.call_soon_threadsafe(task.cancel)
        server.wait_idle()


class Stats:
    def __init__(self, num_running: int) -> None:
        self.num_running = num_running


def test_requests_are_gathered_while_others_run() -> None:
    async def run() -> None:
        window = BatchWindow(0.05)
        with pytest.raises(StopIteration):  # it did not wait: nothing ran, so there was nobody to wait for
            window.gather(lambda: Stats(0)).send(None)  # type: ignore[arg-type, return-value]
        tasks = []
        for _ in range(3):
            tasks.append(asyncio.ensure_future(window.gather(lambda: Stats(1))))  # type: ignore[arg-type, return-value]
            await asyncio.sleep(0)
        assert not any(task.done() for task in tasks)
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        assert all(task.done() for task in tasks), "all of a window start together"

    asyncio.run(run())


def test_stream_interval_sends_fewer_and_larger_updates() -> None:
    def events(interval: int) -> list[Any]:
        with running_server({"stream_interval": interval}) as server:
            return list(server.complete(stream=True, max_tokens=64, ignore_eos=True, temperature=0).events)

    each, every_16 = events(1), events(16)
    text = ["".join(e["choices"][0]["text"] for e in found) for found in (each, every_16)]
    assert text[0] == text[1]
    assert len(every_16) <= 6 and every_16[-1]["choices"][0]["finish_reason"] == "length"
