"""The OpenAPI document: every route of the server, with the types that requests are decoded into.

The types are the wire structs themselves, so a field cannot be served and missing here. What only admission refuses
(ranges, lengths, combinations) is told by its 400 and not by a schema.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import msgspec
from aiohttp import web

from fastllm.server import messages_protocol, protocol, responses_protocol
from fastllm.server.errors import ErrorEnvelope

_REF = "#/components/schemas/{name}"


@dataclass(frozen=True)
class Operation:
    """One method of one path. request, response: wire types; None: no body, or one without a type."""

    summary: str
    request: type[msgspec.Struct] | None = None
    response: type[msgspec.Struct] | None = None
    statuses: tuple[int, ...] = ()  # besides 200 and those every request may get
    streams: type[msgspec.Struct] | None = None  # the chunks of a streamed answer
    events: bool = False  # streams events of several types
    text: bool = False  # answers plain text


_MODEL_ERRORS = (400, 404, 408, 413, 415, 429)
_STORED_ERRORS = (400, 404)

# (method, path) -> operation, for every route of the app but the files of the console. Answers whose parts are of
# several types, told apart by a field of each, have no schema here.
OPERATIONS: dict[tuple[str, str], Operation] = {
    ("POST", "/v1/completions"): Operation(
        "Continues one prompt or a batch of them.",
        protocol.CompletionRequest,
        protocol.CompletionResponse,
        _MODEL_ERRORS,
        protocol.CompletionResponse,
    ),
    ("POST", "/v1/chat/completions"): Operation(
        "Answers a conversation.",
        protocol.ChatRequest,
        protocol.ChatResponse,
        _MODEL_ERRORS,
        protocol.ChatChunk,
    ),
    ("POST", "/v1/responses"): Operation(
        "Answers a conversation in the form of OpenAI's Responses.",
        responses_protocol.ResponsesRequest,
        statuses=_MODEL_ERRORS,
        events=True,
    ),
    ("POST", "/v1/responses/input_tokens"): Operation(
        "The length of a conversation in tokens.",
        responses_protocol.ResponsesRequest,
        responses_protocol.InputTokens,
        _MODEL_ERRORS,
    ),
    ("GET", "/v1/responses/{id}"): Operation("A stored response.", statuses=_STORED_ERRORS),
    ("DELETE", "/v1/responses/{id}"): Operation(
        "Forgets a stored response.", response=responses_protocol.DeletedResponse, statuses=_STORED_ERRORS
    ),
    ("POST", "/v1/responses/{id}/cancel"): Operation(
        "Ends a response made in the background.", statuses=_STORED_ERRORS
    ),
    ("GET", "/v1/responses/{id}/input_items"): Operation(
        "What a stored response answered.", response=responses_protocol.ItemList, statuses=_STORED_ERRORS
    ),
    ("POST", "/v1/messages"): Operation(
        "Answers a conversation in the form of Anthropic's Messages.",
        messages_protocol.MessagesRequest,
        statuses=_MODEL_ERRORS,
        events=True,
    ),
    ("POST", "/v1/messages/count_tokens"): Operation(
        "The length of a conversation in tokens.",
        messages_protocol.MessagesRequest,
        messages_protocol.TokensCount,
        _MODEL_ERRORS,
    ),
    ("GET", "/v1/models"): Operation("The served names of the model.", response=protocol.ModelList),
    ("GET", "/v1/models/{model}"): Operation("One served name.", response=protocol.ModelCard, statuses=(404,)),
    ("POST", "/tokenize"): Operation(
        "Text or a conversation as tokens.", protocol.TokenizeRequest, protocol.TokenizeResponse, _MODEL_ERRORS
    ),
    ("POST", "/detokenize"): Operation(
        "Tokens as text.", protocol.DetokenizeRequest, protocol.DetokenizeResponse, _MODEL_ERRORS
    ),
    ("GET", "/live"): Operation("The process runs."),
    ("GET", "/health"): Operation("The engine runs."),
    ("GET", "/health/deep"): Operation("The model says what it said before, by one token."),
    ("GET", "/ready"): Operation("The server takes requests."),
    ("GET", "/ping"): Operation("The same as /health."),
    ("POST", "/ping"): Operation("The same as /health."),
    ("GET", "/metrics"): Operation("Prometheus metrics.", text=True),
    ("GET", "/version"): Operation("The version of the server."),
    ("GET", "/stats"): Operation("What the scheduler and the KV cache do now."),
    ("GET", "/load"): Operation("How many requests are accepted and not yet answered."),
    ("GET", "/openapi.json"): Operation("This document."),
}


async def handle(request: web.Request) -> web.Response:
    return web.Response(body=document(), content_type="application/json", charset="utf-8")


@lru_cache(maxsize=1)
def document() -> bytes:
    from fastllm import __version__

    kinds = [k for o in OPERATIONS.values() for k in (o.request, o.response, o.streams) if k is not None]
    _, schemas = msgspec.json.schema_components(list(dict.fromkeys([*kinds, ErrorEnvelope])), ref_template=_REF)
    paths: dict[str, dict[str, Any]] = {}
    for (method, path), operation in OPERATIONS.items():
        paths.setdefault(path, {})[method.lower()] = _operation(method, path, operation)
    return msgspec.json.encode(
        {
            "openapi": "3.1.0",
            "info": {"title": "fastllm", "version": __version__},
            "paths": paths,
            "components": {
                "schemas": schemas,
                "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
            },
            "security": [{}, {"key": []}],
        }
    )


def _operation(method: str, path: str, operation: Operation) -> dict[str, Any]:
    answer: dict[str, Any] = {"application/json": {"schema": _ref(operation.response)}}
    if operation.text:
        answer = {"text/plain": {"schema": {"type": "string"}}}
    if operation.streams is not None:
        described = f"Events whose data are `{operation.streams.__name__}` objects, then `[DONE]`."
        answer["text/event-stream"] = {"schema": {"description": described}}
    if operation.events:
        described = "Events whose data are objects that name their `type`."
        answer["text/event-stream"] = {"schema": {"description": described}}
    refusal = {"application/json": {"schema": _ref(ErrorEnvelope)}}
    result: dict[str, Any] = {
        "summary": operation.summary,
        "responses": {"200": {"description": "The answer.", "content": answer}}
        | {str(status): {"description": "A refusal.", "content": refusal} for status in (*operation.statuses, 401, 403)}
        | {"503": {"description": "Loading, draining or overloaded.", "content": {"application/json": {}}}},
    }
    if operation.request is not None:
        schema = _ref(operation.request)
        result["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    names = re.findall(r"{(\w+)}", path)
    if names:
        result["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names
        ]
    return result


def _ref(kind: type[msgspec.Struct] | None) -> dict[str, Any]:
    return {} if kind is None else {"$ref": _REF.format(name=kind.__name__)}
