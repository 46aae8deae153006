"""Structured output: whatever a random model would say, the text is what was asked for."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastllm import LLM, SamplingParams, StructuredOutputsParams
from schemas import SCHEMAS, fits

PROMPT = [72, 101, 108, 108, 111]


@pytest.fixture(scope="module")
def llm(llama: Path) -> Any:
    from tiny_models import ENGINE

    with LLM(str(llama), **ENGINE) as made:
        yield made


def params(constraint: dict[str, Any], **fields: Any) -> SamplingParams:
    fields = {"max_tokens": 200, "temperature": 1.0, "seed": 5} | fields
    return SamplingParams(structured_outputs=constraint, **fields)


def test_output_fits_each_of_20_schemas(llm: LLM, seed: int) -> None:
    assert len(SCHEMAS) == 20
    wanted = [params({"json": schema}, seed=seed + i) for i, schema in enumerate(SCHEMAS)]
    outputs = llm.generate([PROMPT] * len(wanted), wanted, use_tqdm=False)
    finished = 0
    for schema, output in zip(SCHEMAS, outputs, strict=True):
        sample = output.outputs[0]
        if sample.finish_reason == "stop":
            assert fits(json.loads(sample.text), schema), (schema, sample.text)
            finished += 1
        else:
            assert sample.finish_reason == "length"
    assert finished >= 15


def test_same_tokens_alone_and_in_a_batch(llm: LLM) -> None:
    wanted = [params({"json": schema}, max_tokens=60, seed=i) for i, schema in enumerate(SCHEMAS[:8])]
    plain = SamplingParams(max_tokens=60, temperature=1.0, seed=3, ignore_eos=True)
    together = llm.generate([PROMPT] * 9, [*wanted, plain], use_tqdm=False)
    for one, output in zip([*wanted, plain], together, strict=True):
        (alone,) = llm.generate([PROMPT], one, use_tqdm=False)
        assert alone.outputs[0].token_ids == output.outputs[0].token_ids


@pytest.mark.parametrize(
    ("constraint", "pattern"),
    [
        ({"regex": r"\d{3}-[a-f]{2}/x"}, r"\d{3}-[a-f]{2}/x"),
        ({"regex": "(yes|no)\\n[é]"}, "(yes|no)\n[é]"),
        ({"choice": ["red", 'green "quoted"', "blé 😀"]}, 'red|green "quoted"|blé 😀'),
        ({"grammar": 'start: "SELECT " NAME\nNAME: /[a-z]{2}/'}, "SELECT [a-z]{2}"),
        ({"grammar": 'root ::= "a" [0-9] "b"'}, "a[0-9]b"),
        ({"json": '{"const": "x"}'}, '"x"'),
        ({"json": {"type": "array", "items": {"const": 1}, "minItems": 2, "maxItems": 2}}, r"\[\s*1\s*,\s*1\s*\]"),
        (
            {"json": {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"]}}
            | {"disable_any_whitespace": True, "disable_additional_properties": True},
            r'\{"a":1\}',
        ),
        (
            {"json": {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"]}}
            | {"whitespace_pattern": "_", "disable_additional_properties": True},
            r'\{_?"a"_?:_?1_?\}',
        ),
    ],
)
def test_constraint_is_kept(llm: LLM, constraint: dict[str, Any], pattern: str) -> None:
    samples = llm.generate([PROMPT], params(constraint, n=3), use_tqdm=False)[0].outputs
    assert len(samples) == 3
    for sample in samples:
        assert re.fullmatch(pattern, sample.text) and sample.finish_reason == "stop", sample.text
        assert sample.stop_reason is None


def test_json_object_is_an_object(llm: LLM) -> None:
    closing = {ord("}"): 100.0}  # a random model would go on for long
    sample = llm.generate([PROMPT], params({"json_object": True}, logit_bias=closing), use_tqdm=False)[0].outputs[0]
    assert isinstance(json.loads(sample.text), dict)


def test_samples_of_one_prompt_are_constrained_each_for_itself(llm: LLM) -> None:
    samples = llm.generate([PROMPT], params({"regex": "[a-z]{8}"}, n=4), use_tqdm=False)[0].outputs
    assert len({sample.text for sample in samples}) == 4


def test_structural_tag_constrains_only_what_follows_its_trigger(llm: LLM) -> None:
    tag = {
        "structures": [{"begin": "<f>", "schema": {"enum": [11, 22]}, "end": "</f>"}],
        "triggers": ["<f"],
    }
    force = {ord("<"): 100.0, ord("f"): 99.0}
    sample = llm.generate([PROMPT], params({"structural_tag": tag}, logit_bias=force), use_tqdm=False)[0].outputs[0]
    assert re.match(r"[^f]*<f>(11|22)</f>", sample.text), sample.text


def test_a_complete_output_ends_though_min_tokens_and_ignore_eos_ask_for_more(llm: LLM) -> None:
    wanted = params({"choice": ["ab"]}, min_tokens=50, ignore_eos=True)
    sample = llm.generate([PROMPT], wanted, use_tqdm=False)[0].outputs[0]
    assert sample.text == "ab" and sample.finish_reason == "stop"


def test_a_bias_against_all_that_is_allowed_ends(llm: LLM) -> None:
    bias = {ord("a"): -1e30, ord("b"): -1e30}
    wanted = params({"choice": ["aa", "bb"]}, logit_bias=bias, temperature=0.0)
    try:
        sample = llm.generate([PROMPT], wanted, use_tqdm=False)[0].outputs[0]
        assert sample.text in ("aa", "bb")
    except Exception as error:
        assert "grammar" in str(error)


def test_stop_string_ends_a_constrained_output(llm: LLM) -> None:
    wanted = params({"regex": "a{3}b{5}"}, stop=["ab"])
    sample = llm.generate([PROMPT], wanted, use_tqdm=False)[0].outputs[0]
    assert (sample.text, sample.finish_reason, sample.stop_reason) == ("aa", "stop", "ab")


def test_preempted_request_returns_identical_tokens(make_llm: Callable[..., LLM], llama: Path) -> None:
    wanted = [params({"regex": "[a-z]{60}"}, seed=i) for i in range(6)]
    roomy = make_llm(llama).generate([PROMPT] * 6, wanted, use_tqdm=False)
    tight = make_llm(llama, num_gpu_blocks_override=16).generate([PROMPT] * 6, wanted, use_tqdm=False)
    for a, b in zip(roomy, tight, strict=True):
        assert a.outputs[0].text == b.outputs[0].text and len(a.outputs[0].text) == 60


def test_old_name_means_the_same(llm: LLM) -> None:
    old = SamplingParams(guided_decoding=StructuredOutputsParams(choice=["x"]), max_tokens=5)
    assert llm.generate([PROMPT], old, use_tqdm=False)[0].outputs[0].text == "x"


@pytest.mark.parametrize(
    ("constraint", "message"),
    [
        ({}, "exactly one"),
        ({"json": {}, "regex": "a"}, "json and regex"),
        ({"regexp": "a"}, "'regexp' is not a field"),
        ({"choice": []}, "at least one string"),
        ({"choice": "ab"}, "list"),
        ({"regex": ""}, "must not be empty"),
        ({"json": 5}, "JSON schema"),
        ("json", "must be an object"),
    ],
)
def test_wrong_params_are_a_sentence(constraint: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingParams(structured_outputs=constraint)
