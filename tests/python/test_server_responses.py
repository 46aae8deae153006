"""/v1/responses: answers, typed events and what the server remembers, against the types of the official client."""

from __future__ import annotations

import json
import threading
from typing import Any

import openai
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from fastllm.server.errors import ApiError
from fastllm.server.long_answer import FEW_ITEMS
from fastllm.server.protocol import ChatMessage, ContentPart
from fastllm.server.responses_builder import ResponseBuilder
from fastllm.server.responses_input import to_messages
from fastllm.server.responses_protocol import InputItem, InputPart, ResponseObject, TextConfig
from fastllm.server.responses_store import ResponseStore, StoredResponse
from server_fixtures import CONTEXT, Reply, RunningServer, running_server, wait_until

PATH = "/v1/responses"
LONG = {"max_output_tokens": CONTEXT - 200, "ignore_eos": True}


@pytest.fixture(scope="module")
def server():
    with running_server() as running:
        yield running
        running.check_alive()


@pytest.fixture(scope="module")
def client(server: RunningServer):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def respond(server: RunningServer, **fields: Any) -> Reply:
    return server.ask("POST", PATH, {"model": "null", "input": "Hello", **fields})


def events_of(reply: Reply) -> list[dict[str, Any]]:
    """The events of a stream; each must name itself twice, and nothing follows the last."""
    parts = reply.body.decode().split("\n\n")
    assert parts.pop() == ""
    events: list[dict[str, Any]] = []
    for part in parts:
        name, data = part.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    return events


def test_answer_has_the_official_shape(server: RunningServer) -> None:
    reply = respond(server, max_output_tokens=6, ignore_eos=True, metadata={"a": "b"}, temperature=0.5, user="me")
    response = Response.model_validate(reply.json)
    assert response.id.startswith("resp_") and response.status == "incomplete"
    assert response.incomplete_details is not None and response.incomplete_details.reason == "max_output_tokens"
    assert response.output_text and response.metadata == {"a": "b"} and response.temperature == 0.5
    usage = response.usage
    assert usage is not None and (usage.output_tokens, usage.total_tokens) == (6, usage.input_tokens + 6)


def test_answer_that_ends_by_itself_is_completed(server: RunningServer) -> None:
    whole = Response.model_validate(respond(server, max_output_tokens=30, ignore_eos=True, seed=3).json).output_text
    stop = next(char for char in whole[1:] if char.isascii())
    body = respond(server, max_output_tokens=30, ignore_eos=True, seed=3, stop=stop).json
    assert body["status"] == body["output"][0]["status"] == "completed"
    assert body["output"][0]["content"][0]["text"] == whole[: whole.index(stop)]
    assert body["incomplete_details"] is None and body["completed_at"] >= body["created_at"]


def test_events_come_in_the_official_order_and_agree_with_the_answer(server: RunningServer) -> None:
    fields = {"max_output_tokens": 40, "ignore_eos": True, "seed": 4, "input": [{"role": "user", "content": "Hi"}]}
    whole = respond(server, **fields).json
    events = events_of(respond(server, **fields, stream=True))
    official: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
    for event in events:
        official.validate_python(event)
    kinds = [event["type"].removeprefix("response.") for event in events]
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert set(kinds[4:-4]) == {"output_text.delta"}
    assert kinds[-4:] == ["output_text.done", "content_part.done", "output_item.done", "incomplete"]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    text = whole["output"][0]["content"][0]["text"]
    assert "".join(event["delta"] for event in events[4:-4]) == events[-4]["text"] == text
    assert events[0]["response"]["status"] == "in_progress" and events[0]["response"]["output"] == []
    last = events[-1]["response"]
    assert last["output"][0]["content"][0]["text"] == text and last["usage"]["output_tokens"] == 40
    assert last["usage"]["input_tokens"] == whole["usage"]["input_tokens"]
    item = last["output"][0]["id"]
    assert all(event.get("item_id", item) == item for event in events)


