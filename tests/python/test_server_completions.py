"""/v1/completions: what the wire carries, streamed and not."""

from __future__ import annotations

import pytest

from server_fixtures import RunningServer, running_server


@pytest.fixture(scope="module")
def server():
    with running_server({"served_model_name": ["null", "alias"]}) as running:
        yield running
        running.check_alive()


def test_max_tokens_defaults_to_16(server: RunningServer) -> None:
    assert server.complete(ignore_eos=True).json["usage"]["completion_tokens"] == 16


def test_alias_is_served_and_answers_with_the_first_name(server: RunningServer) -> None:
    assert server.complete(model="alias", max_tokens=1).json["model"] == "null"
    assert server.ask("GET", "/v1/models/alias").json["id"] == "alias"


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("prompt", ["Hello", ["Hello", "World"]])
def test_streamed_text_equals_the_answer(server: RunningServer, prompt: object, n: int) -> None:
    fields = {"prompt": prompt, "n": n, "max_tokens": 60, "seed": 7, "ignore_eos": True}
    whole = server.complete(**fields).json
    reply = server.complete(**fields, stream=True, stream_options={"include_usage": True})
    assert reply.headers["Content-Type"] == "text/event-stream; charset=utf-8"
    *chunks, last = reply.events
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    assert len({chunk["id"] for chunk in (*chunks, last)}) == 1
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
    prompts = 1 if isinstance(prompt, str) else len(prompt)
    assert [choice["index"] for choice in whole["choices"]] == list(range(prompts * n))
    for expected in whole["choices"]:
        mine = [choice for choice in choices if choice["index"] == expected["index"]]
        assert "".join(choice["text"] for choice in mine) == expected["text"]
        assert [choice["finish_reason"] for choice in mine if choice["finish_reason"]] == ["length"]
        assert mine[-1]["finish_reason"] == "length"


def test_stream_without_options_carries_no_usage(server: RunningServer) -> None:
    events = server.complete(stream=True, max_tokens=3).events
    assert all("usage" not in event for event in events)


def test_continuous_usage_counts_up(server: RunningServer) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    events = server.complete(stream=True, max_tokens=200, ignore_eos=True, stream_options=options).events
    counts = [event["usage"]["completion_tokens"] for event in events]
    assert counts == sorted(counts) and counts[-1] == 200


@pytest.mark.parametrize(
    "prompt, expected",
    [([72, 105], 2), ([[72, 105], [72]], 3), (["Hi", "H"], 3), ("Hi", 2)],
)
def test_prompts_may_be_text_or_token_ids(server: RunningServer, prompt: object, expected: int) -> None:
    assert server.complete(prompt=prompt, max_tokens=1).json["usage"]["prompt_tokens"] == expected


def test_token_ids_and_text_give_the_same_answer(server: RunningServer) -> None:
    texts = [server.complete(prompt=p, seed=1).json["choices"][0]["text"] for p in ("Hi", [72, 105])]
    assert texts[0] == texts[1]


def test_echo_repeats_the_prompt_streamed_and_not(server: RunningServer) -> None:
    fields = {"prompt": "Hi", "echo": True, "max_tokens": 8, "seed": 3, "logprobs": 1}
    whole = server.complete(**fields).json["choices"][0]
    streamed = [event["choices"][0] for event in server.complete(**fields, stream=True).events]
    assert whole["text"].startswith("Hi")
    assert "".join(choice["text"] for choice in streamed) == whole["text"]
    for key in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        joined = [value for choice in streamed if choice["logprobs"] for value in choice["logprobs"][key]]
        assert joined == whole["logprobs"][key], key
    assert whole["logprobs"]["tokens"][:2] == ["H", "i"]
    assert whole["logprobs"]["token_logprobs"][0] is None and whole["logprobs"]["top_logprobs"][0] is None


