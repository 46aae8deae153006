"""What broke other servers, sent to /v1/responses and /v1/messages: an answer of that API, and a server as before."""

from __future__ import annotations

import asyncio
import time
from typing import Any, get_type_hints

import aiohttp
import pytest
from test_hostile_requests import ANSWER_WITHIN_S, LEAKS, NESTED_OBJECT, WRONG_VALUES, accepts

from fastllm.server.messages_protocol import MessagesRequest
from fastllm.server.responses_protocol import ResponsesRequest
from server_fixtures import Reply, RunningServer, ask, running_server

RESPONSES = "/v1/responses"
MESSAGES = "/v1/messages"
COUNT = "/v1/messages/count_tokens"
KINDS = [(RESPONSES, ResponsesRequest), (MESSAGES, MessagesRequest), (COUNT, MessagesRequest)]
MANY = 50_000


@pytest.fixture(scope="module")
def server():
    with running_server({"max_num_seqs": 16}) as running:
        running.golden = running.complete(max_tokens=12, temperature=0).json["choices"][0]["text"]  # type: ignore[attr-defined]
        yield running


@pytest.fixture(autouse=True)
def after_check(server: RunningServer):
    yield
    assert server.ask("GET", "/health").status == 200
    assert server.complete(max_tokens=12, temperature=0).json["choices"][0]["text"] == server.golden  # type: ignore[attr-defined]
    server.wait_idle()


def body_for(path: str) -> dict[str, Any]:
    if path == RESPONSES:
        return {"input": "x", "max_output_tokens": 2}
    return {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2}


def check(path: str, reply: Reply, statuses: tuple[int, ...]) -> dict[str, Any]:
    """The error object, in the shape of the path's API; empty after a 200."""
    assert reply.status in statuses, reply.body[:300]
    assert not any(leak in reply.body for leak in LEAKS), reply.body[:300]
    if reply.status == 200:
        return {}
    error: dict[str, Any] = reply.json["error"]
    assert set(error) == ({"message", "type", "param", "code"} if path == RESPONSES else {"message", "type"})
    assert len(error["message"]) <= 500
    return error


@pytest.mark.parametrize("path, kind", KINDS, ids=[row[0] for row in KINDS])
def test_wrong_type_of_every_field_is_named(server: RunningServer, path: str, kind: type) -> None:
    async def work() -> None:
        async with aiohttp.ClientSession() as session:
            for name, hint in get_type_hints(kind).items():
                for value in WRONG_VALUES:
                    if not accepts(hint, value):
                        reply = await ask(session, "POST", server.url + path, body_for(path) | {name: value})
                        assert name in check(path, reply, (400,))["message"]

    asyncio.run(work())


VALUES: list[tuple[str, str, list[Any]]] = [
    (RESPONSES, "input", [[{"type": t} for t in ("", "message", "__class__", "computer_call", "x" * 1_000_000)]]),
    (RESPONSES, "input", [[{"role": "user", "content": [{"type": "input_text"}]}], [{}], [[]], [None]]),
    (RESPONSES, "input", [[{"role": "user", "content": "x"}] * MANY, "x" * 5_000_000, "\ud800"]),
    (RESPONSES, "input", [[{"role": "user", "content": [{"type": "input_text", "text": "a"}] * MANY}]]),
    (RESPONSES, "input", [[{"type": "function_call", "call_id": "1", "name": "f", "arguments": 5}]]),
    (RESPONSES, "max_output_tokens", [0, -1, 2**63, 2**64, 1.5, "5", True]),
    (RESPONSES, "top_logprobs", [-1, 21, 2**64]),
    (RESPONSES, "previous_response_id", ["", "resp_x", "x" * 1_000_000, "../../etc/passwd", "resp_\u0000"]),
    (RESPONSES, "metadata", [{str(i): "" for i in range(MANY)}, {"a": None}, {"a": {"b": "c"}}, {"a": "x" * 10_000}]),
    (RESPONSES, "include", [["x"] * MANY, [5], "message.output_text.logprobs"]),
    (
        RESPONSES,
        "text",
        [{"format": {"type": "xml"}}, {"format": {}}, {"format": {"type": "json_schema", "schema": 5}}],
    ),
    (RESPONSES, "tools", [[{}], [{"type": "function"}], [{"type": "mcp", "server_url": "http://127.0.0.1/"}]]),
    (RESPONSES, "tool_choice", ["required", {"type": "function", "name": "x"}, 5]),
    (RESPONSES, "stop", [["x"] * MANY, "", [None]]),
    (RESPONSES, "truncation", ["auto", "", "x" * 1_000_000]),
    (
        MESSAGES,
        "messages",
        [[], None, [{}], [{"role": "user"}], [{"role": "user", "content": c} for c in (None, 5, {})]],
    ),
    (MESSAGES, "messages", [[{"role": "user", "content": [{"type": "text", "text": "a"}] * MANY}]]),
    (MESSAGES, "messages", [[{"role": "user", "content": "x"}] * MANY]),
    (
        MESSAGES,
        "messages",
        [[{"role": "user", "content": [{"type": "image", "source": {"url": "file:///etc/passwd"}}]}]],
    ),
    (MESSAGES, "messages", [[{"role": "assistant", "content": [{"type": "tool_use", "id": "1", "name": 5}]}]]),
    (MESSAGES, "max_tokens", [None, 0, -1, 2**64, 1.5, "5"]),
    (MESSAGES, "stop_sequences", [["x"] * MANY, [""], "x", [5], ["x" * 100_000]]),
    (MESSAGES, "system", [5, [{"type": "image"}], [{"text": "x"}], "x" * 5_000_000]),
    (MESSAGES, "thinking", [{"type": "hard"}, {}, {"type": "enabled", "budget_tokens": "x"}]),
    (MESSAGES, "tools", [[{}], [{"name": 5}], [{"type": "bash_20250124", "name": "bash"}]]),
    (MESSAGES, "tool_choice", [{}, {"type": 5}, {"type": "tool", "name": "x"}, "any"]),
    (MESSAGES, "output_config", [{"format": {"type": "xml"}}, {"format": {}}, 5]),
]
CASES = [(path, name, value) for path, name, values in VALUES for value in values]


