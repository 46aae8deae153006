"""The request that the current task answers: who sent it, and how large it came."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass

from fastllm.server.client import ANONYMOUS, Client
from fastllm.server.errors import ApiError


@dataclass
class Call:
    client: Client
    body_bytes: int = 0  # known once the body was read
    error: ApiError | None = None  # that ended the answer after its first byte


_call: ContextVar[Call] = ContextVar("call")


def begin_call(client: Client) -> Call:
    """Called by the outermost middleware; tasks made from here on inherit it."""
    call = Call(client)
    _call.set(call)
    return call


def current_call() -> Call:
    """A fresh anonymous one where no middleware ran."""
    return _call.get(None) or Call(Client(ANONYMOUS))
