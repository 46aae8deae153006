"""From the bytes of a JSON body to its struct, in a few milliseconds of the event loop however large it is.

    bytes --native, without the GIL--> long values, and a small JSON with marks in their places
    small JSON --msgspec--> struct --marks replaced--> struct
What cannot be made small has too many values, and is refused.
"""

from __future__ import annotations

import asyncio
import re
import secrets
from functools import lru_cache, partial
from typing import Any, TypeVar

import msgspec

from fastllm import _core
from fastllm.server.errors import ApiError, bad_request, from_decode_error
from fastllm.server.protocol import CompletionRequest, DetokenizeRequest
from fastllm.server.state import ServerState

T = TypeVar("T", bound=msgspec.Struct)

_INLINE = 64 << 10  # bytes; larger bodies are read on a worker
_MAX_SMALL = 4 << 20  # bytes of what msgspec reads
_PUT_BACK_A_TURN = 500  # between turns of others
_SHAPES = (
    "The request body is nested {found} levels deep or more; at most {limit} are accepted.",
    "An object of the request body has {found} keys; at most {limit} are accepted.",
    "An array of the request body has {found} elements; at most {limit} are accepted.",
)
_IDS_FIELDS: dict[type, str] = {CompletionRequest: "prompt", DetokenizeRequest: "tokens"}
_KINDS = {'"': "a string", "[": "an array", "{": "an object", "t": "true or false", "f": "true or false", "n": "null"}
_WHOLE = re.compile(r"-?\d+(\.0+)?[\s,\]]")


@lru_cache(maxsize=16)
def _decoder(kind: type[T]) -> msgspec.json.Decoder[T]:
    return msgspec.json.Decoder(kind)


async def decode(body: bytes | bytearray, kind: type[T], state: ServerState) -> T:
    """Raises a 400 that says what is wrong with the body."""
    mark = str(secrets.randbelow(9 * 10**11) + 10**11)
    read = partial(
        _core.read_json_body,
        body,
        fields=kind.__struct_fields__,
        ids_field=_IDS_FIELDS.get(kind, ""),
        mark=mark,
    )
    elsewhere = len(body) > _INLINE
    found = await asyncio.get_running_loop().run_in_executor(state.workers, read) if elsewhere else read()
    _check(found, kind, state)
    try:
        value = await _struct(found.small, kind, state)
    except (msgspec.MsgspecError, RecursionError) as exc:
        raise from_decode_error(exc) from None
    await _put_back(value, found, mark)
    return value


def _check(found: _core.JsonBody, kind: type[msgspec.Struct], state: ServerState) -> None:
    limits = state.limits
    longest = max(limits.max_json_items, state.llm.model_config.max_model_len if state.loaded else 0)
    allowed = (limits.max_json_depth, limits.max_json_keys, longest)
    for sentence, (most, field), limit in zip(_SHAPES, found.most, allowed, strict=True):
        if most > limit:
            raise bad_request(sentence.format(found=most, limit=limit), field, "invalid_json")
    if found.error:
        raise bad_request(f"The request body is not valid JSON: {found.error}.", found.error_field, "invalid_json")
    if found.bad_id is not None:
        raise _bad_id(_IDS_FIELDS[kind], *found.bad_id)
    if found.values > limits.max_json_values:
        raise bad_request(
            f"The request body has {found.values} values, long lists of token ids aside; at most "
            f"{limits.max_json_values} are accepted.",
            code="invalid_json",
        )
    if len(found.small) > _MAX_SMALL:
        raise bad_request(
            f"The request body has {len(found.small)} bytes of names and short values; at most {_MAX_SMALL} are "
            "accepted.",
            code="invalid_json",
        )
    if found.unknown:
        if state.strict_params:
            name = found.unknown[0]
            raise bad_request(f"Unknown parameter: {name!r}.", name, "unknown_parameter")
        state.note_unknown_fields(set(found.unknown))


def _bad_id(field: str, outer: int, index: int, text: bytes) -> ApiError:
    """text: the element and what follows it."""
    shown = text.decode("utf-8", "replace")
    where = f"{field}[{index}]" if outer < 0 else f"{field}[{outer}][{index}]"
    whole = _WHOLE.match(shown + ",")
    if whole is not None:
        number = re.split(r"[.\s,\]]", whole[0], maxsplit=1)[0]
        return bad_request(f"{where}: token id {number} is out of vocabulary.", field, "invalid_value")
    got = _KINDS.get(shown[:1], "a number")
    return bad_request(f"{where} must be an integer, got {got}.", field, "invalid_type")


async def _struct(small: bytes, kind: type[T], state: ServerState) -> T:
    try:
        value: T = _decoder(kind).decode(small)
        return value
    except msgspec.ValidationError as exc:
        if "got `float`" not in str(exc):
            raise
    if len(small) <= _INLINE:
        return _leniently(small, kind)
    return await asyncio.get_running_loop().run_in_executor(state.workers, _leniently, small, kind)


def _leniently(small: bytes, kind: type[T]) -> T:
    value: T = msgspec.convert(_whole_floats_as_ints(msgspec.json.decode(small)), kind)
    return value


def _whole_floats_as_ints(value: Any) -> Any:
    """JSON has one kind of number, so 16.0 is as good an integer as 16; some clients only write the former."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, list):
        return [_whole_floats_as_ints(item) for item in value]
    if isinstance(value, dict):
        return {key: _whole_floats_as_ints(item) for key, item in value.items()}
    return value


async def _put_back(value: msgspec.Struct, found: _core.JsonBody, mark: str) -> None:
    """Long values to where their marks are; a later duplicate of their field may have taken the place."""
    places: list[Any] = []
    for number, (parent, key) in enumerate(found.places, 1):
        places.append(_child(value if parent < 0 else places[parent], key))
        if number % _PUT_BACK_A_TURN == 0:
            await asyncio.sleep(0)
    for number, (place, key, long) in enumerate(found.cuts, 1):
        holder = value if place < 0 else places[place]
        marked = f"{mark}{number - 1}"
        if _child(holder, key) == (marked if isinstance(long, str) else [int(marked)]):
            if isinstance(holder, msgspec.Struct):
                setattr(holder, str(key), long)
            else:
                holder[key] = long
        if number % _PUT_BACK_A_TURN == 0:
            await asyncio.sleep(0)


def _child(holder: Any, key: str | int) -> Any:
    if isinstance(holder, msgspec.Struct):
        return getattr(holder, str(key)) if key in holder.__struct_fields__ else None
    if isinstance(holder, list):
        return holder[key] if isinstance(key, int) and key < len(holder) else None
    return holder.get(key) if isinstance(holder, dict) else None