@pytest.mark.parametrize("path, name, value", CASES, ids=[f"{row[1]}-{i}" for i, row in enumerate(CASES)])
def test_values_that_cannot_be_used(server: RunningServer, path: str, name: str, value: Any) -> None:
    for stream in (False, True):
        started = time.monotonic()
        reply = server.ask("POST", path, body_for(path) | {"stream": stream, name: value})
        assert time.monotonic() - started < ANSWER_WITHIN_S
        check(path, reply, (400, 404) if name == "previous_response_id" else (400,))


BODIES = [b"", b"[]", b"null", b'{"input": "x"', NESTED_OBJECT, b'{"messages": [{"content": ' + b"[" * 100_000, b"\xff"]


@pytest.mark.parametrize("path", [RESPONSES, MESSAGES, COUNT])
@pytest.mark.parametrize("body", BODIES, ids=[str(body[:20]) for body in BODIES])
def test_bodies_that_are_no_request(server: RunningServer, path: str, body: bytes) -> None:
    check(path, server.ask("POST", path, body), (400,))


@pytest.mark.parametrize("path", [RESPONSES, MESSAGES])
def test_deep_content_blocks_are_refused_or_read(server: RunningServer, path: str) -> None:
    name = "input" if path == RESPONSES else "messages"
    for depth in (200, 50_000):
        content = '[{"type": "tool_result", "tool_use_id": "1", "content": ' * depth + '"x"' + "}]" * depth
        body = f'{{"max_tokens": 2, "{name}": [{{"role": "user", "content": {content}}}]}}'
        check(path, server.ask("POST", path, body.encode()), (400,))


@pytest.mark.parametrize("id", ["%2e%2e", "x" * 5000, "%00", "resp_%ff", "..;", "'--"])
@pytest.mark.parametrize("method, suffix", [("GET", ""), ("DELETE", ""), ("POST", "/cancel"), ("GET", "/input_items")])
def test_ids_that_no_response_has(server: RunningServer, id: str, method: str, suffix: str) -> None:
    reply = server.ask(method, f"{RESPONSES}/{id}{suffix}")
    assert reply.status in (400, 404, 405) and set(reply.error) == {"message", "type", "param", "code"}
    assert len(reply.error["message"]) <= 500


def test_store_stays_within_its_bounds(server: RunningServer) -> None:
    store = server.state.responses
    big = "x" * 30_000  # tokens of the byte tokenizer

    async def work() -> None:
        async with aiohttp.ClientSession() as session:
            for text in [big] * 10 + ["x"] * 260:
                reply = await ask(session, "POST", server.url + RESPONSES, {"input": text, "max_output_tokens": 1})
                assert reply.status == 200

    asyncio.run(work())
    assert len(store) == store.capacity == 256
    assert 0 < store._bytes == sum(entry.size for entry in store._entries.values())
