"""From the core's deltas to the text and tokens of each request. One owner thread: whoever polls the engine."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fastllm.detokenizer import IncrementalDetokenizer
from fastllm.errors import RequestError
from fastllm.outputs import CompletionOutput, Logprob, PositionLogprobs, RequestMetrics, RequestOutput, TokenIds
from fastllm.sampling import RequestOutputKind, SamplingParams
from fastllm.tokenizer import Tokenizer

if TYPE_CHECKING:
    from fastllm import _core

_SCORED_AT_ONCE = 100  # positions


@dataclass
class SequenceState:
    """One sample of a request: what is known, and how much of it a stream has already been given."""

    index: int
    detokenizer: IncrementalDetokenizer | None
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[PositionLogprobs] | None = None
    cumulative_logprob: float = 0.0
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    given_tokens: int = 0
    given_text: int = 0  # characters
    given_finish: bool = False

    @property
    def num_chars(self) -> int:
        return self.detokenizer.num_chars if self.detokenizer else 0

    def output(self, delta: bool, index: int) -> CompletionOutput:
        tokens, text = (self.given_tokens, self.given_text) if delta else (0, 0)
        result = CompletionOutput(
            index=index,
            text=self.detokenizer.text_from(text) if self.detokenizer else "",
            token_ids=self.token_ids[tokens:],
            cumulative_logprob=None if self.logprobs is None else self.cumulative_logprob,
            logprobs=None if self.logprobs is None else self.logprobs[tokens:],
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
        )
        self.given_tokens, self.given_text = len(self.token_ids), self.num_chars
        self.given_finish = self.finish_reason is not None
        return result

    def has_news(self) -> bool:
        unseen = len(self.token_ids) > self.given_tokens or self.num_chars > self.given_text
        return unseen or (self.finish_reason is not None and not self.given_finish)


class RequestState:
    """A live request. take() hands out what a caller has not seen, in the form its output kind asks for."""

    def __init__(
        self,
        request_id: str,
        core_id: int,
        prompt: str | None,
        prompt_token_ids: TokenIds,
        params: SamplingParams,
        kind: RequestOutputKind,
        tokenizer: Tokenizer,
    ) -> None:
        self.request_id = request_id
        self.core_id = core_id
        self.prompt = prompt
        self.prompt_token_ids = prompt_token_ids
        self.params = params
        self.kind = kind
        self.metrics = RequestMetrics()
        self.num_cached_tokens = 0
        self.prompt_logprobs: list[PositionLogprobs | None] | None = None
        self._tokenizer = tokenizer
        self._unscored: deque[_core.TokenDelta] = deque()  # with what is missing in prompt_logprobs
        self.error: RequestError | None = None
        self.sequences = [
            SequenceState(
                index,
                IncrementalDetokenizer(tokenizer, params) if params.detokenize else None,
                logprobs=None if params.logprobs is None else [],
            )
            for index in range(params.num_reported)
        ]
        if params.prompt_logprobs is not None:
            self.prompt_logprobs = [None]

    @property
    def num_unscored(self) -> int:
        """Positions of the prompt that score_prompt() has before it."""
        return sum(delta.num_prompt_logprobs for delta in self._unscored)

    def leave_unscored(self, delta: _core.TokenDelta) -> None:
        self._unscored.append(delta)

    def score_prompt(self) -> None:
        """Adds to prompt_logprobs what the engine has found. take() does so if nobody did; tens of us a position.

        Callable from any thread, in pieces after which other threads get their turn.
        """
        while self._unscored:
            delta = self._unscored.popleft()
            assert self.prompt_logprobs is not None
            for begin in range(0, delta.num_prompt_logprobs, _SCORED_AT_ONCE):
                found = delta.prompt_logprobs(begin, _SCORED_AT_ONCE)
                self.prompt_logprobs += [_position(self._tokenizer, position) for position in found]

    @property
    def finished(self) -> bool:
        return self.error is not None or all(s.finish_reason is not None for s in self.sequences)

    @property
    def num_generated_tokens(self) -> int:
        return sum(len(s.token_ids) for s in self.sequences)

    def take(self) -> RequestOutput | None:
        """The next output, or None if there is nothing to say yet.

        Raises the request's error, if it has one; a caller that gets outputs on the way first gets what came before it.
        """
        on_the_way = self.kind is not RequestOutputKind.FINAL_ONLY and not self.params.ranks
        if self.error is not None and not (on_the_way and any(s.has_news() for s in self.sequences)):
            raise self.error
        if self.params.ranks:
            chosen = self._best() if self.finished else []
        elif self.kind is RequestOutputKind.FINAL_ONLY:
            chosen = self.sequences if self.finished else []
        elif self.kind is RequestOutputKind.DELTA:
            chosen = [s for s in self.sequences if s.has_news()]
        else:
            chosen = self.sequences if any(s.has_news() for s in self.sequences) else []
        if not chosen:
            return None
        self.score_prompt()
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=self.prompt_token_ids,
            prompt_logprobs=self.prompt_logprobs,
            outputs=[
                s.output(self.kind is RequestOutputKind.DELTA, rank if self.params.ranks else s.index)
                for rank, s in enumerate(chosen)
            ],
            finished=self.finished and self.error is None,
            num_cached_tokens=self.num_cached_tokens,
            num_generated_tokens=self.num_generated_tokens,
            metrics=self.metrics,
        )

    def _best(self) -> list[SequenceState]:
        """The n samples to return, of the best_of that were made."""
        return sorted(self.sequences, key=lambda s: -s.cumulative_logprob)[: self.params.n]


class OutputProcessor:
    """Applies deltas to the requests they belong to. Deltas of requests it does not know are late and ignored."""

    def __init__(self, tokenizer: Tokenizer, eos_token_ids: Iterable[int]) -> None:
        self._tokenizer = tokenizer
        self._eos = frozenset(eos_token_ids)
        self.requests: dict[int, RequestState] = {}

    def process(self, deltas: Sequence[_core.TokenDelta]) -> tuple[list[RequestState], list[tuple[int, int]]]:
        """The requests that changed, in order of their first delta, and the samples to abort: (core id, index).

        A sample is to be aborted when a stop string ended it, which only text can tell. Finished requests are
        forgotten.
        """
        changed: dict[int, RequestState] = {}
        ended: list[RequestState] = []
        to_abort: list[tuple[int, int]] = []
        for delta in deltas:
            core_id = delta.id
            state = self.requests.get(core_id)
            if state is None:
                continue
            finish = delta.finish
            stopped = self._apply(state, delta, finish)
            if stopped:
                to_abort.append((core_id, delta.index))
            if stopped or finish is not None:
                state.metrics.num_preemptions += delta.num_preemptions
                ended.append(state)
            changed[core_id] = state
        for state in ended:
            if state.finished:
                self.requests.pop(state.core_id, None)
        return list(changed.values()), to_abort

    def _apply(self, state: RequestState, delta: _core.TokenDelta, finish: str | None) -> bool:
        """True if text ended a sample that the core still runs. finish: the delta's."""
        metrics = state.metrics
        if finish is not None or not metrics.first_token_time:  # these rarely change, and there are many deltas
            (
                metrics.arrival_time,
                metrics.first_scheduled_time,
                metrics.first_token_time,
                metrics.finished_time,
            ) = delta.times
            state.num_cached_tokens = max(state.num_cached_tokens, delta.cached_tokens)
        if finish == "error":
            if delta.tokens and state.sequences[delta.index].finish_reason is None:
                self._extend(state.sequences[delta.index], state.params, delta, None)
            if any(s.finish_reason is None for s in state.sequences):  # else a stop string came before it
                state.error = RequestError(delta.error, delta.error_kind or "engine")
            return False
        if state.prompt_logprobs is not None and delta.num_prompt_logprobs:
            state.leave_unscored(delta)
        sequence = state.sequences[delta.index]
        if sequence.finish_reason is None:
            self._extend(sequence, state.params, delta, finish)
            return sequence.finish_reason is not None and finish is None
        return False

    def _extend(
        self, sequence: SequenceState, params: SamplingParams, delta: _core.TokenDelta, finish: str | None
    ) -> None:
        tokens = delta.tokens
        stop_token = delta.stop_token if finish == "stop" else None
        sequence.finish_reason = finish
        if stop_token is not None and stop_token not in self._eos:
            sequence.stop_reason = stop_token
        if sequence.detokenizer is not None:
            hide_last = stop_token is not None and not params.include_stop_str_in_output
            before = sequence.detokenizer.num_tokens
            sequence.detokenizer.add(tokens[:-1] if hide_last else tokens)
            if sequence.detokenizer.stop_reason is not None:
                tokens = tokens[: sequence.detokenizer.num_tokens - before]
                sequence.finish_reason, sequence.stop_reason = "stop", sequence.detokenizer.stop_reason
            if sequence.finish_reason is not None:
                sequence.detokenizer.finish()
        sequence.token_ids += tokens
        if sequence.logprobs is not None or params.ranks:
            for position in delta.logprobs[: len(tokens)]:
                sequence.cumulative_logprob += position[0][1]
                if sequence.logprobs is not None:
                    sequence.logprobs.append(_position(self._tokenizer, position))


def _position(tokenizer: Tokenizer, position: _core.PositionLogprobs) -> PositionLogprobs:
    chosen, alternatives = position
    return {
        token: Logprob(logprob, rank, tokenizer.token_str(token)) for token, logprob, rank in [chosen, *alternatives]
    }
