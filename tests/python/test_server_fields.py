"""Request fields one by one: what each does to the tokens, and that a stream carries the same."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import aiohttp
import pytest

from server_fixtures import RunningServer, ask, running_server, wait_until

COMPLETIONS = "/v1/completions"
EOS = 258  # of the null model's tokenizer
BASE = {"max_tokens": 40, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
LETTERS = list(range(97, 123))


@pytest.fixture(scope="module")
def server():
    with running_server({"scheduling_policy": "priority"}) as running:
        yield running
        running.check_alive()


def choices(server: RunningServer, **fields: Any) -> list[dict[str, Any]]:
    """The choices of a completion; what a stream and a chat give for the same must be the same."""
    fields = BASE | fields
    reply = server.complete(**fields)
    assert reply.status == 200, reply.body
    whole = reply.json["choices"]
    if fields.get("best_of", 1) == fields.get("n", 1) or fields.get("use_beam_search"):
        events = [event["choices"][0] for event in server.complete(**fields, stream=True).events]
        for choice in whole:
            mine = [event for event in events if event["index"] == choice["index"]]
            assert "".join(event["text"] for event in mine) == choice["text"]
            assert [token for event in mine for token in event["token_ids"]] == choice["token_ids"]
            assert (mine[-1]["finish_reason"], mine[-1]["stop_reason"]) == (
                choice["finish_reason"],
                choice["stop_reason"],
            )
    return whole


def tokens(server: RunningServer, **fields: Any) -> list[int]:
    return choices(server, **fields)[0]["token_ids"]


# ---- which tokens may be sampled


def test_allowed_token_ids_are_the_only_ones(server: RunningServer) -> None:
    assert set(tokens(server, allowed_token_ids=[97, 98, 99])) == {97, 98, 99}
    assert set(tokens(server, allowed_token_ids=[97, 98], temperature=1.5, seed=1)) == {97, 98}
    assert tokens(server, allowed_token_ids=[EOS], ignore_eos=False) == [EOS]


def test_a_bad_word_of_one_token_never_appears(server: RunningServer) -> None:
    free = tokens(server, allowed_token_ids=LETTERS)
    kept = tokens(server, allowed_token_ids=LETTERS, bad_words=[chr(free[3])])
    assert kept[:3] == free[:3] and free[3] not in kept


def test_bad_words_of_several_tokens_never_appear_together(server: RunningServer) -> None:
    free = choices(server, allowed_token_ids=LETTERS)[0]["text"]
    word = free[10:13]
    first = free.index(word)
    text = choices(server, allowed_token_ids=LETTERS, bad_words=[word])[0]["text"]
    assert word not in text and text[: first + 2] == free[: first + 2] and text[first + 2] != free[first + 2]


def test_a_bad_word_in_the_prompt_does_not_count(server: RunningServer) -> None:
    """vLLM looks at the output alone, so a word may be begun in the prompt and ended in the output."""
    free = tokens(server, prompt="xyz", allowed_token_ids=LETTERS)
    assert tokens(server, prompt="xyz", allowed_token_ids=LETTERS, bad_words=["z" + chr(free[0])])[0] == free[0]


def test_lists_and_penalties_combine(server: RunningServer) -> None:
    fields = {"allowed_token_ids": [97, 98, 99, 100], "bad_words": ["ab", "d"], "temperature": 1.0, "seed": 3}
    fields |= {"presence_penalty": 0.5, "repetition_penalty": 1.2, "logit_bias": {"98": 5}}
    text = choices(server, **fields)[0]["text"]
    assert set(text) <= set("abc") and "ab" not in text


def test_nothing_left_to_sample_is_an_error_of_this_request(server: RunningServer) -> None:
    reply = server.complete(**BASE, allowed_token_ids=[97], bad_words=["aa"])
    assert reply.status == 400 and "No token of the vocabulary is allowed" in reply.error["message"]
    server.wait_idle()


def test_min_tokens_holds_off_every_end(server: RunningServer) -> None:
    fields = {"ignore_eos": False, "allowed_token_ids": [97, 98, EOS], "stop_token_ids": [98]}
    assert tokens(server, **fields, min_tokens=12)[:12] == [97] * 12
    free = tokens(server, **fields)
    assert len(free) < 12 or free[:12] == [97] * 12


@pytest.mark.parametrize("skip, text", [(True, ""), (False, "<|im_start|>" * 3)])
@pytest.mark.parametrize("spaces", [True, False])
def test_special_tokens_are_skipped_or_spelled(server: RunningServer, skip: bool, spaces: bool, text: str) -> None:
    fields = {"allowed_token_ids": [257], "max_tokens": 3, "spaces_between_special_tokens": spaces}
    assert choices(server, **fields, skip_special_tokens=skip)[0]["text"] == text


# ---- several sequences of one prompt


def test_n_numbers_the_samples_prompt_by_prompt(server: RunningServer) -> None:
    found = choices(server, prompt=["Hi", "H", "Ho"], n=2, temperature=1, seed=5)
    assert [choice["index"] for choice in found] == [0, 1, 2, 3, 4, 5]
    assert found[0]["token_ids"] != found[1]["token_ids"]
    assert found[2]["token_ids"] == choices(server, prompt="H", temperature=1, seed=5)[0]["token_ids"]


def test_best_of_returns_the_likeliest_and_counts_all(server: RunningServer) -> None:
    fields = {"temperature": 1, "seed": 9, "logprobs": 0, "max_tokens": 6}
    every = choices(server, **fields, n=5)
    body = server.complete(**BASE | fields, n=2, best_of=5).json
    ranked = sorted(every, key=lambda choice: -sum(choice["logprobs"]["token_logprobs"]))
    assert [choice["token_ids"] for choice in body["choices"]] == [choice["token_ids"] for choice in ranked[:2]]
    assert [choice["index"] for choice in body["choices"]] == [0, 1]
    assert body["usage"]["completion_tokens"] == 5 * 6
    chat = server.chat(**fields | {"logprobs": False}, n=1, best_of=3, ignore_eos=True).json
    assert len(chat["choices"]) == 1 and chat["usage"]["completion_tokens"] == 3 * 6


@pytest.mark.parametrize("early", [False, True, "never"])
def test_beams_come_best_first(server: RunningServer, early: object) -> None:
    fields = {"use_beam_search": True, "best_of": 4, "n": 3, "logprobs": 1, "early_stopping": early, "max_tokens": 9}
    found = choices(server, **fields, length_penalty=0.0)
    sums = [sum(choice["logprobs"]["token_logprobs"]) for choice in found]
    assert sums == sorted(sums, reverse=True) and len({tuple(c["token_ids"]) for c in found}) == 3
    greedy = choices(server, logprobs=1, max_tokens=9)[0]
    assert sums[0] >= sum(greedy["logprobs"]["token_logprobs"])
    prompt = server.ask("POST", "/tokenize", {"messages": [{"role": "user", "content": "Hello"}]}).json["tokens"]
    chat = server.chat(**BASE | fields | {"logprobs": True, "top_logprobs": 1}).json
    same = choices(server, **fields, prompt=prompt)
    assert [c["token_ids"] for c in chat["choices"]] == [c["token_ids"] for c in same]
    assert len(chat["choices"][0]["logprobs"]["content"]) == 9


def test_beams_samples_and_ranked_samples_run_together_and_leave_nothing(server: RunningServer) -> None:
    kinds: list[dict[str, Any]] = [
        {"use_beam_search": True, "n": 3, "max_tokens": 30},
        {"n": 3, "temperature": 1, "seed": 1},
        {"n": 1, "best_of": 3, "temperature": 1, "seed": 2},
        {"use_beam_search": True, "n": 2, "best_of": 6, "max_tokens": 12},
    ]

    async def together() -> list[Any]:
        async with aiohttp.ClientSession() as session:
            calls = [ask(session, "POST", server.url + COMPLETIONS, {"prompt": "Hi", **BASE, **k}) for k in kinds * 4]
            return [reply.json["choices"] for reply in await asyncio.gather(*calls)]

    answers = asyncio.run(together())
    for kind, answer in zip(kinds * 4, answers, strict=True):
        alone = server.complete(prompt="Hi", **BASE | kind).json["choices"]
        assert [c["token_ids"] for c in answer] == [c["token_ids"] for c in alone]
    server.wait_idle()


def test_a_client_that_leaves_frees_its_beams(server: RunningServer) -> None:
    async def leave() -> None:
        body = {"prompt": "x" * 100, "use_beam_search": True, "n": 8, "max_tokens": 20000, "ignore_eos": True}
        async with aiohttp.ClientSession() as session:
            call = asyncio.create_task(ask(session, "POST", server.url + COMPLETIONS, body))
            await asyncio.to_thread(wait_until, lambda: server.state.llm.stats().num_running == 8, 10.0)
            call.cancel()

    asyncio.run(leave())
    server.wait_idle()


# ---- how tokens are told


def test_tokens_may_be_named_by_id(server: RunningServer) -> None:
    choice = choices(server, logprobs=2, return_tokens_as_token_ids=True, max_tokens=5)[0]
    logprobs = choice["logprobs"]
    assert logprobs["tokens"] == [f"token_id:{token}" for token in choice["token_ids"]]
    assert all(name.startswith("token_id:") for top in logprobs["top_logprobs"] for name in top)
    body = server.chat(logprobs=True, return_tokens_as_token_ids=True, max_tokens=2, ignore_eos=True).json
    assert all(e["token"].startswith("token_id:") for e in body["choices"][0]["logprobs"]["content"])


def test_text_offsets_count_characters_not_bytes(server: RunningServer) -> None:
    fields = {"prompt": "é€😀x", "echo": True, "max_tokens": 0, "logprobs": 0}
    logprobs = server.complete(**fields).json["choices"][0]["logprobs"]
    assert logprobs["text_offset"] == [0, 0, 1, 1, 1, 2, 2, 2, 2, 3]
    (event,) = server.complete(**fields, stream=True).events
    assert event["choices"][0]["logprobs"] == logprobs and event["choices"][0]["text"] == "é€😀x"


def test_bytes_of_parts_of_a_character_are_exact(server: RunningServer) -> None:
    allowed = list("é€😀".encode())
    body = server.chat(**BASE | {"max_tokens": 20}, allowed_token_ids=allowed, logprobs=True, top_logprobs=1).json
    (choice,) = body["choices"]
    parts = [entry["bytes"] for entry in choice["logprobs"]["content"]]
    assert [part[0] for part in parts] == choice["token_ids"] and {len(part) for part in parts} == {1}
    text = bytes(byte for part in parts for byte in part).decode(errors="replace")
    assert choice["message"]["content"] == text


@pytest.mark.parametrize("include", [False, True])
def test_a_stop_string_is_found_across_tokens_and_chunks(server: RunningServer, include: bool) -> None:
    free = choices(server, allowed_token_ids=LETTERS)[0]["text"]
    stop = free[17:24]
    end = free.index(stop)
    fields = {"stop": ["§", stop], "include_stop_str_in_output": include, "allowed_token_ids": LETTERS}
    choice = server.complete(**BASE | fields).json["choices"][0]
    assert (choice["text"], choice["stop_reason"]) == (free[: end + len(stop) * include], stop)
    events = [event["choices"][0] for event in server.complete(**BASE | fields, stream=True).events]
    assert "".join(event["text"] for event in events) == choice["text"] and events[-1]["stop_reason"] == stop


def test_usage_is_told_as_the_options_say(server: RunningServer) -> None:
    options: list[tuple[dict[str, bool], bool, bool]] = [
        ({}, False, False),
        ({"include_usage": False, "continuous_usage_stats": True}, False, False),
        ({"include_usage": True}, False, True),
        ({"include_usage": True, "continuous_usage_stats": True}, True, True),
    ]
    for option, each, last in options:
        for call in (server.complete, server.chat):
            events = call(stream=True, stream_options=option, max_tokens=4, ignore_eos=True).events
            assert all(bool(event.get("usage")) is each for event in events[:-1])
            assert bool(events[-1].get("usage")) is last and (events[-1]["choices"] == []) is last


# ---- prompts


def test_a_batch_streams_every_prompt_under_its_index(server: RunningServer) -> None:
    fields = {"prompt": ["One", "Two", "Three"], "max_tokens": 60, "allowed_token_ids": LETTERS, "ignore_eos": True}
    events = [event["choices"][0] for event in server.complete(**fields, stream=True, seed=1).events]
    assert {event["index"] for event in events} == {0, 1, 2}
    assert [e["finish_reason"] for e in events if e["finish_reason"]] == ["length"] * 3


@pytest.mark.parametrize("limit", [None, 7])
def test_truncating_to_fit_leaves_room_for_the_output(server: RunningServer, limit: int | None) -> None:
    room = server.state.llm.model_config.max_model_len
    fields = {"prompt": [97] * (room + 5), "truncate_prompt_tokens": -1, "ignore_eos": True}
    usage = server.complete(**fields, **({} if limit is None else {"max_tokens": limit})).json["usage"]
    assert usage["completion_tokens"] == (limit or 16) and usage["total_tokens"] == room


def test_documents_and_variables_reach_a_template_that_reads_them() -> None:
    template = "{{ style }}:{% for d in documents or [] %}{{ d.title }};{% endfor %}{{ messages[0].content }}"
    with running_server({"chat_template": template}) as running:
        body = {"messages": [{"role": "developer", "content": "Hi", "name": "me"}], "documents": [{"title": "T"}]}

        def text(**fields: Any) -> str:
            ids = running.ask("POST", "/tokenize", body | fields).json["tokens"]
            return str(running.ask("POST", "/detokenize", {"tokens": ids}).json["prompt"])

        assert text(chat_template_kwargs={"style": "brief"}) == "brief:T;Hi"
        assert running.ask("POST", "/v1/chat/completions", body).status == 200
        for bad in ({"other": 1}, {"style": {"a": 1}}, {"style": [[1]]}, {"style": "x" * 20_000}, {"documents": []}):
            reply = running.ask("POST", "/v1/chat/completions", body | {"chat_template_kwargs": bad})
            assert reply.status == 400 and reply.error["param"] == "chat_template_kwargs"


def test_the_role_continues_with_the_message(server: RunningServer) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
    for role, fields in (("assistant", {}), ("user", {"add_generation_prompt": False})):
        body = server.chat(messages=messages, max_tokens=1, **fields).json
        assert body["choices"][0]["message"]["role"] == role


# ---- the rest


def test_priority_is_taken_under_the_priority_policy(server: RunningServer) -> None:
    assert server.complete(priority=-3, max_tokens=1).status == 200


def test_one_seed_gives_one_answer_fifty_times_beside_load(server: RunningServer) -> None:
    fields = {"prompt": "Once", "temperature": 1, "seed": 11, "max_tokens": 24, "ignore_eos": True}

    async def flood() -> list[str]:
        async with aiohttp.ClientSession() as session:
            url = server.url + COMPLETIONS
            load = [ask(session, "POST", url, {"prompt": f"{i}", "max_tokens": 40, "n": 2}) for i in range(25)]
            mine = [ask(session, "POST", url, fields) for _ in range(50)]
            mixed = [call for pair in zip(mine[:25], load, mine[25:], strict=True) for call in pair]
            replies = await asyncio.gather(*mixed)
            return [r.json["choices"][0]["text"] for i, r in enumerate(replies) if i % 3 != 1]

    texts = asyncio.run(flood())
    assert len(texts) == 50 and len(set(texts)) == 1


def test_neutral_values_change_nothing(server: RunningServer) -> None:
    neutral: dict[str, Any] = {"best_of": 1, "use_beam_search": False, "length_penalty": 1.0, "early_stopping": False}
    neutral |= {"bad_words": [], "logit_bias": {}, "stop": [], "priority": 0, "user": "somebody", "min_tokens": 0}
    neutral |= {"top_k": -1, "min_p": 0, "repetition_penalty": 1, "suffix": None, "logprobs": None, "echo": False}
    assert tokens(server, **neutral) == tokens(server)


# Values of every field that change something, alone or with others.
VALUES: dict[str, list[Any]] = {
    "n": [2, 3],
    "best_of": [3],
    "use_beam_search": [True],
    "length_penalty": [0.5, 2.0],
    "early_stopping": [True, "never"],
    "echo": [True],
    "logprobs": [0, 2],
    "prompt_logprobs": [1],
    "temperature": [0.7, 2.0],
    "top_p": [0.5],
    "top_k": [5],
    "min_p": [0.1],
    "presence_penalty": [1.0],
    "frequency_penalty": [-1.0],
    "repetition_penalty": [1.3],
    "logit_bias": [{"97": 50}],
    "allowed_token_ids": [LETTERS, [97, EOS]],
    "bad_words": [["a"], ["ab", "c"]],
    "stop": ["e", ["st", "q"]],
    "stop_token_ids": [[101]],
    "ignore_eos": [True],
    "min_tokens": [3],
    "include_stop_str_in_output": [True],
    "skip_special_tokens": [False],
    "truncate_prompt_tokens": [2, -1],
    "return_token_ids": [True],
    "return_tokens_as_token_ids": [True],
    "prompt": ["é", ["Hi", "Ho"], [1, 2, 3], [[4], [5, 6]]],
    "priority": [2],
    "cache_salt": ["s"],
    "request_id": ["r"],
    "add_special_tokens": [False],
}


def test_any_combination_is_answered_the_same_way_twice_or_refused_by_name(server: RunningServer, seed: int) -> None:
    source = random.Random(seed)
    answered = 0
    for _ in range(60):
        names = source.sample(sorted(VALUES), source.randint(1, 6))
        fields = {
            "prompt": "Hello",
            "seed": 1,
            "max_tokens": 12,
            **{name: source.choice(VALUES[name]) for name in names},
        }
        whole = server.complete(**fields)
        if whole.status != 200:
            assert whole.status == 400 and whole.error["param"] in fields, (fields, whole.body)
            continue
        answered += 1
        streamed = server.complete(**fields, stream=True)
        if streamed.status != 200:
            assert streamed.status == 400 and streamed.error["param"] in ("prompt_logprobs", "best_of"), fields
            continue
        events = [event["choices"][0] for event in streamed.events]
        for choice in whole.json["choices"]:
            mine = [event for event in events if event["index"] == choice["index"]]
            assert "".join(event["text"] for event in mine) == choice["text"], fields
            assert mine[-1]["finish_reason"] == choice["finish_reason"], fields
            if choice["logprobs"]:
                told = [value for event in mine for value in (event["logprobs"] or {}).get("token_logprobs", ())]
                assert told == choice["logprobs"]["token_logprobs"], fields
    assert answered > 15
    server.wait_idle()
