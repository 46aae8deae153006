"""SmolLM2 135M from its GGUF file: the tokens of Transformers, in dense fp32, over real prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from fastllm import LLM, SamplingParams
from fastllm.outputs import CompletionOutput

_TEXT = (
    "The history of the printing press begins long before Gutenberg. In China, craftsmen carved whole pages into "
    "wooden blocks as early as the seventh century, and movable type made of clay followed in the eleventh. In "
    "Europe, the goldsmith from Mainz combined a new metal alloy, an oil-based ink and a screw press borrowed from "
    "wine makers. Within fifty years, workshops in more than two hundred cities had printed some twenty million "
    "volumes. Prices fell, literacy rose, and ideas travelled faster than those who wished to stop them. "
)
_STARTS = [
    "The capital of France is",
    "def quicksort(numbers):\n    ",
    "Once upon a time, in a village by the sea,",
    "To make a good tomato soup you need",
    "Water boils at 100 degrees Celsius because",
    '{"name": "Ada", "born": 1815, "field":',
    "Dear Sir or Madam,\n\nI am writing to",
    "1, 1, 2, 3, 5, 8, 13,",
]
NEW_TOKENS = 64
NEAR_TIE = 0.25  # of logits; bfloat16 keeps steps of 0.125 of numbers from 16 to 32


@pytest.fixture(scope="module")
def reference(demo_gguf: str) -> Any:
    """Transformers' Llama with the file's weights as the gguf package decodes them."""
    torch = pytest.importorskip("torch", reason="needs torch as the reference")
    transformers = pytest.importorskip("transformers", reason="needs transformers as the reference")
    gguf = pytest.importorskip("gguf", reason="needs the gguf package to decode the reference weights")
    from fastllm.loader.hub import resolve_model

    reader = gguf.GGUFReader(resolve_model(demo_gguf))

    def value(key: str) -> Any:
        return reader.fields[f"llama.{key}"].contents()

    config = transformers.LlamaConfig(
        hidden_size=value("embedding_length"),
        intermediate_size=value("feed_forward_length"),
        num_hidden_layers=value("block_count"),
        num_attention_heads=value("attention.head_count"),
        num_key_value_heads=value("attention.head_count_kv"),
        max_position_embeddings=value("context_length"),
        rms_norm_eps=value("attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": value("rope.freq_base")},
        vocab_size=value("vocab_size"),
        tie_word_embeddings=True,
        attn_implementation="eager",
    )
    model = transformers.LlamaForCausalLM(config).eval()
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    tensors = {t.name: t for t in reader.tensors}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            tensor = tensors[names.get_name(name, try_suffixes=(".weight",))]
            rows = torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type)).reshape(parameter.shape)
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                pairs = rows.reshape(-1, config.head_dim // 2, 2, rows.shape[1])
                rows = pairs.transpose(1, 2).reshape(rows.shape)
            parameter.copy_(rows)
    return model


def prompts(tokenizer: Any, count: int) -> list[list[int]]:
    """Real text of 5 to 400 tokens."""
    text = tokenizer.encode(_TEXT * 4)
    made = []
    for i in range(count):
        length = 5 + (395 * i) // max(1, count - 1)
        start = tokenizer.encode(_STARTS[i % len(_STARTS)])
        made.append((text[i : i + max(0, length - len(start))] + start)[-length:])
    return made


def greedy(llm: LLM, count: int, new_tokens: int) -> Iterator[tuple[list[int], CompletionOutput]]:
    batch = prompts(llm.get_tokenizer(), count)
    params = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, logprobs=0)
    for prompt, output in zip(batch, llm.generate(batch, params, use_tqdm=False), strict=True):
        yield prompt, output.outputs[0]


def logits_after(reference: Any, prompt: list[int], tokens: list[int]) -> Any:
    """[tokens, vocab]: one forward over prompt and answer gives what greedy decoding would have seen at every token."""
    import torch

    with torch.no_grad():
        return reference(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1].float()


def check(
    demo_gguf: str, reference: Any, make_llm: Callable[..., LLM], count: int, new_tokens: int, device: str
) -> None:
    import torch

    llm = make_llm(demo_gguf, device=device, quantization="none", max_model_len=512, num_gpu_blocks_override=1200)
    for prompt, sample in greedy(llm, count, new_tokens):
        assert sample.logprobs is not None
        logits = logits_after(reference, prompt, sample.token_ids)
        assert sample.token_ids == logits.argmax(-1).tolist()
        expected = torch.log_softmax(logits, -1).gather(1, torch.tensor(sample.token_ids)[:, None])[:, 0]
        ours = torch.tensor([p[t].logprob for p, t in zip(sample.logprobs, sample.token_ids, strict=True)])
        assert float((ours - expected).abs().max()) < 1e-3


def test_demo_model_equals_transformers(
    demo_gguf: str, reference: Any, make_llm: Callable[..., LLM], device: str
) -> None:
    check(demo_gguf, reference, make_llm, count=4, new_tokens=16, device=device)


def test_bfloat16_leaves_the_float32_tokens_only_at_near_ties(
    demo_gguf: str, reference: Any, make_llm: Callable[..., LLM], device: str
) -> None:
    llm = make_llm(demo_gguf, device=device, dtype="bfloat16", quantization="none", num_gpu_blocks_override=1200)
    gaps: list[float] = []  # by how much the float32 model prefers its own choice
    for prompt, sample in greedy(llm, count=6, new_tokens=24):
        logits = logits_after(reference, prompt, sample.token_ids)
        for row, token in zip(logits, sample.token_ids, strict=True):
            gaps.append(float(row.max() - row[token]))
    assert max(gaps) < NEAR_TIE
    assert sum(gap > 0 for gap in gaps) <= 0.1 * len(gaps)


@pytest.mark.slow
def test_demo_model_equals_transformers_on_32_prompts(
    demo_gguf: str, reference: Any, make_llm: Callable[..., LLM], device: str
) -> None:
    check(demo_gguf, reference, make_llm, count=32, new_tokens=NEW_TOKENS, device=device)
