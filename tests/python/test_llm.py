"""LLM and LLMEngine: results in input order, every form of prompt, and errors before anything runs."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastllm import LLM, EngineArgs, LLMEngine, RequestOutputKind, SamplingParams, _core
from fastllm.errors import InvalidArgument
from fastllm.progress import Progress


@pytest.fixture(scope="module")
def null_llm() -> Iterator[LLM]:
    with LLM("null", check_invariants=True) as llm:
        yield llm


def fixed(**fields: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 0, "max_tokens": 5, "ignore_eos": True, **fields})


def test_outputs_keep_the_order_of_the_prompts(null_llm: LLM) -> None:
    params = [fixed(max_tokens=12 - i) for i in range(10)]
    outputs = null_llm.generate([f"prompt {i}" for i in range(10)], params, use_tqdm=False)
    assert [o.prompt for o in outputs] == [f"prompt {i}" for i in range(10)]
    assert [len(o.outputs[0].token_ids) for o in outputs] == [12 - i for i in range(10)]
    assert all(o.finished and o.outputs[0].finish_reason == "length" for o in outputs)


def test_every_form_of_prompt_means_the_same(null_llm: LLM) -> None:
    ids = null_llm.get_tokenizer().encode("abc")
    forms: list[Any] = ["abc", ["abc"], ids, [ids], {"prompt": "abc"}, [{"prompt_token_ids": ids}]]
    results = [null_llm.generate(form, fixed(), use_tqdm=False) for form in forms]
    assert all(len(r) == 1 and r[0].prompt_token_ids == ids for r in results)
    assert len({tuple(r[0].outputs[0].token_ids) for r in results}) == 1


@pytest.mark.parametrize(
    ("prompt", "fields", "message"),
    [
        ("", {}, "prompt is empty"),
        ([], {}, "non-empty list"),
        ([300], {}, "Token id 300 is out of vocabulary"),
        ([[-1]], {}, "Token id -1 is out of vocabulary"),
        ([[1, 2**70]], {}, f"Token id {2**70} is out of vocabulary"),
        ([[1, True]], {}, "Token id True is out of vocabulary"),
        ([[1, 2.0]], {}, r"Token id 2\.0 is out of vocabulary"),
        ("x" * 5000, {}, "maximum context length is 4096 tokens. The prompt has 5000 tokens"),
        (3.5, {}, "prompts must be"),
        ([3.5], {}, "A prompt is a string"),
        ("a", {"logprobs": 21}, "greater than max allowed: 20"),
        ("a", {"logit_bias": {999: 1.0}}, "out-of-vocab"),
    ],
)
def test_bad_prompt_is_refused_with_a_sentence(null_llm: LLM, prompt: Any, fields: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        null_llm.generate(prompt, fixed(**fields), use_tqdm=False)
    assert not null_llm._client.live, "nothing was submitted"


def test_numbers_of_prompts_and_params_must_agree(null_llm: LLM) -> None:
    with pytest.raises(ValueError, match="2 prompts but 1 sampling"):
        null_llm.generate(["a", "b"], [fixed()], use_tqdm=False)


def test_samples_differ_and_share_their_prompt(null_llm: LLM) -> None:
    output = null_llm.generate("hello", fixed(n=3, temperature=1.0, seed=1), use_tqdm=False)[0]
    assert [o.index for o in output.outputs] == [0, 1, 2]
    assert len(output.outputs) == 3


def test_prompt_is_truncated_from_the_left(null_llm: LLM) -> None:
    output = null_llm.generate("abcdef", fixed(truncate_prompt_tokens=2), use_tqdm=False)[0]
    assert output.prompt_token_ids == [ord("e"), ord("f")]
    output = null_llm.generate("x" * 5000, fixed(truncate_prompt_tokens=-1), use_tqdm=False)[0]
    assert len(output.prompt_token_ids) == 4096 - 5


def test_params_of_the_caller_are_not_changed(null_llm: LLM) -> None:
    params = fixed(output_kind=RequestOutputKind.DELTA)
    null_llm.generate("a", params, use_tqdm=False)
    assert params.output_kind is RequestOutputKind.DELTA


def test_stop_string_ends_the_text_and_aborts_the_sequence(null_llm: LLM) -> None:
    whole = null_llm.generate("tell me", fixed(max_tokens=60), use_tqdm=False)[0].outputs[0]
    stop = whole.text[10:13]
    short = null_llm.generate("tell me", fixed(max_tokens=60, stop=stop), use_tqdm=False)[0].outputs[0]
    assert (short.finish_reason, short.stop_reason) == ("stop", stop)
    assert short.text == whole.text[: whole.text.index(stop)]
    assert short.token_ids == whole.token_ids[: len(short.token_ids)]


def test_stop_token_is_the_stop_reason(null_llm: LLM) -> None:
    whole = null_llm.generate("count", fixed(max_tokens=9), use_tqdm=False)[0].outputs[0].token_ids
    stop = whole[4]
    output = null_llm.generate("count", fixed(max_tokens=9, stop_token_ids=[stop]), use_tqdm=False)[0].outputs[0]
    assert (output.finish_reason, output.stop_reason) == ("stop", stop)
    assert output.token_ids == whole[: whole.index(stop) + 1]


def test_logits_processor_decides_the_token(llama: Path, make_llm: Callable[..., LLM]) -> None:
    llm = make_llm(llama)

    def count_up(prompt_ids: list[int], output_ids: list[int], logits: np.ndarray) -> np.ndarray:
        logits[:] = -np.inf
        logits[prompt_ids[-1] + len(output_ids) + 1] = 0.0
        return logits

    output = llm.generate([65], fixed(logits_processors=[count_up]), use_tqdm=False)[0]
    assert output.outputs[0].text == "BCDEF"


def test_torch_logits_processor_gets_a_tensor(llama: Path, make_llm: Callable[..., LLM]) -> None:
    torch = pytest.importorskip("torch", reason="the processor under test uses torch")
    seen: list[type] = []

    def only_z(output_ids: list[int], logits: Any) -> Any:
        seen.append(type(logits))
        return torch.full_like(logits, float("-inf")).index_fill(0, torch.tensor([90]), 0.0)

    output = make_llm(llama).generate([65], fixed(logits_processors=[only_z]), use_tqdm=False)[0]
    assert (output.outputs[0].text, set(seen)) == ("ZZZZZ", {torch.Tensor})


def test_logit_bias_and_min_tokens_are_obeyed(llama: Path, make_llm: Callable[..., LLM]) -> None:
    llm = make_llm(llama)
    biased = fixed(logit_bias={258: 100.0}, ignore_eos=False, max_tokens=8)
    assert llm.generate([65], biased, use_tqdm=False)[0].outputs[0].token_ids == [258]
    biased.min_tokens = 3
    output = llm.generate([65], biased, use_tqdm=False)[0].outputs[0]
    assert (len(output.token_ids), output.token_ids[-1], output.finish_reason) == (4, 258, "stop")
    assert output.stop_reason is None


def test_chat_renders_the_template(null_llm: LLM) -> None:
    output = null_llm.chat([{"role": "user", "content": "hi"}], fixed(), use_tqdm=False)[0]
    assert output.prompt == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert output.prompt_token_ids[0] == null_llm.get_tokenizer().bos_token_id
    two = null_llm.chat([[{"role": "user", "content": c}] for c in "ab"], fixed(), use_tqdm=False)
    assert len(two) == 2


def test_max_model_len_above_the_limit_is_refused_with_both_numbers(llama: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"max_model_len \(1000\) is greater than .* \(256"):
        LLM(str(llama), max_model_len=1000)


def test_generation_stops_at_the_context_length(llama: Path, make_llm: Callable[..., LLM]) -> None:
    llm = make_llm(llama, max_model_len=40)
    output = llm.generate([[1] * 30], fixed(max_tokens=None), use_tqdm=False)[0].outputs[0]
    assert (len(output.token_ids), output.finish_reason) == (10, "length")


def test_dummy_weights_run(llama: Path, make_llm: Callable[..., LLM]) -> None:
    output = make_llm(llama, load_format="dummy").generate([1, 2], fixed(), use_tqdm=False)[0]
    assert len(output.outputs[0].token_ids) == 5


def test_engine_steps_until_all_requests_are_done() -> None:
    engine = LLMEngine.from_engine_args(EngineArgs(model="null", check_invariants=True))
    for name in ("a", "b", "c"):
        engine.add_request(name, name, fixed(output_kind=RequestOutputKind.DELTA, max_tokens=7))
    with pytest.raises(ValueError, match="'a' is in use"):
        engine.add_request("a", "again", fixed())
    engine.abort_request("b")
    assert engine.get_num_unfinished_requests() == 2
    tokens: dict[str, list[int]] = {}
    finished = set()
    while engine.has_unfinished_requests():
        for output in engine.step():
            tokens.setdefault(output.request_id, []).extend(output.outputs[0].token_ids)
            finished |= {output.request_id} if output.finished else set()
    assert finished == {"a", "c"} == set(tokens)
    assert {len(t) for t in tokens.values()} == {7}
    engine.shutdown()


def test_progress_prints_plain_lines_without_a_terminal() -> None:
    stream = io.StringIO()
    progress = Progress("Loading", 4 << 20, "B", stream=stream)
    progress.update(1 << 20)
    progress.update(4 << 20)
    progress.close()
    assert stream.getvalue().startswith("Loading: 100% 4/4 MiB [")
    assert "\r" not in stream.getvalue() and stream.getvalue().count("\n") == 1


@pytest.mark.parametrize("detokenize", [True, False])
def test_tokens_without_text_are_the_tokens_with_text(detokenize: bool) -> None:
    llm = LLM("null", max_num_seqs=8)
    params = SamplingParams(temperature=0, n=2, max_tokens=20, ignore_eos=True, detokenize=detokenize)
    outputs = llm.generate([[i, 7] for i in range(1, 20)], params, use_tqdm=False)
    expected = llm.generate([[i, 7] for i in range(1, 20)], fixed(n=2, max_tokens=20), use_tqdm=False)
    for output, other in zip(outputs, expected, strict=True):
        assert [o.token_ids for o in output.outputs] == [o.token_ids for o in other.outputs]
        assert [len(o.token_ids) for o in output.outputs] == [20, 20]
        assert bool(output.outputs[0].text) is detokenize
        metrics = output.metrics
        assert 0 < metrics.arrival_time <= metrics.first_token_time <= metrics.finished_time


def test_polling_until_an_end_gathers_every_token() -> None:
    engine = _core.Engine.create_null(_core.EngineConfig(), step_us=200)
    for i in range(3):
        engine.submit(i, [5, i], _core.SamplingParams(max_tokens=10 + i, ignore_eos=True, temperature=0.0))
    tokens: dict[int, int] = {}
    polls = 0
    while not all(tokens.get(i) == 10 + i for i in range(3)):
        deltas = engine.poll(60.0, until_end=True)
        assert any(d.finish is not None for d in deltas)
        assert len({d.id for d in deltas}) == len(deltas)
        for d in deltas:
            tokens[d.id] = tokens.get(d.id, 0) + len(d.tokens)
        polls += 1
    assert polls <= 3
    assert engine.poll(0.0, until_end=True) == []
    with pytest.raises(InvalidArgument, match=r"prompt\[1\] is no 32-bit int"):
        engine.submit(8, [5, 2**31], _core.SamplingParams())
    engine.submit(9, [5], _core.SamplingParams(max_tokens=4000, ignore_eos=True))
    while not engine.poll(0.01, until_end=True):  # what came in time is handed out, nothing is lost
        pass
    engine.shutdown()
