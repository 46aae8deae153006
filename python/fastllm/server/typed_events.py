"""Server-sent events of the APIs whose events have names. The last one says that the answer is complete; no [DONE]."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec
from aiohttp import web

from fastllm.server.protocol import TypedEvent
from fastllm.server.streaming import EventStream, as_api_error

_encode = msgspec.json.Encoder().encode


class TypedEventStream(EventStream):
    async def send(self, *events: msgspec.Struct) -> None:
        """One write for all of them; each is a TypedEvent."""
        await self._write(_named(events))

    async def end(self, *events: TypedEvent) -> web.StreamResponse:
        """The last events."""
        return await self._end(_named(events))

    async def fail(self, exc: Exception) -> web.StreamResponse:
        return await self._end(b"event: error\ndata: %b\n\n" % as_api_error(exc).payload(self._request.path))


def _named(events: Iterable[msgspec.Struct]) -> bytes:
    return b"".join(
        b"event: %b\ndata: %b\n\n" % (event.type.encode(), _encode(event))
        for event in events
        if isinstance(event, TypedEvent)
    )
