"""What a request takes of the engine, computed before anything is allocated for it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from fastllm.outputs import TokenIds
    from fastllm.sampling import SamplingParams

    class Prompted(Protocol):
        """A prompt with its parameters."""

        prompt_ids: TokenIds
        params: SamplingParams


BYTES_PER_TOKEN = 4  # of a body that is not tokenised yet; only ever compared to other estimates


@dataclass(frozen=True)
class Cost:
    """Of one prompt, or summed over the prompts of a call."""

    sequences: int
    prompt_tokens: int
    output_tokens: int  # at most
    kv_blocks: int  # when every sequence has reached its last token; the prompt's are shared
    largest_prompt_blocks: int  # of the longest prompt
    mask_bytes: int  # a step
    logprob_cells: int  # log-probabilities that are kept until the answer: positions times (1 + alternatives)


def cost_of(prompt: Prompted, *, block_size: int, max_model_len: int, vocab: int, masked: bool = False) -> Cost:
    """masked: the output is constrained by a grammar. vocab: tokens."""
    params = prompt.params
    length, n = len(prompt.prompt_ids), max(params.n, params.best_of or 1)  # best_of: samples or beams that run
    room = max(0, max_model_len - length)
    output = room if params.max_tokens is None else min(params.max_tokens, room)
    shared = length // block_size
    each = -(-(length + output) // block_size)
    cells = 0
    if params.logprobs is not None:
        cells += n * output * (1 + params.logprobs)
    if params.prompt_logprobs is not None:
        cells += length * (1 + params.prompt_logprobs)
    return Cost(
        sequences=n,
        prompt_tokens=length,
        output_tokens=n * output,
        kv_blocks=shared + n * (each - shared),
        largest_prompt_blocks=-(-length // block_size),
        mask_bytes=n * -(-vocab // 32) * 4 if masked else 0,
        logprob_cells=cells,
    )


def total(costs: Iterable[Cost]) -> Cost:
    """The sum of at least one."""
    all_costs = list(costs)
    return Cost(
        sequences=sum(cost.sequences for cost in all_costs),
        prompt_tokens=sum(cost.prompt_tokens for cost in all_costs),
        output_tokens=sum(cost.output_tokens for cost in all_costs),
        kv_blocks=sum(cost.kv_blocks for cost in all_costs),
        largest_prompt_blocks=max(cost.largest_prompt_blocks for cost in all_costs),
        mask_bytes=sum(cost.mask_bytes for cost in all_costs),
        logprob_cells=sum(cost.logprob_cells for cost in all_costs),
    )