@pytest.mark.parametrize("tokens", [8, 300])  # few are scored on the event loop, many on a worker
def test_logprobs_come_when_they_are_asked_for(server: RunningServer, tokens: int) -> None:
    fields = {"max_output_tokens": tokens, "ignore_eos": True, "seed": 1}
    assert respond(server, **fields).json["output"][0]["content"][0]["logprobs"] == []
    fields |= {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    answer = respond(server, **fields).json
    whole = answer["output"][0]["content"][0]["logprobs"]
    assert len(whole) == tokens and all(len(entry["top_logprobs"]) == 2 for entry in whole)
    assert server.ask("GET", f"{PATH}/{answer['id']}").json == answer
    events = events_of(respond(server, **fields, stream=True))
    deltas = [event for event in events if event["type"] == "response.output_text.delta"]
    assert [entry for event in deltas for entry in event["logprobs"]] == whole
    by_type = {event["type"]: event for event in events}
    done = by_type["response.output_text.done"]
    assert done["logprobs"] == by_type["response.content_part.done"]["part"]["logprobs"] == whole
    assert by_type["response.incomplete"]["response"]["output"][0]["content"][0]["logprobs"] == whole


def test_input_counts_as_the_chat_it_amounts_to(server: RunningServer) -> None:
    parts = [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]
    given = {"instructions": "Be brief.", "input": [{"role": "user", "content": parts}]}
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "a\nb"}]
    chat = server.chat(messages=messages, max_tokens=9, seed=1).json
    body = respond(server, **given, max_output_tokens=9, seed=1).json
    assert body["output"][0]["content"][0]["text"] == chat["choices"][0]["message"]["content"]
    assert body["usage"]["input_tokens"] == chat["usage"]["prompt_tokens"]
    counted = server.ask("POST", PATH + "/input_tokens", given).json
    assert counted == {"object": "response.input_tokens", "input_tokens": chat["usage"]["prompt_tokens"]}


def test_calls_and_their_results_become_chat_messages() -> None:
    items = [
        InputItem(role="user", content="What is the weather?"),
        InputItem(type="reasoning", id="rs_1"),
        InputItem(type="function_call", call_id="1", name="f", arguments="{}"),
        InputItem(type="function_call", call_id="2", name="g", arguments="{}"),
        InputItem(type="function_call_output", call_id="1", output="rain"),
        InputItem(type="function_call_output", call_id="2", output=[InputPart("input_text", "sun")]),
        InputItem(role="assistant", content=[InputPart("output_text", "Mixed."), InputPart("refusal", refusal="No.")]),
    ]
    user, calls, first, second, answer = to_messages(items)
    assert user == ChatMessage("user", "What is the weather?")
    assert calls.role == "assistant" and calls.tool_calls is not None
    assert [(call["id"], call["function"]["name"]) for call in calls.tool_calls] == [("1", "f"), ("2", "g")]
    assert first == ChatMessage("tool", "rain", tool_call_id="1")
    assert second == ChatMessage("tool", [ContentPart("text", "sun")], tool_call_id="2")
    assert answer.content == [ContentPart("text", "Mixed."), ContentPart("text", "No.")]


def test_tools_that_the_server_would_run_are_left_out(server: RunningServer) -> None:
    function = {"type": "function", "name": "f", "parameters": {"type": "object", "properties": {}}}
    hosted = [{"type": "web_search", "external_web_access": False}, {"type": "code_interpreter", "container": {}}]
    alone = respond(server, tools=[function], seed=1).json
    among = respond(server, tools=[function, *hosted], seed=1).json
    assert among["usage"]["input_tokens"] == alone["usage"]["input_tokens"]
    assert respond(server, tools=hosted).json["usage"]["input_tokens"] == respond(server).json["usage"]["input_tokens"]


def test_previous_response_is_continued_without_its_instructions(server: RunningServer) -> None:
    first = respond(server, input="One", instructions="Be odd.", max_output_tokens=5, ignore_eos=True, seed=2).json
    answer = first["output"][0]["content"][0]["text"]
    second = respond(server, input="Two", previous_response_id=first["id"], max_output_tokens=5, seed=2).json
    messages = [
        {"role": "user", "content": "One"},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": "Two"},
    ]
    chat = server.chat(messages=messages, max_tokens=5, seed=2).json
    assert second["usage"]["input_tokens"] == chat["usage"]["prompt_tokens"]
    assert second["output"][0]["content"][0]["text"] == chat["choices"][0]["message"]["content"]
    third = events_of(
        respond(
            server, input="Three", previous_response_id=second["id"], stream=True, **LONG | {"max_output_tokens": 3}
        )
    )
    assert third[-1]["response"]["usage"]["input_tokens"] > second["usage"]["input_tokens"]


