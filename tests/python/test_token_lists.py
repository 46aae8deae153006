"""allowed_token_ids and bad_words of the Python API, against the processors of Transformers."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastllm import LLM, SamplingParams
from fastllm.bad_words import bad_word_tokens
from fastllm.tokenizer import byte_tokenizer

Llm = Callable[..., LLM]
STEPS = 16


def greedy(model: Any, prompt: list[int], allowed: list[int], words: list[list[int]], penalty: float) -> list[int]:
    """Transformers' own processors around its model; bad words look at the output alone, as vLLM's do."""
    import torch
    from transformers.generation import logits_process as processors

    ids = list(prompt)
    for _ in range(STEPS):
        with torch.no_grad():
            scores = model(torch.tensor([ids])).logits[:, -1].float()
        output = torch.tensor([ids[len(prompt) :]], dtype=torch.long)
        if allowed:
            allow = processors.PrefixConstrainedLogitsProcessor(lambda batch, sent: allowed, num_beams=1)
            scores = allow(output, scores)
        if words:
            scores = processors.NoBadWordsLogitsProcessor(words)(output, scores)
        if penalty != 1.0:
            scores = processors.RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([ids]), scores)
        ids.append(int(scores.argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("penalty", [1.0, 1.4])
@pytest.mark.parametrize("num_allowed", [0, 12])
@pytest.mark.parametrize("with_words", [False, True])
def test_tokens_are_those_that_transformers_processors_leave(
    penalty: float, num_allowed: int, with_words: bool, llama: Path, make_llm: Llm, seed: int, one_torch_thread: None
) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    source = random.Random(seed)
    llm = make_llm(llama)
    prompts = [[source.randrange(256) for _ in range(length)] for length in (3, 20)]
    for prompt in prompts:
        allowed = sorted(source.sample(range(33, 127), num_allowed))
        free = greedy(model, prompt, allowed, [], penalty)
        texts = []
        if with_words:  # of what comes by itself, where each token is a character of its own
            letters = [chr(token) if 33 <= token < 127 else "~" for token in free]
            texts = [letters[2], "".join(letters[4:6]), "".join(letters[7:10])]
        words = bad_word_tokens(byte_tokenizer(), texts)
        expected = greedy(model, prompt, allowed, words, penalty)
        params = SamplingParams(
            temperature=0.0,
            max_tokens=STEPS,
            ignore_eos=True,
            allowed_token_ids=allowed or None,
            bad_words=texts,
            repetition_penalty=penalty,
        )
        found = llm.generate([prompt], params, use_tqdm=False)[0].outputs[0].token_ids
        assert found == expected
        for word in words:
            places = range(len(found) - len(word) + 1)
            assert all(found[i : i + len(word)] != word for i in places)


def test_a_word_is_forbidden_with_and_without_a_space_before_it() -> None:
    from tokenizers import Tokenizer as FastTokenizer
    from tokenizers import models, pre_tokenizers

    from fastllm.tokenizer import Tokenizer

    vocab = {"ab": 0, "Ġab": 1, "c": 2, "Ġ": 3, "d": 4}
    backend = FastTokenizer(models.WordLevel(vocab=vocab, unk_token="d"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = Tokenizer(backend)
    assert bad_word_tokens(tokenizer, ["ab"]) == [[0], [1]]
    assert bad_word_tokens(tokenizer, [" ab"]) == [[0], [1]]
    assert bad_word_tokens(byte_tokenizer(), ["ab"]) == [[97, 98]], "a space would be a token more"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"allowed_token_ids": []}, "allowed_token_ids must be a list of at least one token id"),
        ({"allowed_token_ids": [10**6]}, "allowed_token_ids .* not in the vocabulary"),
        ({"bad_words": [""]}, "bad_words must be texts that are not empty"),
        ({"best_of": 1, "n": 2}, "best_of must be greater than or equal to n"),
        ({"use_beam_search": True, "logit_bias": {1: 1.0}}, "logit_bias cannot be combined with use_beam_search"),
        ({"length_penalty": 2.0}, "length_penalty is only used with use_beam_search"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_runs(fields: dict[str, Any], message: str) -> None:
    with LLM("null") as llm, pytest.raises(ValueError, match=message):
        llm.generate(["Hi"], SamplingParams(**fields), use_tqdm=False)
