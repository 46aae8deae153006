"""Grows a message from what the model says, thinks and calls, and tells every growth as events."""

from __future__ import annotations

import msgspec

from fastllm.server.messages_protocol import (
    BlockDelta,
    BlockStart,
    BlockStop,
    ContentBlock,
    InputDelta,
    Message,
    MessageDelta,
    MessageStart,
    MessageUsage,
    StopDelta,
    TextBlock,
    TextDelta,
    ThinkingBlock,
    ThinkingDelta,
    ToolUseBlock,
)
from fastllm.server.protocol import TypedEvent

_STOP_REASONS = {"length": "max_tokens", "context": "model_context_window_exceeded", "tool_calls": "tool_use"}


class MessageBuilder:
    """Owns one message: begin(); say(), think(), call() and argue() as the model goes on; finish().

    Events hold the message itself, so those of one call are to be encoded before the next call.
    """

    def __init__(self, message: Message) -> None:
        self.message = message
        self._block: ContentBlock | None = None  # the one that is being written, without its text
        self._pieces: list[str] = []

    def begin(self, usage: MessageUsage) -> list[TypedEvent]:
        self.message.usage = usage
        return [MessageStart(type="message_start", message=self.message), TypedEvent(type="ping")]

    def say(self, text: str) -> list[TypedEvent]:
        events = [] if isinstance(self._block, TextBlock) else self._open(TextBlock(""))
        return events + self._grow(text, TextDelta(text))

    def think(self, text: str) -> list[TypedEvent]:
        events = [] if isinstance(self._block, ThinkingBlock) else self._open(ThinkingBlock(""))
        return events + self._grow(text, ThinkingDelta(text))

    def call(self, call_id: str, name: str) -> list[TypedEvent]:
        """The model begins to call a function; its arguments follow."""
        return self._open(ToolUseBlock(call_id, name, {}))

    def argue(self, arguments: str) -> list[TypedEvent]:
        """More of the arguments of the call that began last."""
        assert isinstance(self._block, ToolUseBlock)
        return self._grow(arguments, InputDelta(arguments))

    def finish(self, reason: str | None, stopped_by: int | str | None, usage: MessageUsage) -> list[TypedEvent]:
        """`reason`: chat's, or "context" when the context ended before the caller's limit."""
        events = self._open(TextBlock("")) if self._block is None else []
        events += self._close()
        stop = StopDelta(_STOP_REASONS.get(reason or "", "end_turn"), None)
        if reason == "stop" and isinstance(stopped_by, str):
            stop = StopDelta("stop_sequence", stopped_by)
        self.message.stop_reason, self.message.stop_sequence = stop.stop_reason, stop.stop_sequence
        self.message.usage = usage
        return [*events, MessageDelta(type="message_delta", delta=stop, usage=usage), TypedEvent(type="message_stop")]

    def _open(self, block: ContentBlock) -> list[TypedEvent]:
        events = self._close()
        self._block = block
        return [*events, BlockStart(type="content_block_start", index=len(self.message.content), content_block=block)]

    def _grow(self, text: str, delta: TextDelta | ThinkingDelta | InputDelta) -> list[TypedEvent]:
        self._pieces.append(text)
        return [BlockDelta(type="content_block_delta", index=len(self.message.content), delta=delta)]

    def _close(self) -> list[TypedEvent]:
        if self._block is None:
            return []
        block, self._block = self._block, None
        written = "".join(self._pieces)
        self._pieces.clear()
        if isinstance(block, TextBlock):
            block = TextBlock(written)
        elif isinstance(block, ThinkingBlock):
            block = ThinkingBlock(written)
        else:
            block = ToolUseBlock(block.id, block.name, _input(written))
        self.message.content.append(block)
        return [BlockStop(type="content_block_stop", index=len(self.message.content) - 1)]


def _input(arguments: str) -> dict[str, object]:
    """Nothing for arguments that the limit cut off: they are no JSON."""
    try:
        return msgspec.json.decode(arguments, type=dict[str, object])
    except (msgspec.MsgspecError, RecursionError):
        return {}
