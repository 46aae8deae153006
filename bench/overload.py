#!/usr/bin/env python3
"""A server under several times the load it can take: what it still gets done, and how fast it refuses the rest.

First as many clients as sequences can run send one request after the other: that is the peak. Then requests arrive at
a multiple of that rate, whether the server answers or not. The model is the null model with a time for every step.

    python bench/overload.py --factor 10 --seconds 60
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

import aiohttp

TOKENS = 20  # of an answer
RUNNING = 16  # sequences
WAITING = 32  # sequences


@dataclass
class Load:
    """What the clients saw. Seconds."""

    seconds: float = 0.0
    statuses: Counter[int] = field(default_factory=Counter)
    served_s: list[float] = field(default_factory=list)  # latency of whole answers
    refused_s: list[float] = field(default_factory=list)

    @property
    def goodput(self) -> float:
        return self.statuses[200] / self.seconds


@dataclass
class Result:
    peak_per_s: float
    offered_per_s: float
    goodput_per_s: float
    goodput_share: float  # of the peak
    statuses: dict[str, int]
    refused_median_ms: float
    refused_p99_ms: float
    served_median_ms: float
    served_p99_ms: float
    rss_before_mib: float
    rss_after_mib: float
    loop_work_ms: float  # longest time the event loop was held up by its own work


class NullServer:
    """The server as a process, with `step_ms` a step."""

    def __init__(self, step_ms: int) -> None:
        flags = ["--max-num-seqs", str(RUNNING), "--max-waiting", str(WAITING), "--disable-log-requests"]
        command = [sys.executable, "-m", "fastllm.server", "--model", "null", "--port", "0", *flags]
        faults = {"FASTLLM_TEST_HOOKS": "1", "FASTLLM_FAULT": f"slow@1:{step_ms}"}
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | faults)
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if line.startswith("ready"):
                self.url = re.search(r"http://\S+(?=/v1)", line)[0]  # type: ignore[index]
                return
        raise SystemExit("the server did not start")

    def rss_mib(self) -> float:
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20

    def stop(self) -> None:
        self.process.terminate()
        self.process.communicate(timeout=60)


async def one(session: aiohttp.ClientSession, url: str, load: Load) -> None:
    body = {"prompt": "Hello", "max_tokens": TOKENS, "ignore_eos": True}
    start = time.perf_counter()
    async with session.post(f"{url}/v1/completions", json=body) as response:
        await response.read()
    taken = time.perf_counter() - start
    load.statuses[response.status] += 1
    (load.served_s if response.status == 200 else load.refused_s).append(taken)


async def closed_loop(session: aiohttp.ClientSession, url: str, seconds: float) -> Load:
    load, start = Load(), time.perf_counter()

    async def client() -> None:
        while time.perf_counter() - start < seconds:
            await one(session, url, load)

    await asyncio.gather(*(client() for _ in range(RUNNING)))
    load.seconds = time.perf_counter() - start
    return load


async def open_loop(session: aiohttp.ClientSession, url: str, rate: float, seconds: float) -> Load:
    load, start = Load(), time.perf_counter()
    tasks: set[asyncio.Task[None]] = set()
    sent = 0
    while (now := time.perf_counter() - start) < seconds:
        for _ in range(int(now * rate) - sent):
            task = asyncio.create_task(one(session, url, load))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            sent += 1
        await asyncio.sleep(0.002)
    load.seconds = time.perf_counter() - start
    served = load.statuses[200]
    await asyncio.gather(*tasks)
    load.statuses[200] = served  # what came after the time does not count
    return load


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * share))] if values else float("nan")


def measure(*, factor: float, peak_seconds: float, seconds: float, step_ms: int) -> Result:
    server = NullServer(step_ms)

    async def work() -> Result:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            peak = await closed_loop(session, server.url, peak_seconds)
            before = server.rss_mib()
            load = await open_loop(session, server.url, factor * peak.goodput, seconds)
            async with session.get(f"{server.url}/stats") as response:
                stats = await response.json()
        return Result(
            peak_per_s=peak.goodput,
            offered_per_s=factor * peak.goodput,
            goodput_per_s=load.goodput,
            goodput_share=load.goodput / peak.goodput,
            statuses={str(status): count for status, count in sorted(load.statuses.items())},
            refused_median_ms=1e3 * (statistics.median(load.refused_s) if load.refused_s else float("nan")),
            refused_p99_ms=1e3 * percentile(load.refused_s, 0.99),
            served_median_ms=1e3 * percentile(load.served_s, 0.5),
            served_p99_ms=1e3 * percentile(load.served_s, 0.99),
            rss_before_mib=before,
            rss_after_mib=server.rss_mib(),
            loop_work_ms=1e3 * stats["max_loop_work_s"],
        )

    try:
        return asyncio.run(work())
    finally:
        server.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--factor", type=float, default=10.0, help="offered load as a multiple of the peak")
    parser.add_argument("--seconds", type=float, default=60.0, help="of overload")
    parser.add_argument("--peak-seconds", type=float, default=10.0)
    parser.add_argument("--step-ms", type=int, default=10, help="time of a step of the null model")
    args = parser.parse_args()
    result = measure(factor=args.factor, peak_seconds=args.peak_seconds, seconds=args.seconds, step_ms=args.step_ms)
    print(json.dumps({k: round(v, 2) if isinstance(v, float) else v for k, v in asdict(result).items()}, indent=1))


if __name__ == "__main__":
    main()