def test_stored_response_is_retrieved_listed_and_deleted(client: openai.OpenAI) -> None:
    given: Any = [
        {"role": "user", "content": "One"},
        {"role": "assistant", "content": "Two"},
        {"role": "user", "content": "3"},
    ]
    made = client.responses.create(model="null", input=given, max_output_tokens=3)
    assert client.responses.retrieve(made.id) == made
    newest = client.responses.input_items.list(made.id, limit=2)
    assert newest.has_more and [item.content[0].text for item in newest.data] == ["3", "Two"]  # type: ignore[union-attr]
    texts = [item.content[0].text for item in client.responses.input_items.list(made.id, order="asc", limit=1)]  # type: ignore[union-attr]
    assert texts == ["One", "Two", "3"]
    client.responses.delete(made.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(made.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.create(model="null", input="x", previous_response_id=made.id)


def test_store_false_keeps_nothing(client: openai.OpenAI) -> None:
    made = client.responses.create(model="null", input="x", store=False, max_output_tokens=2)
    assert made.to_dict()["store"] is False
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(made.id)


def test_response_belongs_to_the_key_that_made_it() -> None:
    with running_server(api_keys=["one", "two"]) as server:
        mine = openai.OpenAI(base_url=f"{server.url}/v1", api_key="one", max_retries=0)
        theirs = openai.OpenAI(base_url=f"{server.url}/v1", api_key="two", max_retries=0)
        made = mine.responses.create(model="null", input="x", max_output_tokens=2)
        for ask in (theirs.responses.retrieve, theirs.responses.delete, theirs.responses.cancel):
            with pytest.raises(openai.NotFoundError):
                ask(made.id)
        assert mine.responses.retrieve(made.id).id == made.id


def test_server_that_keeps_no_responses_says_so() -> None:
    with running_server(responses_store=0) as server:
        assert respond(server, max_output_tokens=2).json["store"] is False
        for field in ("store", "background"):
            reply = respond(server, **{field: True})
            assert reply.status == 400 and reply.error["param"] == field
        missing = server.ask("GET", f"{PATH}/resp_x")
        assert missing.status == 404 and "keeps none" in missing.error["message"]


def _stored(name: str, size: int) -> StoredResponse:
    response = ResponseObject(
        id=name, created_at=0, model="m", status="completed", store=True, temperature=1, text=TextConfig(), top_p=1
    )
    return StoredResponse("me", response, [], [], size)


def test_store_drops_the_oldest_beyond_its_number_and_its_bytes() -> None:
    store = ResponseStore(3, max_bytes=100)
    for name in "abcd":
        store.add(_stored(name, 10))
    with pytest.raises(ApiError):
        store.get("a", "me")
    store.add(_stored("b", 20))  # grown: now the youngest
    store.add(_stored("e", 75))
    assert [name for name in "abcde" if name in store._entries] == ["b", "e"]
    store.add(_stored("f", 1000))
    assert len(store) == 0 and store._bytes == 0


def test_background_response_is_finished_without_its_client(client: openai.OpenAI) -> None:
    made = client.responses.create(model="null", input="x", background=True, max_output_tokens=4)
    assert made.background and made.status in ("queued", "in_progress")
    wait_until(lambda: client.responses.retrieve(made.id).status not in ("queued", "in_progress"), 20)
    done = client.responses.retrieve(made.id)
    assert done.status in ("completed", "incomplete") and done.output_text


def test_cancelled_and_deleted_background_responses_free_everything(
    server: RunningServer, client: openai.OpenAI
) -> None:
    made = [client.responses.create(model="null", input="x", background=True, extra_body=LONG) for _ in range(2)]
    with pytest.raises(openai.BadRequestError, match="still in progress"):
        client.responses.create(model="null", input="x", previous_response_id=made[0].id)
    cancelled = client.responses.cancel(made[0].id)
    assert cancelled.status == "cancelled" and client.responses.retrieve(made[0].id).status == "cancelled"
    client.responses.delete(made[1].id)
    server.wait_idle()
    plain = client.responses.create(model="null", input="x", max_output_tokens=2)
    with pytest.raises(openai.BadRequestError, match="background"):
        client.responses.cancel(plain.id)


@pytest.mark.parametrize("written", [False, True])
def test_background_response_cancelled_while_a_worker_ends_it_stays_cancelled(
    server: RunningServer, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch, written: bool
) -> None:
    """The worker is held before or after it writes the end of the answer; until it is back the response goes on."""
    held, go, left = threading.Event(), threading.Event(), threading.Event()
    finish = ResponseBuilder.finish

    def held_finish(*args: Any) -> Any:
        events = finish(*args) if written else None
        held.set()
        assert go.wait(20)
        events = events or finish(*args)
        left.set()
        return events

    monkeypatch.setattr(ResponseBuilder, "finish", held_finish)
    scored = {"max_output_tokens": FEW_ITEMS + 1, "top_logprobs": 1, "extra_body": {"ignore_eos": True}}
    made = client.responses.create(model="null", input="x", background=True, **scored)
    try:
        assert held.wait(20)
        running = client.responses.retrieve(made.id)
        assert running.status == "in_progress" and not running.output
        assert client.responses.cancel(made.id).status == "cancelled"
    finally:
        go.set()
    assert left.wait(20)
    kept = client.responses.retrieve(made.id)
    assert kept.status == "cancelled" and not kept.output and kept.usage is None
    server.wait_idle()


def test_failure_after_the_first_byte_is_an_error_event_and_a_failed_response() -> None:
    with running_server() as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        stream = client.responses.create(model="null", input="x", stream=True, extra_body=LONG)
        kinds = []
        for event in stream:
            kinds.append(event.type)
            if kinds.count("response.output_text.delta") == 1 and kinds[-1] == "response.output_text.delta":
                server._loop.call_soon_threadsafe(server.state.llm.shutdown)
        assert kinds[-2:] == ["error", "response.failed"]
        assert event.type == "response.failed" and event.response.error is not None
        assert event.response.status == "failed" and event.response.error.code == "server_error"


def test_failed_background_response_tells_why() -> None:
    with running_server() as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        made = client.responses.create(model="null", input="x", background=True, extra_body=LONG)
        server._loop.call_soon_threadsafe(server.state.llm.shutdown)
        wait_until(lambda: client.responses.retrieve(made.id).status == "failed", 20)
        error = client.responses.retrieve(made.id).error
        assert error is not None and error.code == "server_error"


IMAGE = [{"role": "user", "content": [{"type": "input_image", "image_url": "data:"}]}]
REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"input": []}, "input", "at least one"),
    ({"input": 5}, "input", "must be"),
    ({"input": IMAGE}, "input", "input[0].content[0]"),
    ({"input": [{"role": "king", "content": "x"}]}, "input", "roles"),
    ({"input": [{"role": "user"}]}, "input", "needs content"),
    ({"input": [{"type": "function_call", "call_id": "1"}]}, "input", "needs call_id"),
    ({"input": [{"type": "function_call_output", "call_id": "1"}]}, "input", "needs call_id"),
    ({"input": [{"type": "item_reference", "id": "x"}]}, "input", "item_reference"),
    ({"input": "x" * CONTEXT}, "input", "context"),
    ({"max_output_tokens": 0}, "max_output_tokens", "at least 1"),
    ({"max_output_tokens": CONTEXT}, "max_output_tokens", "context"),
    ({"max_tokens": 5}, "max_tokens", "max_output_tokens"),
    ({"n": 2}, "n", "must be 1"),
    ({"truncation": "auto"}, "truncation", "disabled"),
    ({"text": {"verbosity": "low"}}, "text", "verbosity"),
    ({"reasoning": {"summary": "detailed"}}, "reasoning", "summary"),
    ({"include": ["everything"]}, "include", "everything"),
    ({"metadata": {str(i): "" for i in range(17)}}, "metadata", "at most 16"),
    ({"metadata": {"k" * 65: ""}}, "metadata", "64"),
    ({"metadata": {"k": 5}}, "metadata", "string"),
    ({"top_logprobs": 21}, "top_logprobs", "at most 20"),
    ({"temperature": 3}, "temperature", "[0, 2]"),
    ({"conversation": "conv_1"}, "conversation", "previous_response_id"),
    ({"prompt": {"id": "x"}}, "prompt", "templates"),
    ({"background": True, "stream": True}, "background", "no stream"),
    ({"background": True, "store": False}, "background", "stored"),
    ({"tools": [{"type": "mcp", "server_label": "x"}]}, "tools", "'mcp'"),
    ({"tools": [{"type": "custom", "name": "f"}]}, "tools", "'custom'"),
    ({"tools": [{"type": "web_search"}], "tool_choice": "required"}, "tool_choice", "tools are given"),
    ({"tools": [{"type": "web_search"}], "tool_choice": {"type": "web_search"}}, "tool_choice", "tools are given"),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("fields, param, words", REFUSED, ids=[f"{row[1]}-{i}" for i, row in enumerate(REFUSED)])
def test_what_cannot_be_honoured_is_refused_in_the_words_of_this_api(
    server: RunningServer, fields: dict[str, Any], param: str, words: str, stream: bool
) -> None:
    reply = respond(server, **({"stream": True} if stream else {}) | fields)
    assert reply.status == 400, reply.body
    assert reply.error["param"] == param and words in reply.error["message"], reply.error


def test_unknown_model_and_unknown_response_are_404(server: RunningServer) -> None:
    assert respond(server, model="nope").error["code"] == "model_not_found"
    for method, path in (("GET", ""), ("DELETE", ""), ("POST", "/cancel"), ("GET", "/input_items")):
        reply = server.ask(method, f"{PATH}/resp_none{path}")
        assert reply.status == 404 and reply.error["code"] == "response_not_found"
