"""The wire types of /v1/responses. Requests: OpenAI's fields over those that all generation shares."""

from __future__ import annotations

from typing import Any

from msgspec import Struct, field

from fastllm.server.protocol import CommonRequest, TokenLogprob, TypedEvent

# ---- requests


class InputPart(Struct):
    type: str
    text: str | None = None
    refusal: str | None = None


class InputItem(Struct, kw_only=True, omit_defaults=True):
    """A message, or what a tool call left in the conversation; which fields count depends on the type."""

    type: str = "message"
    id: str | None = None
    role: str | None = None
    content: str | list[InputPart] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | list[InputPart] | None = None


class TextFormat(Struct, omit_defaults=True):
    type: str
    name: str | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None
    description: str | None = None


class TextConfig(Struct, omit_defaults=True):
    format: TextFormat | None = None
    verbosity: str | None = None


class ReasoningConfig(Struct):
    effort: str | None = None
    summary: str | None = None


class FunctionTool(Struct, omit_defaults=True):
    type: str
    name: str | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ResponsesRequest(CommonRequest, kw_only=True):
    input: str | list[InputItem]
    instructions: str | None = None
    max_output_tokens: int | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    background: bool | None = None
    metadata: dict[str, str] | None = None
    include: list[str] | None = None
    top_logprobs: int | None = None
    text: TextConfig | None = None
    reasoning: ReasoningConfig | None = None
    tools: list[FunctionTool] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    truncation: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    # Said about the request, without effect on the answer.
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    service_tier: str | None = None
    # Refused by name when set.
    conversation: Any = None
    prompt: Any = None
    max_tool_calls: int | None = None
    moderation: Any = None
    context_management: Any = None


# ---- answers


class OutputText(Struct):
    text: str
    logprobs: list[TokenLogprob] = field(default_factory=list)
    annotations: list[None] = field(default_factory=list)
    type: str = "output_text"


class OutputMessage(Struct):
    id: str
    status: str
    content: list[OutputText]
    role: str = "assistant"
    type: str = "message"


class ReasoningText(Struct):
    text: str
    type: str = "reasoning_text"


class OutputReasoning(Struct):
    """What the model thought before it answered."""

    id: str
    status: str
    content: list[ReasoningText]
    summary: list[None] = field(default_factory=list)
    type: str = "reasoning"


class OutputCall(Struct):
    id: str
    status: str
    call_id: str
    name: str
    arguments: str  # JSON, as the model wrote it
    type: str = "function_call"


OutputItem = OutputMessage | OutputReasoning | OutputCall


class InputTokensDetails(Struct):
    cached_tokens: int
    cache_write_tokens: int = 0


class OutputTokensDetails(Struct):
    reasoning_tokens: int = 0


class ResponseUsage(Struct):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class IncompleteDetails(Struct):
    reason: str


class ResponseError(Struct):
    code: str
    message: str


class ResponseObject(Struct, kw_only=True):
    id: str
    created_at: int  # unix seconds
    model: str
    status: str
    object: str = "response"
    background: bool = False
    completed_at: int | None = None
    error: ResponseError | None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    metadata: dict[str, str] = field(default_factory=dict)
    output: list[OutputItem] = field(default_factory=list)
    parallel_tool_calls: bool = True
    previous_response_id: str | None = None
    reasoning: ReasoningConfig = field(default_factory=ReasoningConfig)
    service_tier: str = "default"
    store: bool
    temperature: float
    text: TextConfig
    tool_choice: str | dict[str, Any] = "auto"
    tools: list[FunctionTool] = field(default_factory=list)
    top_logprobs: int = 0
    top_p: float
    truncation: str = "disabled"
    usage: ResponseUsage | None = None
    user: str | None = None


class DeletedResponse(Struct):
    id: str
    object: str = "response"
    deleted: bool = True


class ItemList(Struct):
    data: list[dict[str, Any]]
    first_id: str | None
    last_id: str | None
    has_more: bool
    object: str = "list"


class InputTokens(Struct):
    input_tokens: int
    object: str = "response.input_tokens"


# ---- events


class NumberedEvent(TypedEvent, kw_only=True):
    sequence_number: int = -1  # until it is sent


class ResponseEvent(NumberedEvent, kw_only=True):
    response: ResponseObject


class ItemEvent(NumberedEvent, kw_only=True):
    output_index: int
    item: OutputItem


class CallDeltaEvent(NumberedEvent, kw_only=True):
    item_id: str
    output_index: int
    delta: str


class CallDoneEvent(NumberedEvent, kw_only=True):
    item_id: str
    output_index: int
    name: str
    arguments: str


class _InPart(NumberedEvent, kw_only=True):
    item_id: str
    output_index: int
    content_index: int = 0


class PartEvent(_InPart, kw_only=True):
    part: OutputText | ReasoningText


class ReasoningDeltaEvent(_InPart, kw_only=True):
    delta: str


class ReasoningDoneEvent(_InPart, kw_only=True):
    text: str


class TextDeltaEvent(_InPart, kw_only=True):
    delta: str
    logprobs: list[TokenLogprob]


class TextDoneEvent(_InPart, kw_only=True):
    text: str
    logprobs: list[TokenLogprob]


class ErrorEvent(NumberedEvent, kw_only=True):
    code: str | None
    message: str
    param: str | None
