"""Clients that leave: each sends a request and drops its connection at a moment or a byte of its own."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import struct
from collections import Counter
from dataclasses import dataclass
from typing import Any

from harness import CHAT, COMPLETIONS, post

AT_ONCE = 24  # fewer than may run and wait: none is refused for the crowd
LONGEST_STAY_S = 0.1  # a request takes longer, so nobody stays for its whole answer by chance
MOST_BYTES = 20_000  # of an answer, that a client takes before it leaves
_MESSAGES = "/v1/messages"
_RESPONSES = "/v1/responses"
_LONG = 4000  # tokens
_RESET = struct.pack("ii", 1, 0)


@dataclass(frozen=True)
class Plan:
    request: bytes
    sent: int  # bytes of it
    taken: int  # bytes of the answer, then it leaves
    stay_s: float  # or after this time
    reset: bool  # instead of an orderly close


def make_plan(rng: random.Random) -> Plan:
    path = rng.choice([COMPLETIONS, COMPLETIONS, CHAT, CHAT, _MESSAGES, _RESPONSES])
    body: dict[str, Any] = {"stream": rng.random() < 0.6, "ignore_eos": True}
    words = "word " * rng.choice([1, 1, 1, 20, 200])
    if path == COMPLETIONS:
        body |= {"prompt": words, "max_tokens": _LONG, "n": rng.choice([1, 1, 1, 2])}
    elif path == _RESPONSES:
        body |= {"input": words, "max_output_tokens": _LONG}
    else:
        body |= {"messages": [{"role": "user", "content": words}], "max_tokens": _LONG}
    request = post(path, json.dumps(body).encode(), close=False)
    return Plan(
        request,
        rng.randrange(1, len(request)) if rng.random() < 0.1 else len(request),
        int(MOST_BYTES ** rng.random()),
        rng.uniform(0, LONGEST_STAY_S),
        rng.random() < 0.5,
    )


class _Leaver(asyncio.Protocol):
    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._taken = 0
        self.status = 0
        self.gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.write(self._plan.request[: self._plan.sent])
        asyncio.get_running_loop().call_later(self._plan.stay_s, self._leave)

    def data_received(self, data: bytes) -> None:
        if not self._taken:
            self.status = int(data.split(b" ", 2)[1])
        self._taken += len(data)
        if self._taken >= self._plan.taken:
            self._leave()

    def _leave(self) -> None:
        if self._plan.reset and not self._transport.is_closing():
            sock = self._transport.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self.gone.set_result(None)


async def abort_storm(port: int, count: int, rng: random.Random) -> Counter[int]:
    """The statuses that the clients saw before they left; 0 for none."""
    statuses: Counter[int] = Counter()
    loop = asyncio.get_running_loop()
    plans = iter([make_plan(rng) for _ in range(count)])

    async def leave_again_and_again() -> None:
        for plan in plans:
            _, leaver = await loop.create_connection(lambda plan=plan: _Leaver(plan), "127.0.0.1", port)  # type: ignore[misc]
            await leaver.gone
            statuses[leaver.status] += 1

    await asyncio.gather(*(leave_again_and_again() for _ in range(AT_ONCE)))
    return statuses
