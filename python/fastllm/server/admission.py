"""Decides whether a request is served, before anything is allocated for it.

The order of refusal: draining, key, the key's limits, loading, unknown model, fields we cannot honour, sizes, queue
full; after tokenising the lengths against the context, what the request costs, and the wait that can be foreseen. Every
function is O(size of the request) and has no side effects but the counts of refusals.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from msgspec import Struct

from fastllm import _core
from fastllm.outputs import TokenIds
from fastllm.server.call import current_call
from fastllm.server.cost import BYTES_PER_TOKEN, Cost
from fastllm.server.errors import ApiError, bad_request
from fastllm.server.limits import Limits
from fastllm.server.protocol import ChatRequest, CommonRequest, CompletionRequest
from fastllm.server.state import Phase, ServerState

_INT64_MAX = (1 << 63) - 1

# Field -> why it is refused when it is set to anything but null, false or its neutral value.
UNSUPPORTED: dict[str, str] = {
    "logits_processors": "logits processors over HTTP",
    "logprob_token_ids": "log-probabilities of chosen tokens",
    "prompt_embeds": "prompt embeddings",
    "kv_transfer_params": "KV transfer",
    "suffix": "a suffix (fill in the middle)",
    "audio": "audio",
}


def check_open(state: ServerState) -> None:
    """The server takes requests at all."""
    if state.phase is Phase.DRAINING:
        raise ApiError(503, "The server is shutting down; send the request elsewhere.", code="draining", retry_after=5)
    if not state.llm.healthy:
        raise ApiError(503, "The engine has stopped after a fault.", code="engine_unhealthy", retry_after=10)
    if state.memory.short:
        raise ApiError(503, "The server is short of memory; try again later.", code="memory_low", retry_after=5)


def check_queue(state: ServerState, sequences: int) -> None:
    """Before tokenising: sequences by number, tokens by the size of the body."""
    config = state.llm.engine_config
    call = current_call()
    limit = config.max_num_seqs + state.limits.waiting_limit(config.max_num_seqs)
    if state.active_sequences and state.active_sequences + sequences > limit:
        _count(state, "max_num_queued_reqs")
        raise ApiError(
            429,
            f"The server is busy: {state.active_sequences} sequences are running or waiting and the limit is {limit}. "
            "Try again later.",
            code="queue_full",
            retry_after=state.gate.retry_after(call.client),
        )
    _check_waiting_tokens(state, call.body_bytes // BYTES_PER_TOKEN)
    _check_wait(state)


def _check_waiting_tokens(state: ServerState, tokens: int) -> None:
    """A request that need not wait is never too long for the queue."""
    config = state.llm.engine_config
    limit = state.limits.waiting_tokens_limit(config.max_num_seqs, config.max_model_len)
    if state.gate.waiting_tokens and state.gate.waiting_tokens + tokens > limit:
        _count(state, "max_num_queued_tokens")
        raise ApiError(
            429,
            f"The server is busy: {state.gate.waiting_tokens} prompt tokens are waiting and the limit is {limit}. "
            "Try again later.",
            code="queue_full",
            retry_after=state.gate.retry_after(current_call().client),
        )


def _check_wait(state: ServerState) -> None:
    """A wait that would end in a refusal is refused at once."""
    client = current_call().client
    limit, expected = state.limits.max_waiting_time_s, state.gate.predicted_wait(client)
    if limit and expected > limit:
        _count(state, "queue_time")
        raise ApiError(
            503,
            f"The server is busy: a start is expected in {expected:.0f} s and the limit is {limit:g} s.",
            code="queue_timeout",
            retry_after=state.gate.retry_after(client),
        )


def check_cost(state: ServerState, cost: Cost) -> None:
    """The last check before the engine: what the call will hold while it runs, and what its key may still use."""
    config = state.llm.engine_config
    pool = config.num_blocks
    if cost.largest_prompt_blocks > pool:
        raise bad_request(
            f"The longest prompt needs {cost.largest_prompt_blocks} KV blocks of {config.block_size} tokens, but the "
            f"KV cache has {pool}. Please reduce its length.",
            "prompt",
            "context_length_exceeded",
        )
    if cost.logprob_cells > state.limits.max_logprob_cells:
        raise bad_request(
            f"This request asks for up to {cost.logprob_cells} log-probabilities; the limit is "
            f"{state.limits.max_logprob_cells}. Lower logprobs, prompt_logprobs, n or max_tokens.",
            "logprobs",
        )
    _check_waiting_tokens(state, cost.prompt_tokens)
    _check_wait(state)
    current_call().client.check_tokens(cost.prompt_tokens)


def _count(state: ServerState, reason: str) -> None:
    if state.metrics is not None:
        state.metrics.rejected(reason)


def check_model(state: ServerState, name: str | None) -> None:
    names = state.model_names
    if name is None:
        name = names[0]
    if name in names:
        if not current_call().client.may_use(name):
            raise ApiError(
                403, f"This API key may not use the model `{name}`.", param="model", code="model_not_allowed"
            )
        return
    if not name:
        raise bad_request("model must not be empty.", "model")
    raise ApiError(
        404,
        f"The model `{name[:100]}` does not exist. Valid names: {', '.join(names)}.",
        param="model",
        code="model_not_found",
    )


def refuse_set_fields(request: Struct, unsupported: Mapping[str, str]) -> None:
    """Refuses the first of these fields that asks for something. `unsupported`: name -> what it would be."""
    for name, what in unsupported.items():
        value = getattr(request, name, None)
        if value is not None and value is not False:
            raise bad_request(f"{name}: this server does not support {what} yet.", name, "unsupported_parameter")


def check_fields(request: CommonRequest, limits: Limits) -> None:
    """Fields that are known and cannot be honoured, and the sizes of the ones that can."""
    refuse_set_fields(request, UNSUPPORTED)
    if request.stream_options is not None and not request.stream:
        raise bad_request("stream_options can only be set when stream is true.", "stream_options")
    _check_sizes(request, limits)
    if isinstance(request, ChatRequest):
        _check_chat(request, limits)


def _check_sizes(request: CommonRequest, limits: Limits) -> None:
    n = 1 if request.n is None else request.n
    if not 1 <= n <= limits.max_n:
        bound = "at least 1" if n < 1 else f"at most {limits.max_n}"
        raise bad_request(f"n must be {bound}, got {n}.", "n")
    if request.best_of is not None and not n <= request.best_of <= limits.max_n:
        bound = f"at least n ({n})" if request.best_of < n else f"at most {limits.max_n}"
        raise bad_request(f"best_of must be {bound}, got {request.best_of}.", "best_of")
    if request.best_of not in (None, n) and request.stream and not request.use_beam_search:
        raise bad_request("best_of above n cannot be streamed: which samples are best is known at the end.", "best_of")
    stops = [request.stop] if isinstance(request.stop, str) else request.stop or []
    if len(stops) > limits.max_stop_strings:
        raise bad_request(f"stop takes at most {limits.max_stop_strings} strings, got {len(stops)}.", "stop")
    if any(not stop for stop in stops):
        raise bad_request("stop cannot contain an empty string.", "stop")
    if any(len(stop.encode()) > limits.max_stop_bytes for stop in stops):
        raise bad_request(f"A stop string takes at most {limits.max_stop_bytes} bytes.", "stop")
    _check_length("stop_token_ids", request.stop_token_ids, limits.max_stop_token_ids)
    _check_length("logit_bias", request.logit_bias, limits.max_logit_bias)
    _check_length("bad_words", request.bad_words, limits.max_bad_words)
    if any(len(word) > limits.max_bad_word_chars for word in request.bad_words or ()):
        raise bad_request(f"A bad word takes at most {limits.max_bad_word_chars} characters.", "bad_words")
    _check_length("allowed_token_ids", request.allowed_token_ids, limits.max_allowed_token_ids)
    for name in ("seed", "priority", "max_tokens", "min_tokens", "top_k", "prompt_logprobs", "truncate_prompt_tokens"):
        value = getattr(request, name)
        if value is not None and abs(value) > _INT64_MAX:
            raise bad_request(f"{name} must fit in 64 bits, got {str(value)[:40]}.", name)
    if request.priority is not None and not -(1 << 31) <= request.priority < (1 << 31):
        raise bad_request(f"priority must fit in 32 bits, got {request.priority}.", "priority")
    if request.cache_salt is not None and not request.cache_salt:
        raise bad_request("cache_salt must not be empty.", "cache_salt")


def _check_length(name: str, value: Sequence[Any] | dict[str, Any] | None, limit: int) -> None:
    if value is not None and len(value) > limit:
        raise bad_request(f"{name} takes at most {limit} entries, got {len(value)}.", name)


def _check_chat(request: ChatRequest, limits: Limits) -> None:
    if not request.messages:
        raise bad_request("messages must contain at least one message.", "messages")
    _check_length("messages", request.messages, limits.max_messages)
    _check_length("documents", request.documents, limits.max_messages)
    for name, instead in (("functions", "tools"), ("function_call", "tool_choice")):
        if getattr(request, name) is not None:
            raise bad_request(f"{name} is not supported; send {instead} instead.", name, "unsupported_parameter")
    if request.modalities not in (None, ["text"]):
        raise bad_request("modalities: this server only produces text.", "modalities", "unsupported_parameter")
    if request.chat_template is not None:
        raise bad_request("chat_template cannot be set by a request.", "chat_template", "not_allowed")
    if request.echo:
        raise bad_request("echo is only supported by /v1/completions.", "echo", "unsupported_parameter")
    if request.top_logprobs is not None and request.top_logprobs and not request.logprobs:
        raise bad_request("When using top_logprobs, logprobs must be set to true.", "top_logprobs")
    both = request.max_tokens is not None and request.max_completion_tokens is not None
    if both and request.max_tokens != request.max_completion_tokens:
        raise bad_request("max_tokens and max_completion_tokens differ; send one of them.", "max_completion_tokens")
    if request.continue_final_message and request.add_generation_prompt:
        raise bad_request(
            "continue_final_message and add_generation_prompt cannot both be true.", "continue_final_message"
        )


def split_prompts(request: CompletionRequest, limits: Limits) -> list[str | TokenIds]:
    """The prompts of a completions call: one string, one list of token ids, or a list of either."""
    prompt: Any = request.prompt
    if prompt is None or prompt == "":
        raise bad_request("prompt must be given and must not be empty.", "prompt")
    if isinstance(prompt, str | memoryview):
        return [prompt]
    kinds = {list if one is memoryview else one for one in map(type, prompt)}
    if not kinds:
        raise bad_request("prompt must contain at least one prompt.", "prompt")
    if len(kinds) > 1:
        raise bad_request("prompt must be strings or token ids, not a mixture.", "prompt")
    if kinds == {int}:
        return [prompt]
    if len(prompt) > limits.max_prompts:
        raise bad_request(f"prompt takes at most {limits.max_prompts} prompts, got {len(prompt)}.", "prompt")
    if not all(prompt):
        raise bad_request("prompt must not contain an empty prompt.", "prompt")
    return list(prompt)


def check_sequences(num_prompts: int, request: CommonRequest, limits: Limits) -> int:
    """The sequences that will run."""
    n = request.best_of or request.n or 1
    sequences = num_prompts * n
    if sequences > limits.max_sequences:
        raise bad_request(
            f"n * prompts must be at most {limits.max_sequences}, got {n} * {num_prompts} = {sequences}.", "n"
        )
    return sequences


def check_priority(state: ServerState, priority: int | None) -> None:
    if priority and state.llm.engine_config.policy != "priority":
        raise bad_request(
            f"priority must be 0 or left out, got {priority}: this server runs requests in the order they came "
            "(--scheduling-policy priority changes that).",
            "priority",
        )


def check_text_length(state: ServerState, chars: int, param: str) -> None:
    """Refuses text that cannot fit before it is tokenised."""
    max_len = state.llm.model_config.max_model_len
    if chars > state.limits.max_prompt_chars(max_len):
        raise bad_request(
            f"This model's maximum context length is {max_len} tokens. However, your prompt has {chars} characters, "
            "which cannot fit. Please reduce its length.",
            param,
            "context_length_exceeded",
        )


def check_tokens(state: ServerState, ids: TokenIds, param: str) -> None:
    vocab = state.llm.model_config.vocab_size
    if not ids:
        raise bad_request(f"{param} is empty after tokenising.", param)
    outside = _core.first_outside(ids, vocab)
    if outside is not None:
        raise bad_request(f"Token id {str(ids[outside])[:40]} is out of vocabulary: 0 <= id < {vocab}.", param)


def context_exceeded(max_len: int, num_prompt: int, param: str) -> ApiError:
    return bad_request(
        f"This model's maximum context length is {max_len} tokens. However, your prompt contains {num_prompt} "
        "input tokens, which leaves no room for output. Please reduce the length of the input prompt.",
        param,
        "context_length_exceeded",
    )


def resolve_max_tokens(
    state: ServerState, num_prompt: int, requested: int | None, default: int | None, param: str, limit_name: str
) -> int:
    """Output tokens this prompt may get; `default` None means the rest of the context.

    `param` and `limit_name` are the fields that carry the prompt and the limit, for errors.
    """
    max_len = state.llm.model_config.max_model_len
    if num_prompt >= max_len:
        raise context_exceeded(max_len, num_prompt, param)
    room = max_len - num_prompt
    if requested is None:
        return room if default is None else min(default, room)
    if requested < 1:
        raise bad_request(f"{limit_name} must be at least 1, got {requested}.", limit_name)
    if requested > room:
        raise bad_request(
            f"This model's maximum context length is {max_len} tokens. However, you requested {num_prompt + requested} "
            f"tokens ({num_prompt} in the prompt, {requested} in the completion). Please reduce the length of the "
            "prompt or of the completion.",
            limit_name,
            "context_length_exceeded",
        )
    return requested
