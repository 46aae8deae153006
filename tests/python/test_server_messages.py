"""/v1/messages and its token count, through raw requests and through Anthropic's own client."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fastllm.server.messages_input import to_chat
from fastllm.server.messages_protocol import Block, MessageParam, MessagesRequest
from fastllm.server.protocol import ChatMessage, ContentPart
from server_fixtures import CONTEXT, Reply, RunningServer, running_server

anthropic = pytest.importorskip("anthropic", reason="needs Anthropic's client: pip install anthropic")
PATH = "/v1/messages"
USER: Any = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def server():
    with running_server(api_keys=["secret"]) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: RunningServer):
    with anthropic.Anthropic(base_url=server.url, api_key="secret", max_retries=0) as made:
        yield made


def send(server: RunningServer, **fields: Any) -> Reply:
    body = {"model": "null", "messages": USER, "max_tokens": 8, **fields}
    return server.ask("POST", PATH, body, headers={"X-Api-Key": "secret", "anthropic-version": "2023-06-01"})


def chat(server: RunningServer, **fields: Any) -> Any:
    headers = {"Authorization": "Bearer secret"}
    return server.ask("POST", "/v1/chat/completions", {"model": "null", **fields}, headers=headers).json


def test_answer_has_the_official_shape(server: RunningServer) -> None:
    body = send(server, ignore_eos=True).json
    (block,) = body.pop("content")
    assert block["type"] == "text" and block["text"]
    assert body.pop("id").startswith("msg_")
    usage = body.pop("usage")
    assert usage["output_tokens"] == 8 and usage["input_tokens"] > 0 and usage["cache_creation_input_tokens"] == 0
    assert body == {
        "type": "message",
        "role": "assistant",
        "model": "null",
        "stop_reason": "max_tokens",
        "stop_sequence": None,
    }


def test_message_is_the_chat_it_amounts_to(server: RunningServer) -> None:
    blocks = [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}, {"type": "text", "text": "b"}]
    body = send(server, system=blocks, messages=[{"role": "user", "content": blocks}], seed=1, max_tokens=9).json
    messages = [{"role": "system", "content": "a\nb"}, {"role": "user", "content": "a\nb"}]
    same = chat(server, messages=messages, seed=1, max_tokens=9)
    assert body["content"][0]["text"] == same["choices"][0]["message"]["content"]


def test_events_come_in_the_official_order_and_agree_with_the_answer(server: RunningServer) -> None:
    fields = {"max_tokens": 40, "ignore_eos": True, "seed": 5}
    whole = send(server, **fields).json
    parts = send(server, **fields, stream=True).body.decode().split("\n\n")
    assert parts.pop() == ""
    events = [json.loads(part.split("\n")[1].removeprefix("data: ")) for part in parts]
    assert [f"event: {event['type']}" for event in events] == [part.split("\n")[0] for part in parts]
    kinds = [event["type"] for event in events]
    assert kinds[:3] == ["message_start", "ping", "content_block_start"]
    assert set(kinds[3:-3]) == {"content_block_delta"}
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert "".join(event["delta"]["text"] for event in events[3:-3]) == whole["content"][0]["text"]
    start, end = events[0]["message"], events[-2]
    assert start["content"] == [] and start["stop_reason"] is None and start["usage"]["output_tokens"] == 0
    assert end["delta"] == {"stop_reason": "max_tokens", "stop_sequence": None}
    total = sum(end["usage"][name] for name in ("input_tokens", "cache_read_input_tokens"))
    assert end["usage"]["output_tokens"] == 40 and total == sum(
        whole["usage"][name] for name in ("input_tokens", "cache_read_input_tokens")
    )


def test_stop_sequence_ends_the_message_and_is_named(client: Any) -> None:
    fields = {"model": "null", "messages": USER, "max_tokens": 40, "extra_body": {"ignore_eos": True, "seed": 5}}
    text = client.messages.create(**fields).content[0].text
    stop = next(char for char in text[1:] if char.isascii())
    for answer in (
        client.messages.create(**fields, stop_sequences=["never there", stop]),
        client.messages.stream(**fields, stop_sequences=["never there", stop]).__enter__().get_final_message(),
    ):
        assert (answer.stop_reason, answer.stop_sequence) == ("stop_sequence", stop)
        assert answer.content[0].text == text[: text.index(stop)]


def test_limit_beyond_the_context_is_cut_and_said(client: Any) -> None:
    filler = "x" * (CONTEXT - 60)
    fields = {"model": "null", "extra_body": {"ignore_eos": True}}
    answer = client.messages.create(messages=[{"role": "user", "content": filler}], max_tokens=4096, **fields)
    assert answer.stop_reason == "model_context_window_exceeded"
    assert answer.usage.input_tokens + answer.usage.cache_read_input_tokens + answer.usage.output_tokens == CONTEXT


def test_answer_goes_on_where_the_callers_words_stop(server: RunningServer) -> None:
    messages = [*USER, {"role": "assistant", "content": "Once upon"}]
    body = send(server, messages=messages, seed=3).json
    same = chat(server, messages=messages, continue_final_message=True, seed=3, max_tokens=8)
    assert body["content"][0]["text"] == same["choices"][0]["message"]["content"]


def test_tool_blocks_become_chat_messages() -> None:
    request = MessagesRequest(
        messages=[
            MessageParam("user", "What is the weather?"),
            MessageParam(
                "assistant",
                [
                    Block("thinking", thinking="Ask f."),
                    Block("text", text="I ask."),
                    Block("tool_use", id="1", name="f", input={"city": "Köln"}),
                ],
            ),
            MessageParam(
                "user",
                [
                    Block("tool_result", tool_use_id="1", content=[Block("text", text="rain")]),
                    Block("text", text="And now?"),
                ],
            ),
        ]
    )
    _, call, result, question = to_chat(request).messages
    assert call.content == [ContentPart("text", "I ask.")] and call.reasoning_content == "Ask f."
    assert call.tool_calls == [
        {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"city": "Köln"}'}}
    ]
    assert result == ChatMessage("tool", [ContentPart("text", "rain")], tool_call_id="1")
    assert question == ChatMessage("user", [ContentPart("text", "And now?")])


def test_what_agents_always_send_is_taken_by_every_model(server: RunningServer) -> None:
    plain = send(server, seed=1).json
    extras: list[dict[str, Any]] = [
        {"thinking": {"type": "enabled", "budget_tokens": 1024}},
        {"thinking": {"type": "adaptive"}, "output_config": {"effort": "high"}},
        {"context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}},
        {"metadata": {"user_id": "u"}, "service_tier": "auto"},
    ]
    for extra in extras:
        assert send(server, seed=1, **extra).json["content"] == plain["content"], extra


def test_counted_tokens_are_the_ones_that_are_used(client: Any) -> None:
    counted = client.messages.count_tokens(model="null", messages=USER, system="Be brief.")
    answer = client.messages.create(model="null", messages=USER, system="Be brief.", max_tokens=1)
    assert counted.input_tokens == answer.usage.input_tokens + answer.usage.cache_read_input_tokens > 0


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"max_tokens": None}, "max_tokens is required"),
    ({"max_tokens": 0}, "max_tokens must be at least 1"),
    ({"messages": []}, "messages must contain"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "'image'"),
    ({"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]}, "tool_use_id"),
    ({"messages": [{"role": "user", "content": "x" * CONTEXT}]}, "context"),
    ({"system": 5}, "system must be"),
    ({"stop_sequences": [""]}, "stop_sequences cannot contain an empty string"),
    ({"stop_sequences": ["x"] * 17}, "stop_sequences takes at most"),
    ({"temperature": 3}, "temperature"),
    ({"top_k": -2}, "top_k"),
    ({"n": 2}, "n must be 1"),
    ({"thinking": {"type": "hard"}}, "thinking.type"),
    ({"container": "x"}, "container"),
    ({"mcp_servers": [{}]}, "mcp_servers"),
    ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type"),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("fields, words", REFUSED, ids=[f"{row[1][:16]}-{i}" for i, row in enumerate(REFUSED)])
def test_what_cannot_be_honoured_is_refused_in_anthropics_shape(
    server: RunningServer, fields: dict[str, Any], words: str, stream: bool
) -> None:
    reply = send(server, **fields, stream=stream)
    assert reply.status == 400 and set(reply.json) == {"type", "error"} and reply.json["type"] == "error"
    error = reply.json["error"]
    assert set(error) == {"type", "message"} and error["type"] == "invalid_request_error"
    assert words in error["message"], error


def test_client_maps_errors(server: RunningServer, client: Any) -> None:
    with pytest.raises(anthropic.BadRequestError, match="max_tokens") as bad:
        client.messages.create(model="null", messages=USER, max_tokens=0)
    assert bad.value.type == "invalid_request_error" and bad.value.request_id
    with pytest.raises(anthropic.NotFoundError) as missing:
        client.messages.create(model="nope", messages=USER, max_tokens=1)
    assert missing.value.type == "not_found_error"
    stranger = anthropic.Anthropic(base_url=server.url, api_key="wrong", max_retries=0)
    with pytest.raises(anthropic.AuthenticationError) as refused:
        stranger.messages.create(model="null", messages=USER, max_tokens=1)
    assert refused.value.type == "authentication_error"
    wrong_method = server.ask("GET", PATH, headers={"X-Api-Key": "secret"})
    assert wrong_method.status == 405 and wrong_method.json["error"]["type"] == "invalid_request_error"
    huge = b" " * ((8 << 20) + 1)
    too_large = server.ask("POST", PATH, huge, headers={"X-Api-Key": "secret"})
    assert too_large.status == 413 and too_large.json["error"]["type"] == "request_too_large"


def test_full_queue_is_a_rate_limit_error() -> None:
    from fastllm.server.limits import Limits

    with running_server({"max_num_seqs": 1}, limits=Limits(max_waiting=0)) as server:
        client = anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0)
        fields: Any = {"model": "null", "messages": USER, "max_tokens": 30_000, "extra_body": {"ignore_eos": True}}
        with client.messages.stream(**fields) as stream:
            next(iter(stream))
            with pytest.raises(anthropic.RateLimitError) as refused:
                client.messages.create(model="null", messages=USER, max_tokens=1)
            assert refused.value.type == "rate_limit_error" and refused.value.response.headers["Retry-After"]
        server.wait_idle()  # leaving the stream has freed its place
        assert client.messages.create(model="null", messages=USER, max_tokens=1).usage.output_tokens == 1


def test_failure_after_the_first_byte_is_an_error_event() -> None:
    with running_server() as server:
        client = anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0)
        fields: Any = {"model": "null", "messages": USER, "max_tokens": 30_000, "extra_body": {"ignore_eos": True}}
        with pytest.raises(anthropic.APIStatusError) as failed, client.messages.stream(**fields) as stream:
            for index, _ in enumerate(stream):
                if index == 3:
                    server._loop.call_soon_threadsafe(server.state.llm.shutdown)
        assert failed.value.type == "api_error"
