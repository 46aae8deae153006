"""What generation returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypedDict

from fastllm.sampling import RequestOutputKind

__all__ = [
    "CompletionOutput",
    "Logprob",
    "RequestMetrics",
    "RequestOutput",
    "RequestOutputKind",
    "TokenIds",
    "TokensPrompt",
]


# A list, or a view of 32-bit ints such as memoryview(array("i")), which large prompts are cheaper in.
TokenIds = list[int] | memoryview


class _TokensPrompt(TypedDict):
    prompt_token_ids: list[int]


class TokensPrompt(_TokensPrompt, total=False):
    """A prompt given as token ids; `prompt` may carry its text for the record."""

    prompt: str
    cache_salt: str


@dataclass
class Logprob:
    """logprob: natural logarithm, from the raw logits. rank: 1 is the most likely token of the vocabulary."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


# One entry per position: token id -> Logprob, the token that stands there first
PositionLogprobs = dict[int, Logprob]


@dataclass
class RequestMetrics:
    """Moments in time.monotonic() seconds; 0.0 while unknown. num_preemptions: over the samples that ended."""

    arrival_time: float = 0.0
    first_scheduled_time: float = 0.0
    first_token_time: float = 0.0
    finished_time: float = 0.0
    num_preemptions: int = 0


@dataclass
class CompletionOutput:
    """One sample. finish_reason: "stop", "length", "abort", "error" or None while running.

    stop_reason: the stop string or stop token id that ended it, None for the end-of-sequence token.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[PositionLogprobs] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass
class RequestOutput:
    """The samples of one request. prompt_logprobs: one entry per prompt token, None for the first.

    num_generated_tokens: so far, those of samples that are not returned included (best_of).
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: TokenIds  # as they were given
    prompt_logprobs: list[PositionLogprobs | None] | None
    outputs: list[CompletionOutput]
    finished: bool
    num_cached_tokens: int = 0
    num_generated_tokens: int = 0
    metrics: RequestMetrics = field(default_factory=RequestMetrics)
