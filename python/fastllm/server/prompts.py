"""From text or messages to prompt tokens, on a worker thread where it could hold up the event loop."""

from __future__ import annotations

from typing import Any

import msgspec

from fastllm.outputs import TokenIds
from fastllm.server.admission import check_text_length, check_tokens, context_exceeded
from fastllm.server.elsewhere import worked
from fastllm.server.errors import bad_request
from fastllm.server.memory import return_free_blocks
from fastllm.server.protocol import ChatMessage, ChatRequest, TokenizeRequest
from fastllm.server.state import ServerState
from fastllm.server.template_kwargs import check_documents, check_template_kwargs, effort_variables
from fastllm.server.tools.prompt import spelled_out
from fastllm.server.tools.request import Tools, with_parsed_arguments
from fastllm.tokenizer import TooManyTokens

_MUCH_TEXT = 256 << 10  # characters, each of which may have been a token with several blocks of memory

ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function"})
HasMessages = ChatRequest | TokenizeRequest


async def encode_text(
    state: ServerState, text: str, add_special_tokens: bool, param: str, *, fits: bool = False
) -> list[int]:
    """fits: what leaves no room in the context is refused, before there is a list of its tokens."""
    check_text_length(state, len(text), param)
    long = len(text) > state.limits.inline_tokenize_chars
    try:
        return await worked(state, long, _encode, state, text, add_special_tokens, param, fits)
    except UnicodeEncodeError:
        raise bad_request(f"{param} contains characters that are no valid Unicode.", param, "invalid_unicode") from None


def _encode(state: ServerState, text: str, add_special_tokens: bool, param: str, fits: bool) -> list[int]:
    max_len = state.llm.model_config.max_model_len
    try:
        return state.llm.tokenizer.encode(text, add_special_tokens, max_len - 1 if fits else None)
    except TooManyTokens as exc:
        raise context_exceeded(max_len, exc.count, param) from None
    finally:
        if len(text) > _MUCH_TEXT:
            return_free_blocks()  # the allocator would tidy up whenever the event loop next frees something, for 20 ms


async def encode_prompt(
    state: ServerState, prompt: str | TokenIds, add_special_tokens: bool, truncate: int | None, room: int
) -> TokenIds:
    """One prompt of a completions call; for `truncate` and `room` see truncate_ids()."""
    if isinstance(prompt, str):
        ids: TokenIds = await encode_text(state, prompt, add_special_tokens, "prompt", fits=truncate is None)
    else:
        ids = prompt
    ids = truncate_ids(state, ids, truncate, room)
    check_tokens(state, ids, "prompt")
    return ids


def truncate_ids(state: ServerState, ids: TokenIds, truncate: int | None, room: int) -> TokenIds:
    """The last `truncate` tokens; -1: as many as leave `room` positions of the context for the output."""
    if truncate is None:
        return ids
    if truncate < -1 or truncate == 0:
        raise bad_request(f"truncate_prompt_tokens must be -1 or at least 1, got {truncate}.", "truncate_prompt_tokens")
    keep = max(1, state.llm.model_config.max_model_len - room) if truncate == -1 else truncate
    return ids[-keep:]


async def encode_messages(
    state: ServerState,
    request: HasMessages,
    add_special_tokens: bool,
    tools: Tools | None = None,
    *,
    fits: bool = False,
) -> tuple[str, list[int]]:
    """The rendered prompt and its tokens. tools: what the model may call. fits: as in encode_text()."""
    given = request.messages or []
    kwargs = request.chat_template_kwargs or {}
    check_template_kwargs(state, kwargs)
    check_documents(state, request.documents)
    variables = dict(kwargs) if request.documents is None else {**kwargs, "documents": request.documents}
    continue_final = bool(request.continue_final_message)
    if request.add_generation_prompt is None:
        add_generation_prompt = not continue_final
    else:
        add_generation_prompt = request.add_generation_prompt
    if continue_final and given[-1].role != "assistant":
        raise bad_request("continue_final_message needs a last message of the assistant.", "continue_final_message")
    tokenizer = state.llm.tokenizer
    if isinstance(request, ChatRequest) and request.reasoning_effort is not None:
        variables = effort_variables(request.reasoning_effort) | variables

    def render_and_encode() -> tuple[str, list[int]]:
        messages = [_for_template(message, index) for index, message in enumerate(given)]
        check_text_length(state, sum(len(message["content"] or "") for message in messages), "messages")
        in_template = state.dialect.tools_in_template
        if not in_template:
            messages = spelled_out(messages, tools, state.dialect.system_in_template)
        text = tokenizer.apply_chat_template(
            messages,
            add_generation_prompt=add_generation_prompt,
            tools=tools.tools if tools is not None and in_template else None,
            continue_final_message=continue_final,
            chat_template=state.llm.model_config.chat_template,
            **variables,
        )
        check_text_length(state, len(text), "messages")
        return text, _encode(state, text, add_special_tokens, "messages", fits)

    try:
        return await worked(state, True, render_and_encode)
    except UnicodeEncodeError:
        raise bad_request("messages contain characters that are no valid Unicode.", "messages") from None
    except (ValueError, TypeError, RecursionError) as exc:
        raise bad_request(str(exc), "messages") from None


def _for_template(message: ChatMessage, index: int) -> dict[str, Any]:
    if message.role not in ROLES:
        allowed = ", ".join(sorted(ROLES))
        raise bad_request(f"messages[{index}].role must be one of {allowed}, got {message.role[:40]!r}.", "messages")
    content = message.content
    if isinstance(content, list):
        texts: list[str] = []
        for number, part in enumerate(content):
            if part.type != "text" or part.text is None:
                raise bad_request(
                    f"messages[{index}].content[{number}] must be a text part ({{'type': 'text', 'text': ...}}), got "
                    f"type {part.type[:40]!r}; this model only reads text.",
                    "messages",
                )
            texts.append(part.text)
        content = "\n".join(texts)
    elif content is None and not (message.role == "assistant" and message.tool_calls):
        raise bad_request(f"messages[{index}].content must be a string or a list of text parts.", "messages")
    result: dict[str, Any] = msgspec.to_builtins(message)
    result["content"] = content or ""
    if message.tool_calls:
        result["tool_calls"] = with_parsed_arguments(message.tool_calls, f"messages[{index}]")
    return result


async def prompt_text(state: ServerState, prompt: str | TokenIds) -> str:
    """What `echo` repeats."""
    if isinstance(prompt, str):
        return prompt
    long = len(prompt) > state.limits.inline_tokenize_chars
    return await worked(state, long, state.llm.tokenizer.decode, prompt, skip_special_tokens=False)
