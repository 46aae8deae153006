"""A few begin in each turn of the event loop, in the order they came; whoever gives up takes no place."""

from __future__ import annotations

import asyncio

from fastllm.server.turns import Turns


async def begun_by_turn(turns: Turns, tasks: list[asyncio.Task[None]], begun: list[int]) -> list[int]:
    """How many had begun after each turn of the loop, until all of them are done."""
    counts = []
    while not all(task.done() for task in tasks):
        await asyncio.sleep(0)
        counts.append(len(begun))
    return counts


def test_many_at_once_begin_a_few_a_turn_in_their_order() -> None:
    async def run() -> tuple[list[int], list[int]]:
        turns, begun = Turns(3), []

        async def one(number: int) -> None:
            await turns.take()
            begun.append(number)

        tasks = [asyncio.create_task(one(number)) for number in range(20)]
        return begun, await begun_by_turn(turns, tasks, begun)

    begun, counts = asyncio.run(run())
    assert begun == list(range(20))
    assert max(later - earlier for earlier, later in zip([0, *counts], counts, strict=False)) <= 3


def test_who_gives_up_takes_no_place() -> None:
    async def run() -> list[int]:
        turns, begun = Turns(2), []

        async def one(number: int) -> None:
            await turns.take()
            begun.append(number)

        tasks = [asyncio.create_task(one(number)) for number in range(8)]
        await asyncio.sleep(0)  # now two have begun and six wait
        for task in tasks[2:6]:
            task.cancel()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        await asyncio.gather(*tasks, return_exceptions=True)
        return begun

    assert asyncio.run(run()) == [0, 1, 6, 7]


def test_one_at_a_time_never_waits() -> None:
    async def run() -> int:
        turns = Turns(1)
        waited = 0
        for _ in range(5):
            task = asyncio.create_task(turns.take())
            await asyncio.sleep(0)
            waited += not task.done()
            await asyncio.sleep(0)  # the next turn
        return waited

    assert asyncio.run(run()) == 0
