"""Renders chat templates: Jinja in a sandbox, with the helpers that templates on the Hugging Face hub rely on.

The sandbox does not bound time and memory, so templates of models are rendered through TemplateRenderer.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    import jinja2

_MAX_CHARS = 16 << 20  # of a rendered prompt; no context is that long
# Put at the end of the last message to find, in the rendered text, where it stops.
_FINAL_MARK = "\u241efinal message\u241e"


def render_chat(
    template: str | None,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
    tools: Sequence[Mapping[str, Any]] | None = None,
    continue_final_message: bool = False,
    **variables: Any,
) -> str:
    """The prompt of a conversation: `messages` through `template`.

    continue_final_message: leave the last message open, so that the model continues it; excludes
    add_generation_prompt. Raises ValueError if the template is missing, wrong, or refuses the messages.
    """
    import jinja2

    if not template:
        raise ValueError("The model has no chat template. Pass one with --chat-template or chat_template=.")
    if not messages:
        raise ValueError("Cannot apply chat template to an empty conversation. Provide at least one message.")
    if continue_final_message and add_generation_prompt:
        raise ValueError("continue_final_message and add_generation_prompt exclude each other.")
    conversation = [dict(message) for message in messages]
    if continue_final_message:
        conversation[-1] = _marked(conversation[-1])
    try:
        pieces = _compile(template).generate(
            messages=conversation, tools=tools, add_generation_prompt=add_generation_prompt, **variables
        )
        text = "".join(_bounded(pieces))
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"The chat template is not valid Jinja, line {error.lineno}: {error.message}") from error
    except (
        jinja2.TemplateError,
        TypeError,
        ValueError,
        KeyError,
        AttributeError,
        RecursionError,
        ArithmeticError,
    ) as error:
        raise ValueError(f"The chat template refused the conversation: {error}") from error
    return _up_to_mark(text) if continue_final_message else text


def _bounded(pieces: Iterable[str]) -> Iterator[str]:
    chars = 0
    for piece in pieces:
        chars += len(piece)
        if chars > _MAX_CHARS:
            raise ValueError(f"it makes more than {_MAX_CHARS} characters of it")
        yield piece


def _marked(message: dict[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    if isinstance(content, str):
        return {**message, "content": content.rstrip() + _FINAL_MARK}
    if isinstance(content, list) and content and isinstance(content[-1], Mapping) and "text" in content[-1]:
        last = {**content[-1], "text": str(content[-1]["text"]).rstrip() + _FINAL_MARK}
        return {**message, "content": [*content[:-1], last]}
    raise ValueError("continue_final_message needs a last message with text.")


def _up_to_mark(text: str) -> str:
    if _FINAL_MARK not in text:
        raise ValueError("continue_final_message: the chat template does not render the last message as it is.")
    return text[: text.rindex(_FINAL_MARK)]


@lru_cache(maxsize=16)
def _compile(template: str) -> jinja2.Template:
    return _environment().from_string(template)


@lru_cache(maxsize=16)
def template_variables(template: str) -> frozenset[str]:
    """The names that the template reads and does not set itself; none if it is not valid Jinja."""
    import jinja2
    from jinja2 import meta

    try:
        return frozenset(meta.find_undeclared_variables(_environment().parse(template)))
    except jinja2.TemplateSyntaxError:
        return frozenset()


@lru_cache(maxsize=1)
def _environment() -> jinja2.Environment:
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} blocks mark what the assistant said, for training; here their body is all that counts."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Unlike Jinja's own filter it does not escape HTML: prompts are plain text."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    import jinja2

    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
