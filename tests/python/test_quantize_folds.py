"""Scales move into the layer before only where that leaves a decoder layer as it was, whatever its family."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastllm.quantize import QuantizeConfig, quantize
from quantized_reader import transformers_model
from tiny_models import VOCAB, save_tiny_model

torch = pytest.importorskip("torch", reason="quantising takes it")
pytest.importorskip("transformers", reason="quantising takes it")

_LLAMA = {
    "self_attn.q_proj": "input_layernorm",
    "self_attn.o_proj": "self_attn.v_proj",
    "mlp.gate_proj": "post_attention_layernorm",
    "mlp.down_proj": "mlp.up_proj",
}
_GEMMA2 = _LLAMA | {"mlp.gate_proj": "pre_feedforward_layernorm"}
# First of the linear layers that share an input -> what makes that input.
FOLDS = {
    "llama": _LLAMA,  # grouped queries
    "llama4heads": _LLAMA,
    "llama-tied-biased": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "mistral-window": _LLAMA,
    "gemma": _LLAMA,
    "gemma2": _GEMMA2,
    "gemma3": _GEMMA2,
    "phi": {"self_attn.q_proj": "input_layernorm", "self_attn.dense": "self_attn.v_proj"},  # one norm for both halves
    "gpt-neox-sequential": {
        "attention.query_key_value": "input_layernorm",
        "mlp.dense_h_to_4h": "post_attention_layernorm",
    },
}

_SIZES = {"vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
# Families that the engine does not run: other forms of layers, which other engines do.
MORE_FAMILIES = {
    "phi3": ("Phi3Config", _SIZES | {"intermediate_size": 96, "pad_token_id": 0}),  # q, k, v and gate, up in one
    "bloom": ("BloomConfig", _SIZES),  # layers return tuples
    "opt": ("OPTConfig", _SIZES | {"ffn_dim": 96, "word_embed_proj_dim": 64}),
    "olmo2": ("Olmo2Config", _SIZES | {"intermediate_size": 96}),  # norms after, none before
}


def decoder_of(folder: Path) -> tuple[Any, Any, Any]:
    """The model, its first layer and that layer's input."""
    from fastllm.quantize.decoder import DecoderModel

    decoder = DecoderModel(folder)
    (hidden,) = decoder.embed([list(range(40))])
    return decoder, decoder.open(0), hidden


@pytest.mark.parametrize("family", list(FOLDS))
def test_folds_are_found_and_exact(family: str, tiny_model: Callable[[str], Path], seed: int) -> None:
    from fastllm.quantize.folds import find_folds
    from fastllm.quantize.inputs import input_groups

    with torch.no_grad():
        decoder, layer, hidden = decoder_of(tiny_model(family))
        call = decoder.calls[0]
        groups = input_groups(layer, call, hidden)
        assert {name for group in groups for name in group} == set(decoder.linears(0))
        folds = find_folds(layer, call, hidden, groups, decoder.head_dim)
        assert {consumer: fold.producer for consumer, fold in folds.items()} == FOLDS[family]
        before = call.run(layer, hidden)
        generator = torch.Generator().manual_seed(seed)
        for fold in folds.values():
            fold.apply(layer, torch.rand(fold.channels, generator=generator) * 4 + 0.1, torch.bfloat16)
        biased = "biased" in family or family in ("qwen2", "phi", "gpt-neox-sequential")  # biases are rounded, too
        assert torch.allclose(call.run(layer, hidden), before, rtol=0, atol=3e-2 if biased else 3e-4)


@pytest.mark.parametrize("method", ["gptq", "awq"])
@pytest.mark.parametrize("family", ["gemma3", "qwen3", "phi", "gpt-neox", *MORE_FAMILIES])
def test_other_families_are_written_as_they_compute(
    method: str, family: str, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    if family in MORE_FAMILIES:
        save_tiny_model(MORE_FAMILIES[family], tmp_path / "model")
    source = tmp_path / "model" if family in MORE_FAMILIES else tiny_model(family)
    config = QuantizeConfig(
        method=method, group_size=32, num_samples=6, sample_length=32, calibration="Some words to calibrate with. " * 30
    )
    report = quantize(str(source), tmp_path / "out", config)
    model = transformers_model(tmp_path / "out")
    ids = torch.tensor([list(b"Words that are not the ones above, but much like them")])
    from transformers import AutoModelForCausalLM

    original = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    with torch.no_grad():
        after, before = (m(ids, labels=ids).loss for m in (model, original))
    assert float(after) == pytest.approx(float(before), rel=0.1)
    assert report.measured.perplexity_after == pytest.approx(report.measured.perplexity_before, rel=0.3)
