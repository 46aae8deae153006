"""How to choose the next token, with the names, defaults and messages users know from vLLM."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

from fastllm.grammar.params import StructuredOutputsParams

if TYPE_CHECKING:
    from fastllm import _core

_GREEDY_BELOW = 1e-5  # temperatures under this are greedy
_MIN_TOP_P = 2.0**-150  # the core computes in fp32, where anything up to this rounds to 0
_MAX_TOP_K = 2**31 - 1  # no vocabulary is larger, so a larger top_k means the same: every token


class RequestOutputKind(Enum):
    """What each RequestOutput of a stream holds: everything so far, only what is new, or only the last one."""

    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


@dataclass
class SamplingParams:
    """Parameters of one request.

    n: samples per prompt, at least 1. best_of: samples made, the n of the greatest cumulative log-probability are
    returned, all at the end. temperature: at least 0, 0 is greedy. top_p: (0, 1]. top_k: 0 or -1 is off.
    min_p: [0, 1]. presence_penalty, frequency_penalty: [-2, 2]. repetition_penalty: above 0. seed: makes a request
    repeatable. stop: strings that end the text; stop_token_ids: ids that end it. max_tokens: output tokens, None for
    what the context leaves. min_tokens: output tokens before any stop. logprobs, prompt_logprobs: alternatives per
    token, None is off. logits_processors: functions of (output_ids, logits) or (prompt_ids, output_ids, logits).
    allowed_token_ids: the only ids that may be sampled. bad_words: texts that may not stand in the output, each alone
    or after a space. use_beam_search: the n best sequences of best_of (or n) beams, all at the end; a score is the
    cumulative log-probability over length ** length_penalty, and early_stopping (False, True or "never") says when the
    search ends, as in Transformers. truncate_prompt_tokens: keep only the last so many prompt tokens; -1: what the
    model's limit allows.
    structured_outputs: what the output must look like, a StructuredOutputsParams or a dict of its fields;
    guided_decoding is its name in vLLM's earlier versions.
    Raises ValueError naming the field, its value and what is allowed.
    """

    n: int = 1
    best_of: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    logits_processors: list[Callable[..., Any]] | None = None
    include_stop_str_in_output: bool = False
    truncate_prompt_tokens: int | None = None
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    use_beam_search: bool = False
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    structured_outputs: StructuredOutputsParams | dict[str, Any] | None = None
    guided_decoding: StructuredOutputsParams | dict[str, Any] | None = None

    def __post_init__(self) -> None:
        self.stop = [self.stop] if isinstance(self.stop, str) else list(self.stop or [])
        self.stop_token_ids = list(self.stop_token_ids or [])
        self.seed = None if self.seed == -1 else self.seed
        if self.logit_bias is not None:
            self.logit_bias = {int(token): float(bias) for token, bias in self.logit_bias.items()}
        # True means "the sampled token only", as in the OpenAI chat API.
        self.logprobs = 1 if self.logprobs is True else self.logprobs
        self.prompt_logprobs = 1 if self.prompt_logprobs is True else self.prompt_logprobs
        self._check_numbers()
        self._check_stops()
        self._check_choice()
        self._check_beams()
        self._take_structured_outputs()

    def _take_structured_outputs(self) -> None:
        if self.guided_decoding is not None:
            if self.structured_outputs is not None:
                raise ValueError("structured_outputs and guided_decoding are two names for one thing; pass one.")
            self.structured_outputs, self.guided_decoding = self.guided_decoding, None
        if self.structured_outputs is not None:
            self.structured_outputs = StructuredOutputsParams.of(self.structured_outputs)

    def _check_numbers(self) -> None:
        _at_least("n", self.n, 1)
        if self.best_of is not None:
            _at_least("best_of", self.best_of, 1)
            if self.best_of < self.n:
                raise ValueError(
                    f"best_of must be greater than or equal to n, got n={self.n} and best_of={self.best_of}."
                )
        for name in ("presence_penalty", "frequency_penalty"):
            _within(name, getattr(self, name), -2.0, 2.0)
        if not _is_number(self.repetition_penalty) or not 0.0 < self.repetition_penalty < math.inf:
            raise ValueError(f"repetition_penalty must be greater than zero, got {self.repetition_penalty}.")
        if not _is_number(self.temperature) or not 0.0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be non-negative, got {self.temperature}.")
        if not _is_number(self.top_p) or not _MIN_TOP_P < self.top_p <= 1.0:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}.")
        if not _is_int(self.top_k) or self.top_k < -1:
            raise ValueError(f"top_k must be 0 (disable), or at least 1, got {self.top_k}.")
        _within("min_p", self.min_p, 0.0, 1.0)
        if self.seed is not None and not (_is_int(self.seed) and -(2**63) <= self.seed < 2**64):
            raise ValueError(f"seed must be a 64-bit whole number, got {self.seed}.")
        if self.max_tokens is not None:
            _at_least("max_tokens", self.max_tokens, 1)
        _at_least("min_tokens", self.min_tokens, 0)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens must be less than or equal to max_tokens={self.max_tokens}, got {self.min_tokens}."
            )
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _at_least(name, getattr(self, name), 0)
        if self.truncate_prompt_tokens is not None and (
            not _is_int(self.truncate_prompt_tokens)
            or self.truncate_prompt_tokens < -1
            or self.truncate_prompt_tokens == 0
        ):
            raise ValueError(f"truncate_prompt_tokens must be -1 or at least 1, got {self.truncate_prompt_tokens}.")
        for token, bias in (self.logit_bias or {}).items():
            if token < 0 or not math.isfinite(bias):
                raise ValueError(f"logit_bias must map token ids to finite numbers, got {token}: {bias}.")

    def _check_choice(self) -> None:
        allowed = self.allowed_token_ids
        if allowed is not None and not (allowed and all(_is_int(i) and i >= 0 for i in allowed)):
            raise ValueError(f"allowed_token_ids must be a list of at least one token id, got {allowed}.")
        if not all(isinstance(word, str) and word.strip() for word in self.bad_words or []):
            raise ValueError(f"bad_words must be texts that are not empty, got {self.bad_words}.")

    def _check_beams(self) -> None:
        if not _is_number(self.length_penalty) or not math.isfinite(self.length_penalty):
            raise ValueError(f"length_penalty must be a finite number, got {self.length_penalty}.")
        if self.early_stopping not in (False, True, "never"):
            raise ValueError(f'early_stopping must be false, true or "never", got {self.early_stopping!r}.')
        if not self.use_beam_search:
            if self.length_penalty != 1.0 or self.early_stopping is not False:
                name = "early_stopping" if self.length_penalty == 1.0 else "length_penalty"
                raise ValueError(f"{name} is only used with use_beam_search.")
            return
        neutral = {"presence_penalty": 0.0, "frequency_penalty": 0.0, "repetition_penalty": 1.0}
        neutral |= {"top_p": 1.0, "min_p": 0.0}
        lists = ("stop", "logits_processors", "logit_bias", "allowed_token_ids", "bad_words")
        for name in [n for n, v in neutral.items() if getattr(self, n) != v] + [n for n in lists if getattr(self, n)]:
            raise ValueError(f"{name} cannot be combined with use_beam_search.")
        if self.top_k not in (0, -1):
            raise ValueError("top_k cannot be combined with use_beam_search.")

    @property
    def num_sequences(self) -> int:
        """Sequences that run for one prompt."""
        return self.n if self.best_of is None else self.best_of

    @property
    def num_reported(self) -> int:
        """Sequences that the engine reports: a beam search tells its results only."""
        return self.n if self.use_beam_search else self.num_sequences

    @property
    def ranks(self) -> bool:
        """More samples are made than returned."""
        return not self.use_beam_search and self.num_sequences > self.n

    def _check_stops(self) -> None:
        if not all(isinstance(s, str) for s in self.stop or []):
            raise ValueError(f"stop must be a string or a list of strings, got {self.stop!r}.")
        if any(not s for s in self.stop or []):
            raise ValueError("stop cannot contain an empty string.")
        if not all(_is_int(i) and i >= 0 for i in self.stop_token_ids or []):
            raise ValueError(f"stop_token_ids must contain token ids (whole numbers >= 0), got {self.stop_token_ids}.")
        if self.stop and not self.detokenize:
            raise ValueError("stop strings are only supported when detokenize is True.")

    def clone(self) -> SamplingParams:
        """A copy that shares no list or dict with this one; its values are checked already."""
        twin = copy.copy(self)
        twin.stop, twin.stop_token_ids = list(self.stop or ()), list(self.stop_token_ids or ())
        twin.logit_bias = None if self.logit_bias is None else dict(self.logit_bias)
        twin.allowed_token_ids = None if self.allowed_token_ids is None else list(self.allowed_token_ids)
        twin.bad_words = None if self.bad_words is None else list(self.bad_words)
        twin.logits_processors = None if self.logits_processors is None else list(self.logits_processors)
        return twin

    def check_model(self, *, vocab_size: int, max_logprobs: int, num_eos: int = 0) -> None:
        """Raises ValueError for what only the model can tell: ids outside the vocabulary, too many logprobs."""
        if self.use_beam_search:
            ends = len(self.stop_token_ids or ()) + (0 if self.ignore_eos else num_eos)
            needed = min(self.num_sequences + ends, vocab_size)
            if needed > max_logprobs:
                raise ValueError(
                    f"use_beam_search with {self.num_sequences} beams needs the log-probabilities of {needed} tokens, "
                    f"but max_logprobs is {max_logprobs}: load the model with max_logprobs={needed} or more, or with "
                    "-1 for all."
                )
        for name, label in (("logprobs", "sample"), ("prompt_logprobs", "prompt")):
            wanted = getattr(self, name)
            if wanted is not None and wanted > max_logprobs:
                raise ValueError(
                    f"Requested {label} logprobs of {wanted}, which is greater than max allowed: {max_logprobs}"
                )
        outside = sorted(t for t in self.logit_bias or {} if t >= vocab_size)
        if outside:
            raise ValueError(
                f"token_id(s) {outside} in logit_bias contain out-of-vocab token ids. Vocabulary size: {vocab_size}"
            )
        outside = [t for t in self.allowed_token_ids or [] if t >= vocab_size]
        if outside:
            raise ValueError(f"allowed_token_ids {outside} are not in the vocabulary of {vocab_size} tokens.")
        outside = [t for t in self.stop_token_ids or [] if t >= vocab_size]
        if outside:
            raise ValueError(f"stop_token_ids {outside} are not in the vocabulary of {vocab_size} tokens.")

    def to_core(
        self, *, max_model_len: int, prompt_len: int, bad_words: Sequence[list[int]] = ()
    ) -> _core.SamplingParams:
        """The core's parameters for a prompt of `prompt_len` tokens in a context of `max_model_len` tokens.

        bad_words: their tokens. End-of-sequence tokens are not among the parameters: they belong to the model's spec.
        """
        from fastllm import _core

        stopping = self.early_stopping
        least = 0 if self.ranks else -1
        return _core.SamplingParams(
            temperature=0.0 if self.temperature < _GREEDY_BELOW else self.temperature,
            top_p=self.top_p,
            min_p=self.min_p,
            top_k=min(max(self.top_k, 0), _MAX_TOP_K),
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            n=self.num_reported,
            beam_width=self.num_sequences if self.use_beam_search else 0,
            length_penalty=self.length_penalty,
            early_stopping=stopping if isinstance(stopping, str) else "yes" if stopping else "no",
            seed=None if self.seed is None else self.seed % 2**64,
            max_tokens=self.max_tokens or max(1, max_model_len - prompt_len),
            min_tokens=self.min_tokens,
            ignore_eos=self.ignore_eos,
            stop_ids=list(self.stop_token_ids or []),
            logit_bias=list((self.logit_bias or {}).items()),
            allowed_ids=self.allowed_token_ids or [],
            bad_words=list(bad_words),
            logprobs=least if self.logprobs is None else self.logprobs,
            prompt_logprobs=-1 if self.prompt_logprobs is None else self.prompt_logprobs,
        )


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _at_least(name: str, value: Any, minimum: int) -> None:
    if not _is_int(value) or value < minimum or value >= 2**31:
        raise ValueError(f"{name} must be at least {minimum}, got {value}.")


def _within(name: str, value: Any, low: float, high: float) -> None:
    if not _is_number(value) or not low <= value <= high:
        raise ValueError(f"{name} must be in [{low:g}, {high:g}], got {value}.")
