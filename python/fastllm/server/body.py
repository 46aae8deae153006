"""From the bytes of a request to its struct, with sentences for what cannot be read."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, TypeVar

import msgspec
from aiohttp import web

from fastllm.server.deadline import time_limit
from fastllm.server.errors import ApiError, bad_request, from_decode_error
from fastllm.server.state import STATE_KEY

T = TypeVar("T", bound=msgspec.Struct)

# Naming unknown fields means reading the body twice; that is not worth it for long token lists.
_NAME_FIELDS_BELOW = 64 << 10  # bytes
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_raw_object = msgspec.json.Decoder(dict[str, msgspec.Raw])


@lru_cache(maxsize=16)
def _decoder(kind: type[T]) -> msgspec.json.Decoder[T]:
    return msgspec.json.Decoder(kind)


@lru_cache(maxsize=16)
def field_names(kind: type[msgspec.Struct]) -> frozenset[str]:
    return frozenset(kind.__struct_fields__)


async def read_json(request: web.Request, kind: type[T]) -> T:
    state = request.app[STATE_KEY]
    content_type = request.headers.getall("Content-Type", [])
    if len(content_type) > 1:
        raise bad_request("Send one Content-Type header.")
    if content_type and request.content_type != "application/json":
        raise ApiError(415, "Send the body as application/json.")
    if content_type and (request.charset or "utf-8").lower() not in ("utf-8", "utf8"):
        raise ApiError(415, "Send the body as UTF-8.")
    if request.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise ApiError(415, "Send the body as it is: compressed bodies are not accepted.")
    if request.content_length is not None and request.content_length > state.limits.max_body_bytes:
        raise _too_large(state.limits.max_body_bytes)
    try:
        async with time_limit(state.limits.body_timeout_s):
            body = await request.read()
    except TimeoutError:
        raise ApiError(408, "The request body did not arrive in time.") from None
    except web.HTTPRequestEntityTooLarge:
        raise _too_large(state.limits.max_body_bytes) from None
    except web.RequestPayloadError:
        raise bad_request("The request body cannot be read: its framing is broken.", code="invalid_body") from None
    return decode(body, kind, request)


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"The request body is larger than {limit} bytes, the most this server accepts.")


def decode(body: bytes, kind: type[T], request: web.Request) -> T:
    body = body.removeprefix(_BYTE_ORDER_MARK)
    try:
        if not body.isascii():
            body.decode("utf-8")  # msgspec skips the text of unknown fields unchecked
        try:
            value: T = _decoder(kind).decode(body)
        except msgspec.ValidationError as exc:
            if "got `float`" not in str(exc):
                raise
            value = msgspec.convert(_whole_floats_as_ints(msgspec.json.decode(body)), kind)
        if len(body) <= _NAME_FIELDS_BELOW:
            unknown = _raw_object.decode(body).keys() - field_names(kind)
            if unknown:
                request.app[STATE_KEY].log_unknown_fields(set(unknown))
        return value
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
        raise from_decode_error(exc) from None


def _whole_floats_as_ints(value: Any) -> Any:
    """JSON has one kind of number, so 16.0 is as good an integer as 16; some clients only write the former."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, list):
        return [_whole_floats_as_ints(item) for item in value]
    if isinstance(value, dict):
        return {key: _whole_floats_as_ints(item) for key, item in value.items()}
    return value
