"""Tool calls, reasoning and structured output through the APIs beside chat; the null model says what it is told to."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pydantic
import pytest

from server_fixtures import RunningServer, running_server
from test_server_tools import CHATML, CITY, said

anthropic = pytest.importorskip("anthropic", reason="needs Anthropic's client: pip install anthropic")

USER: Any = [{"role": "user", "content": "What is the weather?"}]
FUNCTION: Any = {"type": "function", "name": "weather", "description": "Says it.", "parameters": CITY}
TOOL: Any = {"name": "weather", "description": "Says it.", "input_schema": CITY}
CALL = '<tool_call>{"name": "weather", "arguments": {"city": "Rome"}}</tool_call>'


class Point(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")
    x: bool
    y: bool


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    template = CHATML + "<|im_start|>assistant\n{% if enable_thinking is defined and not enable_thinking %}"
    with running_server({"chat_template": template + "<think>\n\n</think>\n\n{% endif %}{# <tool_call> #}"}) as running:
        yield running
        running.check_alive()


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def messages(server: RunningServer) -> Iterator[Any]:
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as made:
        yield made.messages


def says(text: str, **more: Any) -> dict[str, Any]:
    """The same for the body of either API, with the thoughts of the model switched off unless the text has some."""
    form = {"structured_outputs": said(text)["structured_outputs"], **more}
    return {**form, "chat_template_kwargs": {"enable_thinking": False}}


def test_responses_call_is_an_item_and_its_result_goes_back(server: RunningServer, client: openai.OpenAI) -> None:
    fields: Any = {"model": "null", "input": "Hm?", "tools": [FUNCTION], "max_output_tokens": 300}
    fields["extra_body"] = says("Let me see.\n" + CALL)
    whole = client.responses.create(**fields)
    with client.responses.stream(**fields) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert whole.status == "completed" and whole.output_text.strip() == "Let me see."
    for response in (whole, final):
        message, call = response.output
        assert message.type == "message" and call.type == "function_call" and call.call_id
        assert call.name == "weather" and json.loads(call.arguments) == {"city": "Rome"}
    assert kinds.count("response.output_item.done") == 2 and "response.function_call_arguments.done" in kinds
    result: Any = [{"type": "function_call_output", "call_id": whole.output[1].call_id, "output": "rain"}]  # type: ignore[union-attr]
    later = client.responses.create(model="null", input=result, previous_response_id=whole.id, max_output_tokens=2)
    calls = [{"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}]
    conversation = [
        {"role": "user", "content": "Hm?"},
        {"role": "assistant", "content": whole.output_text, "tool_calls": calls},
        {"role": "tool", "tool_call_id": "1", "content": "rain"},
    ]
    assert later.usage is not None
    same = server.chat(messages=conversation, max_tokens=2).json["usage"]["prompt_tokens"]
    assert later.usage.input_tokens == same


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "weather"}])
def test_responses_call_can_be_required(client: openai.OpenAI, choice: Any) -> None:
    body: Any = {"chat_template_kwargs": {"enable_thinking": False}, "seed": 3}
    response = client.responses.create(
        model="null", input="Hm?", tools=[FUNCTION], tool_choice=choice, parallel_tool_calls=False, extra_body=body
    )
    (call,) = response.output
    assert call.type == "function_call" and json.loads(call.arguments)["city"] in ("Paris", "Rome")
    assert response.tools[0].type == "function" and response.parallel_tool_calls is False


def test_messages_call_is_a_block_and_its_result_goes_back(messages: Any) -> None:
    fields: Any = {"model": "null", "messages": USER, "tools": [TOOL], "max_tokens": 300}
    fields["extra_body"] = says("Let me see.\n" + CALL)
    whole = messages.create(**fields)
    with messages.stream(**fields) as stream:
        final = stream.get_final_message()
    for message in (whole, final):
        text, use = message.content
        assert text.text.strip() == "Let me see." and message.stop_reason == "tool_use"
        assert use.type == "tool_use" and use.id and (use.name, use.input) == ("weather", {"city": "Rome"})
    result = {"type": "tool_result", "tool_use_id": whole.content[1].id, "content": "rain"}
    turns = [*USER, {"role": "assistant", "content": whole.content}, {"role": "user", "content": [result]}]
    longer = messages.count_tokens(model="null", messages=turns, tools=[TOOL]).input_tokens
    assert longer > messages.count_tokens(model="null", messages=turns).input_tokens > whole.usage.output_tokens


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "weather"}])
def test_messages_call_can_be_required(messages: Any, choice: dict[str, Any]) -> None:
    choice = {**choice, "disable_parallel_tool_use": True}
    body: Any = {"seed": 3}
    message = messages.create(
        model="null",
        messages=USER,
        max_tokens=500,
        tools=[TOOL],
        tool_choice=choice,
        thinking={"type": "disabled"},
        extra_body=body,
    )
    (use,) = message.content
    assert use.type == "tool_use" and use.input["city"] in ("Paris", "Rome") and message.stop_reason == "tool_use"


def test_thoughts_are_their_own_item_and_block(client: openai.OpenAI, messages: Any) -> None:
    # A form of the answer lets the model think first, and this model never ends that by itself.
    form: Any = {"structured_outputs": {"choice": ["Yes."]}, "seed": 5}
    fields: Any = {"model": "null", "input": "Hm?", "max_output_tokens": 60, "extra_body": form}
    whole = client.responses.create(**fields)
    (thoughts,) = whole.output
    assert thoughts.type == "reasoning" and thoughts.content and thoughts.status == "incomplete"
    assert whole.usage is not None and whole.usage.output_tokens_details.reasoning_tokens > 40
    events = list(client.responses.create(**fields, stream=True))
    said = "".join(event.delta for event in events if event.type == "response.reasoning_text.delta")
    assert said == thoughts.content[0].text and events[-1].type == "response.incomplete"
    same: Any = [{"role": "user", "content": "Hm?"}]
    with messages.stream(model="null", messages=same, max_tokens=60, extra_body=form) as stream:
        message = stream.get_final_message()
    assert message.content[0].type == "thinking" and message.content[0].thinking == said
    assert message.stop_reason == "max_tokens"


def test_structured_output_in_the_words_of_each_api(client: openai.OpenAI, messages: Any) -> None:
    body: Any = {"chat_template_kwargs": {"enable_thinking": False}, "seed": 4}
    parsed = client.responses.parse(
        model="null", input="Where?", text_format=Point, max_output_tokens=400, extra_body=body
    )
    assert isinstance(parsed.output_parsed, Point)
    config = {"format": {"type": "json_schema", "schema": Point.model_json_schema()}}
    message = messages.create(
        model="null", messages=USER, max_tokens=400, output_config=config, thinking={"type": "disabled"}
    )
    assert isinstance(Point.model_validate_json(message.content[0].text), Point)
    with pytest.raises(openai.BadRequestError) as refused:
        broken: Any = {"format": {"type": "json_schema", "name": "x", "schema": {"type": "no such type"}}}
        client.responses.create(model="null", input="x", text=broken)
    assert refused.value.param == "text.format"
    with pytest.raises(openai.BadRequestError) as nameless:
        client.responses.create(
            model="null", input="x", tools=[FUNCTION], tool_choice={"type": "function", "name": "f"}
        )
    assert nameless.value.param == "tool_choice"
