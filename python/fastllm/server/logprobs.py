"""Log-probabilities in the two shapes of the wire."""

from __future__ import annotations

import codecs
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


class TokenNames:
    """What tokens are called on the wire. as_ids: "token_id:5" in place of texts, which several tokens may share."""

    def __init__(self, tokenizer: Tokenizer, as_ids: bool = False) -> None:
        self.tokenizer = tokenizer
        self._as_ids = as_ids

    def name(self, token: int, entry: Logprob | None = None) -> str:
        return f"token_id:{token}" if self._as_ids else self.text(token, entry)

    def text(self, token: int, entry: Logprob | None = None) -> str:
        known = entry.decoded_token if entry is not None else None
        return known if known is not None else self.tokenizer.token_str(token)

    def bytes(self, token: int) -> bytes:
        return self.tokenizer.token_bytes(token)


class TextPlace:
    """Where the next token of a choice begins in its text, in characters. Parts of a character begin where it does."""

    def __init__(self) -> None:
        self.offset = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def pass_token(self, data: bytes) -> None:
        self.offset += len(self._decoder.decode(data))


def completion_logprobs(
    names: TokenNames, tokens: Sequence[int], positions: Sequence[Position | None], top: int, place: TextPlace
) -> CompletionLogprobs:
    """The tokens from `place` on, which is moved behind them; a position without values is null."""
    result = CompletionLogprobs([], [], [], [])
    for token, position in zip(tokens, positions, strict=False):
        entry = position.get(token) if position else None
        name = names.name(token, entry)
        result.text_offset.append(place.offset)
        result.tokens.append(name)
        place.pass_token(names.bytes(token))
        if not position or entry is None:
            result.token_logprobs.append(None)
            result.top_logprobs.append(None)
            continue
        result.token_logprobs.append(_finite(entry.logprob))
        # Tokens that are parts of one character may share a text; the likeliest of them keeps it.
        best: dict[str, float] = {}
        for id, other in _best(position, top):
            best.setdefault(names.name(id, other), _finite(other.logprob))
        best.setdefault(name, _finite(entry.logprob))
        result.top_logprobs.append(best)
    return result


def chat_logprobs(names: TokenNames, tokens: Sequence[int], positions: Sequence[Position], top: int) -> ChatLogprobs:
    content: list[TokenLogprob] = []
    for token, position in zip(tokens, positions, strict=False):
        entry = position[token]
        best = [
            TopLogprob(names.name(id, e), _finite(e.logprob), list(names.bytes(id))) for id, e in _best(position, top)
        ]
        content.append(TokenLogprob(names.name(token, entry), _finite(entry.logprob), list(names.bytes(token)), best))
    return ChatLogprobs(content)


def prompt_logprobs(names: TokenNames, positions: Sequence[Position | None] | None) -> PromptLogprobs | None:
    """vLLM's shape: one object per prompt token keyed by token id, null for the first."""
    if positions is None:
        return None
    return [
        {str(id): PromptLogprob(_finite(e.logprob), e.rank, names.text(id, e)) for id, e in position.items()}
        if position
        else None
        for position in positions
    ]


def _best(position: Position, top: int) -> list[tuple[int, Logprob]]:
    ranked = sorted(position.items(), key=lambda item: -item[1].logprob)
    return ranked[:top]
