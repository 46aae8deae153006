"""The wire types of /v1/messages. Requests: Anthropic's fields over those that all generation shares."""

from __future__ import annotations

from typing import Any

from msgspec import Struct, field

from fastllm.server.protocol import CommonRequest, TypedEvent

# ---- requests


class Block(Struct):
    """One block of content; which fields count depends on the type."""

    type: str
    text: str | None = None
    thinking: str | None = None
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None
    tool_use_id: str | None = None
    content: str | list[Block] | None = None


class MessageParam(Struct):
    role: str
    content: str | list[Block]


class ToolParam(Struct):
    name: str
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    type: str | None = None
    strict: bool | None = None


class ToolChoice(Struct):
    type: str
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class OutputFormat(Struct):
    type: str
    schema: dict[str, Any] | None = None


class OutputConfig(Struct):
    effort: str | None = None
    format: OutputFormat | None = None


class Thinking(Struct):
    type: str
    budget_tokens: int | None = None


class Metadata(Struct):
    user_id: str | None = None


class MessagesRequest(CommonRequest, kw_only=True):
    messages: list[MessageParam]
    system: str | list[Block] | None = None
    stop_sequences: list[str] | None = None
    metadata: Metadata | None = None
    tools: list[ToolParam] | None = None
    tool_choice: ToolChoice | None = None
    output_config: OutputConfig | None = None
    thinking: Thinking | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    service_tier: str | None = None
    context_management: Any = None  # without effect: what the context holds is the caller's to clear
    # Refused by name when set.
    container: Any = None
    mcp_servers: Any = None


# ---- answers


class TextBlock(Struct):
    text: str
    type: str = "text"


class ThinkingBlock(Struct):
    thinking: str
    type: str = "thinking"
    signature: str = ""


class ToolUseBlock(Struct):
    id: str
    name: str
    input: dict[str, Any]
    type: str = "tool_use"


ContentBlock = TextBlock | ThinkingBlock | ToolUseBlock


class MessageUsage(Struct):
    input_tokens: int  # without the cached ones
    output_tokens: int
    cache_read_input_tokens: int
    cache_creation_input_tokens: int = 0


class Message(Struct, kw_only=True):
    id: str
    type: str = "message"
    role: str = "assistant"
    model: str
    content: list[ContentBlock] = field(default_factory=list)
    stop_reason: str | None = None
    stop_sequence: str | None = None
    usage: MessageUsage


class TokensCount(Struct):
    input_tokens: int


# ---- events


class MessageStart(TypedEvent, kw_only=True):
    message: Message


class BlockStart(TypedEvent, kw_only=True):
    index: int
    content_block: ContentBlock


class TextDelta(Struct):
    text: str
    type: str = "text_delta"


class ThinkingDelta(Struct):
    thinking: str
    type: str = "thinking_delta"


class InputDelta(Struct):
    partial_json: str
    type: str = "input_json_delta"


class BlockDelta(TypedEvent, kw_only=True):
    index: int
    delta: TextDelta | ThinkingDelta | InputDelta


class BlockStop(TypedEvent, kw_only=True):
    index: int


class StopDelta(Struct):
    stop_reason: str | None
    stop_sequence: str | None


class MessageDelta(TypedEvent, kw_only=True):
    delta: StopDelta
    usage: MessageUsage
