"""Beam search finds what Transformers and brute force find, however the engine runs it, in the memory of a tree."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from fastllm import LLM, BeamSearchParams, SamplingParams
from fastllm.beam import BeamSearchOutput, BeamSearchSequence, beam_search, score
from fastllm.outputs import CompletionOutput, Logprob, RequestOutput
from fastllm.tokenizer import byte_tokenizer
from tiny_models import FAMILIES, save_tiny_model

Llm = Callable[..., LLM]


def random_prompts(seed: int, lengths: Sequence[int], vocab: int = 256) -> list[list[int]]:
    source = random.Random(seed)
    return [[source.randrange(vocab) for _ in range(length)] for length in lengths]


def tokens_of(outputs: Sequence[BeamSearchOutput]) -> list[list[list[int]]]:
    return [[s.tokens for s in output.sequences] for output in outputs]


def test_sequences_and_scores_are_those_of_transformers(llama: Path, make_llm: Llm, seed: int) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    prompts = random_prompts(seed, [1, 7, 16, 33])
    outputs = make_llm(llama).beam_search(prompts, BeamSearchParams(beam_width=4, max_tokens=20, ignore_eos=True))
    for prompt, output in zip(prompts, outputs, strict=True):
        reference = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            num_beams=4,
            num_return_sequences=4,
            do_sample=False,
            max_new_tokens=20,
            return_dict_in_generate=True,
            output_scores=True,
        )
        assert [s.tokens for s in output.sequences] == reference.sequences.tolist()
        scores = [score(s.cum_logprob, 20, 1.0) for s in output.sequences]
        assert scores == pytest.approx(reference.sequences_scores.tolist(), abs=1e-4)
        assert all(s.finish_reason == "length" and s.stop_reason is None for s in output.sequences)


@pytest.mark.parametrize("length_penalty", [1.0, 0.0, 2.0, -1.0])
def test_a_wide_search_finds_what_brute_force_finds(
    length_penalty: float, tmp_path: Path, make_llm: Llm, seed: int
) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    vocab, end, steps, width = 8, 7, 3, 64
    family, fields = FAMILIES["llama"]
    tiny = fields | {"vocab_size": vocab, "bos_token_id": 5, "eos_token_id": end, "pad_token_id": 6}
    save_tiny_model((family, tiny), tmp_path)
    prompt = random_prompts(seed, [9], end)[0]

    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    every = torch.tensor([prompt + list(tail) for tail in itertools.product(range(vocab), repeat=steps)])
    with torch.no_grad():
        logprobs = model(every).logits.log_softmax(-1)
    scores: dict[tuple[int, ...], float] = {}
    for row, ids in enumerate(every.tolist()):
        tail = ids[len(prompt) :]
        tail = tail[: tail.index(end) + 1] if end in tail else tail
        total = sum(logprobs[row, len(prompt) + i - 1, token].item() for i, token in enumerate(tail))
        scores[tuple(tail)] = score(total, len(tail), length_penalty)
    best = sorted(scores, key=lambda tail: scores[tail], reverse=True)[:width]

    params = BeamSearchParams(width, steps, length_penalty=length_penalty, include_stop_str_in_output=True)
    sequences = make_llm(tmp_path).beam_search(prompt, params)[0].sequences
    found = [tuple(s.tokens[len(prompt) :]) for s in sequences]
    assert len(set(found)) == width
    expected = [scores[tail] for tail in best]
    assert [scores[tail] for tail in found] == pytest.approx(expected, abs=1e-4), "nearly equal ones may swap"
    assert [score(s.cum_logprob, len(s.logprobs), length_penalty) for s in sequences] == pytest.approx(
        expected, abs=1e-4
    )
    assert any(s.finish_reason == "stop" for s in sequences)


@pytest.mark.parametrize(
    "limits",
    [
        {},
        {"enable_prefix_caching": False},
        {"async_scheduling": False},
        {"max_num_seqs": 2},
        {"num_gpu_blocks_override": 16},
    ],
    ids=str,
)
def test_a_batch_gives_what_its_prompts_give_alone(
    limits: dict[str, Any], llama: Path, make_llm: Llm, seed: int
) -> None:
    prompts = random_prompts(seed, [5, 40, 16, 17, 3])
    params = BeamSearchParams(beam_width=3, max_tokens=18)
    one = make_llm(llama)
    alone = [one.beam_search(prompt, params)[0] for prompt in prompts]
    together = make_llm(llama, **limits).beam_search(prompts, params)
    assert tokens_of(together) == tokens_of(alone)
    assert all(len(output.sequences) == 3 for output in together)


class TableModel:
    """Logprobs drawn from a hash of the tokens so far; counts the batches it was asked for."""

    def __init__(self, seed: int, vocab: int) -> None:
        self.seed, self.vocab, self.batches = seed, vocab, 0

    def logprobs(self, ids: Sequence[int]) -> list[float]:
        source = random.Random(f"{self.seed} {list(ids)}")
        weights = [source.expovariate(1.0) ** 2 for _ in range(self.vocab)]
        return [math.log(w / sum(weights)) for w in weights]

    def generate(self, prompts: Sequence[Any], params: SamplingParams) -> list[RequestOutput]:
        self.batches += 1
        outputs = []
        for prompt in prompts:
            ids = prompt["prompt_token_ids"]
            ranked = sorted(enumerate(self.logprobs(ids)), key=lambda c: -c[1])[: params.logprobs]
            position = {token: Logprob(logprob, rank) for rank, (token, logprob) in enumerate(ranked, 1)}
            sample = CompletionOutput(0, "", [ranked[0][0]], logprobs=[position], finish_reason="length")
            outputs.append(RequestOutput("", None, ids, None, [sample], True))
        return outputs


def plain_search(model: TableModel, prompt: list[int], params: BeamSearchParams, end: int) -> list[list[int]]:
    """The same search, always to its last step."""
    live, ended = [(0.0, prompt)], []
    for _ in range(params.max_tokens):
        grown = []
        for total, ids in live:
            best = sorted(enumerate(model.logprobs(ids)), key=lambda c: -c[1])[: 2 * params.beam_width]
            grown += [(total + logprob, [*ids, token]) for token, logprob in best]
        ended += [g for g in grown if g[1][-1] == end]
        live = sorted((g for g in grown if g[1][-1] != end), reverse=True)[: params.beam_width]
    every = sorted(
        ended + live, key=lambda g: score(g[0], len(g[1]) - len(prompt), params.length_penalty), reverse=True
    )
    return [ids for _, ids in every[: params.beam_width]]


@pytest.mark.parametrize("length_penalty", [1.0, 0.0, 0.5, -0.5])
def test_stopping_early_changes_no_result(length_penalty: float, seed: int) -> None:
    model = TableModel(seed, vocab=9)
    params = BeamSearchParams(3, 12, length_penalty=length_penalty, include_stop_str_in_output=True)
    prompts = random_prompts(seed, [1] * 8 + [2] * 8 + [5] * 8, 8)
    outputs = [
        beam_search(
            model.generate,
            [{"prompt_token_ids": prompt}],
            params,
            tokenizer=byte_tokenizer(),
            eos_token_ids=[8],
            max_model_len=100,
            num_candidates=6,
        )[0]
        for prompt in prompts
    ]
    assert tokens_of(outputs) == [plain_search(model, prompt, params, 8) for prompt in prompts]
    if length_penalty <= 0:
        assert model.batches < len(prompts) * params.max_tokens, "some search ended before its last step"


def sequences_of_null(params: BeamSearchParams, **engine_args: Any) -> list[BeamSearchSequence]:
    with LLM("null", **engine_args) as llm:
        return llm.beam_search("Hello", params)[0].sequences


def test_the_context_ends_a_beam() -> None:
    sequences = sequences_of_null(BeamSearchParams(2, 50, ignore_eos=True), max_model_len=12)
    assert [len(s.tokens) for s in sequences] == [12, 12]
    assert [s.finish_reason for s in sequences] == ["length", "length"]


def test_the_ending_token_is_left_out_unless_asked_for() -> None:
    eos = byte_tokenizer().eos_token_id
    model = TableModel(1, vocab=260)
    model.logprobs = lambda ids: [-0.1 if i == eos else -9.0 - i for i in range(260)]  # type: ignore[method-assign]
    for include, tail in ((False, []), (True, [eos])):
        output = beam_search(
            model.generate,
            [{"prompt_token_ids": [72, 105]}],
            BeamSearchParams(1, 5, include_stop_str_in_output=include),
            tokenizer=byte_tokenizer(),
            eos_token_ids=[eos],
            max_model_len=100,
            num_candidates=2,
        )[0]
        best = output.sequences[0]
        assert best.tokens == [72, 105, *tail] and best.text == "Hi" + ("<|im_end|>" if include else "")
        assert (best.finish_reason, best.stop_reason, best.cum_logprob) == ("stop", eos, -0.1)
        assert [list(position) for position in best.logprobs] == [[eos, 0]]


def test_temperature_keeps_the_scores_of_the_raw_logits() -> None:
    best, *_ = sequences_of_null(BeamSearchParams(3, 6, ignore_eos=True, temperature=1.0))
    raw = [position[token].logprob for position, token in zip(best.logprobs, best.tokens[5:], strict=True)]
    assert best.cum_logprob == pytest.approx(sum(raw))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"beam_width": 0}, "beam_width must be at least 1, got 0"),
        ({"max_tokens": 0}, "max_tokens must be at least 1, got 0"),
        ({"temperature": -1.0}, "temperature must be non-negative"),
        ({"length_penalty": math.nan}, "length_penalty must be a finite number"),
        ({"beam_width": 11}, "max_logprobs is 20: load the model with max_logprobs=22 or more"),
    ],
)
def test_bad_parameters_are_refused_with_a_sentence(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sequences_of_null(BeamSearchParams(**{"beam_width": 2, "max_tokens": 2, **fields}))


def test_wider_beams_work_when_the_engine_allows_their_logprobs() -> None:
    assert len(sequences_of_null(BeamSearchParams(10, 4, ignore_eos=True))) == 10
    assert len(sequences_of_null(BeamSearchParams(11, 4, ignore_eos=True), max_logprobs=22)) == 11


@pytest.mark.parametrize("model", ["null", "llama"])
def test_samples_and_beams_share_most_of_their_memory(model: str, request: Any, make_llm: Llm, seed: int) -> None:
    num_prompt, num_output = (512, 64) if model == "null" else (192, 24)  # the tiny model has 256 positions
    llm = make_llm(model if model == "null" else request.getfixturevalue("llama"))
    prompt = random_prompts(seed, [num_prompt])[0]

    def saved(count: int) -> float:
        alone = math.ceil((num_prompt + num_output) / llm.engine_config.block_size)
        share = llm.stats().peak_used_blocks / (count * alone)
        print(f"{count} sequences: {llm.stats().peak_used_blocks} blocks, alone {count * alone}")
        return 1 - share

    llm.generate([prompt], SamplingParams(n=8, max_tokens=num_output, ignore_eos=True, seed=seed), use_tqdm=False)
    assert saved(8) >= 0.55
    llm.reset_prefix_cache()
    llm.beam_search([prompt], BeamSearchParams(beam_width=4, max_tokens=num_output, ignore_eos=True))
    assert saved(4) >= 0.55
    assert llm.stats().used_blocks == 0
