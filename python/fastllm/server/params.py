"""From request fields to SamplingParams, over the defaults of the model's generation_config."""

from __future__ import annotations

from typing import Any

from fastllm.outputs import RequestOutputKind
from fastllm.sampling import SamplingParams
from fastllm.server.admission import resolve_max_tokens
from fastllm.server.body import field_names
from fastllm.server.errors import bad_request, from_value_error
from fastllm.server.protocol import ChatRequest, CommonRequest, CompletionRequest
from fastllm.server.state import ServerState

MAX_TEMPERATURE = 2.0  # OpenAI's
COMPLETION_MAX_TOKENS = 16  # OpenAI's default for /v1/completions

# Fields whose name and meaning are the same in the request and in SamplingParams.
_SAME_NAME = (
    "n",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "min_tokens",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "include_stop_str_in_output",
    "prompt_logprobs",
    "best_of",
    "use_beam_search",
    "length_penalty",
    "early_stopping",
    "bad_words",
    "allowed_token_ids",
)
_FROM_GENERATION_CONFIG = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def sampling_params(state: ServerState, request: CommonRequest, num_prompt: int, param: str) -> SamplingParams:
    """`num_prompt` tokens long is the prompt these are for; `param` names it in errors."""
    defaults = state.llm.model_config.generation_config
    fields: dict[str, Any] = {name: defaults[name] for name in _FROM_GENERATION_CONFIG if name in defaults}
    if request.use_beam_search:  # compares raw log-probabilities
        fields = {"temperature": 0.0}
    for name in _SAME_NAME:
        value = getattr(request, name)
        if value is not None:
            fields[name] = value
    if request.logit_bias:
        fields["logit_bias"] = _logit_bias(request.logit_bias)
    _logprobs(state, request, fields)
    if fields.get("top_k", 0) > state.llm.model_config.vocab_size:
        fields["top_k"] = 0  # every token: the same as off
    limit_name, requested = "max_tokens", request.max_tokens
    default: int | None = COMPLETION_MAX_TOKENS
    if isinstance(request, ChatRequest):
        if request.max_completion_tokens is not None:
            limit_name, requested = "max_completion_tokens", request.max_completion_tokens
        default = defaults.get("max_tokens")
    elif isinstance(request, CompletionRequest) and request.echo and requested == 0:
        requested = 1  # the prompt alone: the engine's one token is dropped again
    fields["max_tokens"] = resolve_max_tokens(state, num_prompt, requested, default, param, limit_name)
    fields["output_kind"] = RequestOutputKind.DELTA if request.stream else RequestOutputKind.FINAL_ONLY
    config = state.llm.model_config
    if request.temperature is not None and request.temperature > MAX_TEMPERATURE:
        raise bad_request(f"temperature must be in [0, 2], got {request.temperature}.", "temperature")
    try:
        params = SamplingParams(**fields)
        params.check_model(
            vocab_size=config.vocab_size,
            max_logprobs=state.llm.engine_config.max_logprobs,
            num_eos=len(config.eos_token_ids),
        )
        return params
    except ValueError as exc:
        raise from_value_error(exc, field_names(type(request))) from None


def output_room(request: CommonRequest) -> int:
    """Tokens that a prompt cut to fit leaves for the output."""
    limit = request.max_tokens
    if isinstance(request, ChatRequest):
        return max(request.max_completion_tokens or limit or 1, 1)
    return COMPLETION_MAX_TOKENS if limit is None else max(limit, 1)


def _logprobs(state: ServerState, request: CommonRequest, fields: dict[str, Any]) -> None:
    name, wanted = "logprobs", None
    if isinstance(request, CompletionRequest):
        wanted = request.logprobs
        if request.echo and wanted is not None:
            fields["prompt_logprobs"] = wanted
    elif isinstance(request, ChatRequest) and request.logprobs:
        name, wanted = "top_logprobs", request.top_logprobs or 0
    limit = state.llm.engine_config.max_logprobs
    for field, value in ((name, wanted), ("prompt_logprobs", request.prompt_logprobs)):
        if value is not None and not 0 <= value <= limit:
            bound = "at least 0" if value < 0 else f"at most {limit} (--max-logprobs)"
            raise bad_request(f"{field} must be {bound}, got {value}.", field)
    if request.stream and request.prompt_logprobs is not None:
        raise bad_request("prompt_logprobs are not available when stream is true.", "prompt_logprobs")
    if wanted is not None:
        fields["logprobs"] = wanted


def _logit_bias(bias: dict[str, float]) -> dict[int, float]:
    result: dict[int, float] = {}
    for key, value in bias.items():
        if not (key.isascii() and key.isdigit() and len(key) <= 10):
            raise bad_request(f"logit_bias: {key[:40]!r} is not a token id.", "logit_bias")
        if not -100 <= value <= 100:
            raise bad_request(f"logit_bias values must be in [-100, 100], got {value} for {key}.", "logit_bias")
        result[int(key)] = value
    return result
