"""Tool calls and reasoning over HTTP, for every family of templates; the null model says what a grammar has it say."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from server_fixtures import RunningServer, running_server

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}CALL {{ c.function.name }} {{ c.function.arguments.city }}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if tools %}TOOLS {{ tools | tojson }}{% endif %}"
)
# family -> a template that shows it
TEMPLATES = {
    "hermes": CHATML + "{# <tool_call> #}",
    "llama3_json": CHATML + "{# <|python_tag|> #}",
    "mistral": CHATML + "{# [TOOL_CALLS] #}",
    "mistral-named": CHATML + "{# [TOOL_CALLS] [ARGS] #}",
    "json": "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}",
}
CITY = {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"]}
CITY["additionalProperties"] = False
WEATHER = {"type": "function", "function": {"name": "weather", "description": "Says it.", "parameters": CITY}}
CLOCK = {"type": "function", "function": {"name": "clock"}}
FORCED = {"type": "function", "function": {"name": "weather"}}


@pytest.fixture(scope="module", params=TEMPLATES)
def server(request: pytest.FixtureRequest) -> Iterator[RunningServer]:
    with running_server({"chat_template": TEMPLATES[request.param]}) as running:
        yield running
        running.check_alive()


@pytest.fixture(scope="module")
def hermes() -> Iterator[RunningServer]:
    with running_server({"chat_template": TEMPLATES["hermes"]}) as running:
        yield running


@pytest.fixture(scope="module")
def thinker() -> Iterator[RunningServer]:
    template = CHATML + "<|im_start|>assistant\n{% if enable_thinking is defined and not enable_thinking %}"
    with running_server({"chat_template": template + "<think>\n\n</think>\n\n{% endif %}{# <tool_call> #}"}) as running:
        yield running


def said(text: str) -> dict[str, Any]:
    """Has the model say exactly this."""
    return {"structured_outputs": {"choice": [text]}, "max_tokens": len(text.encode()) + 50}


def join(events: list[Any]) -> tuple[dict[str, Any], str | None]:
    """The message that the deltas of one choice add up to, checked on the way, and its finish reason."""
    message: dict[str, Any] = {"content": "", "reasoning": "", "tool_calls": []}
    finish = None
    for event in events:
        for choice in event["choices"]:
            assert finish is None, "nothing follows the finish reason"
            delta, finish = choice["delta"], choice["finish_reason"]
            message["content"] += delta.get("content", "")
            assert delta.get("reasoning") == delta.get("reasoning_content")
            message["reasoning"] += delta.get("reasoning", "")
            for call in delta.get("tool_calls", ()):
                if "id" in call:
                    assert call["type"] == "function" and call["function"]["name"]
                    assert call["index"] == len(message["tool_calls"])
                    message["tool_calls"].append([call["function"]["name"], call["function"]["arguments"], call["id"]])
                else:
                    message["tool_calls"][call["index"]][1] += call["function"]["arguments"]
    return message, finish


@pytest.mark.parametrize("choice", ["required", FORCED])
def test_forced_call_is_made_and_streams_the_same(server: RunningServer, choice: Any) -> None:
    fields = {"tools": [WEATHER, CLOCK], "tool_choice": choice, "parallel_tool_calls": False}
    fields |= {"max_tokens": 400, "seed": 3, "temperature": 1.0}
    body = server.chat(**fields).json["choices"][0]
    calls = body["message"]["tool_calls"]
    assert len(calls) == 1 and body["message"]["content"] is None
    name, arguments = calls[0]["function"]["name"], calls[0]["function"]["arguments"]
    if choice is FORCED:
        assert name == "weather" and body["finish_reason"] == "stop"
        assert json.loads(arguments)["city"] in ("Paris", "Rome")
    else:
        assert body["finish_reason"] in ("tool_calls", "length")
    assert len(calls[0]["id"]) >= 9 and calls[0]["type"] == "function"
    message, finish = join(server.chat(**fields, stream=True).events)
    assert [c[:2] for c in message["tool_calls"]] == [[name, arguments]] and not message["content"]
    assert finish == body["finish_reason"]


def test_parallel_calls_are_all_well_formed(server: RunningServer) -> None:
    names = {"weather", "clock"}
    tools = [WEATHER, {"type": "function", "function": {"name": "clock", "parameters": CITY}}]
    body = server.chat(tools=tools, tool_choice="required", max_tokens=3000, seed=1).json["choices"][0]
    calls = body["message"]["tool_calls"]
    assert body["finish_reason"] == "tool_calls" and 1 <= len(calls) <= 16
    for call in calls:
        assert call["function"]["name"] in names
        assert json.loads(call["function"]["arguments"])["city"] in ("Paris", "Rome")
    assert len({call["id"] for call in calls}) == len(calls)


def test_function_that_is_named_is_called_once(server: RunningServer) -> None:
    tools = [WEATHER, {"type": "function", "function": {"name": "clock", "parameters": CITY}}]
    for seed in range(5):
        named = {"type": "function", "function": {"name": "clock"}}
        body = server.chat(tools=tools, tool_choice=named, max_tokens=300, seed=seed).json["choices"][0]
        assert [call["function"]["name"] for call in body["message"]["tool_calls"]] == ["clock"]
        assert not body["message"]["content"]


def test_form_of_the_text_does_not_hinder_a_call(server: RunningServer) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object", "required": ["x"]}}}
    fields: dict[str, Any] = {"tools": [WEATHER], "tool_choice": "required", "max_tokens": 300, "seed": 1}
    plain = server.chat(**fields).json["choices"][0]["message"]
    formed = server.chat(**fields, response_format=form).json["choices"][0]["message"]
    calls = [[call["function"] for call in message["tool_calls"]] for message in (plain, formed)]
    assert calls[0] == calls[1]


def test_template_without_a_system_role_is_told_about_tools_in_the_first_user_message() -> None:
    template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    )
    with running_server({"chat_template": template}) as running:
        reply = running.chat(tools=[WEATHER], max_tokens=1, return_token_ids=True).json
    prompt = bytes(token for token in reply["prompt_token_ids"] if token < 256).decode()
    assert prompt.startswith("user: You can call") and "Says it." in prompt and prompt.endswith("Hello\n")


def test_schema_of_a_tool_may_say_more_than_a_grammar_can(hermes: RunningServer) -> None:
    parameters = {**CITY, "properties": {"city": {"type": "array", "items": {"enum": [1]}, "uniqueItems": True}}}
    parameters["description"] = "rule ::= 'not GBNF'"
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    body = hermes.chat(tools=[tool], tool_choice="required", max_tokens=300, parallel_tool_calls=False).json
    assert body["choices"][0]["message"]["tool_calls"][0]["function"]["name"] == "f"


# Schemas that no grammar can enforce, or that are not schemas at all; clients send them.
ODD_SCHEMAS = [
    {"type": "object", "properties": {"a": {"type": "array", "items": {"type": "string"}, "uniqueItems": True}}},
    {"type": "object", "properties": {"a": {"type": "string", "pattern": "^(?!x)"}}, "required": ["a"]},
    {"type": "object", "properties": {"a": {"type": "array", "contains": {"const": 1}}}},
    {"type": "object", "properties": {"a": {"type": "any"}}, "required": ["a"]},
    {"type": "object", "properties": {"a": {"not": {"$ref": "#/$defs/b"}}}, "$defs": {"b": {}}},
    {"type": "object", "if": {"required": ["a"]}, "then": {"patternProperties": {"(": {}}}},
    {"type": "object", "properties": {"a": {"type": "string", "format": "int64"}}, "required": ["a"]},
    {"type": "object", "$dynamicRef": "#x"},
]


@pytest.mark.parametrize("schema", ODD_SCHEMAS, ids=lambda schema: json.dumps(schema)[18:70])
@pytest.mark.parametrize("choice", ["auto", "required", {"type": "function", "function": {"name": "f"}}])
def test_schema_that_cannot_be_enforced_does_not_refuse_a_tool(hermes: RunningServer, schema: Any, choice: Any) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    for strict in (None, False):
        tool["function"]["strict"] = strict
        fields = {"tools": [tool, WEATHER], "tool_choice": choice, "max_tokens": 20, "seed": 1}
        body = hermes.chat(**fields).json["choices"][0]
        assert body["finish_reason"] in ("stop", "length", "tool_calls")


def test_strict_schema_that_cannot_be_enforced_is_a_400_that_names_the_function(hermes: RunningServer) -> None:
    for schema in ODD_SCHEMAS[:2]:
        tool = {"type": "function", "function": {"name": "f", "strict": True, "parameters": schema}}
        for choice in ("auto", "required", {"type": "function", "function": {"name": "f"}}):
            reply = hermes.chat(tools=[tool], tool_choice=choice, max_tokens=2)
            assert reply.status == 400 and reply.error["param"] == "tools"
        assert hermes.chat(tools=[tool], tool_choice="none", max_tokens=2).status == 200
    tool["function"]["parameters"] = ODD_SCHEMAS[0]
    assert "'f', which is strict" in hermes.chat(tools=[tool], max_tokens=2).error["message"]


def test_answers_beside_a_strict_tool_stream_the_same(server: RunningServer) -> None:
    strict = {"type": "function", "function": {**WEATHER["function"], "strict": True}}
    for choice in ("auto", "required"):
        fields = {"tools": [strict, CLOCK], "tool_choice": choice, "max_tokens": 60, "seed": 5, "temperature": 1.0}
        whole, streamed = server.chat(**fields).json["choices"][0], server.chat(**fields, stream=True).events
        message, finish = join(streamed)
        calls = whole["message"].get("tool_calls") or []
        told = [[call["function"]["name"], call["function"]["arguments"]] for call in calls]
        assert [call[:2] for call in message["tool_calls"]] == told
        assert finish == whole["finish_reason"] and message["content"] == (whole["message"]["content"] or "")


def test_text_stays_text_with_tools_on_offer(server: RunningServer) -> None:
    for stream in (False, True):
        reply = server.chat(tools=[WEATHER], **said("It is {sunny} in Paris."), stream=stream)
        if stream:
            message, finish = join(reply.events)
        else:
            message, finish = reply.json["choices"][0]["message"], reply.json["choices"][0]["finish_reason"]
        assert message["content"] == "It is {sunny} in Paris." and finish == "stop"
        assert not message.get("tool_calls")


def test_calls_among_text(hermes: RunningServer) -> None:
    text = 'Hm.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
    body = hermes.chat(tools=[WEATHER], **said(text)).json["choices"][0]
    assert body["message"]["content"] == "Hm.\n" and body["finish_reason"] == "tool_calls"
    (call,) = body["message"]["tool_calls"]
    assert call["function"] == {"name": "weather", "arguments": '{"city": "Rome"}'}
    body = hermes.chat(tools=[WEATHER], tool_choice="none", **said(text)).json["choices"][0]
    assert body["message"]["content"] == text and "tool_calls" not in body["message"]
    assert body["finish_reason"] == "stop"
    first = '<tool_call>{"name": "weather", "arguments": {}}</tool_call>'
    fields = said(first + first)
    assert len(hermes.chat(tools=[WEATHER], **fields).json["choices"][0]["message"]["tool_calls"]) == 2
    fields["parallel_tool_calls"] = False
    assert len(hermes.chat(tools=[WEATHER], **fields).json["choices"][0]["message"]["tool_calls"]) == 1


def test_cut_call_is_finish_reason_length(hermes: RunningServer) -> None:
    body = hermes.chat(tools=[WEATHER], tool_choice="required", max_tokens=45).json["choices"][0]
    assert body["finish_reason"] == "length"


def test_tools_calls_and_results_reach_the_template(server: RunningServer) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "rain"},
    ]
    reply = server.chat(messages=messages, tools=[WEATHER], max_tokens=1, return_token_ids=True).json
    prompt = bytes(token for token in reply["prompt_token_ids"] if token < 256).decode()
    for part in ("Says it.", "Oslo", "weather", "rain"):
        assert part in prompt


def test_official_client_streams_calls(hermes: RunningServer) -> None:
    with openai.OpenAI(base_url=f"{hermes.url}/v1", api_key="none", max_retries=0) as client:
        with client.chat.completions.stream(
            model="null",
            messages=[{"role": "user", "content": "Hi"}],
            tools=[WEATHER],  # type: ignore[list-item]
            tool_choice="required",
            parallel_tool_calls=False,
            max_tokens=300,
        ) as stream:
            stream.until_done()
            (call,) = stream.get_final_completion().choices[0].message.tool_calls or []
    assert call.function.name == "weather" and "city" in json.loads(call.function.arguments)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": []}, "tools"),
        ({"tools": "x"}, "tools"),
        ({"tools": [5]}, "tools"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tools": [{"type": "retrieval", "function": {"name": "f"}}]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": []}}]}, "tools"),
        ({"tools": [CLOCK, CLOCK]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "f", "strict": "yes"}}]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": f"f{i}"}} for i in range(129)]}, "tools"),
        ({"tools": [WEATHER], "tool_choice": "always"}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function"}}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": "required", "guided_regex": "a"}, "guided_regex"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"function_call": "auto"}, "function_call"),
        (
            {
                "tools": [{"type": "function", "function": {"name": "f", "parameters": {"$ref": "http://x/y"}}}],
                "tool_choice": "required",
            },
            "tools",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
            "messages",
        ),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "messages"),
    ],
)
def test_wrong_tools_are_a_400(hermes: RunningServer, fields: dict[str, Any], param: str) -> None:
    reply = hermes.chat(**fields, max_tokens=2)
    assert reply.status == 400, reply.body
    assert reply.error["param"] == param


def test_reasoning_is_split_from_the_answer(thinker: RunningServer) -> None:
    text = "<think>\nOne plus one.\n</think>\n\nTwo."
    # The grammar speaks of the answer, so the reasoning is free: have the model say both through a regex of everything.
    fields = {"max_tokens": 300, "logit_bias": {}, "seed": 1}
    body = thinker.chat(structured_outputs={"choice": [text]}, **fields)
    message = body.json["choices"][0]["message"]
    assert message["reasoning"] == message["reasoning_content"]
    assert body.json["usage"]["completion_tokens_details"]["reasoning_tokens"] > 0
    streamed, _ = join(thinker.chat(structured_outputs={"choice": [text]}, **fields, stream=True).events)
    assert streamed["reasoning"] == message["reasoning"] and streamed["content"] == (message["content"] or "")


def test_grammar_constrains_the_answer_when_thinking_is_off(thinker: RunningServer) -> None:
    body = thinker.chat(
        structured_outputs={"choice": ["yes"]}, max_tokens=20, chat_template_kwargs={"enable_thinking": False}
    ).json["choices"][0]
    assert body["message"]["content"] == "yes" and body["message"]["reasoning"] is None


def test_effort_reaches_the_template_on_every_route(thinker: RunningServer) -> None:
    def prompt_tokens(path: str, **fields: Any) -> int:
        body = {"model": "null", "max_tokens": 1, "messages": [{"role": "user", "content": "Hi"}], **fields}
        usage = thinker.ask("POST", path, body).json["usage"]
        tokens: int = usage["prompt_tokens"] if "prompt_tokens" in usage else usage["input_tokens"]
        return tokens + usage.get("cache_read_input_tokens", 0)

    chat, messages = "/v1/chat/completions", "/v1/messages"
    thinks = prompt_tokens(chat)
    closed = prompt_tokens(chat, chat_template_kwargs={"enable_thinking": False})
    assert closed > thinks, "the template closes the thoughts"
    assert (
        prompt_tokens(chat, reasoning_effort="none") == prompt_tokens(messages, thinking={"type": "disabled"}) == closed
    )
    for effort in ("low", "high"):
        assert prompt_tokens(chat, reasoning_effort=effort) == thinks
    assert prompt_tokens(messages, thinking={"type": "enabled", "budget_tokens": 1024}) == thinks
    body = {"model": "null", "input": "Hi", "max_output_tokens": 1, "reasoning": {"effort": "none"}}
    assert thinker.ask("POST", "/v1/responses", body).json["usage"]["input_tokens"] == closed
    # What the caller says to the template itself counts more.
    template = {"enable_thinking": True}
    assert prompt_tokens(chat, reasoning_effort="none", chat_template_kwargs=template) == thinks
    assert thinker.chat(reasoning_effort="all of it").error["param"] == "reasoning_effort"