def test_echo_with_max_tokens_0_returns_the_prompt_alone(server: RunningServer) -> None:
    body = server.complete(prompt="Hi", echo=True, max_tokens=0, logprobs=0).json
    assert body["choices"][0]["text"] == "Hi" and len(body["choices"][0]["logprobs"]["tokens"]) == 2
    assert body["usage"]["completion_tokens"] == 0
    events = server.complete(prompt="Hi", echo=True, max_tokens=0, stream=True).events
    assert "".join(event["choices"][0]["text"] for event in events) == "Hi"


def test_logprobs_contain_the_sampled_token(server: RunningServer) -> None:
    logprobs = server.complete(logprobs=3, max_tokens=20, ignore_eos=True).json["choices"][0]["logprobs"]
    assert {len(values) for values in logprobs.values()} == {20}
    for token, value, top in zip(logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True):
        assert token in top and value <= 0 and 1 <= len(top) <= 4


def test_prompt_logprobs_have_one_entry_per_token(server: RunningServer) -> None:
    values = server.complete(prompt="Hey", prompt_logprobs=2).json["choices"][0]["prompt_logprobs"]
    assert values[0] is None and len(values) == 3
    assert str(ord("y")) in values[2] and set(values[2][str(ord("y"))]) == {"logprob", "rank", "decoded_token"}


def test_return_token_ids(server: RunningServer) -> None:
    whole = server.complete(return_token_ids=True, max_tokens=40, seed=1).json["choices"][0]
    streamed = server.complete(return_token_ids=True, max_tokens=40, seed=1, stream=True).events
    choices = [event["choices"][0] for event in streamed]
    assert whole["prompt_token_ids"] == list(b"Hello") == choices[0]["prompt_token_ids"]
    assert [id for choice in choices for id in choice["token_ids"]] == whole["token_ids"]


def test_stop_string_ends_the_text_before_it(server: RunningServer) -> None:
    fields = {"max_tokens": 400, "ignore_eos": True, "seed": 1}
    text = server.complete(**fields).json["choices"][0]["text"]
    position = next(i for i in range(20, 300) if text[i : i + 2].isascii() and "\ufffd" not in text[i : i + 2])
    stop = text[position : position + 2]
    expected = text[: text.index(stop)]
    for include, wanted in ((False, expected), (True, expected + stop)):
        choice = server.complete(**fields, stop=[stop], include_stop_str_in_output=include).json["choices"][0]
        assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == (wanted, "stop", stop)
        streamed = server.complete(**fields, stop=stop, include_stop_str_in_output=include, stream=True).events
        assert "".join(event["choices"][0]["text"] for event in streamed) == wanted


def test_stop_token_id_is_the_stop_reason(server: RunningServer) -> None:
    tokens = server.complete(max_tokens=30, ignore_eos=True, seed=1, return_token_ids=True).json["choices"][0]
    stop = tokens["token_ids"][10]
    choice = server.complete(max_tokens=30, ignore_eos=True, seed=1, stop_token_ids=[stop]).json["choices"][0]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)


def test_truncate_keeps_the_last_tokens(server: RunningServer) -> None:
    fields = {"max_tokens": 8, "seed": 1}
    cut = server.complete(prompt="Hello", truncate_prompt_tokens=2, **fields).json
    short = server.complete(prompt="lo", **fields).json
    assert cut["usage"]["prompt_tokens"] == 2 and cut["choices"][0]["text"] == short["choices"][0]["text"]


def test_second_identical_prompt_reports_cached_tokens(server: RunningServer) -> None:
    prompt = "The same beginning, long enough for several blocks of the cache." * 2
    server.complete(prompt=prompt, max_tokens=1)
    second = server.complete(prompt=prompt, max_tokens=1).json["usage"]
    assert second["prompt_tokens_details"]["cached_tokens"] >= 16
    salted = server.complete(prompt=prompt, max_tokens=1, cache_salt="another tenant").json["usage"]
    assert salted["prompt_tokens_details"]["cached_tokens"] == 0


def test_unknown_fields_are_ignored(server: RunningServer) -> None:
    assert server.complete(max_tokens=1, no_such_field={"a": [1]}, user="somebody").status == 200
