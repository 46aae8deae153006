"""Many different requests in one batch of a real model: each gets what it gets alone (rows D13 and D14)."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from harness import SLOW

from fastllm import LLM, SamplingParams
from fastllm.grammar.params import StructuredOutputsParams
from tiny_models import ENGINE, FAMILIES, save_tiny_model

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
_STOP: dict[str, Any] = {"max_tokens": 24, "temperature": 1.0}
# One of everything that keeps a state of its own per request, and pairs of them.
KINDS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"seed": 1},
    {"seed": 1, "logprobs": 5},
    {"seed": 2, "prompt_logprobs": 3},
    {"seed": 3, "min_p": 0.2},
    {"seed": 4, "top_k": 3, "top_p": 0.7},
    {"seed": 5, "presence_penalty": 1.5, "frequency_penalty": -1.5},
    {"seed": 6, "repetition_penalty": 1.7, "logprobs": 2},
    {"seed": 7, "logit_bias": {5: 50.0, 6: -100.0}},
    {"seed": 8, "allowed_token_ids": [65, 66, 67]},
    {"seed": 9, "bad_words": ["a"], "min_tokens": 10},
    {"seed": 10, "stop": ["e"], "include_stop_str_in_output": True},
    {"seed": 11, "n": 3, "logprobs": 1},
    {"seed": 12, "structured_outputs": StructuredOutputsParams(json=SCHEMA)},
    {"seed": 13, "structured_outputs": StructuredOutputsParams(regex="[ab]{4,9}"), "repetition_penalty": 2.0},
    {"temperature": 0, "structured_outputs": StructuredOutputsParams(choice=["yes", "no"]), "logprobs": 3},
    {"seed": 14, "structured_outputs": StructuredOutputsParams(regex=".*"), "logit_bias": {70: 30.0}, "min_p": 0.1},
    {"seed": 15, "frequency_penalty": 2.0, "logit_bias": {80: 8.0}, "logprobs": 4, "ignore_eos": True},
]

Given = tuple[list[int], SamplingParams]


@pytest.fixture
def make_engine() -> Iterator[Callable[..., LLM]]:
    made: list[LLM] = []

    def make(model: Path, **args: Any) -> LLM:
        made.append(LLM(str(model), **{**ENGINE, **args}))
        return made[-1]

    yield make
    for llm in made:
        llm.shutdown()


def answers(llm: LLM, given: Sequence[Given]) -> list[Any]:
    """Tokens, ends and log-probabilities, to the last bit."""
    prompts = [{"prompt_token_ids": ids} for ids, _ in given]
    outputs = llm.generate(prompts, [params for _, params in given], use_tqdm=False)

    def row(entry: Any) -> Any:
        return None if entry is None else {id: one.logprob for id, one in entry.items()}

    return [
        (
            [(s.token_ids, s.finish_reason, [row(entry) for entry in s.logprobs or []]) for s in output.outputs],
            [row(entry) for entry in output.prompt_logprobs or []],
        )
        for output in outputs
    ]


def test_d14_mixed_batch_gives_each_what_it_gets_alone(llama: Path, make_engine: Callable[..., LLM], seed: int) -> None:
    rng = random.Random(seed)
    llm = make_engine(llama, deterministic=True, enable_prefix_caching=False)
    given = [
        ([rng.randrange(256) for _ in range(rng.randint(1, 60))], SamplingParams(**{**_STOP, **kind})) for kind in KINDS
    ]
    alone = [answers(llm, [one])[0] for one in given]
    for _ in range(3):
        order = rng.sample(range(len(given)), len(given))
        together = answers(llm, [given[i] for i in order])
        for place, i in enumerate(order):
            assert together[place] == alone[i], KINDS[i]


@pytest.mark.parametrize("rows, width", [(1024, 1 << 12), pytest.param(70_000, 1 << 14, marks=SLOW)])
def test_d13_large_batch_gives_what_small_ones_give(
    tmp_path: Path, make_engine: Callable[..., LLM], seed: int, rows: int, width: int
) -> None:
    """rows * 2 * width values behind the gate: above 2^31 where it is slow, and then in memory of 14 GB."""
    pytest.importorskip("transformers")
    family, config = FAMILIES["llama"]
    # The last layer computes the last tokens only.
    shape = {"num_hidden_layers": 2, "intermediate_size": width, "hidden_size": 32, "num_attention_heads": 2}
    save_tiny_model((family, config | shape), tmp_path)
    rng = random.Random(seed)
    prompts = [[rng.randrange(256) for _ in range(200)] for _ in range(rows // 200)]
    given = [(ids, SamplingParams(temperature=0, max_tokens=1, logprobs=1)) for ids in prompts]
    settings = {
        "deterministic": True,
        "enable_prefix_caching": False,
        "max_num_seqs": len(given),
        "check_invariants": False,
    }
    settings |= {"num_gpu_blocks_override": 16 * len(given), "cpu_threads": os.cpu_count()}
    steps, results = [], []
    for tokens in (rows, 256):
        llm = make_engine(tmp_path, max_num_batched_tokens=tokens, **settings)
        results.append(answers(llm, given))
        steps.append(llm.stats().num_steps)
    assert results[0] == results[1]
    assert steps[0] <= 3 and steps[1] >= len(given) * 200 // 256, steps
