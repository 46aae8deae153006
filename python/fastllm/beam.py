"""Beam search: the most likely continuations of a prompt instead of sampled ones.

Names, defaults and what a sequence holds are those of vLLM's offline beam search; scores are those of Transformers'
generate(num_beams=...): cum_logprob / length ** length_penalty over the generated tokens, an ending token included.

Each step is one batch: every live beam of every prompt is a request of one token that asks for its 2 * beam_width most
likely next tokens. The prefix cache keeps the blocks that beams have in common, so memory use is that of a tree:

    prompt |--------------------|--a--|--b--|     beam 1       the prompt and a are stored once
                                      |--c--|     beam 2
                                |--d--|--e--|     beam 3
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from fastllm.outputs import PositionLogprobs, RequestOutput, TokensPrompt
from fastllm.sampling import SamplingParams
from fastllm.tokenizer import Tokenizer

# Runs one request per prompt to its end; outputs in the order of the prompts.
Generate = Callable[[list[TokensPrompt], SamplingParams], list[RequestOutput]]


@dataclass
class BeamSearchParams:
    """Parameters of a beam search.

    beam_width: beams kept per prompt and sequences returned, at least 1. max_tokens: output tokens, at least 1; fewer
    where the context ends. ignore_eos: end-of-sequence tokens do not end a beam. temperature: at least 0; above 0 a
    sampled token becomes one more candidate of each beam, log-probabilities stay those of the raw logits.
    length_penalty: above 0 favours longer sequences, below 0 shorter ones. include_stop_str_in_output: keep the token
    that ended a sequence in its tokens and text. Raises ValueError naming the field, its value and what is allowed.
    """

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    temperature: float = 0.0
    length_penalty: float = 1.0
    include_stop_str_in_output: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.beam_width, int) or self.beam_width < 1:
            raise ValueError(f"beam_width must be at least 1, got {self.beam_width}.")
        if not math.isfinite(self.length_penalty):
            raise ValueError(f"length_penalty must be a finite number, got {self.length_penalty}.")
        SamplingParams(max_tokens=self.max_tokens, temperature=self.temperature)  # raises for both


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


def beam_search(
    generate: Generate,
    prompts: Sequence[TokensPrompt],
    params: BeamSearchParams,
    *,
    tokenizer: Tokenizer,
    eos_token_ids: Collection[int],
    max_model_len: int,
    num_candidates: int,
) -> list[BeamSearchOutput]:
    """Searches all prompts at once. num_candidates: next tokens looked at per beam."""
    searches = [_Search(prompt, params, eos_token_ids, max_model_len) for prompt in prompts]
    step_params = SamplingParams(
        temperature=params.temperature, max_tokens=1, logprobs=num_candidates, ignore_eos=True, detokenize=False
    )
    while live := [search for search in searches if search.beams]:
        outputs = iter(generate([prompt for search in live for prompt in search.step_prompts()], step_params))
        for search in live:
            search.advance([next(outputs) for _ in search.beams])
    return [search.output(tokenizer) for search in searches]


class _Search:
    """The beams of one prompt. Live ones are equally long; `completed` holds the best that ended, best first."""

    def __init__(
        self, prompt: TokensPrompt, params: BeamSearchParams, eos_token_ids: Collection[int], max_model_len: int
    ) -> None:
        self._prompt = prompt
        self._params = params
        self._eos = frozenset() if params.ignore_eos else frozenset(eos_token_ids)
        num_prompt = len(prompt["prompt_token_ids"])
        self._most = min(params.max_tokens, max_model_len - num_prompt)  # generated tokens
        self.beams = [BeamSearchSequence(list(prompt["prompt_token_ids"]))]
        self.completed: list[BeamSearchSequence] = []

    def step_prompts(self) -> list[TokensPrompt]:
        salt = self._prompt.get("cache_salt", "")
        return [{"prompt_token_ids": beam.tokens, "cache_salt": salt} for beam in self.beams]

    def advance(self, outputs: Sequence[RequestOutput]) -> None:
        """One output of one token per live beam, in their order."""
        width = self._params.beam_width
        candidates: list[tuple[float, int, int]] = []  # cum_logprob, index of the beam, token
        positions: list[PositionLogprobs] = []
        for index, (beam, output) in enumerate(zip(self.beams, outputs, strict=True)):
            position = (output.outputs[0].logprobs or [{}])[0]
            positions.append(position)
            for token, logprob in position.items():
                total = beam.cum_logprob + logprob.logprob
                if token in self._eos:
                    self.completed.append(self._extend(beam, token, position, total))
                else:
                    candidates.append((total, index, token))
        # Live beams are equally long, so their sums rank them. Equal sums: the better beam, then its likelier token.
        chosen = heapq.nlargest(width, candidates, key=lambda c: c[0])
        self.beams = [self._extend(self.beams[index], token, positions[index], total) for total, index, token in chosen]
        if self.beams and len(self.beams[0].logprobs) == self._most:
            self.completed += self.beams
            self.beams = []
        self.completed = heapq.nlargest(width, self.completed, key=self._score)
        if self.beams and len(self.completed) == width and self._score(self.completed[-1]) >= self._bound():
            self.beams = []

    def output(self, tokenizer: Tokenizer) -> BeamSearchOutput:
        for sequence in self.completed:
            if sequence.stop_reason is not None and not self._params.include_stop_str_in_output:
                sequence.tokens = sequence.tokens[:-1]
            sequence.text = tokenizer.decode(sequence.tokens, skip_special_tokens=False)
        return BeamSearchOutput(self.completed)

    def _extend(
        self, beam: BeamSearchSequence, token: int, position: PositionLogprobs, cum_logprob: float
    ) -> BeamSearchSequence:
        ended = token in self._eos
        return BeamSearchSequence(
            tokens=[*beam.tokens, token],
            logprobs=[*beam.logprobs, position],
            cum_logprob=cum_logprob,
            finish_reason="stop" if ended else "length",
            stop_reason=token if ended else None,
        )

    def _score(self, sequence: BeamSearchSequence) -> float:
        return score(sequence.cum_logprob, len(sequence.logprobs), self._params.length_penalty)

    def _bound(self) -> float:
        """The best score that any live beam can still reach: sums only fall, and the best length divides them."""
        penalty = self._params.length_penalty
        length = self._most if penalty > 0 else len(self.beams[0].logprobs) + 1
        return score(self.beams[0].cum_logprob, length, penalty)
