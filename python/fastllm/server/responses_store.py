"""Responses that can be asked for again: in memory, the oldest dropped first, each only for the key that made it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from fastllm.server.errors import ApiError
from fastllm.server.protocol import ChatMessage
from fastllm.server.responses_protocol import ResponseObject

RESPONSES_KEPT = 256  # unless --responses-store says otherwise
MAX_STORE_BYTES = 64 << 20  # of all conversations together, as conversation_bytes counts
_MESSAGE_BYTES = 512  # what a message or a part takes beside its text


@dataclass
class StoredResponse:
    owner: str  # the client's name
    response: ResponseObject
    conversation: list[ChatMessage]  # without the instructions; the answer joins it at the end
    items: list[dict[str, Any]]  # the input of this response
    size: int  # bytes, roughly
    task: asyncio.Task[None] | None = None  # of a background response, until it ends


def conversation_bytes(messages: Iterable[ChatMessage]) -> int:
    """Roughly what these messages take, without looking at every character."""
    size = 0
    for message in messages:
        size += _MESSAGE_BYTES
        if isinstance(message.content, str):
            size += len(message.content)
        else:
            size += sum(_MESSAGE_BYTES + len(part.text or "") for part in message.content or ())
        for call in message.tool_calls or ():
            size += _MESSAGE_BYTES + len(call["function"]["arguments"])
    return size


class ResponseStore:
    """Event loop only. At most `capacity` finished responses; those that still run are bounded by admission."""

    def __init__(self, capacity: int, max_bytes: int = MAX_STORE_BYTES) -> None:
        self.capacity = capacity
        self._max_bytes = max_bytes
        self._entries: dict[str, StoredResponse] = {}  # oldest first
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, entry: StoredResponse) -> None:
        """Keeps a response, or moves a kept one that has grown to the young end."""
        if self.capacity == 0:
            return
        self._drop(entry.response.id)
        self._entries[entry.response.id] = entry
        self._bytes += entry.size
        finished = [id for id, other in self._entries.items() if other.task is None]
        for id in finished:
            if len(self._entries) <= self.capacity and self._bytes <= self._max_bytes:
                break
            self._drop(id)

    def get(self, id: str, owner: str, param: str | None = None) -> StoredResponse:
        """Raises a 404, for the responses of other keys too."""
        entry = self._entries.get(id)
        if entry is None or entry.owner != owner:
            kept = f"the last {self.capacity} are kept" if self.capacity else "this server keeps none"
            raise ApiError(404, f"There is no response {id[:80]!r}; {kept}.", param=param, code="response_not_found")
        return entry

    def delete(self, id: str, owner: str) -> None:
        """Ends it first if it still runs."""
        entry = self.get(id, owner)
        if entry.task is not None:
            entry.task.cancel()
        self._drop(id)

    def _drop(self, id: str) -> None:
        entry = self._entries.pop(id, None)
        if entry is not None:
            self._bytes -= entry.size
