"""/v1/chat/completions, through raw requests and through the official client."""

from __future__ import annotations

import openai
import pytest

from server_fixtures import CONTEXT, RunningServer, running_server

MESSAGES = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def server():
    with running_server() as running:
        yield running
        running.check_alive()


@pytest.fixture(scope="module")
def client(server: RunningServer):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def test_stream_sends_role_then_content_then_finish_then_usage(server: RunningServer) -> None:
    fields = {"max_tokens": 50, "ignore_eos": True, "seed": 4}
    whole = server.chat(**fields).json["choices"][0]["message"]["content"]
    events = server.chat(**fields, stream=True, stream_options={"include_usage": True}).events
    role, *contents, finish, usage = events
    assert role["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert all(set(event["choices"][0]["delta"]) == {"content"} for event in contents)
    assert "".join(event["choices"][0]["delta"]["content"] for event in contents) == whole
    assert finish["choices"][0]["delta"] == {} and finish["choices"][0]["finish_reason"] == "length"
    assert usage["choices"] == [] and usage["usage"]["completion_tokens"] == 50
    assert len({event["id"] for event in events}) == 1
    assert all(event["object"] == "chat.completion.chunk" for event in events)


def test_missing_max_tokens_means_the_rest_of_the_context(server: RunningServer) -> None:
    filler = "x" * (CONTEXT - 60)
    body = server.chat(messages=[{"role": "user", "content": filler}], ignore_eos=True).json
    assert body["usage"]["total_tokens"] == CONTEXT and body["choices"][0]["finish_reason"] == "length"


def test_max_completion_tokens_is_another_name_of_max_tokens(server: RunningServer) -> None:
    assert server.chat(max_tokens=9, max_completion_tokens=3).status == 400
    usage = server.chat(max_tokens=3, max_completion_tokens=3, ignore_eos=True).json["usage"]
    assert usage["completion_tokens"] == 3


def test_text_parts_are_joined(server: RunningServer) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    tokens = server.chat(messages=[{"role": "user", "content": parts}], max_tokens=1).json["usage"]["prompt_tokens"]
    assert (
        tokens
        == server.chat(messages=[{"role": "user", "content": "a\nb"}], max_tokens=1).json["usage"]["prompt_tokens"]
    )


def test_template_syntax_in_content_stays_text(server: RunningServer) -> None:
    content = "{{ 7*7 }}{% for x in y %}"
    tokenized = server.ask("POST", "/tokenize", {"messages": [{"role": "user", "content": content}]}).json["tokens"]
    assert content in server.ask("POST", "/detokenize", {"tokens": tokenized}).json["prompt"]


def test_logprobs_carry_bytes_and_alternatives(server: RunningServer) -> None:
    fields = {"logprobs": True, "top_logprobs": 2, "max_tokens": 12, "seed": 5, "ignore_eos": True}
    content = server.chat(**fields).json["choices"][0]["logprobs"]["content"]
    assert len(content) == 12
    for entry in content:
        assert set(entry) == {"token", "logprob", "bytes", "top_logprobs"} and len(entry["top_logprobs"]) == 2
    streamed = [
        entry
        for event in server.chat(**fields, stream=True).events
        if event["choices"][0]["logprobs"]
        for entry in event["choices"][0]["logprobs"]["content"]
    ]
    assert streamed == content
    none = server.chat(logprobs=True, max_tokens=1).json["choices"][0]["logprobs"]["content"]
    assert none[0]["top_logprobs"] == []


def test_continue_final_message_leaves_the_last_message_open(server: RunningServer) -> None:
    messages = [*MESSAGES, {"role": "assistant", "content": "Once upon"}]
    opened = server.ask("POST", "/tokenize", {"messages": messages, "continue_final_message": True})
    text = server.ask("POST", "/detokenize", {"tokens": opened.json["tokens"]}).json["prompt"]
    assert text.endswith("Once upon")
    assert server.chat(messages=messages, continue_final_message=True, max_tokens=2).status == 200


def test_chat_equals_completion_of_its_tokens(server: RunningServer) -> None:
    tokens = server.ask("POST", "/tokenize", {"messages": MESSAGES}).json["tokens"]
    chat = server.chat(messages=MESSAGES, seed=2, max_tokens=9).json
    completion = server.complete(prompt=tokens, seed=2, max_tokens=9).json
    assert chat["choices"][0]["message"]["content"] == completion["choices"][0]["text"]


def test_official_client_reads_answers_and_streams(client: openai.OpenAI) -> None:
    fields = {"model": "null", "messages": MESSAGES, "seed": 1, "max_completion_tokens": 20}
    answer = client.chat.completions.create(**fields, n=2, logprobs=True, top_logprobs=3)
    assert len(answer.choices) == 2 and answer.usage is not None and answer.usage.prompt_tokens > 0
    text = client.chat.completions.create(**fields).choices[0].message.content
    chunks = list(client.chat.completions.create(**fields, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == text
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens <= 20


def test_official_client_reads_completions_and_models(client: openai.OpenAI) -> None:
    completion = client.completions.create(model="null", prompt=["a", "b"], n=2, logprobs=1, max_tokens=3)
    assert [choice.index for choice in completion.choices] == [0, 1, 2, 3]
    assert [model.id for model in client.models.list()] == ["null"]
    assert client.models.retrieve("null").id == "null"


def test_official_client_maps_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="nope", messages=MESSAGES)
    assert missing.value.code == "model_not_found" and missing.value.param == "model"
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model="null", prompt="x" * CONTEXT)
    assert long.value.code == "context_length_exceeded"
