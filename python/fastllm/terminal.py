"""Talks to a model from a terminal: `fastllm chat` and `fastllm generate`. One thread, the caller's."""

from __future__ import annotations

import json
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from fastllm.errors import RequestError

if TYPE_CHECKING:
    from fastllm.engine_args import EngineArgs
    from fastllm.llm_engine import LLMEngine
    from fastllm.sampling import SamplingParams

Message = dict[str, str]
# From the model's sampling defaults to the parameters of a request.
MakeParams = Callable[[dict[str, Any]], "SamplingParams"]

_HELP = "/clear forgets the conversation, /exit or Ctrl-D ends it, Ctrl-C stops an answer."


class Talker(Protocol):
    def answer(self, messages: Sequence[Message]) -> Iterator[str]: ...
    def close(self) -> None: ...


class LocalChat:
    """A model loaded into this process."""

    def __init__(self, args: EngineArgs, make_params: MakeParams) -> None:
        from fastllm.llm_engine import LLMEngine

        self._engine = LLMEngine.from_engine_args(args)
        self._params = make_params(self._engine.model_config.generation_config)

    def answer(self, messages: Sequence[Message]) -> Iterator[str]:
        engine = self._engine
        prompt = engine.tokenizer.apply_chat_template(messages, chat_template=engine.model_config.chat_template)
        ids = engine.tokenizer.encode(prompt, add_special_tokens=False)
        return _deltas(engine, ids, self._params)

    def close(self) -> None:
        self._engine.shutdown()


class RemoteChat:
    """A server that speaks the OpenAI API. `fields` are sampling fields of the request."""

    def __init__(self, url: str, api_key: str | None, fields: dict[str, Any]) -> None:
        base = url.rstrip("/").removesuffix("/v1")
        if not base.startswith(("http://", "https://")):
            raise ValueError(f"the url must begin with http:// or https://, got {url!r}.")
        self._url = f"{base}/v1/chat/completions"
        self._fields = fields
        key = api_key or os.environ.get("FASTLLM_API_KEY")
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})

    def answer(self, messages: Sequence[Message]) -> Iterator[str]:
        body = json.dumps({"messages": list(messages), "stream": True, **self._fields}).encode()
        request = urllib.request.Request(self._url, body, self._headers)
        try:
            with urllib.request.urlopen(request) as response:
                yield from _events(response)
        except urllib.error.HTTPError as exc:
            raise RequestError(_error_sentence(exc.read()) or f"the server answered {exc.code}.") from None
        except urllib.error.URLError as exc:
            raise RequestError(f"{self._url} cannot be reached: {exc.reason}.") from None

    def close(self) -> None:
        """Every answer has its own connection: there is nothing to close."""


def _events(lines: Iterator[bytes]) -> Iterator[str]:
    for line in lines:
        if not line.startswith(b"data: "):
            continue
        data = line[6:].strip()
        if data == b"[DONE]":
            return
        event = json.loads(data)
        if "error" in event:
            raise RequestError(_error_sentence(data) or "the server failed.")
        for choice in event.get("choices", ()):
            yield choice["delta"].get("content") or ""
    raise RequestError("the server ended the answer early.")


def _error_sentence(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return ""


def _deltas(engine: LLMEngine, prompt: str | list[int], params: SamplingParams) -> Iterator[str]:
    """The text of one request as it comes; a consumer that stops early aborts it."""
    engine.add_request("terminal", prompt, params)
    try:
        while engine.has_unfinished_requests():
            for output in engine.step():
                for sample in output.outputs:
                    if sample.finish_reason == "error":
                        raise RequestError(str(sample.stop_reason))
                    yield sample.text
    finally:
        engine.abort_request("terminal")


def _print(pieces: Iterator[str], *, interactive: bool = False) -> str:
    """Shows the pieces as they come and returns them joined; `interactive`: Ctrl-C ends only the answer."""
    text: list[str] = []
    try:
        for piece in pieces:
            text.append(piece)
            sys.stdout.write(piece)
            sys.stdout.flush()
    except KeyboardInterrupt:
        if not interactive:
            raise
        sys.stderr.write(" [stopped]")
    sys.stdout.write("\n")
    sys.stdout.flush()
    return "".join(text)


def converse(make: Callable[[], Talker], system: str | None) -> int:
    """A conversation on a terminal; piped input is one message and gets one answer."""
    talker = make()
    start: list[Message] = [{"role": "system", "content": system}] if system else []
    try:
        if not sys.stdin.isatty():
            text = sys.stdin.read().strip()
            if not text:
                raise ValueError("standard input is empty.")
            _print(talker.answer([*start, {"role": "user", "content": text}]))
            return 0
        print(_HELP, file=sys.stderr)
        messages = list(start)
        while True:
            try:
                text = input("> ").strip()
            except EOFError:
                print(file=sys.stderr)
                return 0
            if text == "/exit":
                return 0
            if text == "/clear":
                messages = list(start)
            elif text:
                messages = _turn(talker, messages, text)
    finally:
        talker.close()


def _turn(talker: Talker, messages: list[Message], text: str) -> list[Message]:
    """One question and its answer; what fails is reported and not remembered."""
    asked = [*messages, {"role": "user", "content": text}]
    try:
        return [*asked, {"role": "assistant", "content": _print(talker.answer(asked), interactive=True)}]
    except (RequestError, ValueError) as exc:
        print(f"fastllm chat: {exc}", file=sys.stderr)
        return messages


def complete(args: EngineArgs, prompt: str, make_params: MakeParams) -> int:
    """Continues `prompt` on standard output."""
    from fastllm.llm_engine import LLMEngine

    engine = LLMEngine.from_engine_args(args)
    try:
        _print(_deltas(engine, prompt, make_params(engine.model_config.generation_config)))
    finally:
        engine.shutdown()
    return 0
