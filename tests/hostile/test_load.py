"""Load and abuse: rows D of the catalogue, at a size that suits a test. `bench/overload.py` runs D1 for a minute."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import test_bodies as bodies
import test_parameters as parameters
import test_sockets as sockets
from harness import (
    ANSWER_WITHIN_S,
    COMPLETIONS,
    LOOP_LAG_S,
    REPEATS,
    SLOW,
    STREAMS,
    Answer,
    Target,
    check,
    get,
    golden,
    parse,
    post,
    read_all,
)
from storm import abort_storm
from test_hostile_requests import CASES, body_for

from fastllm import _core
from server_fixtures import ServerProcess, running_server, wait_until

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))


def test_d1_ten_times_the_load_leaves_the_goodput_and_is_refused_at_once() -> None:
    """Bounds are loose: the clients share the processors with the server."""
    from overload import measure

    result = measure(factor=10, peak_seconds=1, seconds=2, step_ms=20)
    print(result)
    assert set(result.statuses) <= {"200", "429", "503"} and result.statuses["429"] > 0
    assert result.goodput_share > 0.6
    assert result.refused_median_ms < 250
    assert result.rss_after_mib - result.rss_before_mib < 64


@contextmanager
def late_wakings() -> Iterator[list[float]]:
    """By how many seconds a thread that sleeps all the time woke up too late: what the machine itself stood still."""
    late, stop = [0.0], threading.Event()

    def sleep() -> None:
        due = time.monotonic() + 0.02
        while not stop.wait(due - time.monotonic()):
            now = time.monotonic()
            late.append(now - due)
            due = now + 0.02

    thread = threading.Thread(target=sleep)
    thread.start()
    try:
        yield late
    finally:
        stop.set()
        thread.join()


@SLOW
def test_d1_ten_times_the_load_for_a_minute() -> None:
    """Who is admitted waits for at most as many as may run and wait; and as long as the machine stands still."""
    from overload import RUNNING, WAITING, measure

    with late_wakings() as late:
        result = measure(factor=10, peak_seconds=10, seconds=60, step_ms=10)
    print(result, f"stood still for {max(late):.3f} s")
    assert set(result.statuses) <= {"200", "429", "503"} and result.statuses["429"] > 5 * result.statuses["200"]
    assert result.goodput_share >= 0.9
    assert result.refused_median_ms < 50
    longest_wait_s = (RUNNING + WAITING) / (0.9 * result.peak_per_s)
    assert result.served_p99_ms < 1e3 * (longest_wait_s + 2 * max(late))
    assert result.rss_after_mib - result.rss_before_mib < 16
    assert result.loop_work_ms < 1e3 * LOOP_LAG_S


def test_d2_10000_aborted_requests_leak_no_block() -> None:
    """In the engine; each is left at a moment of its own: before it runs, in its prompt, in its output."""
    seed = random.SystemRandom().randrange(2**31)
    print(f"seed {seed}")
    rng = random.Random(seed)
    config = _core.EngineConfig(max_num_seqs=64, num_blocks=2048, max_waiting=0)
    engine = _core.Engine.create_null(config, vocab=300, max_len=4096)
    params = _core.SamplingParams(max_tokens=4000, ignore_eos=True)
    live: list[int] = []
    for id in range(1, 10_001):
        engine.submit(id, [rng.randrange(300)] * rng.randint(1, 60), params)
        live.append(id)
        if len(live) > rng.choice([0, 1, 10, 100]):
            engine.abort(live.pop(rng.randrange(len(live))))
        if id % 100 == 0:
            engine.poll(0.001)
    for id in live:
        engine.abort(id)
    wait_until(lambda: engine.stats().num_running + engine.stats().num_waiting + engine.stats().used_blocks == 0, 30)
    stats = engine.stats()
    assert stats.num_aborted == 10_000 and stats.block_leaks == 0 and stats.healthy
    engine.shutdown()


@pytest.fixture(scope="module")
def steady() -> Iterator[Target]:
    """A target whose model takes 2 ms a step, so that there is a middle of every answer, and 2 s at most a request."""
    running = Target("--max-request-time", "2", FASTLLM_TEST_HOOKS="1", FASTLLM_FAULT="slow@1:2")
    yield running
    running.stop()


def test_d2_10000_clients_that_leave(steady: Target) -> None:
    """At random moments and bytes of streams and other answers, of four APIs."""
    seed = random.SystemRandom().randrange(2**31)
    print(f"seed {seed}")
    before = steady.stats()["engine"]
    with steady.undisturbed(throughout=True):
        statuses = steady.run(abort_storm(steady.port, 10_000, random.Random(seed)), timeout=60)
    engine = steady.stats()["engine"]
    print(statuses, engine["num_aborted"] - before["num_aborted"], "aborted in the engine")
    assert set(statuses) == {0, 200} and min(statuses.values()) > 100, "before and during their answers"
    assert engine["num_aborted"] - before["num_aborted"] > 500
    assert engine["block_leaks"] == engine["used_blocks"] == 0
    steady.check_memory()


def test_d5_preemption_storm_changes_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a millisecond a step, so that requests meet."""
    monkeypatch.setenv("FASTLLM_TEST_HOOKS", "1")
    monkeypatch.setenv("FASTLLM_FAULT", "slow@1:1")
    fields = {"max_tokens": 100, "ignore_eos": True, "temperature": 0, "return_token_ids": True}

    def tokens(blocks: int) -> list[Any]:
        with running_server(
            {"num_gpu_blocks_override": blocks, "max_num_seqs": 64, "check_invariants": False}
        ) as server:

            async def work() -> list[Any]:
                async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

                    async def one(number: int) -> Any:
                        body = {"prompt": f"{number} " * 20, **fields}
                        async with session.post(server.url + COMPLETIONS, json=body) as response:
                            return (await response.json())["choices"][0]["token_ids"]

                    return await asyncio.gather(*(one(number) for number in range(64)))

            answers = asyncio.run(work())
            server.wait_idle()
            preempted = server.state.llm.stats().num_preemptions
            assert (preempted > 0) == (blocks < 1000), preempted
            return answers

    assert tokens(70) == tokens(4000)


