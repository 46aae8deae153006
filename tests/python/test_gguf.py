"""GGUF: every block format, Llama's rotary pairing and rope factors, SentencePiece vocabularies."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastllm import LLM, SamplingParams, _core
from fastllm.engine_args import EngineArgs
from fastllm.errors import LoadError
from fastllm.loader.gguf import read_gguf
from fastllm.loader.model import open_model
from tiny_models import VOCAB

gguf = pytest.importorskip("gguf", reason="the gguf package is the reference")

# The gguf package writes these; K blocks come as random bytes, which are blocks too.
_QUANTISED = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"]
_RANDOM_BLOCKS = ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]
_HALVES = {"Q2_K": (80, 84), "Q3_K": (108, 110), "Q6_K": (208, 210)}  # bytes of a block that are fp16; else the first 4


@pytest.mark.parametrize("name", [*_QUANTISED, *_RANDOM_BLOCKS])
def test_block_format_decodes_as_the_gguf_package_does(name: str, tmp_path: Path, seed: int) -> None:
    kind = gguf.GGMLQuantizationType[name]
    rng = np.random.default_rng(seed)
    rows, cols = 6, 512
    if name in _QUANTISED:
        packed = gguf.quantize(rng.standard_normal((rows, cols), dtype=np.float32), kind)
    else:
        block, size = gguf.GGML_QUANT_SIZES[kind]
        blocks = rng.integers(0, 256, (rows, cols // block, size), dtype=np.uint8)
        # The fp16 scales must be finite: keep their exponents small.
        scales = _HALVES.get(name, (0, 4))
        blocks[:, :, scales[0] + 1 : scales[1] : 2] &= 0xBB
        packed = blocks.reshape(rows, -1)
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_tensor("t", packed, raw_dtype=kind)
    write(writer)
    tensor = read_gguf(tmp_path / "x.gguf").tensors["t"]
    assert (tensor.type, tensor.shape) == (name, (rows, cols))
    expected = gguf.dequantize(packed, kind).reshape(rows, cols)
    np.testing.assert_allclose(_core.dequantize(name, tensor.data, rows, cols), expected, rtol=1e-6, atol=1e-7)


def write(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def paired(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of q and k rows: the two halves of each head interleaved."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(rows.shape)


def write_model(folder: Path, path: Path, config: dict[str, Any], kind: Any, factors: np.ndarray | None) -> None:
    from safetensors.numpy import load_file

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    tokens = [chr(256 + i) for i in range(VOCAB)]
    writer.add_token_list(tokens)
    writer.add_token_merges([])
    writer.add_eos_token_id(258)
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", factors)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for name, values in load_file(folder / "model.safetensors").items():
        if name.endswith("q_proj.weight"):
            values = paired(values, config["num_attention_heads"])
        if name.endswith("k_proj.weight"):
            values = paired(values, config["num_key_value_heads"])
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if values.ndim == 2:
            writer.add_tensor(target, gguf.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(target, values)
    write(writer)


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "Q4_0", "Q5_1"])
def test_gguf_model_equals_the_same_weights_in_a_folder(
    kind: str, tmp_path: Path, make_llm: Callable[..., LLM], tiny_model: Callable[[str], Path]
) -> None:
    """The folder holds what the blocks decode to, so that both engines compute with equal weights."""
    from safetensors.numpy import load_file, save_file

    quant = gguf.GGMLQuantizationType[kind]
    folder = tmp_path / "folder"
    source = tiny_model("llama")
    config = open_config(source)
    weights = load_file(source / "model.safetensors")
    rounded = {
        n: gguf.dequantize(gguf.quantize(w, quant), quant).reshape(w.shape) if w.ndim == 2 else w
        for n, w in weights.items()
    }
    folder.mkdir()
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    save_file(rounded, folder / "model.safetensors")
    write_model(source, tmp_path / "m.gguf", config, quant, None)
    same_tokens_and_logprobs(make_llm(tmp_path / "m.gguf", quantization="none"), make_llm(folder))


def test_rope_factors_equal_llama3_scaling(
    tmp_path: Path, make_llm: Callable[..., LLM], tiny_model: Callable[[str], Path]
) -> None:
    import torch
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    folder = tiny_model("llama3-rope")
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](AutoConfig.from_pretrained(folder), torch.device("cpu"))
    dim = 2 * len(scaled)
    plain = 10000.0 ** -(np.arange(0, dim, 2) / dim)
    factors = (plain / scaled.numpy()).astype(np.float32)
    write_model(folder, tmp_path / "m.gguf", open_config(folder), gguf.GGMLQuantizationType.F32, factors)
    same_tokens_and_logprobs(make_llm(tmp_path / "m.gguf"), make_llm(folder))


def open_config(folder: Path) -> dict[str, Any]:
    import json

    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def same_tokens_and_logprobs(first: LLM, second: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=0)
    prompt = [(i * 31 + 7) % 256 for i in range(70)]
    a, b = (llm.generate(prompt, params, use_tqdm=False)[0].outputs[0] for llm in (first, second))
    assert a.token_ids == b.token_ids
    assert a.logprobs is not None and b.logprobs is not None
    for x, y in zip(a.logprobs, b.logprobs, strict=True):
        for token in x:
            assert abs(x[token].logprob - y[token].logprob) < 1e-4


def sentencepiece_file(path: Path, pre: str | None = None) -> Path:
    """A small SentencePiece vocabulary, in which longer pieces score higher."""
    pieces = ["<unk>", "<s>", "</s>", *[f"<0x{b:02X}>" for b in range(256)]]
    words = ["▁", "h", "e", "l", "o", "w", "r", "d", "he", "ll", "hell", "hello", "▁hello", "wo", "▁wo", "▁wor"]
    types = [2, 3, 3, *[6] * 256, *[1] * len(words)]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("llama" if pre is None else "gpt2")
    if pre is not None:
        writer.add_tokenizer_pre(pre)
        writer.add_token_merges([])
    writer.add_token_list(pieces + words)
    writer.add_token_scores([0.0] * len(pieces) + [-float(20 - len(w)) for w in words])
    writer.add_token_types(types)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    write(writer)
    return path


def test_sentencepiece_vocabulary_encodes_and_decodes(tmp_path: Path) -> None:
    from fastllm.loader.gguf_tokenizer import gguf_tokenizer

    tokenizer = gguf_tokenizer(read_gguf(sentencepiece_file(tmp_path / "x.gguf")))
    encoding = tokenizer.encode("hello world é")
    assert encoding.tokens == ["<s>", "▁hello", "▁wor", "l", "d", "▁", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(encoding.ids) == "hello world é"


def test_unknown_pre_tokenizer_is_named(tmp_path: Path) -> None:
    from fastllm.loader.gguf_tokenizer import gguf_tokenizer

    with pytest.raises(LoadError, match="pre-tokenizer 'martian' is not known; known are"):
        gguf_tokenizer(read_gguf(sentencepiece_file(tmp_path / "x.gguf", pre="martian")))


def test_unsupported_architecture_is_named(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "mamba")
    writer.add_tensor("t", np.zeros((2, 2), np.float32))
    write(writer)
    with pytest.raises(LoadError, match="architecture 'mamba' is not supported; supported are llama"):
        open_model(EngineArgs(model=str(tmp_path / "x.gguf")))
