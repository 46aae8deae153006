"""Whole answers as they leave the server, with ids, times, versions and texts masked."""

from __future__ import annotations

from typing import Any

import pytest

from server_fixtures import CONTEXT, RunningServer, running_server


@pytest.fixture(scope="module")
def server():
    with running_server({"served_model_name": ["null", "org/alias"]}) as running:
        yield running
        running.check_alive()


def masked(document: Any) -> Any:
    """The document with "*" for what differs from run to run; each masked value must have its type."""
    kinds = {"id": str, "created": int, "system_fingerprint": str, "text": str, "content": str, "logprob": float}
    if isinstance(document, list):
        return [masked(item) for item in document]
    if not isinstance(document, dict):
        return document
    result = {}
    for key, value in document.items():
        is_masked = key in kinds and value not in (None, "") and not isinstance(value, list)
        if is_masked:
            assert isinstance(value, kinds[key]), (key, value)
        result[key] = "*" if is_masked else masked(value)
    return result


USAGE = {
    "prompt_tokens": 5,
    "total_tokens": 9,
    "completion_tokens": 4,
    "prompt_tokens_details": {"cached_tokens": 0},
    "completion_tokens_details": None,
}
PARAMS = {"max_tokens": 4, "ignore_eos": True, "allowed_token_ids": list(b"ab"), "temperature": 0}
STREAM = {"stream": True, "stream_options": {"include_usage": True}}


def joined(events: list[Any], key: str) -> list[Any]:
    """Chunks of text in the middle count as one: how many there are depends on the time."""
    kept: list[Any] = []
    for event in events:
        choice = event["choices"][0] if event["choices"] else {}
        middle = choice.get("finish_reason") is None and (choice.get("text") or choice.get("delta", {}).get("content"))
        if middle and kept and kept[-1] == event:
            continue
        kept.append(event)
    return kept


def test_completion(server: RunningServer) -> None:
    reply = server.complete(**PARAMS)
    assert reply.headers["Content-Type"] == "application/json; charset=utf-8"
    assert reply.headers["Server"] == "fastllm" and reply.headers["X-Request-Id"]
    assert reply.json["id"].startswith("cmpl-") and reply.json["system_fingerprint"].startswith("fastllm-")
    assert masked(reply.json) == {
        "id": "*",
        "object": "text_completion",
        "created": "*",
        "model": "null",
        "choices": [
            {
                "index": 0,
                "text": "*",
                "logprobs": None,
                "finish_reason": "length",
                "stop_reason": None,
                "token_ids": None,
                "prompt_logprobs": None,
                "prompt_token_ids": None,
                "routed_experts": None,
            }
        ],
        "service_tier": None,
        "system_fingerprint": "*",
        "usage": USAGE,
        "kv_transfer_params": None,
        "ec_transfer_params": None,
        "metrics": None,
    }


def test_completion_stream(server: RunningServer) -> None:
    reply = server.complete(**PARAMS, **STREAM)
    assert reply.headers["Content-Type"] == "text/event-stream; charset=utf-8"
    head = {"id": "*", "object": "text_completion", "created": "*", "model": "null"}
    choice = {
        "index": 0,
        "text": "*",
        "logprobs": None,
        "finish_reason": None,
        "stop_reason": None,
        "token_ids": None,
        "prompt_token_ids": None,
    }
    *texts, last, usage = joined([masked(event) for event in reply.events], "text")
    assert texts in ([], [{**head, "choices": [choice], "usage": None}])
    assert last == {**head, "choices": [{**choice, "finish_reason": "length"}], "usage": None}
    assert usage == {**head, "choices": [], "system_fingerprint": "*", "usage": USAGE}


CHAT_USAGE = USAGE | {"prompt_tokens": 26, "total_tokens": 30}
ROLE = {"role": "assistant", "content": ""}


def test_chat(server: RunningServer) -> None:
    body = server.chat(**PARAMS).json
    assert body["id"].startswith("chatcmpl-")
    body["usage"]["prompt_tokens_details"]["cached_tokens"] = 0
    assert masked(body) == {
        "id": "*",
        "object": "chat.completion",
        "created": "*",
        "model": "null",
        "choices": [
            {
                "index": 0,
                "message": {
                    "role": "assistant",
                    "content": "*",
                    "refusal": None,
                    "annotations": None,
                    "audio": None,
                    "function_call": None,
                    "reasoning": None,
                },
                "logprobs": None,
                "finish_reason": "length",
                "stop_reason": None,
                "token_ids": None,
                "routed_experts": None,
            }
        ],
        "service_tier": None,
        "system_fingerprint": "*",
        "usage": body["usage"],
        "prompt_logprobs": None,
        "prompt_token_ids": None,
        "prompt_text": None,
        "kv_transfer_params": None,
        "ec_transfer_params": None,
        "metrics": None,
    }


@pytest.mark.parametrize("n", [1, 2])
def test_chat_stream(server: RunningServer, n: int) -> None:
    events = [masked(event) for event in server.chat(**PARAMS, **STREAM, n=n).events]
    head = {"id": "*", "object": "chat.completion.chunk", "created": "*", "model": "null"}
    usage = events.pop()
    usage["usage"] = None
    assert usage == {**head, "choices": [], "system_fingerprint": "*", "usage": None}
    for index in range(n):
        mine = [event for event in events if event["choices"][0]["index"] == index]
        role, *texts, finish = joined(mine, "content")
        opening = {"index": index, "delta": ROLE, "logprobs": None, "finish_reason": None}
        assert role == {**head, "choices": [opening], "usage": None, "prompt_token_ids": None, "prompt_text": None}
        text = {**opening, "delta": {"content": "*"}, "token_ids": None}
        assert texts == [{**head, "choices": [text], "usage": None}]
        end = {**text, "delta": {}, "finish_reason": "length", "stop_reason": None}
        assert finish == {**head, "choices": [end], "usage": None}


