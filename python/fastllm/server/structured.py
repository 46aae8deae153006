"""The constraint on the output of a request: from its fields to a compiled grammar, on worker threads."""

from __future__ import annotations

import asyncio
from typing import Any

from fastllm.grammar.compiler import CompiledGrammar
from fastllm.grammar.limits import GrammarError, GrammarLimits
from fastllm.grammar.params import StructuredOutputsParams
from fastllm.grammar.source import Preamble
from fastllm.server.errors import bad_request
from fastllm.server.limits import Limits
from fastllm.server.protocol import CommonRequest, ResponseFormat
from fastllm.server.state import ServerState

_GUIDED = {"guided_json": "json", "guided_regex": "regex", "guided_choice": "choice", "guided_grammar": "grammar"}
_FORMATS = ("text", "json_object", "json_schema", "structural_tag")


def grammar_limits(limits: Limits) -> GrammarLimits:
    return GrammarLimits(
        max_schema_bytes=limits.max_schema_bytes,
        max_schema_nodes=limits.max_schema_nodes,
        max_schema_depth=limits.max_schema_depth,
        max_compile_time_s=limits.max_compile_time_s,
    )


def read_constraint(request: CommonRequest) -> tuple[StructuredOutputsParams, str] | None:
    """What the request asks for and the field that says so, from whichever of its three forms it uses."""
    given: dict[str, dict[str, Any]] = {}
    if request.response_format is not None and request.response_format.type != "text":
        given["response_format"] = _from_response_format(request.response_format)
    if request.structured_outputs is not None:
        given["structured_outputs"] = request.structured_outputs
    for name, kind in _GUIDED.items():
        value = getattr(request, name)
        if value is not None:
            given[name] = {kind: value}
    if not given:
        return None
    if len(given) > 1:
        raise bad_request(f"Only one of {' and '.join(given)} can be set.", list(given)[1])
    ((param, fields),) = given.items()
    if request.guided_whitespace_pattern is not None:
        fields = {**fields, "whitespace_pattern": request.guided_whitespace_pattern}
    try:
        return StructuredOutputsParams.of(fields), param
    except ValueError as error:
        raise bad_request(str(error).replace("structured_outputs", param, 1), param) from None


def _from_response_format(form: ResponseFormat) -> dict[str, Any]:
    if form.type not in _FORMATS:
        allowed = ", ".join(map(repr, _FORMATS))
        raise bad_request(f"response_format.type must be one of {allowed}, got {form.type[:40]!r}.", "response_format")
    if form.type == "json_object":
        return {"json_object": True} if form.schema is None else {"json": _schema(form.schema)}
    if form.type == "structural_tag":
        fields = {"structures": form.structures, "triggers": form.triggers, "format": form.format}
        return {"structural_tag": {name: value for name, value in fields.items() if value is not None}}
    if not isinstance(form.json_schema, dict):
        raise bad_request(
            "When the type of response_format is 'json_schema', its json_schema must be an object with a schema.",
            "response_format",
        )
    return {"json": _schema(form.json_schema.get("schema"))}


def _schema(schema: Any) -> dict[str, Any]:
    if not isinstance(schema, dict):
        raise bad_request("response_format: the schema must be a JSON schema, which is an object.", "response_format")
    return schema


async def compile_constraint(
    state: ServerState,
    params: StructuredOutputsParams,
    param: str,
    *,
    preamble: Preamble | None = None,
    limits: GrammarLimits | None = None,
) -> CompiledGrammar:
    """Raises a 400 that names `param` and says what is wrong with it or too much of it.

    limits: where they are not those of one schema.
    """
    limits = limits or grammar_limits(state.limits)
    compile = state.llm.grammars.compile
    try:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(state.compilers, compile, params, limits, preamble)
    except GrammarError as error:
        raise bad_request(f"{param}: {error}", param, error.code) from None
