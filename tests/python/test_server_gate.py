"""Costs, budgets and the fair queue: arithmetic and order, without an engine."""

from __future__ import annotations

import asyncio
import random
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace

import pytest

from fastllm.sampling import SamplingParams
from fastllm.server.client import Allowance, Bucket, Client
from fastllm.server.cost import Cost, cost_of, total
from fastllm.server.errors import ApiError
from fastllm.server.gate import Gate

ONE = Cost(
    sequences=1,
    prompt_tokens=10,
    output_tokens=10,
    kv_blocks=2,
    largest_prompt_blocks=1,
    mask_bytes=0,
    logprob_cells=0,
)


@dataclass
class Prompt:
    prompt_ids: list[int]
    params: SamplingParams


@pytest.mark.parametrize(
    "length, params, masked, want",
    [
        (32, {"max_tokens": 16}, False, Cost(1, 32, 16, 3, 2, 0, 0)),
        (33, {"max_tokens": 16}, False, Cost(1, 33, 16, 4, 3, 0, 0)),
        (33, {"max_tokens": 16, "n": 4}, False, Cost(4, 33, 64, 2 + 4 * 2, 3, 0, 0)),
        (90, {"max_tokens": 50}, False, Cost(1, 90, 10, 7, 6, 0, 0)),  # the context ends before max_tokens
        (16, {"max_tokens": 16, "logprobs": 4, "n": 2}, False, Cost(2, 16, 32, 3, 1, 0, 2 * 16 * 5)),
        (16, {"max_tokens": 1, "prompt_logprobs": 20}, False, Cost(1, 16, 1, 2, 1, 0, 16 * 21)),
        (16, {"max_tokens": 1, "n": 2}, True, Cost(2, 16, 2, 3, 1, 2 * 4 * 32, 0)),
    ],
)
def test_cost_of_a_prompt(length: int, params: dict, masked: bool, want: Cost) -> None:
    prompt = Prompt([1] * length, SamplingParams(**params))
    assert cost_of(prompt, block_size=16, max_model_len=100, vocab=1000, masked=masked) == want


def test_cost_of_a_call_sums_all_but_the_longest_prompt() -> None:
    assert total([ONE, replace(ONE, largest_prompt_blocks=7, sequences=3)]) == Cost(4, 20, 20, 4, 7, 0, 0)


def test_bucket_refills_by_the_minute_and_may_be_overdrawn() -> None:
    now = 100.0
    bucket = Bucket(60, clock=lambda: now)
    bucket.take(60)
    assert bucket.level() == 0 and bucket.seconds_until(1) == 1
    bucket.take(30)
    assert bucket.seconds_until(1) == 31
    assert bucket.seconds_until(1000) == 90  # never more than the limit is waited for
    now += 31
    assert bucket.seconds_until(1) == 0
    now += 1e6
    assert bucket.level() == 60


def test_client_over_a_limit_is_told_which_and_until_when() -> None:
    client = Client("a", Allowance(requests_per_minute=2, tokens_per_minute=100, concurrent=1))
    with client.serving():
        with pytest.raises(ApiError) as refused, client.serving():
            pass
        assert refused.value.status == 429 and refused.value.body.code == "concurrent_requests"
    client.check_tokens(100)
    client.use_tokens(90)
    with pytest.raises(ApiError) as refused:
        client.check_tokens(20)
    assert refused.value.body.code == "tokens_per_minute" and 1 <= (refused.value.retry_after or 0) <= 6
    headers = client.headers()
    assert headers["x-ratelimit-limit-requests"] == "2" and headers["x-ratelimit-remaining-requests"] == "1"
    assert headers["x-ratelimit-limit-tokens"] == "100" and headers["x-ratelimit-remaining-tokens"] == "10"
    assert headers["x-ratelimit-reset-tokens"].endswith("s")
    with client.serving():
        pass
    with pytest.raises(ApiError) as refused, client.serving():
        pass
    assert refused.value.body.code == "requests_per_minute" and refused.value.retry_after == 30
    assert client.active == 0


def test_reload_keeps_what_was_used_of_a_limit_that_stays() -> None:
    client = Client("a", Allowance(tokens_per_minute=100, requests_per_minute=10))
    client.use_tokens(100)
    client.set_allowance(Allowance(tokens_per_minute=100, requests_per_minute=20))
    assert client.tokens is not None and client.tokens.level() < 1
    assert client.requests is not None and client.requests.limit == 20


def gate_for(sequences: int, *, by_priority: bool = False) -> Gate:
    """Room for exactly that many, which must be at least 3."""
    gate = Gate()
    gate.open(sequences - 2, by_priority=by_priority)
    return gate


