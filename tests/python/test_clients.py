"""The main flows of the clients that people have: OpenAI's own, LangChain and LiteLLM."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from typing import Any

import openai
import pydantic
import pytest

from fastllm.server.limits import Limits
from server_fixtures import RunningServer, running_server

KEY = "secret"
USER: Any = [{"role": "user", "content": "Hello"}]
LONG: Any = {"model": "null", "messages": USER, "max_tokens": 30_000, "extra_body": {"ignore_eos": True}}


CITY = {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"]}
CITY["additionalProperties"] = False
WEATHER: Any = {"type": "function", "function": {"name": "weather", "description": "Says it.", "parameters": CITY}}


class Answer(pydantic.BaseModel):
    """Whether it is."""

    model_config = pydantic.ConfigDict(extra="forbid")
    it_is: bool


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with running_server(api_keys=[KEY]) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as made:
        yield made


# ---- OpenAI's client


def _late_character(text: str) -> str:
    """A stop string: the helpers of the client refuse answers that ran into the limit."""
    return next(char for char in reversed(text[1:]) if char.isascii() and char not in text[:1])


def test_openai_completions_stream_with_logprobs(client: openai.OpenAI) -> None:
    fields: Any = {"model": "null", "prompt": "Hello", "max_tokens": 12, "seed": 1, "logprobs": 2}
    fields["extra_body"] = {"ignore_eos": True}
    whole = client.completions.create(**fields).choices[0]
    chunks = [chunk.choices[0] for chunk in client.completions.create(**fields, stream=True)]
    assert "".join(chunk.text for chunk in chunks) == whole.text
    tokens = [token for chunk in chunks if chunk.logprobs for token in chunk.logprobs.tokens or ()]
    assert whole.logprobs is not None and tokens == whole.logprobs.tokens and len(tokens) == 12


def test_openai_chat_stream_helper_collects_the_answer(client: openai.OpenAI) -> None:
    fields: Any = {"model": "null", "messages": USER, "max_tokens": 40, "seed": 2, "logprobs": True, "top_logprobs": 1}
    fields["extra_body"] = {"ignore_eos": True}
    fields["stop"] = _late_character(client.chat.completions.create(**fields).choices[0].message.content or "")
    whole = client.chat.completions.create(**fields).choices[0]
    with client.chat.completions.stream(**fields, stream_options={"include_usage": True}) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done", "logprobs.content.delta"} <= kinds
    assert final.choices[0].message.content == whole.message.content
    assert final.choices[0].logprobs is not None and whole.logprobs is not None
    assert final.choices[0].logprobs.content == whole.logprobs.content
    assert final.usage is not None and final.usage.completion_tokens == len(final.choices[0].logprobs.content or ())


def test_openai_responses_stream_helper_collects_the_answer(client: openai.OpenAI) -> None:
    body: Any = {"seed": 2, "ignore_eos": True}
    fields: Any = {"model": "null", "input": "Hello", "max_output_tokens": 40, "extra_body": body}
    body["stop"] = _late_character(client.responses.create(**fields).output_text)
    whole = client.responses.create(**fields)
    with client.responses.stream(**fields) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        final = stream.get_final_response()
    assert text == final.output_text == whole.output_text
    assert final.status == whole.status == "completed"


def test_openai_parse_and_tools(client: openai.OpenAI) -> None:
    fields: Any = {"model": "null", "messages": USER, "max_tokens": 400, "seed": 1}
    parsed = client.chat.completions.parse(**fields, response_format=Answer)
    assert isinstance(parsed.choices[0].message.parsed, Answer)
    whole = client.chat.completions.create(**fields, tools=[WEATHER], tool_choice="required", parallel_tool_calls=False)
    (call,) = whole.choices[0].message.tool_calls or ()
    assert call.type == "function" and call.function.name == "weather"


def test_openai_errors_are_the_exceptions_users_catch(server: RunningServer, client: openai.OpenAI) -> None:
    def ask(**fields: Any) -> Any:
        return client.chat.completions.create(**{"model": "null", "messages": USER, "max_tokens": 1, **fields})

    with pytest.raises(openai.BadRequestError) as bad:
        ask(temperature=3)
    assert bad.value.param == "temperature" and bad.value.type == "invalid_request_error" and bad.value.request_id
    with pytest.raises(openai.NotFoundError) as missing:
        ask(model="nope")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.AuthenticationError) as refused:
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0).models.list()
    assert refused.value.code == "invalid_api_key"
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.05).chat.completions.create(**LONG)
    server.wait_idle()


def test_openai_rate_limit_and_shutdown_are_told_apart() -> None:
    with running_server({"max_num_seqs": 1}, limits=Limits(max_waiting=0)) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        with client.chat.completions.create(**LONG, stream=True) as stream:
            next(stream)
            with pytest.raises(openai.RateLimitError) as full:
                client.chat.completions.create(model="null", messages=USER)
            assert full.value.code == "queue_full" and full.value.response.headers["Retry-After"] == "1"
        server.wait_idle()
        server.state.begin_drain()
        with pytest.raises(openai.InternalServerError) as draining:
            client.chat.completions.create(model="null", messages=USER)
        assert draining.value.status_code == 503 and draining.value.code == "draining"


@pytest.mark.parametrize("shape", ["chat", "completions", "responses"])
def test_openai_stream_left_in_the_middle_frees_its_request(
    server: RunningServer, client: openai.OpenAI, shape: str
) -> None:
    body: Any = {"model": "null", "stream": True, "extra_body": {"ignore_eos": True}}
    stream: Any
    if shape == "chat":
        stream = client.chat.completions.create(**body, messages=USER, max_tokens=30_000)
    elif shape == "completions":
        stream = client.completions.create(**body, prompt="Hello", max_tokens=30_000)
    else:
        stream = client.responses.create(**body, input="Hello", max_output_tokens=30_000)
    for _ in range(6):
        next(stream)
    assert server.state.llm.stats().num_running == 1
    stream.close()
    server.wait_idle()


def test_openai_async_request_that_is_cancelled_frees_everything(server: RunningServer) -> None:
    async def work() -> None:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as client:
            streams = await asyncio.gather(*(client.chat.completions.create(**LONG, stream=True) for _ in range(8)))
            tasks = [asyncio.ensure_future(anext(stream)) for stream in streams]
            await asyncio.gather(*tasks)
            waiting = asyncio.ensure_future(client.chat.completions.create(**LONG))
            while server.state.active_requests < 9:
                await asyncio.sleep(0.001)
            waiting.cancel()
            await asyncio.gather(*(stream.close() for stream in streams))

    asyncio.run(work())
    server.wait_idle()


# ---- LangChain


def _langchain(server: RunningServer, **fields: Any) -> Any:
    langchain = pytest.importorskip("langchain_openai", reason="needs LangChain: pip install langchain-openai")
    settings = {"model": "null", "max_retries": 0, "max_tokens": 12, "seed": 1, "extra_body": {"ignore_eos": True}}
    return langchain.ChatOpenAI(base_url=f"{server.url}/v1", api_key=KEY, **{**settings, **fields})


def test_langchain_chat_stream_and_batch(server: RunningServer) -> None:
    model = _langchain(server, stream_usage=True)
    whole = model.invoke([("system", "Be brief."), ("human", "Hello")])
    assert whole.content and whole.response_metadata["finish_reason"] == "length"
    assert whole.usage_metadata["output_tokens"] == 12
    chunks = list(model.stream([("system", "Be brief."), ("human", "Hello")]))
    assert "".join(chunk.content for chunk in chunks) == whole.content
    assert sum(chunk.usage_metadata["output_tokens"] for chunk in chunks if chunk.usage_metadata) == 12
    assert [answer.content != "" for answer in model.batch(["One", "Two", "Three"])] == [True] * 3
    scored = _langchain(server, logprobs=True, top_logprobs=2).invoke("Hello")
    assert len(scored.response_metadata["logprobs"]["content"]) == 12


@pytest.mark.parametrize("through_responses", [False, True])
def test_langchain_tools_and_structured_output(server: RunningServer, through_responses: bool) -> None:
    shape = {"use_responses_api": True, "seed": None} if through_responses else {}
    model = _langchain(server, max_tokens=400, extra_body={}, temperature=0, **shape)
    bound = model.bind_tools([WEATHER], tool_choice="weather", parallel_tool_calls=False)
    (call,) = bound.invoke("What is the weather?").tool_calls
    assert call["name"] == "weather" and call["args"]["city"] in ("Paris", "Rome")
    (streamed,) = _sum(bound.stream("What is the weather?")).tool_calls
    assert (streamed["name"], streamed["args"]) == (call["name"], call["args"])
    assert isinstance(model.with_structured_output(Answer, method="json_schema").invoke("Is it?"), Answer)


def _sum(chunks: Any) -> Any:
    total = next(chunks)
    for chunk in chunks:
        total += chunk
    return total


def test_langchain_through_responses(server: RunningServer) -> None:
    model = _langchain(server, use_responses_api=True, seed=None, temperature=0)
    whole = model.invoke("Hello")
    assert whole.text and whole.usage_metadata["output_tokens"] == 12
    assert "".join(chunk.text for chunk in model.stream("Hello")) == whole.text
    again = model.invoke("More", previous_response_id=whole.response_metadata["id"])
    assert again.usage_metadata["input_tokens"] > whole.usage_metadata["input_tokens"]


def test_langchain_raises_what_openai_raises(server: RunningServer) -> None:
    with pytest.raises(openai.BadRequestError):
        _langchain(server, temperature=3).invoke("Hello")
    with pytest.raises(openai.NotFoundError):
        _langchain(server, model="nope").invoke("Hello")


# ---- LiteLLM


@pytest.fixture(scope="module")
def litellm() -> Any:
    os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else importing it asks the network
    module = pytest.importorskip("litellm", reason="needs LiteLLM: pip install '.[clients]'")
    module.telemetry = False
    return module


def _litellm_fields(server: RunningServer, **fields: Any) -> dict[str, Any]:
    url = {"api_base": f"{server.url}/v1", "api_key": KEY, "num_retries": 0}
    return {
        "model": "openai/null",
        "messages": USER,
        "max_tokens": 12,
        "extra_body": {"ignore_eos": True},
        **url,
        **fields,
    }


@pytest.mark.parametrize("provider", ["openai", "hosted_vllm"])
def test_litellm_chat_and_stream(server: RunningServer, litellm: Any, provider: str) -> None:
    fields = _litellm_fields(server, model=f"{provider}/null", seed=1)
    whole = litellm.completion(**fields)
    assert whole.choices[0].message.content and whole.choices[0].finish_reason == "length"
    assert whole.usage.completion_tokens == 12
    chunks = list(litellm.completion(**fields, stream=True))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content
    later = asyncio.run(litellm.acompletion(**fields))
    assert later.choices[0].message.content == text


def test_litellm_tools(server: RunningServer, litellm: Any) -> None:
    choice = {"type": "function", "function": {"name": "weather"}}
    fields = _litellm_fields(server, tools=[WEATHER], tool_choice=choice, max_tokens=400, seed=1, extra_body={})
    fields["parallel_tool_calls"] = False
    (call,) = litellm.completion(**fields).choices[0].message.tool_calls
    chunks = list(litellm.completion(**fields, stream=True))
    streamed = litellm.stream_chunk_builder(chunks).choices[0].message.tool_calls[0]
    assert call.function.name == streamed.function.name == "weather"
    assert call.function.arguments == streamed.function.arguments


def test_litellm_raises_its_own_kinds_of_error(server: RunningServer, litellm: Any) -> None:
    with pytest.raises(litellm.BadRequestError):
        litellm.completion(**_litellm_fields(server, temperature=3))
    with pytest.raises(litellm.NotFoundError):
        litellm.completion(**_litellm_fields(server, model="openai/nope"))
    with pytest.raises(litellm.AuthenticationError):
        litellm.completion(**_litellm_fields(server, api_key="wrong"))


def test_litellm_speaks_messages_and_responses(server: RunningServer, litellm: Any) -> None:
    answer = litellm.completion(
        model="anthropic/null", messages=USER, max_tokens=8, api_base=server.url, api_key=KEY, num_retries=0
    )
    assert answer.choices[0].message.content
    response = litellm.responses(
        model="openai/null", input="Hello", max_output_tokens=8, api_base=f"{server.url}/v1", api_key=KEY
    )
    assert response.id and response.output[0].content[0].text
