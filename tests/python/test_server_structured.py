"""Structured output over HTTP: every way to ask for it, and what is refused before anything is compiled or opened."""

from __future__ import annotations

import json
import re
import threading
import time
from typing import Any

import openai
import pytest

from fastllm import StructuredOutputsParams
from schemas import SCHEMAS, fits
from server_fixtures import RunningServer, running_server

POINT = {
    "type": "object",
    "properties": {"x": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["x"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def server():
    with running_server() as running:
        yield running
        running.check_alive()


def wrapped(schema: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "it", "schema": schema}}}


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        (wrapped(POINT), r'\{\s*"x"\s*:\s*\d\s*\}'),
        ({"response_format": {"type": "json_object", "schema": POINT}}, r'\{\s*"x"\s*:\s*\d\s*\}'),
        ({"structured_outputs": {"json": POINT}}, r'\{\s*"x"\s*:\s*\d\s*\}'),
        ({"structured_outputs": {"json": POINT, "disable_any_whitespace": True}}, r'\{"x":\d\}'),
        ({"structured_outputs": {"choice": ["red", "blue"]}}, "red|blue"),
        ({"guided_json": json.dumps(POINT)}, r'\{\s*"x"\s*:\s*\d\s*\}'),
        ({"guided_json": POINT, "guided_whitespace_pattern": "~"}, r'\{~?"x"~?:~?\d~?\}'),
        ({"guided_regex": "[0-9a-f]{4}"}, "[0-9a-f]{4}"),
        ({"guided_choice": ["yes", "no"]}, "yes|no"),
        ({"guided_grammar": 'root ::= "x" [0-9]'}, "x[0-9]"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_every_way_to_ask(server: RunningServer, fields: dict[str, Any], pattern: str, stream: bool) -> None:
    fields = {**fields, "max_tokens": 300, "n": 2, "seed": 1, "stream": stream}
    for ask, text_of in ((server.complete, _completion_text), (server.chat, _chat_text)):
        reply = ask(**fields)
        assert reply.status == 200, reply.json
        texts: dict[int, str] = {0: "", 1: ""}
        reasons = {}
        for body in reply.events if stream else [reply.json]:
            for choice in body["choices"]:
                texts[choice["index"]] += text_of(choice)
                reasons[choice["index"]] = choice["finish_reason"]
        assert all(re.fullmatch(pattern, text) for text in texts.values()), texts
        assert set(reasons.values()) == {"stop"}


def _completion_text(choice: Any) -> str:
    return str(choice["text"])


def _chat_text(choice: Any) -> str:
    return str(choice.get("message", choice.get("delta")).get("content") or "")


def test_structural_tag_in_both_forms(server: RunningServer) -> None:
    old = {"type": "structural_tag", "triggers": ["<f"]}
    old["structures"] = [{"begin": "<f>", "schema": {"const": 7}, "end": "</f>"}]
    tag = {
        "type": "tag",
        "begin": "<f>",
        "content": {"type": "json_schema", "json_schema": {"const": 7}},
        "end": "</f>",
    }
    new = {"type": "structural_tag", "format": {"type": "triggered_tags", "triggers": ["<f"], "tags": [tag]}}
    bias = {str(ord("<")): 100}
    for form in (old, new):
        text = server.complete(response_format=form, logit_bias=bias, max_tokens=400).json["choices"][0]["text"]
        assert all(part.startswith("f>7</f>") or not part.startswith("f") for part in text.split("<")[1:-8])


def test_twenty_schemas_over_http(server: RunningServer) -> None:
    for schema in SCHEMAS:
        choice = server.chat(structured_outputs={"json": schema}, max_tokens=400, seed=2).json["choices"][0]
        if choice["finish_reason"] == "stop":
            assert fits(json.loads(choice["message"]["content"]), schema)


def test_official_client_parses_into_a_model(server: RunningServer) -> None:
    pydantic = pytest.importorskip("pydantic")

    class Point(pydantic.BaseModel):
        x: int
        kind: str = pydantic.Field(pattern="^[ab]$")

    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        answer = client.chat.completions.parse(
            model="null", messages=[{"role": "user", "content": "Hi"}], response_format=Point, max_tokens=200
        )
    point = answer.choices[0].message.parsed
    assert point is not None and point.kind in "ab"


def deep(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


def doubling(levels: int) -> dict[str, Any]:
    defs: dict[str, Any] = {"d0": {"type": "object", "properties": {"a": {"type": "string"}}}}
    for i in range(1, levels):
        below = {"$ref": f"#/$defs/d{i - 1}"}
        defs[f"d{i}"] = {
            "anyOf": [{"type": "object", "properties": {"l": below, "r": below}}, {"allOf": [below, below]}]
        }
    return {"$ref": f"#/$defs/d{levels - 1}", "$defs": defs}


REFUSED: list[tuple[dict[str, Any], str | None]] = [
    ({"response_format": {"type": "xml"}}, None),
    ({"response_format": {"type": "json_schema"}}, None),
    (wrapped(None), None),
    (wrapped(True), None),
    (wrapped(False), None),
    (wrapped([]), None),
    (wrapped("x"), None),
    (wrapped({"type": "nonsense"}), "invalid_schema"),
    (wrapped({"type": "array", "uniqueItems": True}), "unsupported_schema"),
    (wrapped({"$ref": "#"}), "schema_too_complex"),
    (
        wrapped({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}),
        "schema_too_complex",
    ),
    (wrapped(deep(400)), "invalid_json"),
    (wrapped({"enum": list(range(6000))}), "schema_too_complex"),
    (wrapped({"enum": ["x" * 70_000]}), "schema_too_complex"),
    (wrapped({"type": "array", "items": {"const": 1}, "minItems": 10**6}), "schema_too_complex"),
    (wrapped({"$ref": "http://169.254.169.254/latest"}), "unsupported_ref"),
    (wrapped({"properties": {"a": {"$ref": "file:///etc/passwd"}}}), "unsupported_ref"),
    (wrapped({"type": "string", "pattern": "(?=a)b"}), "unsupported_regex"),
    ({"guided_regex": "["}, "invalid_regex"),
    ({"guided_regex": "a(?!b)"}, "unsupported_regex"),
    ({"guided_regex": r"(a)\1"}, "unsupported_regex"),
    ({"guided_regex": "(a{1000}){1000}"}, "schema_too_complex"),
    ({"guided_regex": "x(((((a{20}){20}){20}){20}){20})"}, "schema_too_complex"),
    ({"guided_regex": ""}, None),
    ({"guided_choice": []}, None),
    ({"guided_grammar": "start: ("}, "invalid_grammar"),
    ({"guided_grammar": 'start: "a" nothing'}, "invalid_grammar"),
    ({"guided_grammar": "start: start start"}, "schema_too_complex"),
    ({"guided_grammar": "root ::= ((("}, "invalid_grammar"),
    ({"guided_grammar": "start: " + "(" * 30_000}, None),
    ({"structured_outputs": {}}, None),
    ({"structured_outputs": {"json": {}, "regex": "a"}}, None),
    ({"structured_outputs": {"nonsense": 1}}, None),
    ({"guided_regex": "a", "guided_choice": ["a"]}, None),
    ({"response_format": {"type": "structural_tag"}}, "invalid_schema"),
]


@pytest.mark.parametrize(("fields", "code"), REFUSED)
def test_refusal_is_a_quick_400_that_names_the_field(
    server: RunningServer, fields: dict[str, Any], code: str | None
) -> None:
    started = time.monotonic()
    reply = server.chat(**fields, max_tokens=4)
    assert reply.status == 400, reply.body[:300]
    assert reply.error["param"] in fields
    assert code is None or reply.error["code"] == code, reply.error
    assert len(reply.error["message"]) < 600 and "\n" not in reply.error["message"]
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    "fields",
    [
        {"guided_regex": "(a+)+b"},
        {"guided_regex": "(a|a)*$"},
        {"guided_regex": "(.*){50}"},
        wrapped(doubling(12)),
        wrapped({"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(400)}}),
    ],
)
def test_what_is_catastrophic_elsewhere_is_harmless(server: RunningServer, fields: dict[str, Any]) -> None:
    reply = server.complete(**fields, max_tokens=16)
    assert reply.status in (200, 400)


def test_endless_string_ends_at_max_tokens(server: RunningServer) -> None:
    schema = {"type": "string", "minLength": 10_000}
    choice = server.complete(**wrapped(schema), max_tokens=40).json["choices"][0]
    assert choice["finish_reason"] == "length"


def test_event_loop_answers_while_grammars_are_compiled(server: RunningServer) -> None:
    stop = threading.Event()

    def hammer() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            server.complete(guided_regex=f"x{number}(a{{100}}){{150}}", max_tokens=1)

    threads = [threading.Thread(target=hammer) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(10):
            started = time.monotonic()
            assert server.ask("GET", "/live").status == 200
            assert time.monotonic() - started < 1
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def test_many_grammars_do_not_grow_the_cache(server: RunningServer) -> None:
    compiler = server.state.llm.grammars
    for number in range(300):
        compiler.compile(StructuredOutputsParams(choice=[f"c{number}"]))
    assert len(compiler._cache) <= 256


def test_constrained_and_free_requests_share_a_batch(server: RunningServer) -> None:
    body = {"prompt": "abc", "max_tokens": 30, "temperature": 0, "ignore_eos": True}
    alone = server.complete(**body).json["choices"][0]["text"]
    results: list[str] = []

    def free() -> None:
        results.append(server.complete(**body).json["choices"][0]["text"])

    threads = [threading.Thread(target=free) for _ in range(3)]
    for thread in threads:
        thread.start()
    constrained = server.complete(guided_regex="[a-z]{30}", max_tokens=60).json["choices"][0]["text"]
    for thread in threads:
        thread.join()
    assert re.fullmatch("[a-z]{30}", constrained) and results == [alone] * 3
