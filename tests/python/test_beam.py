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
from fastllm.beam import BeamSearchOutput, BeamSearchSequence, score
from tiny_models import FAMILIES, save_tiny_model

Llm = Callable[..., LLM]


def random_prompts(seed: int, lengths: Sequence[int], vocab: int = 256) -> list[list[int]]:
    source = random.Random(seed)
    return [[source.randrange(vocab) for _ in range(length)] for length in lengths]


def tokens_of(outputs: Sequence[BeamSearchOutput]) -> list[list[list[int]]]:
    return [[s.tokens for s in output.sequences] for output in outputs]


def save_small_model(folder: Path, **ids: Any) -> None:
    """A tiny llama of ids["vocab_size"] ids, with a tokenizer that has a letter for each."""
    from tokenizers import Tokenizer, models

    family, fields = FAMILIES["llama"]
    save_tiny_model((family, fields | ids), folder)
    letters = {chr(ord("A") + i): i for i in range(ids["vocab_size"])}
    Tokenizer(models.WordLevel(letters, unk_token="A")).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text("{}")


# num_beams, length_penalty, early_stopping, num_return_sequences
SEARCHES = [
    (4, 1.0, False, 4),
    (4, 1.0, True, 2),
    (4, 1.0, "never", 4),
    (2, 0.0, False, 1),
    (3, 2.0, "never", 1),
    (3, -1.0, True, 3),
    (6, 0.6, "never", 5),
]


