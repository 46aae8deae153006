"""What the model thinks, says and calls, as the items and events of the two APIs; checked against their clients."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from fastllm.server.errors import ApiError
from fastllm.server.messages_builder import MessageBuilder
from fastllm.server.messages_protocol import Message, MessageUsage
from fastllm.server.protocol import ChatMessage, Usage
from fastllm.server.responses_builder import ResponseBuilder
from fastllm.server.responses_protocol import ResponseObject, TextConfig

USAGE = MessageUsage(3, 5, 0)
# Thoughts, words, two calls: the order in which models write them.
STORY = [
    ("think", ("Which ",)),
    ("think", ("city?",)),
    ("say", ("Let me ",)),
    ("say", ("see.",)),
    ("call", ("call_1", "weather")),
    ("argue", ('{"city": ',)),
    ("argue", ('"Köln"}',)),
    ("call", ("call_2", "time")),
    ("argue", ("{}",)),
]


def _response() -> ResponseBuilder:
    config = {"store": True, "temperature": 1.0, "text": TextConfig(), "top_p": 1.0}
    return ResponseBuilder(ResponseObject(id="resp_1", created_at=1, model="m", status="queued", **config))


def _told(builder: Any, story: list[tuple[str, tuple[str, ...]]]) -> list[dict[str, Any]]:
    """The events of a story, encoded as each came."""
    events: list[dict[str, Any]] = []
    for act, said in story:
        events += map(msgspec.to_builtins, getattr(builder, act)(*said))
    return events


def test_response_items_open_grow_and_close_one_after_the_other() -> None:
    builder = _response()
    events = [*map(msgspec.to_builtins, builder.begin()), *_told(builder, STORY)]
    events += map(msgspec.to_builtins, builder.finish("tool_calls", Usage(3, 8, 5), 2))
    official: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
    for event in events:
        official.validate_python(event)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    kinds = [event["type"].removeprefix("response.") for event in events]
    part = ["content_part.done", "output_item.done"]
    assert kinds == [
        *("created", "in_progress"),
        *("output_item.added", "content_part.added", *["reasoning_text.delta"] * 2, "reasoning_text.done", *part),
        *("output_item.added", "content_part.added", *["output_text.delta"] * 2, "output_text.done", *part),
        *("output_item.added", *["function_call_arguments.delta"] * 2, "function_call_arguments.done"),
        *("output_item.done", "output_item.added", "function_call_arguments.delta"),
        *("function_call_arguments.done", "output_item.done", "completed"),
    ]
    assert [event["output_index"] for event in events if event["type"] == "response.output_item.done"] == [0, 1, 2, 3]
    response = Response.model_validate(msgspec.to_builtins(builder.response))
    assert [item.type for item in response.output] == ["reasoning", "message", "function_call", "function_call"]
    assert response.output_text == "Let me see." and response.status == "completed"
    calls = [
        {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Köln"}'}},
        {"id": "call_2", "type": "function", "function": {"name": "time", "arguments": "{}"}},
    ]
    assert builder.answer() == ChatMessage("assistant", "Let me see.", tool_calls=calls)


@pytest.mark.parametrize("reason, status", [("stop", "completed"), ("length", "incomplete"), ("abort", "incomplete")])
def test_response_that_says_nothing_has_an_empty_message(reason: str, status: str) -> None:
    builder = _response()
    builder.begin()
    builder.finish(reason, Usage(3, 3, 0), 2)
    response = Response.model_validate(msgspec.to_builtins(builder.response))
    assert response.output_text == "" and response.status == response.output[0].status == status  # type: ignore[union-attr]
    assert (response.incomplete_details is not None) == (reason == "length")


def test_failed_response_says_why_once_as_event_and_once_as_state() -> None:
    builder = _response()
    builder.begin()
    builder.say("Half")
    error, failed = (msgspec.to_builtins(event) for event in builder.fail(ApiError(503, "The server stopped.")))
    assert (error["type"], error["message"]) == ("error", "The server stopped.")
    assert failed["type"] == "response.failed" and failed["response"]["error"]["message"] == "The server stopped."
    assert failed["sequence_number"] == error["sequence_number"] + 1


def test_message_blocks_open_grow_and_close_one_after_the_other() -> None:
    builder = MessageBuilder(Message(id="msg_1", model="m", usage=USAGE))
    events = [*map(msgspec.to_builtins, builder.begin(USAGE)), *_told(builder, STORY)]
    events += map(msgspec.to_builtins, builder.finish("tool_calls", None, USAGE))
    assert [event["type"].removeprefix("content_block_") for event in events] == [
        *("message_start", "ping"),
        *("start", "delta", "delta", "stop") * 3,
        *("start", "delta", "stop"),
        *("message_delta", "message_stop"),
    ]
    indices = [event["index"] for event in events if "index" in event]
    assert indices == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 3
    assert builder.message.stop_reason == "tool_use"
    assert msgspec.to_builtins(builder.message)["content"] == [
        {"type": "thinking", "thinking": "Which city?", "signature": ""},
        {"type": "text", "text": "Let me see."},
        {"type": "tool_use", "id": "call_1", "name": "weather", "input": {"city": "Köln"}},
        {"type": "tool_use", "id": "call_2", "name": "time", "input": {}},
    ]
    deltas = [event["delta"] for event in events if event["type"] == "content_block_delta" and event["index"] == 2]
    assert json.loads("".join(delta["partial_json"] for delta in deltas)) == {"city": "Köln"}


def test_message_with_a_call_that_was_cut_off_is_still_a_message() -> None:
    builder = MessageBuilder(Message(id="msg_1", model="m", usage=USAGE))
    _told(builder, STORY[:6])
    builder.finish("length", None, USAGE)
    assert builder.message.stop_reason == "max_tokens"
    assert msgspec.to_builtins(builder.message.content[-1])["input"] == {}


@pytest.mark.parametrize(
    "reason, stopped_by, expected",
    [
        ("stop", None, ("end_turn", None)),
        ("stop", 7, ("end_turn", None)),
        ("stop", "END", ("stop_sequence", "END")),
        ("length", None, ("max_tokens", None)),
        ("context", None, ("model_context_window_exceeded", None)),
        ("tool_calls", None, ("tool_use", None)),
    ],
)
def test_stop_reasons(reason: str, stopped_by: int | str | None, expected: tuple[str, str | None]) -> None:
    builder = MessageBuilder(Message(id="msg_1", model="m", usage=USAGE))
    builder.finish(reason, stopped_by, USAGE)
    assert (builder.message.stop_reason, builder.message.stop_sequence) == expected
    assert msgspec.to_builtins(builder.message.content) == [{"type": "text", "text": ""}]