async def entries(gate: Gate, arrivals: list[tuple[Client, Cost, int]]) -> list[int]:
    """The order in which requests go in, one at a time, when all have arrived behind a full gate."""
    order: list[int] = []
    async with AsyncExitStack() as holders:
        for _ in range(3):
            await holders.enter_async_context(gate.turn(Client("holder"), ONE, 0, 0))

        async def request(number: int, client: Client, cost: Cost, priority: int) -> None:
            async with gate.turn(client, replace(cost, sequences=3), priority, 0) as turn:
                order.append(number)
                turn.generated = cost.output_tokens

        tasks = [asyncio.create_task(request(i, *arrival)) for i, arrival in enumerate(arrivals)]
        await asyncio.sleep(0)
        assert gate.waiting_sequences == 3 * len(arrivals)
    await asyncio.gather(*tasks)
    assert gate.waiting_sequences == gate.waiting_tokens == 0
    return order


def test_flood_of_one_client_does_not_hold_up_another() -> None:
    flood, quiet = Client("flood"), Client("quiet")
    order = asyncio.run(entries(gate_for(3), [(flood, ONE, 0)] * 50 + [(quiet, ONE, 0)] * 2))
    assert max(order.index(50), order.index(51)) < 6
    assert [i for i in order if i < 50] == list(range(50))


def test_weights_share_the_engine() -> None:
    light, heavy = Client("light"), Client("heavy", Allowance(weight=3))
    order = asyncio.run(entries(gate_for(3), [(light, ONE, 0)] * 60 + [(heavy, ONE, 0)] * 60))
    assert 25 <= sum(number >= 60 for number in order[:40]) <= 35


def test_long_requests_count_by_their_tokens() -> None:
    long, short = Client("long"), Client("short")
    big = replace(ONE, prompt_tokens=1000, output_tokens=10)
    order = asyncio.run(entries(gate_for(3), [(long, big, 0)] * 10 + [(short, ONE, 0)] * 100))
    assert sum(number < 10 for number in order[:50]) <= 3


def test_priority_goes_first_where_the_policy_says_so() -> None:
    a, b = Client("a"), Client("b")
    arrivals = [(a, ONE, 5), (a, ONE, 1), (b, ONE, 3), (b, ONE, -1)]
    assert asyncio.run(entries(gate_for(3, by_priority=True), arrivals)) == [3, 1, 2, 0]
    assert asyncio.run(entries(gate_for(3), [(a, ONE, 5), (a, ONE, 1)])) == [0, 1]


@asynccontextmanager
async def full(gate: Gate):
    async with gate.turn(Client("holder"), replace(ONE, sequences=3), 0, 0):
        yield


def test_wait_ends_with_a_503_at_its_limit() -> None:
    async def work() -> None:
        gate = gate_for(3)
        async with full(gate):
            with pytest.raises(ApiError) as refused:
                async with gate.turn(Client("a"), ONE, 0, 0.01):
                    pass
            assert refused.value.status == 503 and refused.value.body.code == "queue_timeout"
            assert gate.waiting_sequences == 0

    asyncio.run(work())


def test_random_arrivals_ends_and_cancellations_lose_no_room() -> None:
    seed = random.SystemRandom().randrange(2**31)
    print(f"seed {seed}")
    rng = random.Random(seed)

    async def work() -> None:
        gate = gate_for(8)
        clients = [Client(str(i), Allowance(weight=rng.choice([0.5, 1, 2]))) for i in range(4)]
        inside = most = 0

        async def request() -> None:
            nonlocal inside, most
            cost = replace(ONE, sequences=rng.choice([1, 1, 2, 5, 12]))
            async with gate.turn(rng.choice(clients), cost, 0, rng.choice([0, 0, 0.005])) as turn:
                inside += cost.sequences
                most = max(most, inside if inside > cost.sequences else 0)
                try:
                    for _ in range(rng.randrange(4)):
                        await asyncio.sleep(0)
                    turn.generated = rng.randrange(20)
                finally:
                    inside -= cost.sequences

        tasks = []
        for _ in range(600):
            tasks.append(asyncio.create_task(request()))
            if rng.random() < 0.4:
                rng.choice(tasks).cancel()
            if rng.random() < 0.5:
                await asyncio.sleep(0)
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            assert result is None or isinstance(result, (ApiError, asyncio.CancelledError)), result
        assert most <= 8
        assert (gate._inside, gate.waiting_sequences, gate.waiting_tokens, gate._lines) == (0, 0, 0, {})

    asyncio.run(work())