@pytest.fixture(scope="module")
def eager_end(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny fp32 model of 40 ids with two that end: often enough that searches end early."""
    pytest.importorskip("torch")
    folder = tmp_path_factory.mktemp("eager_end")
    save_small_model(folder, vocab_size=40, pad_token_id=36, bos_token_id=37, eos_token_id=[38, 39])
    return folder


def test_twenty_prompts_give_the_sequences_and_scores_of_transformers(
    device: str, eager_end: Path, make_llm: Llm, seed: int, one_torch_thread: None
) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(eager_end, dtype=torch.float32)
    llm = make_llm(eager_end, device=device)
    batches = [random_prompts(seed + length, [length] * 5, 36) for length in (1, 8, 17, 33)]
    prompts = [prompt for batch in batches for prompt in batch]
    steps, ended, differ = 8, 0, 0
    for width, penalty, early, count in SEARCHES:
        params = SamplingParams(
            n=count, best_of=width, use_beam_search=True, max_tokens=steps, temperature=0.0, logprobs=0
        )
        params.length_penalty, params.early_stopping = penalty, early
        outputs = llm.generate(prompts, params, use_tqdm=False)
        sequences, scores = [], []
        for batch in batches:
            reference = model.generate(
                torch.tensor(batch),
                attention_mask=torch.ones(len(batch), len(batch[0]), dtype=torch.long),
                num_beams=width,
                num_return_sequences=count,
                length_penalty=penalty,
                early_stopping=early,
                do_sample=False,
                max_new_tokens=steps,
                return_dict_in_generate=True,
                output_scores=True,
            )
            sequences += reference.sequences[:, len(batch[0]) :].tolist()
            scores += reference.sequences_scores.tolist()
        samples = [sample for output in outputs for sample in output.outputs]
        ended += sum(sample.finish_reason == "stop" for sample in samples)
        found = [score(s.cumulative_logprob or 0.0, len(s.token_ids), penalty) for s in samples]
        assert found == pytest.approx(scores, rel=1e-6, abs=2e-5)
        for sample, row in zip(samples, sequences, strict=True):
            end = next((i for i, token in enumerate(row) if token in (38, 39)), len(row) - 1)
            differ += sample.token_ids != row[: end + 1]
    assert ended > 10, "the model ends too seldom to test how searches end"
    # Only sequences whose scores are equal to rounding may change places.
    assert differ <= 2, f"{differ} sequences differ although their scores are equal"


def test_beams_samples_and_ranked_samples_share_a_batch(device: str, eager_end: Path, make_llm: Llm, seed: int) -> None:
    llm = make_llm(eager_end, device=device, max_num_seqs=9, num_gpu_blocks_override=40)
    prompts = random_prompts(seed, [3, 9, 17, 30] * 3, 38)
    kinds = [
        SamplingParams(n=2, best_of=4, use_beam_search=True, max_tokens=10, temperature=0.0),
        SamplingParams(n=3, max_tokens=10, seed=seed),
        SamplingParams(n=2, best_of=5, max_tokens=10, seed=seed),
    ]
    params = [kinds[i % 3] for i in range(len(prompts))]
    together = llm.generate(prompts, params, use_tqdm=False)
    for prompt, one, output in zip(prompts, params, together, strict=True):
        alone = llm.generate([prompt], one, use_tqdm=False)[0]
        assert [s.token_ids for s in output.outputs] == [s.token_ids for s in alone.outputs]
        assert [s.index for s in output.outputs] == list(range(one.n))
    assert llm.stats().used_blocks == 0 and llm.stats().block_leaks == 0


def test_best_of_returns_the_samples_of_the_greatest_likelihood(llama: Path, make_llm: Llm, seed: int) -> None:
    llm = make_llm(llama)
    prompt = random_prompts(seed, [7])[0]
    fields: dict[str, Any] = {"max_tokens": 8, "seed": seed, "ignore_eos": True}
    every = llm.generate([prompt], SamplingParams(n=6, logprobs=0, **fields), use_tqdm=False)[0].outputs
    best = llm.generate([prompt], SamplingParams(n=2, best_of=6, **fields), use_tqdm=False)[0]
    ranked = sorted(every, key=lambda s: -(s.cumulative_logprob or 0.0))
    assert [s.token_ids for s in best.outputs] == [s.token_ids for s in ranked[:2]]
    assert [s.index for s in best.outputs] == [0, 1]
    assert best.outputs[0].logprobs is None and best.outputs[0].cumulative_logprob is None
    assert best.num_generated_tokens == 6 * 8


@pytest.mark.parametrize("length_penalty", [1.0, 0.0, 2.0, -1.0])
def test_a_wide_search_finds_what_brute_force_finds(
    length_penalty: float, tmp_path: Path, make_llm: Llm, seed: int
) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    vocab, end, steps, width = 8, 7, 3, 64
    save_small_model(tmp_path, vocab_size=vocab, bos_token_id=5, eos_token_id=end, pad_token_id=6)
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
        {"max_num_seqs": 3},
        {"num_gpu_blocks_override": 16},
    ],
    ids=str,
)
def test_a_batch_gives_what_its_prompts_give_alone(
    limits: dict[str, Any], device: str, llama: Path, make_llm: Llm, seed: int
) -> None:
    prompts = random_prompts(seed, [5, 40, 16, 17, 3])
    params = BeamSearchParams(beam_width=3, max_tokens=18)
    one = make_llm(llama, device=device)
    alone = [one.beam_search(prompt, params)[0] for prompt in prompts]
    together = make_llm(llama, device=device, **limits).beam_search(prompts, params)
    assert tokens_of(together) == tokens_of(alone)
    assert all(len(output.sequences) == 3 for output in together)


def sequences_of_null(params: BeamSearchParams, **engine_args: Any) -> list[BeamSearchSequence]:
    with LLM("null", **engine_args) as llm:
        return llm.beam_search("Hello", params)[0].sequences


def test_the_context_ends_a_beam() -> None:
    sequences = sequences_of_null(BeamSearchParams(2, 50, ignore_eos=True), max_model_len=12)
    assert [len(s.tokens) for s in sequences] == [12, 12]
    assert [s.finish_reason for s in sequences] == ["length", "length"]


def test_the_ending_token_is_left_out_unless_asked_for(eager_end: Path, make_llm: Llm, seed: int) -> None:
    llm = make_llm(eager_end)
    prompts = random_prompts(seed, [5] * 12, 36)
    found = 0
    with_end = llm.beam_search(prompts, BeamSearchParams(4, 24, include_stop_str_in_output=True))
    without = llm.beam_search(prompts, BeamSearchParams(4, 24))
    for longer, shorter in zip(with_end, without, strict=True):
        for one, other in zip(longer.sequences, shorter.sequences, strict=True):
            assert one.cum_logprob == other.cum_logprob and len(one.logprobs) == len(other.logprobs)
            ended = one.finish_reason == "stop"
            assert one.stop_reason == other.stop_reason == (one.tokens[-1] if ended else None)
            assert one.stop_reason in (38, 39, None)
            assert other.tokens == (one.tokens[:-1] if ended else one.tokens)
            found += ended
    assert found, "no beam ended"


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
        ({"beam_width": 20}, "max_logprobs is 20: load the model with max_logprobs=21 or more"),
        ({"early_stopping": "soon"}, "early_stopping must be false, true or"),
    ],
)
def test_bad_parameters_are_refused_with_a_sentence(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sequences_of_null(BeamSearchParams(**{"beam_width": 2, "max_tokens": 2, **fields}))


def test_wider_beams_work_when_the_engine_allows_their_logprobs() -> None:
    assert len(sequences_of_null(BeamSearchParams(20, 4, ignore_eos=True))) == 20
    assert len(sequences_of_null(BeamSearchParams(21, 4, ignore_eos=True), max_logprobs=21)) == 21


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
