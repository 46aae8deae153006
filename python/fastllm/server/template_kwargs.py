"""Which variables of the chat template a request may set: those that the template reads, to plain values."""

from __future__ import annotations

from typing import Any

from fastllm.chat import template_variables
from fastllm.server.errors import bad_request
from fastllm.server.state import ServerState

# Names that a template takes from the server, not from the caller.
_RESERVED = frozenset(
    {
        "messages",
        "tools",
        "documents",
        "chat_template",
        "tokenize",
        "add_generation_prompt",
        "continue_final_message",
        "raise_exception",
        "strftime_now",
    }
)
_MAX_CHARS = 16 << 10  # of all strings
_FIELD = "chat_template_kwargs"
_EFFORT = "reasoning_effort"
_EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")


def check_documents(state: ServerState, documents: list[dict[str, Any]] | None) -> None:
    """Documents that no template puts into the prompt would be lost without a word."""
    if documents and "documents" not in _variables(state):
        raise bad_request(
            "documents: the chat template of this model does not read them.", "documents", "unsupported_parameter"
        )


def effort_variables(effort: str) -> dict[str, Any]:
    """How much the model should reason, in the words of the templates; one that reads neither has a model that cannot
    be told."""
    if effort not in _EFFORTS:
        raise bad_request(f"reasoning_effort must be one of {', '.join(_EFFORTS)}, got {effort[:40]!r}.", _EFFORT)
    return {"reasoning_effort": effort, "enable_thinking": effort != "none"}


def check_template_kwargs(state: ServerState, kwargs: dict[str, Any]) -> None:
    if not kwargs:
        return
    for name in sorted(kwargs):
        if name in _RESERVED:
            raise bad_request(f"{_FIELD} cannot set {name[:40]!r}.", _FIELD, "not_allowed")
    known = _variables(state) - _RESERVED - state.llm.tokenizer.special_tokens.keys()
    chars = 0
    for name, value in sorted(kwargs.items()):
        if name not in known:
            allowed = ", ".join(sorted(known)) or "none"
            raise bad_request(
                f"{_FIELD}: the chat template does not read {name[:40]!r}; it reads: {allowed}.", _FIELD, "not_allowed"
            )
        items = value if isinstance(value, list) else [value]
        if any(isinstance(item, dict | list) for item in items):
            raise bad_request(f"{_FIELD}: {name} must be a plain value or a list of them.", _FIELD, "not_allowed")
        chars += sum(len(item) if isinstance(item, str) else 8 for item in items)
    if chars > _MAX_CHARS:
        raise bad_request(f"{_FIELD} take at most {_MAX_CHARS} characters.", _FIELD, "too_large")


def _variables(state: ServerState) -> frozenset[str]:
    template = state.llm.model_config.chat_template or state.llm.tokenizer.template_for(None)
    return template_variables(template) if template else frozenset()
