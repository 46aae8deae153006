"""From the bytes of a request to its struct, with sentences for what cannot be read."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from functools import lru_cache
from typing import Any, TypeVar

import msgspec
from aiohttp import web

from fastllm import _core
from fastllm.server.call import current_call
from fastllm.server.deadline import time_limit
from fastllm.server.errors import ApiError, bad_request, from_decode_error
from fastllm.server.limits import Limits
from fastllm.server.state import STATE_KEY, ServerState

T = TypeVar("T", bound=msgspec.Struct)

# Naming unknown fields means reading the body twice; that is not worth it for long token lists.
_NAME_FIELDS_BELOW = 64 << 10  # bytes
# Larger bodies are scanned on a worker, without the interpreter's lock.
_SCAN_INLINE = 256 << 10  # bytes
_FREE_SECONDS = 5.0  # before the rate of a body counts
_CHUNKS_A_TURN = 500  # of a body, between turns of others
_FEW_FIELDS = 1000  # a body of more has no one to blame
_SHAPES = (
    "The request body is nested {found} levels deep or more; at most {limit} are accepted.",
    "An object of the request body has {found} keys; at most {limit} are accepted.",
    "An array of the request body has {found} elements; at most {limit} are accepted.",
)
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
            body = await _read(request, state.limits)
    except TimeoutError:
        raise ApiError(408, "The request body did not arrive in time.") from None
    except web.RequestPayloadError:
        raise bad_request("The request body cannot be read: its framing is broken.", code="invalid_body") from None
    current_call().body_bytes = len(body)
    await _check_shape(body, state)
    return decode(body, kind, request)


async def _read(request: web.Request, limits: Limits) -> bytes:
    """The whole body, unless it grows too large, too slowly or in too many pieces."""
    if not request.body_exists:  # aiohttp's empty body yields chunks without end
        return b""
    loop = asyncio.get_running_loop()
    start = loop.time()
    parts: list[bytes] = []
    size = chunks = 0
    while True:
        data, chunk_ended = await request.content.readchunk()
        if not data and not chunk_ended:
            return b"".join(parts)
        parts.append(data)
        size += len(data)
        if size > limits.max_body_bytes:
            raise _too_large(limits.max_body_bytes)
        if chunk_ended:
            chunks += 1
            if chunks > limits.max_body_chunks:
                raise ApiError(413, f"The request body comes in more than {limits.max_body_chunks} chunks.")
            if chunks % _CHUNKS_A_TURN == 0:
                await asyncio.sleep(0)
        seconds = loop.time() - start
        if seconds > _FREE_SECONDS and size < limits.min_body_rate * seconds:
            raise TimeoutError


async def _check_shape(body: bytes, state: ServerState) -> None:
    """Depth and width of the JSON, before anything is built from it."""
    limits = state.limits
    if len(body) <= _SCAN_INLINE:
        shape = _core.json_shape(body)
    else:
        shape = await asyncio.get_running_loop().run_in_executor(state.workers, _core.json_shape, body)
    longest = max(limits.max_json_items, state.llm.model_config.max_model_len if state.loaded else 0)
    for kind, (found, limit) in enumerate(
        zip(shape, (limits.max_json_depth, limits.max_json_keys, longest), strict=True)
    ):
        if found > limit:
            sentence = _SHAPES[kind].format(found=found, limit=limit)
            where = asyncio.get_running_loop().run_in_executor(state.workers, _field_of, body, kind, found)
            raise bad_request(sentence, await where, "invalid_json")


def _field_of(body: bytes, kind: int, found: int) -> str | None:
    """The top-level field in which that much of one kind of _SHAPES was found, if there is one."""
    with suppress(msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        fields = _raw_object.decode(body)
        for name, value in fields.items() if len(fields) < _FEW_FIELDS else ():
            if _core.json_shape(bytes(value))[kind] == (found - 1 if kind == 0 else found):
                return name[:64]
    return None


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
