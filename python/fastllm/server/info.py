"""What the server says about itself: models, health, metrics, version, and text to tokens and back."""

from __future__ import annotations

import uuid
from typing import Any

import msgspec
from aiohttp import web

from fastllm.server import admission
from fastllm.server.body import read_json
from fastllm.server.call import current_call
from fastllm.server.elsewhere import worked
from fastllm.server.errors import ApiError, bad_request
from fastllm.server.long_answer import json_response, raw_array, raw_text
from fastllm.server.metrics import CONTENT_TYPE
from fastllm.server.prompts import encode_messages, encode_text
from fastllm.server.protocol import (
    DetokenizeRequest,
    DetokenizeResponse,
    ModelCard,
    ModelList,
    ModelPermission,
    TokenizeRequest,
    TokenizeResponse,
)
from fastllm.server.state import STATE_KEY, Phase, ServerState
from fastllm.server.stats import describe
from fastllm.server.watch import EngineStatus, engine_status

_FREED_AT_ONCE = 20_000  # tokens


def answer_json(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    return web.Response(
        body=msgspec.json.encode(value),
        status=status,
        content_type="application/json",
        charset="utf-8",
        headers=headers,
    )


def _card(state: ServerState, name: str) -> ModelCard:
    config = state.llm.model_config
    permission = ModelPermission(f"modelperm-{uuid.uuid4().hex[:16]}", state.created)
    return ModelCard(name, state.created, str(config.model), config.max_model_len, [permission])


async def models(request: web.Request) -> web.Response:
    state = request.app[STATE_KEY]
    client = current_call().client
    return answer_json(ModelList([_card(state, name) for name in state.model_names if client.may_use(name)]))


async def model(request: web.Request) -> web.Response:
    state = request.app[STATE_KEY]
    name = request.match_info["model"]
    admission.check_model(state, name)
    return answer_json(_card(state, name))


async def live(request: web.Request) -> web.Response:
    """The process and its event loop turn; says nothing about the engine."""
    return answer_json({"status": "alive"})


async def health(request: web.Request) -> web.Response:
    """The engine makes progress, or has nothing to do."""
    state = request.app[STATE_KEY]
    if not state.loaded:
        return answer_json({"status": "starting"}, 503, {"Retry-After": "5"})
    return unhealthy(state) or answer_json({"status": "ok"})


def unhealthy(state: ServerState) -> web.Response | None:
    status = engine_status(state.llm, state.limits.step_limit(state.llm.engine_config.device))
    if state.watch.status is not EngineStatus.OK:
        status = state.watch.status  # what was seen first
    if status is EngineStatus.OK:
        return None
    return answer_json({"status": status.value, "since_s": round(state.llm.heartbeat().age_s, 3)}, 503)


async def ready(request: web.Request) -> web.Response:
    """Takes traffic: loaded, healthy, and not about to stop."""
    state = request.app[STATE_KEY]
    if state.phase is not Phase.READY:
        return answer_json({"status": state.phase.value}, 503, {"Retry-After": "5"})
    if state.watch.saturated:
        return answer_json({"status": "queue_full"}, 503, {"Retry-After": "1"})
    if state.memory.short:
        return answer_json({"status": "memory_low"}, 503, {"Retry-After": "5"})
    return unhealthy(state) or answer_json({"status": "ready"})


async def metrics(request: web.Request) -> web.Response:
    state = request.app[STATE_KEY]
    if state.metrics is None:
        raise ApiError(503, "The model is still loading.", code="loading", retry_after=5)
    return web.Response(body=state.metrics.render(), headers={"Content-Type": CONTENT_TYPE})


async def version(request: web.Request) -> web.Response:
    from fastllm import __version__

    answer: dict[str, Any] = {"version": __version__}
    if request.query.get("verbose", "false").lower() not in ("false", "0"):
        state = request.app[STATE_KEY]
        answer["limits"] = state.limits_in_force()
    return answer_json(answer)


async def load(request: web.Request) -> web.Response:
    """Requests accepted and not yet answered, for load balancers."""
    return answer_json({"server_load": request.app[STATE_KEY].active_requests})


async def stats(request: web.Request) -> web.Response:
    return answer_json(describe(request.app[STATE_KEY]))


async def tokenize(request: web.Request) -> web.Response:
    state = request.app[STATE_KEY]
    admission.check_open(state)
    body = await read_json(request, TokenizeRequest)
    admission.check_model(state, body.model)
    if (body.prompt is None) == (body.messages is None):
        raise bad_request("Send either prompt or messages.", "prompt")
    if body.messages is not None:
        if not body.messages:
            raise bad_request("messages must contain at least one message.", "messages")
        _, ids = await encode_messages(state, body, bool(body.add_special_tokens))
    else:
        ids = await encode_text(state, body.prompt or "", body.add_special_tokens is not False, "prompt")
    long = len(ids) > state.limits.inline_tokenize_chars
    return json_response(await worked(state, long, _tokens, state, ids, bool(body.return_token_strs)))


def _tokens(state: ServerState, ids: list[int], with_strs: bool) -> bytes:
    pieces = raw_array(state.llm.tokenizer.pieces(ids)) if with_strs else None
    answer = TokenizeResponse(len(ids), state.llm.model_config.max_model_len, raw_array(ids), pieces)
    while ids:  # freeing them takes time, too
        del ids[-_FREED_AT_ONCE:]
    return msgspec.json.encode(answer)


async def detokenize(request: web.Request) -> web.Response:
    state = request.app[STATE_KEY]
    admission.check_open(state)
    body = await read_json(request, DetokenizeRequest)
    admission.check_model(state, body.model)
    if body.tokens:
        admission.check_tokens(state, body.tokens, "tokens")
    long = len(body.tokens) > state.limits.inline_tokenize_chars
    return json_response(await worked(state, long, _text, state, body.tokens))


def _text(state: ServerState, ids: list[int]) -> bytes:
    return msgspec.json.encode(DetokenizeResponse(raw_text(state.llm.tokenizer.decode(ids, False))))
