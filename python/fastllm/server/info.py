"""What the server says about itself: models, health, metrics, version, and text to tokens and back."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import msgspec
from aiohttp import web

from fastllm.server import admission
from fastllm.server.body import read_json
from fastllm.server.call import current_call
from fastllm.server.errors import ApiError, bad_request
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

T = TypeVar("T")


def _json(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
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
    return _json(ModelList([_card(state, name) for name in state.model_names if client.may_use(name)]))


async def model(request: web.Request) -> web.Response:
    state = request.app[STATE_KEY]
    name = request.match_info["model"]
    admission.check_model(state, name)
    return _json(_card(state, name))


async def live(request: web.Request) -> web.Response:
    """The process and its event loop turn; says nothing about the engine."""
    return _json({"status": "alive"})


async def health(request: web.Request) -> web.Response:
    """The engine makes progress, or has nothing to do."""
    state = request.app[STATE_KEY]
    if not state.loaded:
        return _json({"status": "starting"}, 503, {"Retry-After": "5"})
    return _unhealthy(state) or _json({"status": "ok"})


def _unhealthy(state: ServerState) -> web.Response | None:
    status = engine_status(state.llm, state.limits.step_limit(state.llm.engine_config.device))
    if state.watch.status is not EngineStatus.OK:
        status = state.watch.status  # what was seen first
    if status is EngineStatus.OK:
        return None
    return _json({"status": status.value, "since_s": round(state.llm.heartbeat().age_s, 3)}, 503)


async def ready(request: web.Request) -> web.Response:
    """Takes traffic: loaded, healthy, and not about to stop."""
    state = request.app[STATE_KEY]
    if state.phase is not Phase.READY:
        return _json({"status": state.phase.value}, 503, {"Retry-After": "5"})
    if state.watch.saturated:
        return _json({"status": "queue_full"}, 503, {"Retry-After": "1"})
    return _unhealthy(state) or _json({"status": "ready"})


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
    return _json(answer)


async def load(request: web.Request) -> web.Response:
    """Requests accepted and not yet answered, for load balancers."""
    return _json({"server_load": request.app[STATE_KEY].active_requests})


async def stats(request: web.Request) -> web.Response:
    return _json(describe(request.app[STATE_KEY]))


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
    tokenizer = state.llm.tokenizer
    pieces = await _elsewhere(state, len(ids), tokenizer.pieces, ids) if body.return_token_strs else None
    return _json(TokenizeResponse(len(ids), state.llm.model_config.max_model_len, ids, pieces))


async def detokenize(request: web.Request) -> web.Response:
    state = request.app[STATE_KEY]
    admission.check_open(state)
    body = await read_json(request, DetokenizeRequest)
    admission.check_model(state, body.model)
    if body.tokens:
        admission.check_tokens(state, body.tokens, "tokens")
    decode = partial(state.llm.tokenizer.decode, skip_special_tokens=False)
    return _json(DetokenizeResponse(await _elsewhere(state, len(body.tokens), decode, body.tokens)))


async def _elsewhere(state: ServerState, size: int, work: Callable[[list[int]], T], ids: list[int]) -> T:
    """work(ids), on a worker if it may hold up the event loop."""
    if size <= state.limits.inline_tokenize_chars:
        return work(ids)
    return await asyncio.get_running_loop().run_in_executor(state.workers, work, ids)
