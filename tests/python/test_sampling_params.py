"""SamplingParams: every wrong value is refused with a sentence that names it; right ones reach the core."""

from __future__ import annotations

import pytest

from fastllm import SamplingParams


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": -1.0}, "temperature must be non-negative, got -1.0."),
        ({"temperature": float("nan")}, "temperature must be non-negative, got nan."),
        ({"top_p": 1.5}, r"top_p must be in \(0, 1\], got 1.5."),
        ({"top_p": 0}, r"top_p must be in \(0, 1\], got 0."),
        ({"top_p": 2.0**-150}, r"top_p must be in \(0, 1\], got 7.0"),
        ({"top_k": -2}, r"top_k must be 0 \(disable\), or at least 1, got -2."),
        ({"min_p": 2.0}, r"min_p must be in \[0, 1\], got 2.0."),
        ({"presence_penalty": 3.0}, r"presence_penalty must be in \[-2, 2\], got 3.0."),
        ({"frequency_penalty": -2.1}, r"frequency_penalty must be in \[-2, 2\], got -2.1."),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be greater than zero, got 0.0."),
        ({"n": 0}, "n must be at least 1, got 0."),
        ({"n": "two"}, "n must be at least 1, got two."),
        ({"n": 4, "best_of": 3}, "best_of must be greater than or equal to n, got n=4 and best_of=3."),
        ({"best_of": 2**40}, "best_of must be at least 1"),
        ({"max_tokens": 0}, "max_tokens must be at least 1, got 0."),
        ({"min_tokens": 10, "max_tokens": 2}, "min_tokens must be less than or equal to max_tokens=2, got 10."),
        ({"logprobs": -2}, "logprobs must be at least 0, got -2."),
        ({"stop": ""}, "stop cannot contain an empty string."),
        ({"stop": ["a", ""]}, "stop cannot contain an empty string."),
        ({"stop": [1]}, "stop must be a string or a list of strings"),
        ({"stop": "x", "detokenize": False}, "stop strings are only supported when detokenize is True."),
        ({"stop_token_ids": [-1]}, "stop_token_ids must contain token ids"),
        ({"seed": 2**70}, "seed must be a 64-bit whole number"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens must be -1 or at least 1, got 0."),
        ({"logit_bias": {1: float("inf")}}, "logit_bias must map token ids to finite numbers"),
    ],
)
def test_wrong_value_is_refused_with_a_sentence(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingParams(**fields)  # type: ignore[arg-type]


def test_unknown_field_is_refused() -> None:
    with pytest.raises(TypeError, match="guided_json"):
        SamplingParams(guided_json="{}")  # type: ignore[call-arg]


def test_model_dependent_values_are_checked_against_the_model() -> None:
    with pytest.raises(ValueError, match="logprobs of 100, which is greater than max allowed: 20"):
        SamplingParams(logprobs=100).check_model(vocab_size=10, max_logprobs=20)
    with pytest.raises(ValueError, match=r"token_id\(s\) \[99\] in logit_bias"):
        SamplingParams(logit_bias={99: 1.0}).check_model(vocab_size=10, max_logprobs=20)


def test_core_gets_what_was_asked() -> None:
    params = SamplingParams(temperature=1e-7, top_k=-1, max_tokens=None, seed=-1, stop_token_ids=[7], logprobs=0)
    core = params.to_core(max_model_len=100, prompt_len=40)
    assert (core.temperature, core.top_k, core.max_tokens, core.seed) == (0.0, 0, 60, None)
    assert (list(core.stop_ids), core.logprobs, core.prompt_logprobs) == ([7], 0, -1)


def test_top_k_beyond_every_vocabulary_means_all_of_it() -> None:
    for top_k in (2**31 - 1, 2**31, 2**63, 2**80):
        assert SamplingParams(top_k=top_k).to_core(max_model_len=100, prompt_len=1).top_k == 2**31 - 1
    assert SamplingParams(top_k=-1).to_core(max_model_len=100, prompt_len=1).top_k == 0


def test_clone_is_equal_and_shares_nothing_that_changes() -> None:
    params = SamplingParams(
        stop=["a"], stop_token_ids=[1], logit_bias={2: 0.5}, logits_processors=[lambda ids, row: row]
    )
    twin = params.clone()
    assert twin == params
    for name in ("stop", "stop_token_ids", "logit_bias", "logits_processors"):
        assert getattr(twin, name) is not getattr(params, name)
