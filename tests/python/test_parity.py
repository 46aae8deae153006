"""Every family computes what Transformers computes, in prefill, chunked prefill and decode, in fp32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastllm import LLM, SamplingParams
from tiny_models import FAMILIES, VOCAB

NEW_TOKENS = 16
PROMPT = [(i * 37 + 11) % 256 for i in range(90)]


def reference(folder: Path, prompt: list[int], new_tokens: int) -> tuple[list[int], Any]:
    """Greedy tokens, and log-probabilities [prompt + new - 1, vocab] of what follows each position."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    ids = torch.tensor([prompt])
    with torch.no_grad():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        logits = model(out[:, :-1]).logits[0].float()
    return out[0, len(prompt) :].tolist(), torch.log_softmax(logits, -1).numpy()


@pytest.mark.parametrize("chunk", [0, 7])
@pytest.mark.parametrize("name", FAMILIES)
def test_family_equals_transformers(
    name: str, chunk: int, tiny_model: Callable[[str], Path], make_llm: Callable[..., LLM]
) -> None:
    folder = tiny_model(name)
    tokens, logprobs = reference(folder, PROMPT, NEW_TOKENS)
    llm = make_llm(folder, max_logprobs=-1, long_prefill_token_threshold=chunk)
    params = SamplingParams(
        temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, logprobs=VOCAB, prompt_logprobs=VOCAB
    )
    output = llm.generate(PROMPT, params, use_tqdm=False)[0]
    assert output.outputs[0].token_ids == tokens
    assert output.prompt_logprobs is not None and output.outputs[0].logprobs is not None
    rows = [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]
    assert len(rows) == len(logprobs)
    for position, (row, expected) in enumerate(zip(rows, logprobs, strict=True)):
        assert row is not None and len(row) == VOCAB
        worst = max(abs(entry.logprob - float(expected[token])) for token, entry in row.items())
        assert worst < 1e-4, f"position {position}: {worst}"
