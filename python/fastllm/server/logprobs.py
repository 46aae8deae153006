"""Log-probabilities in the two shapes of the wire."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from fastllm.outputs import Logprob
from fastllm.server.protocol import (
    ChatLogprobs,
    CompletionLogprobs,
    PromptLogprob,
    PromptLogprobs,
    TokenLogprob,
    TopLogprob,
)

if TYPE_CHECKING:
    from fastllm.tokenizer import Tokenizer

Position = Mapping[int, Logprob]  # token id -> its log-probability; the token that stands there is always among them
JSON_NEG_INF = -9999.0  # JSON has no infinity


def _finite(value: float) -> float:
    return value if math.isfinite(value) else JSON_NEG_INF


def _token_text(tokenizer: Tokenizer, token: int, entry: Logprob) -> str:
    return entry.decoded_token if entry.decoded_token is not None else tokenizer.token_str(token)


def completion_logprobs(
    tokenizer: Tokenizer, tokens: Sequence[int], positions: Sequence[Position | None], top: int, offset: int
) -> CompletionLogprobs:
    """`offset` is where the first token begins in the text, in characters; a position without values is null."""
    result = CompletionLogprobs([], [], [], [])
    for token, position in zip(tokens, positions, strict=False):
        entry = position.get(token) if position else None
        text = _token_text(tokenizer, token, entry) if entry else tokenizer.token_str(token)
        result.text_offset.append(offset)
        result.tokens.append(text)
        offset += len(text)
        if not position or entry is None:
            result.token_logprobs.append(None)
            result.top_logprobs.append(None)
            continue
        result.token_logprobs.append(_finite(entry.logprob))
        # Tokens that are parts of one character may share a text; the likeliest of them keeps it.
        best: dict[str, float] = {}
        for id, other in _best(position, top):
            best.setdefault(_token_text(tokenizer, id, other), _finite(other.logprob))
        best.setdefault(text, _finite(entry.logprob))
        result.top_logprobs.append(best)
    return result


def chat_logprobs(tokenizer: Tokenizer, tokens: Sequence[int], positions: Sequence[Position], top: int) -> ChatLogprobs:
    content: list[TokenLogprob] = []
    for token, position in zip(tokens, positions, strict=False):
        entry = position[token]
        best = [
            TopLogprob(_token_text(tokenizer, id, e), _finite(e.logprob), list(tokenizer.token_bytes(id)))
            for id, e in _best(position, top)
        ]
        text = _token_text(tokenizer, token, entry)
        content.append(TokenLogprob(text, _finite(entry.logprob), list(tokenizer.token_bytes(token)), best))
    return ChatLogprobs(content)


def prompt_logprobs(tokenizer: Tokenizer, positions: Sequence[Position | None] | None) -> PromptLogprobs | None:
    """vLLM's shape: one object per prompt token keyed by token id, null for the first."""
    if positions is None:
        return None
    return [
        {
            str(id): PromptLogprob(_finite(e.logprob), e.rank, _token_text(tokenizer, id, e))
            for id, e in position.items()
        }
        if position
        else None
        for position in positions
    ]


def _best(position: Position, top: int) -> list[tuple[int, Logprob]]:
    ranked = sorted(position.items(), key=lambda item: -item[1].logprob)
    return ranked[:top]
