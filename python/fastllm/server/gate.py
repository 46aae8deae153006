"""The way into the engine: who goes next when more wait than can run.

    accepted requests --> one line per client --> [ room: max_num_seqs and some ahead ] --> engine

Start-time fair queueing over tokens: a client's virtual time advances by the tokens it is given, divided by its weight,
and the client with the least goes next. A client that was idle starts at the time of the last one served, so that
nobody saves up and nobody starves. Within a client: priority (where the engine has that policy), then arrival. Event
loop only.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from fastllm.server.client import Client
from fastllm.server.cost import Cost
from fastllm.server.errors import ApiError

_SMOOTHING = 0.1  # of the running means
_FIRST_OUTPUT = 128.0  # tokens a sequence is expected to produce before any has


@dataclass(order=True)
class _Waiter:
    priority: int
    serial: int
    cost: Cost = field(compare=False)
    ready: asyncio.Future[None] = field(compare=False)


@dataclass
class Turn:
    """A request inside. `generated` tokens are counted by whoever holds it."""

    waited_s: float
    generated: int = 0


class Gate:
    def __init__(self) -> None:
        self.waiting_sequences = 0
        self.waiting_tokens = 0  # of prompts
        self._room = 0  # sequences that may be inside; 0: closed
        self._by_priority = False
        self._inside = 0  # sequences
        self._lines: dict[Client, list[_Waiter]] = {}  # heaps, of the clients that wait
        self._serial = itertools.count()
        self._virtual_time = 0.0
        self._mean_output = _FIRST_OUTPUT
        self._last_entry = 0.0  # loop time of the last entry out of a line; 0 while nobody waits
        self._entry_interval = 0.0  # seconds between two of those, on average

    def open(self, max_num_seqs: int, *, by_priority: bool = False) -> None:
        """Some more than can run are let in, so that the engine never waits for the event loop."""
        self._room = max_num_seqs + max(2, max_num_seqs // 4)
        self._by_priority = by_priority

    def predicted_wait(self, client: Client) -> float:
        """Seconds until one more request of this client would enter; 0 while nothing is known or nobody waits."""
        if not self._lines:
            return 0.0
        everybody = sum(map(len, self._lines.values()))
        fair = (len(self._lines.get(client, ())) + 1) * len(self._lines.keys() | {client})
        return min(everybody, fair) * self._entry_interval

    @asynccontextmanager
    async def turn(self, client: Client, cost: Cost, priority: int, timeout: float) -> AsyncIterator[Turn]:
        """Waits for room, at most `timeout` seconds unless that is 0, and holds it. Raises a 503."""
        loop = asyncio.get_running_loop()
        start = loop.time()
        if client not in self._lines:
            client.virtual_time = max(client.virtual_time, self._virtual_time)
        if self._lines or not self._fits(cost):
            await self._wait(client, cost, priority if self._by_priority else 0, timeout)
        else:
            self._enter(client, cost)
        charge = self._charge(cost)
        client.virtual_time += charge / client.allowance.weight
        turn = Turn(loop.time() - start)
        try:
            yield turn
        finally:
            client.virtual_time += (cost.prompt_tokens + turn.generated - charge) / client.allowance.weight
            mean = turn.generated / cost.sequences
            self._mean_output += _SMOOTHING * (mean - self._mean_output)
            self._inside -= cost.sequences
            self._let_in()

    def _fits(self, cost: Cost) -> bool:
        """What is larger than the room goes in alone."""
        return self._inside == 0 or self._inside + cost.sequences <= self._room

    def _charge(self, cost: Cost) -> float:
        """Tokens a request is expected to take; corrected when it ends."""
        return cost.prompt_tokens + min(float(cost.output_tokens), self._mean_output * cost.sequences)

    def _enter(self, client: Client, cost: Cost) -> None:
        self._inside += cost.sequences
        self._virtual_time = max(self._virtual_time, client.virtual_time)

    async def _wait(self, client: Client, cost: Cost, priority: int, timeout: float) -> None:
        loop = asyncio.get_running_loop()
        waiter = _Waiter(priority, next(self._serial), cost, loop.create_future())
        heapq.heappush(self._lines.setdefault(client, []), waiter)
        self.waiting_sequences += cost.sequences
        self.waiting_tokens += cost.prompt_tokens
        if not self._last_entry:
            self._last_entry = loop.time()
        timer = loop.call_later(timeout, _expire, waiter.ready, timeout) if timeout else None
        try:
            await waiter.ready
        except BaseException:
            if waiter.ready.done() and not waiter.ready.cancelled() and waiter.ready.exception() is None:
                self._inside -= cost.sequences  # let in and cancelled in the same moment
            else:
                self._leave_line(client, waiter)
            self._let_in()
            raise
        finally:
            if timer is not None:
                timer.cancel()

    def _leave_line(self, client: Client, waiter: _Waiter) -> None:
        line = self._lines.get(client)
        if line is None or waiter not in line:
            return
        line.remove(waiter)
        heapq.heapify(line)
        self._left(client, waiter.cost)

    def _left(self, client: Client, cost: Cost) -> None:
        self.waiting_sequences -= cost.sequences
        self.waiting_tokens -= cost.prompt_tokens
        if not self._lines[client]:
            del self._lines[client]
        if not self._lines:
            self._last_entry = 0.0

    def _let_in(self) -> None:
        while self._lines:
            client = min(self._lines, key=lambda one: (self._lines[one][0].priority, one.virtual_time))
            line = self._lines[client]
            waiter = line[0]
            if not waiter.ready.done() and not self._fits(waiter.cost):
                return
            heapq.heappop(line)
            if not waiter.ready.done():
                self._note_entry()
                self._enter(client, waiter.cost)
                waiter.ready.set_result(None)
            self._left(client, waiter.cost)

    def _note_entry(self) -> None:
        now = asyncio.get_running_loop().time()
        self._entry_interval += _SMOOTHING * (now - self._last_entry - self._entry_interval)
        self._last_entry = now

    def retry_after(self, client: Client) -> int:
        """Seconds after which another try may find room."""
        return max(1, min(30, math.ceil(self.predicted_wait(client))))

    def fail(self, error: ApiError) -> None:
        """Ends the wait of everybody."""
        for line in list(self._lines.values()):
            for waiter in list(line):
                if not waiter.ready.done():
                    waiter.ready.set_exception(error)


def _expire(ready: asyncio.Future[None], timeout: float) -> None:
    if not ready.done():
        ready.set_exception(
            ApiError(503, f"The request waited {timeout:g} s without a start.", code="queue_timeout", retry_after=1)
        )