def test_logprobs_of_a_completion(server: RunningServer) -> None:
    fields = {**PARAMS, "max_tokens": 1, "prompt": "Hi", "echo": True, "logprobs": 0}
    logprobs = server.complete(**fields).json["choices"][0]["logprobs"]
    text = logprobs["tokens"][2]
    first, *values = logprobs["token_logprobs"]
    assert first is None and all(value <= 0 for value in values)
    assert logprobs == {
        "text_offset": [0, 1, 2],
        "token_logprobs": [None, *values],
        "tokens": ["H", "i", text],
        "top_logprobs": [None, {"i": values[0]}, {text: values[1]}],
    }


def test_logprobs_of_a_chat(server: RunningServer) -> None:
    body = server.chat(**PARAMS | {"max_tokens": 1}, logprobs=True, top_logprobs=1).json
    (entry,) = body["choices"][0]["logprobs"]["content"]
    (top,) = entry.pop("top_logprobs")
    assert set(body["choices"][0]["logprobs"]) == {"content"}
    for item in (entry, top):
        assert set(item) == {"token", "logprob", "bytes"} and item["logprob"] <= 0
    assert entry["token"] in ("a", "b") and entry["bytes"] == list(entry["token"].encode())


def test_prompt_logprobs(server: RunningServer) -> None:
    values = server.complete(prompt="Hi", max_tokens=1, prompt_logprobs=0).json["choices"][0]["prompt_logprobs"]
    assert masked(values) == [None, {"105": {"logprob": "*", "rank": 1, "decoded_token": "i"}}]


def test_models(server: RunningServer) -> None:
    def card(name: str) -> dict[str, Any]:
        permission = {
            "id": "*",
            "object": "model_permission",
            "created": "*",
            "allow_create_engine": False,
            "allow_sampling": True,
            "allow_logprobs": True,
            "allow_search_indices": False,
            "allow_view": True,
            "allow_fine_tuning": False,
            "organization": "*",
            "group": None,
            "is_blocking": False,
        }
        model = {"object": "model", "owned_by": "fastllm", "root": "null", "parent": None, "max_model_len": CONTEXT}
        return {"id": "*", "created": "*", "permission": [permission], **model}

    listed = server.ask("GET", "/v1/models").json
    assert [model["id"] for model in listed["data"]] == ["null", "org/alias"]
    assert masked(listed) == {"object": "list", "data": [card("null"), card("org/alias")]}
    for path in ("/v1/models/org/alias", "/v1/models/org%2Falias"):
        assert server.ask("GET", path).json["id"] == "org/alias"
    missing = server.ask("GET", "/v1/models/org/none")
    assert missing.status == 404 and missing.error["code"] == "model_not_found"


def test_error(server: RunningServer) -> None:
    reply = server.complete(temperature=-1)
    assert reply.status == 400 and reply.json == {
        "error": {
            "message": "temperature must be non-negative, got -1.0.",
            "type": "invalid_request_error",
            "param": "temperature",
            "code": "invalid_value",
        }
    }


def test_tokenize_and_detokenize(server: RunningServer) -> None:
    whole = server.ask("POST", "/tokenize", {"prompt": "Hé y", "return_token_strs": True}).json
    assert whole == {
        "count": 5,
        "max_model_len": CONTEXT,
        "tokens": [72, 195, 169, 32, 121],
        "token_strs": ["H", "Ã", "©", "Ġ", "y"],  # as the vocabulary spells bytes
    }
    assert server.ask("POST", "/tokenize", {"prompt": ""}).json["tokens"] == []
    assert server.ask("POST", "/detokenize", {"tokens": whole["tokens"]}).json == {"prompt": "Hé y"}
    assert server.ask("POST", "/detokenize", {"tokens": []}).json == {"prompt": ""}
    chat = {"messages": [{"role": "user", "content": "Hi"}], "add_generation_prompt": False}
    tokens = server.ask("POST", "/tokenize", chat).json
    assert tokens["token_strs"] is None and tokens["count"] == len(tokens["tokens"])
    text = server.ask("POST", "/detokenize", {"tokens": tokens["tokens"]}).json["prompt"]
    assert text == "<|im_start|>user\nHi<|im_end|>\n"
    for bad in ({"tokens": [10**6]}, {"tokens": [-1]}, {"tokens": ["a"]}, {}):
        assert server.ask("POST", "/detokenize", bad).status == 400
    for bad in ({}, {"prompt": "a", "messages": []}, {"messages": []}, {"prompt": "x" * 10**6}):
        assert server.ask("POST", "/tokenize", bad).status == 400


def test_request_ids_of_header_and_body_become_part_of_the_id(server: RunningServer) -> None:
    named = server.ask("POST", "/v1/completions", {"prompt": "a", "request_id": "mine"}).json
    headers = {"X-Request-Id": "theirs"}
    reply = server.ask("POST", "/v1/completions", {"prompt": "a", "request_id": "mine"}, headers=headers)
    assert named["id"] == "cmpl-mine" and reply.json["id"] == "cmpl-theirs"
    assert reply.headers["X-Request-Id"] == "theirs"
