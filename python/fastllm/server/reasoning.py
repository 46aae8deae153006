"""Splits what a model thinks from what it answers. Pure: text in, pieces out, however the text is cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fastllm.server.tools.parsers import held_back

_SPACE = " \t\r\n"


@dataclass(frozen=True)
class ReasoningTags:
    start: str
    end: str


THINK = ReasoningTags("<think>", "</think>")
BRACKETS = ReasoningTags("[THINK]", "[/THINK]")

# Names of --reasoning-parser, vLLM's among them.
BY_NAME: dict[str, ReasoningTags | None] = {
    "none": None,
    "think": THINK,
    "qwen3": THINK,
    "deepseek_r1": THINK,
    "deepseek_v3": THINK,
    "glm45": THINK,
    "mistral": BRACKETS,
}


def choose_tags(template: str | None) -> ReasoningTags | None:
    """What the models of a chat template put around their reasoning, if it speaks of any."""
    for tags in (THINK, BRACKETS):
        if template is not None and (tags.start in template or tags.end in template):
            return tags
    return None


def is_opened(prompt: str, tags: ReasoningTags) -> bool:
    """The prompt ends inside the reasoning, so that the output begins there."""
    return prompt.rstrip().endswith(tags.start)


@dataclass
class Piece:
    text: str
    is_reasoning: bool


class ReasoningParser:
    """Owned by one sample. feed() every piece of text, then finish().

    Whitespace around the reasoning belongs to nothing. began: there is reasoning; thinking: and it has not ended.

        <think>\\n reasoning \\n</think>\\n\\n answer
    """

    def __init__(self, tags: ReasoningTags, opened: bool) -> None:
        self._tags = tags
        self.thinking = self.began = opened
        self._undecided = not opened  # nothing but whitespace so far: reasoning may still begin
        self._at_start = opened  # of the reasoning or of the answer behind it, where whitespace is dropped
        self._pending = ""

    def feed(self, text: str) -> list[Piece]:
        self._pending += text
        return self._run(last=False)

    def finish(self) -> list[Piece]:
        return self._run(last=True)

    def _run(self, last: bool) -> list[Piece]:
        pieces: list[Piece] = []
        if self._undecided:
            rest = self._pending.lstrip(_SPACE)
            if rest.startswith(self._tags.start):
                self._pending = rest[len(self._tags.start) :]
                self.thinking = self.began = self._at_start = True
                self._undecided = False
            elif not last and self._tags.start.startswith(rest):
                return pieces
            else:
                self._undecided = False
        if self._at_start:
            self._pending = self._pending.lstrip(_SPACE)
            self._at_start = not self._pending
        if self.thinking:
            at = self._pending.find(self._tags.end)
            if at >= 0:
                _append(pieces, self._pending[:at].rstrip(_SPACE), True)
                self._pending = self._pending[at + len(self._tags.end) :].lstrip(_SPACE)
                self.thinking, self._at_start = False, not self._pending
            else:
                shown = self._pending
                if not last:
                    shown = shown[: len(shown) - held_back(shown, [self._tags.end])]
                shown = shown.rstrip(_SPACE)
                _append(pieces, shown, True)
                self._pending = "" if last else self._pending[len(shown) :]
        if not self.thinking:
            _append(pieces, self._pending, False)
            self._pending = ""
        return pieces


def _append(pieces: list[Piece], text: str, is_reasoning: bool) -> None:
    if text:
        pieces.append(Piece(text, is_reasoning))


class ReasoningCounter:
    """Tokens that went into reasoning, for usage. end_id: the token that ends it, where it is one."""

    def __init__(self, end_id: int | None) -> None:
        self._end_id = end_id
        self.tokens = 0

    def add(self, token_ids: Sequence[int], was_thinking: bool, parser: ReasoningParser) -> None:
        """`token_ids` of one update, which `parser` has read; was_thinking: what it did before."""
        if was_thinking or parser.thinking or (parser.began and not self.tokens):
            ended = not parser.thinking and self._end_id is not None and self._end_id in token_ids
            self.tokens += list(token_ids).index(self._end_id or 0) + 1 if ended else len(token_ids)
