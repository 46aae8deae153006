"""What the server does when its memory runs short, how it knows, and what a deep look at its health says."""

from __future__ import annotations

import asyncio
import gc
from pathlib import Path

import aiohttp
import pytest

from fastllm.server.errors import ApiError
from fastllm.server.limits import Limits
from fastllm.server.memory import MemoryGuard, held_bytes, limit_bytes
from server_fixtures import RunningServer, ask, running_server, wait_until

COMPLETIONS = "/v1/completions"
GIB = 1 << 30


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


MEMINFO = {"proc/meminfo": f"MemTotal:  {64 << 20} kB\nMemFree: 5 kB\n"}
V2 = {"proc/self/cgroup": "0::/a/b\n"}
V1 = {"proc/self/cgroup": "9:name=systemd:/\n4:memory:/docker/x\n1:cpu:/\n0::/\n"}


@pytest.mark.parametrize(
    "files, expected",
    [
        ({}, 0),
        (MEMINFO, 64 * GIB),
        (MEMINFO | V2 | {"sys/fs/cgroup/a/b/memory.max": "max"}, 64 * GIB),
        (MEMINFO | V2 | {"sys/fs/cgroup/a/b/memory.max": f"{GIB}\n"}, GIB),
        (MEMINFO | V2 | {"sys/fs/cgroup/a/b/memory.max": "max", "sys/fs/cgroup/a/memory.max": f"{2 * GIB}"}, 2 * GIB),
        (MEMINFO | {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": f"{GIB}"}, GIB),
        (MEMINFO | V1 | {"sys/fs/cgroup/memory/docker/x/memory.limit_in_bytes": f"{GIB}"}, GIB),
        (MEMINFO | V1 | {"sys/fs/cgroup/memory/memory.limit_in_bytes": f"{3 * GIB}"}, 3 * GIB),  # in the container
        (MEMINFO | V1 | {"sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712"}, 64 * GIB),
    ],
)
def test_smallest_limit_of_container_and_machine_counts(tmp_path: Path, files: dict[str, str], expected: int) -> None:
    assert limit_bytes(write(tmp_path, files)) == expected


def test_guard_acts_once_and_recovers_below_its_share() -> None:
    relieved: list[int] = []

    async def relieve() -> None:
        relieved.append(1)

    guard = MemoryGuard(50, 2000, relieve)
    seen = []
    for held in (900, 1000, 1001, 1500, 990, 979, 1000):
        guard.held = lambda held=held: held  # type: ignore[misc]
        asyncio.run(guard.look())
        seen.append(guard.short)
    assert seen == [False, False, True, True, True, False, False] and relieved == [1]
    unlimited = MemoryGuard(0, 2000, relieve)
    asyncio.run(unlimited.look())
    assert not unlimited.short and 0 < held_bytes() < limit_bytes()


def test_server_short_of_memory_refuses_finishes_and_recovers() -> None:
    with running_server(limits=Limits(max_memory_percent=1)) as server:

        def cached() -> int:
            usage = server.complete(prompt="w" * 161, max_tokens=1).json["usage"]
            return int(usage["prompt_tokens_details"]["cached_tokens"])

        async def work() -> None:
            url = server.url + COMPLETIONS
            async with aiohttp.ClientSession() as session:
                long = {"prompt": "x" * 100, "max_tokens": 3000, "ignore_eos": True, "stream": True}
                async with session.post(url, json=long) as running:
                    await running.content.readline()
                    server.state.memory.held = lambda: 1 << 62
                    while (refused := await ask(session, "POST", url, {"prompt": "x", "max_tokens": 1})).status == 200:
                        pass
                    assert refused.status == 503 and refused.error["code"] == "memory_low"
                    assert refused.headers["Retry-After"] == "5"
                    reply = await ask(session, "GET", server.url + "/ready")
                    assert reply.status == 503 and reply.json == {"status": "memory_low"}
                    assert (await ask(session, "GET", server.url + "/health")).status == 200
                    text = await running.text()
                    assert text.endswith("data: [DONE]\n\n"), "accepted requests are finished"

        held = server.state.memory.held
        server.state.memory.held = lambda: 0
        assert [cached() for _ in range(2)] == [0, 160]
        asyncio.run(work())
        server.state.memory.held = lambda: 0
        wait_until(lambda: server.ask("GET", "/ready").status == 200, 5)
        assert cached() == 0, "the prefix cache was dropped"
        server.check_alive()
        assert server.metric("fastllm:requests_refused_total", code="memory_low") >= 1
        server.state.memory.held = held


def test_refused_bodies_are_not_kept() -> None:
    """An error that holds its frames, held by one of them, would keep the body until a collection comes by."""
    with running_server() as server:
        gc.collect()
        gc.disable()
        gc.set_debug(gc.DEBUG_SAVEALL)
        try:
            for body in (b'{"prompt": 5}', b'{"prompt": "', b'{"prompt": "x", "n": 0}', b'{"prompt": "x", "z": [[[[[['):
                assert server.ask("POST", COMPLETIONS, body).status == 400
            gc.collect()
            kept = [one for one in gc.garbage if isinstance(one, ApiError) or "read_json" in repr(one)[:300]]
        finally:
            gc.set_debug(0)
            gc.garbage.clear()
            gc.enable()
        assert kept == []


# ---- /health/deep


def test_deep_health_is_ok_while_the_first_token_stays_the_same() -> None:
    with running_server() as server:
        assert [server.ask("GET", "/health/deep").status for _ in range(3)] == [200] * 3
        _wanted_of(server)
        reply = server.ask("GET", "/health/deep")
        assert reply.status == 503 and reply.json["status"] == "wrong" and reply.json["wanted"] == [-5]
        server.wait_idle()


def _wanted_of(server: RunningServer) -> None:
    from fastllm.server.deep_health import GOLDEN_KEY

    server.server._runner.app[GOLDEN_KEY]._wanted = frozenset({-5})


def test_deep_health_asks_the_engine_once_for_many() -> None:
    with running_server() as server:

        async def work() -> list[int]:
            async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
                asks = (ask(session, "GET", server.url + "/health/deep") for _ in range(50))
                return [reply.status for reply in await asyncio.gather(*asks)]

        assert set(asyncio.run(work())) == {200}
        assert server.state.llm.stats().num_finished < 50


def test_deep_health_needs_a_key_where_there_are_keys_and_a_model() -> None:
    with running_server(api_keys=["sesame"]) as server:
        assert server.ask("GET", "/health/deep").status == 401
        assert server.ask("GET", "/health/deep", headers={"Authorization": "Bearer sesame"}).status == 200


def test_deep_health_of_a_slow_engine_is_a_503_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTLLM_TEST_HOOKS", "1")
    monkeypatch.setenv("FASTLLM_FAULT", "slow@1:300")
    monkeypatch.setattr("fastllm.server.deep_health._ANSWER_WITHIN_S", 0.1)
    with running_server() as server:
        reply = server.ask("GET", "/health/deep")
        assert reply.status == 503 and reply.json == {"status": "timeout"}
        assert server.ask("GET", "/health").status == 200
        server.wait_idle()
