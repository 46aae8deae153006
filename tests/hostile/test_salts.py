"""A prefix that one tenant has cached is no faster for another: its answers tell nobody what was asked (row C68)."""

from __future__ import annotations

import http.client
import json
import math
import random
import string
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import mean, variance

import pytest
from harness import COMPLETIONS, SLOW

from fastllm.async_llm import AsyncLLM
from fastllm.engine_args import EngineArgs
from server_fixtures import RunningServer
from tiny_models import ENGINE

PREFIX, TAIL = 1600, 176  # tokens, which are bytes: nine tenths of each prompt are the system's
ROUNDS = 500  # of the timing
# Equal times fail one comparison in a hundred by chance, and three in a row one time in a million.
LIKELY, ATTEMPTS = 0.01, 3
CERTAIN = 1e-6


class Tenant:
    """A connection to a server of a real tiny model. The seed makes the texts, of which no two are alike."""

    def __init__(self, server: RunningServer, seed: int) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        self.rng = random.Random(seed)

    def text(self, length: int) -> str:
        return "".join(self.rng.choices(string.ascii_letters + " ", k=length))

    def ask(self, prefix: str, salt: str) -> tuple[float, int]:
        """Seconds until the first token, and how many of the prompt's tokens were computed."""
        fields = {"prompt": prefix + self.text(TAIL), "cache_salt": salt, "max_tokens": 1}
        body = json.dumps(fields).encode()
        start = time.perf_counter()
        self._connection.request("POST", COMPLETIONS, body, {"Content-Type": "application/json"})
        answer = self._connection.getresponse().read()
        seconds = time.perf_counter() - start
        usage = json.loads(answer)["usage"]
        return seconds, usage["prompt_tokens"] - usage["prompt_tokens_details"]["cached_tokens"]


@pytest.fixture
def tenant(tiny_model: Callable[[str], Path], seed: int) -> Iterator[Tenant]:
    settings = {"num_gpu_blocks_override": 1024, "cpu_threads": 1, "check_invariants": False}
    args = EngineArgs(str(tiny_model("llama-heads-of-64")), **{**ENGINE, **settings})
    server = RunningServer(lambda: AsyncLLM.from_engine_args(args), log_requests=False)
    try:
        server.load()
        yield Tenant(server, seed)
    finally:
        server.close()


def rounds(tenant: Tenant, count: int) -> dict[str, list[tuple[float, int]]]:
    """What A's prefix costs A again, what it costs B then, and what a prefix that nobody sent costs; interleaved."""
    found: dict[str, list[tuple[float, int]]] = {"own": [], "other": [], "new": []}
    for number in range(count):
        sent, unsent = tenant.text(PREFIX), tenant.text(PREFIX)
        tenant.ask(sent, f"a{number}")
        turns = [("own", sent, f"a{number}"), ("other", sent, f"b{number}"), ("new", unsent, f"c{number}")]
        tenant.rng.shuffle(turns)
        for kind, prefix, salt in turns:
            found[kind].append(tenant.ask(prefix, salt))
    return found


def chance(low: Sequence[float], high: Sequence[float]) -> float:
    """How likely `low` would be lower by at least as much if both were alike: Welch's test for large samples."""
    error = math.sqrt(variance(low) / len(low) + variance(high) / len(high))
    return math.erfc((mean(high) - mean(low)) / error / math.sqrt(2)) / 2


def test_c68_prefix_of_another_salt_is_computed_anew(tenant: Tenant) -> None:
    found = rounds(tenant, 5)
    computed = {kind: {tokens for _, tokens in asked} for kind, asked in found.items()}
    assert computed["other"] == computed["new"] == {PREFIX + TAIL}
    assert computed["own"] == {TAIL}


@SLOW
@pytest.mark.timeout(1800)
def test_c68_first_token_comes_no_sooner_for_a_prefix_of_another_salt(tenant: Tenant) -> None:
    rounds(tenant, 20)  # every thread and buffer is there
    for _ in range(ATTEMPTS):
        # Of logarithms, so that a moment in which the machine stood still does not outweigh the rest.
        times = {kind: [math.log(seconds) for seconds, _ in asked] for kind, asked in rounds(tenant, ROUNDS).items()}
        own, other = (chance(times[kind], times["new"]) for kind in ("own", "other"))
        means = {kind: f"{1e3 * math.exp(mean(logs)):.2f} ms" for kind, logs in times.items()}
        print(f"{means}, chance {own:.1e} of a tenant's own prefix, {other:.3f} of another's")
        assert own < CERTAIN, "too noisy: not even a tenant's own prefix is seen"
        if other > LIKELY:
            return
    pytest.fail("the first token comes sooner when another tenant has sent the prefix before")
