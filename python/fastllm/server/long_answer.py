"""Answers of megabytes: encoded piece by piece on a worker, so that other threads go on, and written piece by piece."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec
from aiohttp import web

if TYPE_CHECKING:
    from fastllm.outputs import RequestOutput
    from fastllm.server.protocol import CommonRequest

FEW_ITEMS = 200
_ITEMS = 5000  # encoded at once
_CHARS = 1 << 18
_WRITTEN_AT_ONCE = 1 << 18  # bytes


def long_answer(outputs: Sequence[RequestOutput], body: CommonRequest) -> bool:
    """Whether these outputs make an answer that the event loop has no time for."""
    items = 0  # of some us each
    for output in outputs:
        prompt = len(output.prompt_logprobs or ())
        for sample in output.outputs:
            items += 4 + prompt + len(sample.logprobs or ())
            if body.return_token_ids:
                items += len(output.prompt_token_ids) // 100
    return items > FEW_ITEMS


def raw_array(values: Sequence[Any] | None) -> Any:
    """The list as JSON, for a field of a struct; None as it is."""
    if values is None:
        return None
    pieces = (msgspec.json.encode(values[at : at + _ITEMS])[1:-1] for at in range(0, len(values), _ITEMS))
    return msgspec.Raw(b"[" + b",".join(pieces) + b"]")


def raw_text(text: str) -> Any:
    """The text as JSON, for a field of a struct."""
    pieces = (msgspec.json.encode(text[at : at + _CHARS])[1:-1] for at in range(0, len(text), _CHARS))
    return msgspec.Raw(b'"' + b"".join(pieces) + b'"')


def json_response(body: bytes) -> web.Response:
    # A file is written as fast as the client reads; bytes would be copied for it all at once.
    payload = body if len(body) <= _WRITTEN_AT_ONCE else io.BytesIO(body)
    return web.Response(body=payload, content_type="application/json", charset="utf-8")
