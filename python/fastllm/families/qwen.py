"""Qwen2 and 2.5 (bias on q, k, v) and Qwen3 (normalised q and k)."""

from __future__ import annotations

from fastllm.families.base import Family, HfConfig, layer_types, rms, rule
from fastllm.families.llama import LLAMA_IGNORED, LLAMA_WEIGHTS, llama_like
from fastllm.spec import ModelSpec


def _windowed(config: HfConfig) -> list[bool]:
    in_use = config.flag("use_sliding_window") and config.get("sliding_window") is not None
    full_layers = config.size("max_window_layers", 28, minimum=0)
    return layer_types(config, lambda i: in_use and i >= full_layers)


def _qwen2(config: HfConfig) -> ModelSpec:
    return llama_like(config, "qwen2", windowed=_windowed(config), qkv_bias=True, max_len=32768)


def _qwen3(config: HfConfig) -> ModelSpec:
    bias = config.flag("attention_bias")
    return llama_like(
        config,
        "qwen3",
        windowed=_windowed(config),
        qkv_bias=bias,
        out_bias=bias,
        qk_norm=rms(config),
        max_len=32768,
    )


QWEN2 = Family("qwen2", "Qwen2ForCausalLM", _qwen2, LLAMA_WEIGHTS, LLAMA_IGNORED)
QWEN3 = Family(
    "qwen3",
    "Qwen3ForCausalLM",
    _qwen3,
    LLAMA_WEIGHTS
    | {
        "layers.{i}.attn.q_norm": rule("model.layers.{i}.self_attn.q_norm"),
        "layers.{i}.attn.k_norm": rule("model.layers.{i}.self_attn.k_norm"),
    },
    LLAMA_IGNORED,
)
