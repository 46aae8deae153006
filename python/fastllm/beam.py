"""Beam search: the most likely continuations of a prompt instead of sampled ones.

Names, defaults and what a sequence holds are those of vLLM's offline beam search; the search itself, its scores and
when it ends are those of Transformers' generate(num_beams=...): cum_logprob / length ** length_penalty over the
generated tokens, an ending token included. The engine searches: beams share the memory of what they have in common.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from fastllm.outputs import CompletionOutput, PositionLogprobs, RequestOutput
from fastllm.sampling import SamplingParams
from fastllm.tokenizer import Tokenizer


@dataclass
class BeamSearchParams:
    """Parameters of a beam search.

    beam_width: beams kept per prompt and sequences returned, at least 1. max_tokens: output tokens, at least 1; fewer
    where the context ends. ignore_eos: end-of-sequence tokens do not end a beam. temperature: at least 0; above 0 a
    sampled token becomes one more candidate of each beam, log-probabilities stay those of the raw logits.
    length_penalty: above 0 favours longer sequences, below 0 shorter ones. include_stop_str_in_output: keep the token
    that ended a sequence in its tokens and text. early_stopping: True ends the search with the first beam_width
    results, False when the best beam looks no better than the worst of them, "never" when none can become so. Raises
    ValueError naming the field, its value and what is allowed.
    """

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    temperature: float = 0.0
    length_penalty: float = 1.0
    include_stop_str_in_output: bool = False
    early_stopping: bool | str = "never"

    def __post_init__(self) -> None:
        if not isinstance(self.beam_width, int) or self.beam_width < 1:
            raise ValueError(f"beam_width must be at least 1, got {self.beam_width}.")
        if not math.isfinite(self.length_penalty):
            raise ValueError(f"length_penalty must be a finite number, got {self.length_penalty}.")
        sampling_params(self, 0)  # raises for the rest


@dataclass
class BeamSearchSequence:
    """One beam. tokens: those of the prompt, then the generated ones. text: of all tokens, special ones spelled out.

    logprobs: one entry per generated token, an ending token included even if `tokens` leaves it out. cum_logprob: their
    sum. finish_reason: "stop" after an end-of-sequence token, which is stop_reason; else "length".
    """

    tokens: list[int]
    logprobs: list[PositionLogprobs] = field(default_factory=list)
    cum_logprob: float = 0.0
    text: str | None = None
    finish_reason: str | None = None
    stop_reason: int | None = None


@dataclass
class BeamSearchOutput:
    """The best sequences of one prompt, the best first."""

    sequences: list[BeamSearchSequence]


def score(cum_logprob: float, num_generated: int, length_penalty: float) -> float:
    return cum_logprob / math.pow(num_generated, length_penalty)


def sampling_params(params: BeamSearchParams, logprobs: int) -> SamplingParams:
    """What the engine is asked for. logprobs: next tokens reported per position."""
    return SamplingParams(
        n=params.beam_width,
        use_beam_search=True,
        max_tokens=params.max_tokens,
        ignore_eos=params.ignore_eos,
        temperature=params.temperature,
        length_penalty=params.length_penalty,
        early_stopping=params.early_stopping,
        logprobs=logprobs,
        detokenize=False,
    )


def beam_output(output: RequestOutput, params: BeamSearchParams, tokenizer: Tokenizer) -> BeamSearchOutput:
    sequences = [_sequence(output, sample, params, tokenizer) for sample in output.outputs if sample.token_ids]
    return BeamSearchOutput(sequences)


def _sequence(
    output: RequestOutput, sample: CompletionOutput, params: BeamSearchParams, tokenizer: Tokenizer
) -> BeamSearchSequence:
    ended = sample.finish_reason == "stop"
    generated = sample.token_ids
    if ended and not params.include_stop_str_in_output:
        generated = generated[:-1]
    tokens = [*output.prompt_token_ids, *generated]
    return BeamSearchSequence(
        tokens=tokens,
        logprobs=sample.logprobs or [],
        cum_logprob=sample.cumulative_logprob or 0.0,
        text=tokenizer.decode(tokens, skip_special_tokens=False),
        finish_reason=sample.finish_reason,
        stop_reason=sample.token_ids[-1] if ended else None,
    )
