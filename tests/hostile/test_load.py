"""Load and abuse: rows D of the catalogue, at a size that suits a test. `bench/overload.py` runs D1 for a minute."""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from harness import ANSWER_WITHIN_S, COMPLETIONS, REPEATS, Target, check, post

from fastllm import _core
from server_fixtures import running_server, wait_until

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


def test_d2_storm_of_dropped_connections(target: Target) -> None:
    """500 of them."""
    body = json.dumps({"prompt": "x", "max_tokens": 8000, "ignore_eos": True, "stream": True}).encode()
    with target.undisturbed():
        for _ in range(50):
            socks = [target.connect() for _ in range(10)]
            for sock in socks:
                sock.sendall(post(COMPLETIONS, body))
            for sock in socks:
                sock.close()
    target.check_memory()


def test_d5_preemption_storm_changes_no_token() -> None:
    fields = {"max_tokens": 300, "ignore_eos": True, "temperature": 0, "return_token_ids": True}

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

    assert tokens(160) == tokens(4000)


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

        (ahead,) = asyncio.run(work())
        assert ahead <= 12, f"{ahead} requests of the flood went before the other key's one"


def test_d16_metrics_under_a_flood_of_scrapes_stay_small(target: Target) -> None:
    with target.undisturbed():
        for number in range(100):
            target.ask(
                "POST", COMPLETIONS, {"prompt": "x", "max_tokens": 1, "user": f"user-{number}", "model": f"m{number}"}
            )
            answer = target.ask("GET", "/metrics")
            assert answer.status == 200 and len(answer.body) < 200_000 and b"user-" not in answer.body


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