def test_d7_long_prompt_does_not_hold_up_short_ones(target: Target) -> None:
    long = json.dumps({"prompt": [7] * 8000, "max_tokens": 100, "ignore_eos": True}).encode()
    with target.undisturbed(), target.connect() as sock:
        for _ in range(REPEATS):
            sock.sendall(post(COMPLETIONS, long, close=False))
            start = time.monotonic()
            check(target.ask("POST", COMPLETIONS, {"prompt": "x", "max_tokens": 1}), (200,))
            assert time.monotonic() - start < ANSWER_WITHIN_S


def test_d8_flood_of_one_key_does_not_hold_up_another() -> None:
    flags = {"max_num_seqs": 2, "check_invariants": False}
    with running_server(flags, api_keys=["flood", "quiet"]) as server:

        async def work() -> list[int]:
            async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
                order: list[int] = []

                async def one(number: int, key: str) -> None:
                    body = {"prompt": f"{number}", "max_tokens": 400, "ignore_eos": True}
                    headers = {"Authorization": f"Bearer {key}"}
                    async with session.post(server.url + COMPLETIONS, json=body, headers=headers) as response:
                        assert response.status == 200
                        await response.read()
                    order.append(number)

                flood = [asyncio.create_task(one(number, "flood")) for number in range(60)]
                while server.state.gate.waiting_sequences < 30:
                    assert order == [] or len(order) < 20, "too fast to be a flood"
                    await asyncio.sleep(0)
                done = len(order)
                await one(1000, "quiet")
                ahead = order.index(1000) - done
                await asyncio.gather(*flood)
                return [ahead]

        (ahead,) = asyncio.run(work())  # 30 or more if they went in the order they came
        assert ahead <= 20, f"{ahead} requests of the flood went before the other key's one"


def test_d16_metrics_under_a_flood_of_scrapes_stay_small(target: Target) -> None:
    with target.undisturbed():
        for number in range(100):
            target.ask(
                "POST", COMPLETIONS, {"prompt": "x", "max_tokens": 1, "user": f"user-{number}", "model": f"m{number}"}
            )
            answer = target.ask("GET", "/metrics")
            assert answer.status == 200 and len(answer.body) < 200_000 and b"user-" not in answer.body


def test_d10_request_whose_time_is_up_in_the_middle(steady: Target) -> None:
    bodies = [{"prompt": "x", "max_tokens": 8000, "ignore_eos": True, "stream": i % 2 == 0} for i in range(REPEATS)]
    before = steady.stats()["engine"]["generated_tokens"]
    with steady.undisturbed():
        socks = [steady.connect() for _ in bodies]
        for sock, body in zip(socks, bodies, strict=True):
            sock.sendall(post(COMPLETIONS, json.dumps(body).encode()))
        for sock, body in zip(socks, bodies, strict=True):
            data = read_all(sock)
            answer = parse(data)
            sock.close()
            assert answer.status == (200 if body["stream"] else 504)
            assert b"request_timeout" in data and b"[DONE]" not in data
            steady.ledger.saw(answer.headers["X-Request-Id"], answer.status, "request_timeout")
    made = steady.stats()["engine"]["generated_tokens"] - before
    assert made > 10 * REPEATS, "tokens that were made are counted"


