"""Every refusal: its status, its shape, the field it names, and that the connection goes on."""

from __future__ import annotations

import asyncio
from typing import Any

import aiohttp
import pytest

from server_fixtures import CONTEXT, RunningServer, ask, running_server

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def server():
    with running_server({"max_num_seqs": 4}, api_keys=()) as running:
        yield running
        running.check_alive()


# path, fields of the body, status, param, code, words of the message
ROWS: list[tuple[str, dict[str, Any], int, str | None, str | None, str]] = [
    (COMPLETIONS, {"model": "nope"}, 404, "model", "model_not_found", "`nope` does not exist"),
    (COMPLETIONS, {"model": ""}, 400, "model", None, "must not be empty"),
    (COMPLETIONS, {"model": 5}, 400, "model", "invalid_type", "must be a string"),
    (COMPLETIONS, {"prompt": None}, 400, "prompt", None, "must be given"),
    (COMPLETIONS, {"prompt": ""}, 400, "prompt", None, "must not be empty"),
    (COMPLETIONS, {"prompt": []}, 400, "prompt", None, "at least one prompt"),
    (COMPLETIONS, {"prompt": [[]]}, 400, "prompt", None, "empty prompt"),
    (COMPLETIONS, {"prompt": ["a", 1]}, 400, "prompt", None, "mixture"),
    (COMPLETIONS, {"prompt": [99999]}, 400, "prompt", None, "99999 is out of vocabulary"),
    (COMPLETIONS, {"prompt": [-1]}, 400, "prompt", None, "-1 is out of vocabulary"),
    (COMPLETIONS, {"prompt": "x" * CONTEXT}, 400, "prompt", "context_length_exceeded", f"length is {CONTEXT} tokens"),
    (COMPLETIONS, {"prompt": "x" * 800_000}, 400, "prompt", "context_length_exceeded", "cannot fit"),
    (COMPLETIONS, {"max_tokens": CONTEXT}, 400, "max_tokens", "context_length_exceeded", "you requested"),
    (COMPLETIONS, {"max_tokens": 0}, 400, "max_tokens", None, "at least 1, got 0"),
    (COMPLETIONS, {"max_tokens": "ten"}, 400, "max_tokens", "invalid_type", "must be an integer"),
    (COMPLETIONS, {"min_tokens": 20, "max_tokens": 10}, 400, "min_tokens", None, "less than or equal"),
    (COMPLETIONS, {"temperature": -1}, 400, "temperature", None, "non-negative"),
    (COMPLETIONS, {"temperature": 3}, 400, "temperature", None, "[0, 2]"),
    (COMPLETIONS, {"top_p": 1.5}, 400, "top_p", None, "(0, 1]"),
    (COMPLETIONS, {"top_k": -2}, 400, "top_k", None, "got -2"),
    (COMPLETIONS, {"min_p": 2}, 400, "min_p", None, "[0, 1]"),
    (COMPLETIONS, {"presence_penalty": 3}, 400, "presence_penalty", None, "[-2, 2]"),
    (COMPLETIONS, {"frequency_penalty": -3}, 400, "frequency_penalty", None, "[-2, 2]"),
    (COMPLETIONS, {"repetition_penalty": 0}, 400, "repetition_penalty", None, "greater than zero"),
    (COMPLETIONS, {"n": 0}, 400, "n", None, "at least 1"),
    (COMPLETIONS, {"n": 10**9}, 400, "n", None, "at most"),
    (COMPLETIONS, {"n": 128, "prompt": ["a"] * 100}, 400, "n", None, "n * prompts"),
    (COMPLETIONS, {"best_of": 1, "n": 2}, 400, "best_of", None, "at least n (2)"),
    (COMPLETIONS, {"best_of": 10**9}, 400, "best_of", None, "at most"),
    (COMPLETIONS, {"best_of": 2, "stream": True}, 400, "best_of", None, "cannot be streamed"),
    (COMPLETIONS, {"best_of": 100, "prompt": ["a"] * 100, "stream": False}, 400, "n", None, "n * prompts"),
    (COMPLETIONS, {"logprobs": 100}, 400, "logprobs", None, "at most 20"),
    (COMPLETIONS, {"prompt_logprobs": 10**6}, 400, "prompt_logprobs", None, "at most 20"),
    (COMPLETIONS, {"prompt_logprobs": 1, "stream": True}, 400, "prompt_logprobs", None, "not available"),
    (COMPLETIONS, {"stop": ""}, 400, "stop", None, "empty string"),
    (COMPLETIONS, {"stop": ["a"] * 17}, 400, "stop", None, "at most 16"),
    (COMPLETIONS, {"stop": [1]}, 400, "stop", "invalid_type", "stop[0] must be a string"),
    (COMPLETIONS, {"stop_token_ids": [10**6]}, 400, "stop_token_ids", None, "not in the vocabulary"),
    (COMPLETIONS, {"logit_bias": {"abc": 1}}, 400, "logit_bias", None, "not a token id"),
    (COMPLETIONS, {"logit_bias": {"99999": 1}}, 400, "logit_bias", None, "out-of-vocab"),
    (COMPLETIONS, {"logit_bias": {"5": 101}}, 400, "logit_bias", None, "[-100, 100]"),
    (COMPLETIONS, {"seed": 2**64}, 400, "seed", None, "64 bits"),
    (COMPLETIONS, {"priority": 2**40}, 400, "priority", None, "32 bits"),
    (COMPLETIONS, {"stream_options": {"include_usage": True}}, 400, "stream_options", None, "when stream is true"),
    (COMPLETIONS, {"stream": "yes"}, 400, "stream", "invalid_type", "true or false"),
    (COMPLETIONS, {"suffix": "x"}, 400, "suffix", "unsupported_parameter", "does not support"),
    (COMPLETIONS, {"priority": 1}, 400, "priority", None, "--scheduling-policy priority"),
    (COMPLETIONS, {"length_penalty": 0.5}, 400, "length_penalty", None, "only used with use_beam_search"),
    (COMPLETIONS, {"early_stopping": True}, 400, "early_stopping", None, "only used with use_beam_search"),
    (COMPLETIONS, {"use_beam_search": True, "early_stopping": "x"}, 400, "early_stopping", None, '"never"'),
    (COMPLETIONS, {"use_beam_search": True, "stop": "a"}, 400, "stop", None, "cannot be combined"),
    (COMPLETIONS, {"use_beam_search": True, "top_p": 0.5}, 400, "top_p", None, "cannot be combined"),
    (COMPLETIONS, {"use_beam_search": True, "n": 30}, 400, "use_beam_search", None, "max_logprobs is 20"),
    (COMPLETIONS, {"use_beam_search": True, "n": 5}, 400, "n", None, "between 1 and 4"),
    (COMPLETIONS, {"allowed_token_ids": []}, 400, "allowed_token_ids", None, "at least one token id"),
    (COMPLETIONS, {"allowed_token_ids": [5, 10**6]}, 400, "allowed_token_ids", None, "not in the vocabulary"),
    (COMPLETIONS, {"allowed_token_ids": [-1]}, 400, "allowed_token_ids", None, "at least one token id"),
    (COMPLETIONS, {"allowed_token_ids": [97], "bad_words": ["a"]}, 400, "bad_words", None, "holds only tokens"),
    (COMPLETIONS, {"bad_words": ["x"] * 257}, 400, "bad_words", None, "at most 256 entries"),
    (COMPLETIONS, {"bad_words": ["x" * 257]}, 400, "bad_words", None, "at most 256 characters"),
    (COMPLETIONS, {"bad_words": [" "]}, 400, "bad_words", None, "not empty"),
    (COMPLETIONS, {"bad_words": "x"}, 400, "bad_words", "invalid_type", "must be an array"),
    (COMPLETIONS, {"logprob_token_ids": [1]}, 400, "logprob_token_ids", "unsupported_parameter", "does not support"),
    (COMPLETIONS, {"guided_json": 5}, 400, "guided_json", None, "JSON schema"),
    (COMPLETIONS, {"structured_outputs": {"regex": "["}}, 400, "structured_outputs", "invalid_regex", "class"),
    (COMPLETIONS, {"truncate_prompt_tokens": 0}, 400, "truncate_prompt_tokens", None, "-1 or at least 1"),
    (CHAT, {"messages": None}, 400, "messages", "invalid_type", "must be an array"),
    (CHAT, {"messages": []}, 400, "messages", None, "at least one message"),
    (CHAT, {"messages": [{"content": "x"}]}, 400, "messages", "missing_required_parameter", "messages[0].role"),
    (CHAT, {"messages": [{"role": "king", "content": "x"}]}, 400, "messages", None, "must be one of"),
    (CHAT, {"messages": [{"role": "user", "content": None}]}, 400, "messages", None, "messages[0].content"),
    (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        400,
        "messages",
        None,
        "only reads text",
    ),
    (CHAT, {"top_logprobs": 2}, 400, "top_logprobs", None, "logprobs must be set"),
    (CHAT, {"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs", None, "at most 20"),
    (CHAT, {"tools": []}, 400, "tools", None, "at least one tool"),
    (CHAT, {"tool_choice": "required"}, 400, "tool_choice", None, "when tools are given"),
    (CHAT, {"response_format": {"type": "xml"}}, 400, "response_format", None, "'json_object'"),
    (CHAT, {"modalities": ["audio"]}, 400, "modalities", "unsupported_parameter", "only produces text"),
    (CHAT, {"audio": {"voice": "x"}}, 400, "audio", "unsupported_parameter", "audio"),
    (CHAT, {"chat_template": "{{ 1 }}"}, 400, "chat_template", "not_allowed", "cannot be set"),
    (CHAT, {"chat_template_kwargs": {"messages": []}}, 400, "chat_template_kwargs", "not_allowed", "'messages'"),
    (CHAT, {"chat_template_kwargs": {"tokenize": True}}, 400, "chat_template_kwargs", "not_allowed", "'tokenize'"),
    (CHAT, {"chat_template_kwargs": {"nobody": 1}}, 400, "chat_template_kwargs", "not_allowed", "does not read"),
    (CHAT, {"documents": [{"text": "x"}]}, 400, "documents", "unsupported_parameter", "does not read them"),
    (CHAT, {"documents": "x"}, 400, "documents", "invalid_type", "must be an array"),
    (CHAT, {"continue_final_message": True}, 400, "continue_final_message", None, "assistant"),
    ("/tokenize", {"prompt": None}, 400, "prompt", None, "either prompt or messages"),
    ("/detokenize", {"tokens": [2**70]}, 400, "tokens", None, "out of vocabulary"),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path, fields, status, param, code, words", ROWS, ids=[f"{r[0]}-{r[1]}"[:60] for r in ROWS])
def test_bad_field_is_named(
    server: RunningServer,
    path: str,
    fields: dict[str, Any],
    status: int,
    param: str,
    code: str | None,
    words: str,
    stream: bool,
) -> None:
    base: dict[str, Any] = {"prompt": "Hello"} if path == COMPLETIONS else {}
    if path == CHAT:
        base = {"messages": [{"role": "user", "content": "Hello"}]}
    if stream and "stream_options" not in fields and path in (COMPLETIONS, CHAT):
        base["stream"] = True
    reply = server.ask("POST", path, base | fields)
    error = reply.error
    assert (reply.status, error["param"]) == (status, param), error
    assert words in error["message"] and len(error["message"]) <= 500
    if code is not None:
        assert error["code"] == code


@pytest.mark.parametrize(
    "body, code",
    [
        (b"", "invalid_json"),
        (b"   ", "invalid_json"),
        (b'{"prompt": "x"', "invalid_json"),
        (b'{"prompt": "x"} {}', "invalid_json"),
        (b'{"prompt": "\xff"}', "invalid_json"),
        (b'{"other": "\xff", "prompt": "x"}', "invalid_json"),
        (b'{"prompt": "\\ud800"}', "invalid_json"),
        (b'{"prompt": "x", "temperature": NaN}', "invalid_json"),
        (b'{"prompt": "x", "temperature": 1e999}', "invalid_json"),
        (b"[" * 100_000, None),
        (b'{"other": ' + b"[" * 100_000, "invalid_json"),
        (b"[1]", "invalid_type"),
        (b'"text"', "invalid_type"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_unreadable_body_is_a_400(server: RunningServer, body: bytes, code: str | None) -> None:
    reply = server.ask("POST", COMPLETIONS, body)
    assert reply.status == 400 and reply.error["type"] == "invalid_request_error"
    assert code is None or reply.error["code"] == code


def test_protocol_errors_have_the_same_shape(server: RunningServer) -> None:
    assert server.ask("GET", "/nope").error["code"] == "not_found"
    wrong_method = server.ask("GET", COMPLETIONS)
    assert wrong_method.status == 405 and wrong_method.headers["Allow"] == "POST"
    assert wrong_method.error["code"] == "method_not_allowed"
    form = server.ask("POST", COMPLETIONS, b"a=b", headers={"Content-Type": "application/x-www-form-urlencoded"})
    assert form.status == 415 and form.error["code"] == "unsupported_media_type"
    assert server.ask("GET", "/v1/models/none").status == 404


@pytest.mark.parametrize("chunked", [False, True])
def test_body_over_the_limit_is_a_413(chunked: bool) -> None:
    from fastllm.server.limits import Limits

    with running_server(limits=Limits(max_body_bytes=1000)) as server:

        async def parts():
            for _ in range(50):
                yield b"x" * 100

        if chunked:

            async def send():
                async with aiohttp.ClientSession() as session:
                    headers = {"Content-Type": "application/json"}
                    async with session.post(server.url + COMPLETIONS, data=parts(), headers=headers) as response:
                        return response.status, await response.json()

            status, body = asyncio.run(send())
            assert status == 413 and body["error"]["code"] == "content_too_large"
        else:
            reply = server.ask("POST", COMPLETIONS, b"x" * 1001)
            assert reply.status == 413 and reply.error["code"] == "content_too_large"
        server.check_alive()


def test_unhandled_exception_is_a_500_without_details(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def explode(*_: object, **__: object) -> None:
        raise RuntimeError("secret /home/somebody/model.py")

    monkeypatch.setattr(type(server.state.llm), "generate", explode)
    for stream in (False, True):
        reply = server.complete(stream=stream)
        assert reply.status == 500 and reply.error["type"] == "server_error"
        assert b"secret" not in reply.body and b".py" not in reply.body
    assert "secret" in caplog.text
    monkeypatch.undo()
    server.check_alive()


def test_connection_survives_errors(server: RunningServer) -> None:
    async def work() -> None:
        connector = aiohttp.TCPConnector(limit=1)
        async with aiohttp.ClientSession(connector=connector) as session:
            ports = set()
            for body in (b"{", b'{"prompt": 5}', b'{"prompt": "Hi", "max_tokens": 1}') * 5:
                headers = {"Content-Type": "application/json"}
                async with session.post(server.url + COMPLETIONS, data=body, headers=headers) as response:
                    assert response.connection is None or response.connection.transport is not None
                    if response.connection is not None and response.connection.transport is not None:
                        ports.add(response.connection.transport.get_extra_info("sockname"))
                    assert response.status in (200, 400)
                    await response.read()
            assert len(ports) <= 1, "an error closed a keep-alive connection"

    asyncio.run(work())


def test_request_id_is_returned_on_every_answer(server: RunningServer) -> None:
    for path in ("/health", "/nope", "/v1/models"):
        assert server.ask("GET", path, headers={"X-Request-Id": "mine-1"}).headers["X-Request-Id"] == "mine-1"
        assert len(server.ask("GET", path).headers["X-Request-Id"]) == 32
    body = {"prompt": "x", "max_tokens": 1}
    reply = server.ask("POST", COMPLETIONS, body, headers={"X-Request-Id": "mine-2"})
    assert reply.headers["X-Request-Id"] == "mine-2" and reply.json["id"] == "cmpl-mine-2"
    streamed = server.ask("POST", COMPLETIONS, body | {"stream": True}, headers={"X-Request-Id": "mine-3"})
    assert streamed.headers["X-Request-Id"] == "mine-3" and streamed.events[0]["id"] == "cmpl-mine-3"
    assert server.complete(request_id="mine-4", max_tokens=1).json["id"] == "cmpl-mine-4"
    assert server.chat(request_id="mine-5", max_tokens=1).json["id"] == "chatcmpl-mine-5"
    assert "<" not in server.complete(request_id="<b>", max_tokens=1).json["id"]
    for bad in ("a b", "../x", "x" * 129, "a;b"):
        assert server.ask("GET", "/health", headers={"X-Request-Id": bad}).headers["X-Request-Id"] != bad


def test_same_request_id_twice_at_once_is_served_twice(server: RunningServer) -> None:
    async def work() -> list[int]:
        async with aiohttp.ClientSession() as session:
            body = {"prompt": "x", "max_tokens": 200, "ignore_eos": True}
            headers = {"X-Request-Id": "twin"}
            tasks = [ask(session, "POST", server.url + COMPLETIONS, body, headers=headers) for _ in range(4)]
            return [reply.status for reply in await asyncio.gather(*tasks)]

    assert asyncio.run(work()) == [200] * 4
