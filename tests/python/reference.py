"""What Transformers computes on the CPU, and an engine's output in the same form. The results are kept for the run."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from fastllm import LLM, SamplingParams
from fastllm.outputs import RequestOutput
from tiny_models import VOCAB

Rows = np.ndarray[Any, np.dtype[np.float64]]


@lru_cache(maxsize=4)
def _model(folder: Path, dtype: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), attn_implementation="eager").eval()


@cache
def _greedy_tokens(folder: Path, prompt: tuple[int, ...], new_tokens: int) -> tuple[int, ...]:
    import torch

    ids = torch.tensor([prompt])
    with torch.no_grad():
        out = _model(folder, "float32").generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    return tuple(out[0, len(prompt) :].tolist())


def greedy_tokens(folder: Path, prompt: Sequence[int], new_tokens: int) -> list[int]:
    return list(_greedy_tokens(folder, tuple(prompt), new_tokens))


def next_logprobs(folder: Path, ids: Sequence[int], dtype: str = "float32") -> Rows:
    """Log-probabilities of what follows each of `ids` but the last: [len(ids) - 1, vocab]."""
    import torch

    with torch.no_grad():
        logits = _model(folder, dtype)(torch.tensor([list(ids)[:-1]])).logits[0].double()
    return np.asarray(torch.log_softmax(logits, -1).numpy())


def generate_all_logprobs(
    llm: LLM, prompts: list[list[int]], new_tokens: int, *, of_prompts: bool = True
) -> list[RequestOutput]:
    """Greedy outputs with the log-probabilities of the whole vocabulary."""
    params = SamplingParams(
        temperature=0,
        max_tokens=new_tokens,
        ignore_eos=True,
        logprobs=VOCAB,
        prompt_logprobs=VOCAB if of_prompts else None,
    )
    return llm.generate(prompts, params, use_tqdm=False)


def logprob_rows(output: RequestOutput) -> Rows:
    """An output with the log-probabilities of the whole vocabulary, as next_logprobs() has them."""
    rows = [*(output.prompt_logprobs or [])[1:], *(output.outputs[0].logprobs or [])]
    assert rows and all(row is not None for row in rows)
    return np.array([[row[token].logprob for token in range(len(row))] for row in rows if row is not None])


def rms(errors: Rows | Sequence[Rows]) -> float:
    """Root mean square over all numbers of one or of several arrays; NaN where one is."""
    parts = [errors] if isinstance(errors, np.ndarray) else list(errors)
    flat = np.concatenate([part.ravel() for part in parts])
    return float(np.sqrt(np.mean(flat**2)))
