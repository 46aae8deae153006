"""Grows a response from what the model says, thinks and calls, and tells every growth as events."""

from __future__ import annotations

import itertools

from fastllm.server.errors import ApiError
from fastllm.server.protocol import ChatMessage, TokenLogprob, Usage
from fastllm.server.responses_items import CallItem, Item, MessageItem, ReasoningItem
from fastllm.server.responses_protocol import (
    ErrorEvent,
    IncompleteDetails,
    InputTokensDetails,
    NumberedEvent,
    OutputCall,
    OutputMessage,
    OutputTokensDetails,
    ResponseError,
    ResponseEvent,
    ResponseObject,
    ResponseUsage,
)


class ResponseBuilder:
    """Owns one response: begin(); say(), think(), call() and argue() as the model goes on; finish() or fail().

    score() brings the log-probabilities of tokens before the text that they are part of.

    Events hold the response itself, so those of one call are to be encoded before the next call.
    """

    def __init__(self, response: ResponseObject) -> None:
        self.response = response
        self._item: Item | None = None  # the one that is being written
        self._scores: list[TokenLogprob] = []  # of text that is still held back
        self._numbers = itertools.count()

    def begin(self) -> list[NumberedEvent]:
        self.response.status = "in_progress"
        return self._numbered([self._told("created"), self._told("in_progress")])

    def score(self, logprobs: list[TokenLogprob]) -> None:
        self._scores += logprobs

    def say(self, text: str) -> list[NumberedEvent]:
        events: list[NumberedEvent] = []
        item = self._item
        if not isinstance(item, MessageItem):
            item = MessageItem(self._next_index())
            events += self._open(item)
        scores, self._scores = self._scores, []
        return self._numbered(events + item.add(text, scores))

    def think(self, text: str) -> list[NumberedEvent]:
        self._scores = []
        events: list[NumberedEvent] = []
        item = self._item
        if not isinstance(item, ReasoningItem):
            item = ReasoningItem(self._next_index())
            events += self._open(item)
        return self._numbered(events + item.add(text))

    def call(self, call_id: str, name: str) -> list[NumberedEvent]:
        """The model begins to call a function; its arguments follow."""
        return self._numbered(self._open(CallItem(self._next_index(), call_id, name)))

    def argue(self, arguments: str) -> list[NumberedEvent]:
        """More of the arguments of the call that began last."""
        assert isinstance(self._item, CallItem)
        self._scores = []
        return self._numbered(self._item.add(arguments))

    def finish(self, finish_reason: str | None, usage: Usage, now: int) -> list[NumberedEvent]:
        """`now` in unix seconds."""
        events: list[NumberedEvent] = []
        if self._item is None:  # nothing was said: an empty message
            events += self._open(MessageItem(0))
        if self._scores and isinstance(self._item, MessageItem):
            events += self.say("")  # tokens that end the answer and have no text
        cut = finish_reason not in ("stop", "tool_calls")
        status = "incomplete" if cut else "completed"
        events += self._close(status)
        self.response.usage = _usage(usage)
        self.response.status = status
        if finish_reason == "length":
            self.response.incomplete_details = IncompleteDetails("max_output_tokens")
        if not cut:
            self.response.completed_at = now
        return self._numbered([*events, self._told(status)])

    def fail(self, error: ApiError) -> list[NumberedEvent]:
        body = error.body
        code = "rate_limit_exceeded" if error.status == 429 else "server_error"
        self.response.status = "failed"
        self.response.error = ResponseError(code, body.message)
        event = ErrorEvent(type="error", code=body.code, message=body.message, param=body.param)
        return self._numbered([event, self._told("failed")])

    def answer(self) -> ChatMessage:
        """What was said and called, as the conversation remembers it."""
        texts: list[str] = []
        calls: list[dict[str, object]] = []
        for item in self.response.output:
            if isinstance(item, OutputMessage):
                texts += [part.text for part in item.content]
            elif isinstance(item, OutputCall):
                function = {"name": item.name, "arguments": item.arguments}
                calls.append({"id": item.call_id, "type": "function", "function": function})
        return ChatMessage("assistant", "".join(texts), tool_calls=calls or None)

    def _next_index(self) -> int:
        return len(self.response.output) + (self._item is not None)

    def _open(self, item: Item) -> list[NumberedEvent]:
        events = self._close("completed")
        self._item = item
        return events + item.opening()

    def _close(self, status: str) -> list[NumberedEvent]:
        if self._item is None:
            return []
        item, self._item = self._item, None
        self.response.output.append(item.output(status))
        return item.closing(status)

    def _told(self, what: str) -> ResponseEvent:
        return ResponseEvent(type=f"response.{what}", response=self.response)

    def _numbered(self, events: list[NumberedEvent]) -> list[NumberedEvent]:
        for event in events:
            event.sequence_number = next(self._numbers)
        return events


def _usage(usage: Usage) -> ResponseUsage:
    details, reasoning = usage.prompt_tokens_details, usage.completion_tokens_details
    return ResponseUsage(
        usage.prompt_tokens,
        InputTokensDetails(details.cached_tokens if details else 0),
        usage.completion_tokens,
        OutputTokensDetails(reasoning.reasoning_tokens if reasoning else 0),
        usage.total_tokens,
    )