def _harmless_rows() -> list[tuple[bytes, tuple[int, ...]]]:
    """Rows of the other files that are small and answered at once."""
    raw = [(data, statuses) for _, data, statuses in sockets.ROWS]
    raw += [(post(path, body), statuses) for _, path, body, statuses in bodies.ROWS]
    for path, name, value, statuses in CASES:
        raw.append((post(path, json.dumps(body_for(path) | {name: value}).encode()), statuses))
    for _, path, body, statuses, _ in parameters.ROWS:
        raw.append((post(path, json.dumps(body).encode()), statuses))
    return [(data, (0, *statuses)) for data, statuses in raw if len(data) < 10_000]


@pytest.mark.parametrize("seconds", [None, pytest.param(3600, marks=[SLOW, pytest.mark.timeout(2 * 3600)])])
def test_d11_valid_requests_among_as_many_bad_ones_get_the_same_tokens(target: Target, seconds: float | None) -> None:
    """2,000 requests, or as many as an hour has room for."""
    seed = random.SystemRandom().randrange(2**31)
    print(f"seed {seed}")
    rng = random.Random(seed)
    rows = _harmless_rows()
    valid = [json.dumps(golden(number, stream=False)).encode() for number in range(STREAMS)]

    async def exchange(data: bytes) -> Answer:
        reader, writer = await asyncio.open_connection("127.0.0.1", target.port)
        answer = b""
        with suppress(ConnectionError):
            writer.write(data)
            answer = await reader.read()
        writer.close()
        return parse(answer)

    async def work() -> None:
        end = time.monotonic() + (seconds or 0)
        turns = itertools.takewhile(lambda turn: turn < 2000 or time.monotonic() < end, itertools.count())

        async def send_some() -> None:
            for turn in turns:
                if turn % 2:
                    data, statuses = rng.choice(rows)
                    check(await exchange(data), statuses)
                else:
                    number = turn // 2 % STREAMS
                    answer = await exchange(post(COMPLETIONS, valid[number]))
                    assert answer.status == 200, answer.body[:300]
                    assert json.loads(answer.body)["choices"][0]["token_ids"] == target.golden[number]

        await asyncio.gather(*(send_some() for _ in range(32)))

    with target.undisturbed():
        target.run(work(), timeout=80 + (seconds or 0))


@pytest.mark.parametrize("refusals", [5_000, pytest.param(100_000, marks=SLOW)])
def test_d17_flood_of_refusals_does_not_fill_the_log(refusals: int) -> None:
    """With the log as it is by default: some lines a second, and how many were left out."""
    server = ServerProcess("fastllm.server", "--disable-uvicorn-access-log")
    try:
        server.wait_ready()
        port, quiet = int(server.url.rsplit(":", 1)[1]), len(server.lines)
        start = time.monotonic()

        async def flood() -> None:
            reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)

            async def count() -> None:
                for _ in range(refusals // 8):
                    assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 404 ")
                    await reader.readuntil(b"}}")

            counting = asyncio.create_task(count())
            for _ in range(refusals // 8):
                writer.write(get("/nowhere", close=False))
                await writer.drain()
            await counting
            writer.close()

        async def work() -> None:
            await asyncio.gather(*(flood() for _ in range(8)))

        asyncio.run(work())
        seconds = time.monotonic() - start

        def told() -> int:
            lines = server.lines[quiet:]
            left_out = sum(int(count) for line in lines for count in re.findall(r"(\d+) (?:more )?lines ", line))
            return left_out + sum("refused: not_found" in line for line in lines)

        wait_until(lambda: told() == refusals, 5, lambda: f"{told()} of {refusals} are told")
        lines = len(server.lines) - quiet
        print(f"{refusals} refusals in {seconds:.1f} s, {lines} lines")
        assert lines <= 21 * (seconds + 2)
    finally:
        server.stop()


@pytest.mark.parametrize("stream", [True, False])
def test_client_that_is_killed_is_harmless(target: Target, stream: bool) -> None:
    import subprocess

    body = {"prompt": "x", "max_tokens": 8000, "ignore_eos": True, "stream": stream}
    request = post(COMPLETIONS, json.dumps(body).encode())
    script = (
        "import socket, sys; s = socket.create_connection(('127.0.0.1', int(sys.argv[1])));"
        "s.sendall(bytes.fromhex(sys.argv[2])); print(1, flush=True); [None for _ in iter(lambda: s.recv(9), b'')]"
    )
    with target.undisturbed():
        clients = [
            subprocess.Popen([sys.executable, "-c", script, str(target.port), request.hex()], stdout=subprocess.PIPE)
            for _ in range(4)
        ]
        for client in clients:
            assert client.stdout is not None
            client.stdout.readline()
            client.kill()
            client.communicate()
