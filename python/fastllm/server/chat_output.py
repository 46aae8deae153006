"""One sample of a chat answer: its text becomes reasoning, content and tool calls, at once or as deltas."""

from __future__ import annotations

import secrets
import string
from collections.abc import Callable, Sequence

from msgspec import UNSET

from fastllm.server.protocol import AssistantMessage, Delta, FunctionCall, FunctionDelta, ToolCall, ToolCallDelta
from fastllm.server.reasoning import ReasoningCounter, ReasoningParser
from fastllm.server.tools.events import CallArguments, CallStart, Event, Text
from fastllm.server.tools.parsers import ToolParser

_ALPHANUMERIC = string.ascii_letters + string.digits


def new_call_id(length: int) -> str:
    """length: characters, of letters and digits alone; 0 for the usual form."""
    if length:
        return "".join(secrets.choice(_ALPHANUMERIC) for _ in range(length))
    return f"call_{secrets.token_hex(12)}"


class ChatOutput:
    """Owned by one sample of a request. read() every update in order.

    called: it made a tool call. Without parsers text is content as it comes.
    """

    def __init__(
        self,
        tools: ToolParser | None = None,
        reasoning: ReasoningParser | None = None,
        *,
        show_reasoning: bool = True,
        max_calls: int | None = None,
        call_id_length: int = 0,
        reasoning_end_id: int | None = None,
    ) -> None:
        self._tools = tools
        self._reasoning = reasoning
        self._show_reasoning = show_reasoning
        self._max_calls = max_calls
        self._new_id: Callable[[], str] = lambda: new_call_id(call_id_length)
        self._counter = ReasoningCounter(reasoning_end_id)
        self.called = False

    @property
    def reasoning_tokens(self) -> int | None:
        """None for models that do not reason."""
        return None if self._reasoning is None else self._counter.tokens

    def read(self, text: str, token_ids: Sequence[int], finished: bool) -> list[Delta]:
        """What an update adds, in order."""
        deltas: list[Delta] = []
        if self._reasoning is None:
            self._read_content(text, finished, deltas)
            return deltas
        was_thinking = self._reasoning.thinking
        pieces = self._reasoning.feed(text)
        if finished:
            pieces += self._reasoning.finish()
        self._counter.add(token_ids, was_thinking, self._reasoning)
        for piece in pieces:
            if not piece.is_reasoning:
                self._read_content(piece.text, False, deltas)
            elif self._show_reasoning:
                deltas.append(Delta(reasoning=piece.text, reasoning_content=piece.text))
        if finished:
            self._read_content("", True, deltas)
        return deltas

    def _read_content(self, text: str, finished: bool, deltas: list[Delta]) -> None:
        if self._tools is None:
            if text:
                deltas.append(Delta(content=text))
            return
        events: list[Event] = self._tools.feed(text) if text else []
        if finished:
            events += self._tools.finish()
        for event in events:
            if isinstance(event, Text):
                deltas.append(Delta(content=event.text))
            elif self._max_calls is not None and event.index >= self._max_calls:
                continue  # the request wants no parallel calls
            elif isinstance(event, CallStart):
                self.called = True
                call = ToolCallDelta(event.index, self._new_id(), "function", FunctionDelta(event.name, ""))
                deltas.append(Delta(tool_calls=[call]))
            elif isinstance(event, CallArguments):
                deltas.append(Delta(tool_calls=[ToolCallDelta(event.index, function=FunctionDelta(UNSET, event.text))]))


def message_of(role: str, deltas: Sequence[Delta]) -> AssistantMessage:
    """The whole answer that the deltas add up to."""
    content: list[str] = []
    reasoning: list[str] = []
    calls: list[ToolCall] = []
    for delta in deltas:
        if isinstance(delta.content, str):
            content.append(delta.content)
        if isinstance(delta.reasoning, str):
            reasoning.append(delta.reasoning)
        for call in delta.tool_calls or ():
            if isinstance(call.id, str) and call.function and isinstance(call.function.name, str):
                calls.append(ToolCall(call.id, FunctionCall(call.function.name, "")))
            elif call.function and isinstance(call.function.arguments, str):
                calls[-1].function.arguments += call.function.arguments
    message = AssistantMessage(role, "".join(content))
    if calls:
        message.content = message.content or None
        message.tool_calls = calls
    if reasoning:
        message.reasoning = message.reasoning_content = "".join(reasoning)
    return message
