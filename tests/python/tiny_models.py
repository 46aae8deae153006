"""Tiny random models of every supported family, made by Transformers, with a byte-level tokenizer beside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

# fp32, small, the same limits on every device, and invariants checked after every step.
ENGINE = {
    "device": "cpu",
    "dtype": "float32",
    "num_gpu_blocks_override": 256,
    "max_num_seqs": 256,
    "max_num_batched_tokens": 2048,
    "check_invariants": True,
    "cpu_threads": 2,
}

VOCAB = 320
_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 257,
    "eos_token_id": 258,
    "pad_token_id": 256,
}
_LONG = _COMMON | {"max_position_embeddings": 2048}
_NEOX = {k: v for k, v in _COMMON.items() if k != "num_key_value_heads"}
_GEMMA = _COMMON | {"head_dim": 32, "sliding_window": 16, "query_pre_attn_scalar": 24, "num_hidden_layers": 4}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}

# name -> config class of transformers, its arguments. GPUs have their fastest attention for heads of 64 and 128.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _COMMON),
    "llama-wide": ("LlamaConfig", _COMMON | {"hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 2}),
    "llama4heads": ("LlamaConfig", _COMMON | {"num_key_value_heads": 4}),
    "llama-heads-of-64": ("LlamaConfig", _LONG | {"head_dim": 64}),
    "llama-heads-of-128": ("LlamaConfig", _LONG | {"head_dim": 128, "num_hidden_layers": 2}),
    "llama-tied-biased": (
        "LlamaConfig",
        _COMMON | {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "head_dim": 24},
    ),
    "llama3-rope": ("LlamaConfig", _COMMON | {"rope_parameters": _LLAMA3}),
    "llama-linear-rope": (
        "LlamaConfig",
        _COMMON | {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}},
    ),
    "llama-yarn": ("LlamaConfig", _COMMON | {"rope_parameters": _YARN}),
    "mistral-window": ("MistralConfig", _COMMON | {"sliding_window": 12}),
    "qwen2": ("Qwen2Config", _COMMON),
    "qwen2-window": (
        "Qwen2Config",
        _COMMON | {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3Config", _COMMON | {"head_dim": 32}),
    "gemma": ("GemmaConfig", _COMMON | {"head_dim": 32}),
    "gemma2": ("Gemma2Config", _GEMMA),
    "gemma3": ("Gemma3TextConfig", _GEMMA | {"sliding_window_pattern": 2}),
    "gpt2": (
        "GPT2Config",
        {"vocab_size": VOCAB, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 256}
        | {"bos_token_id": 257, "eos_token_id": 258},
    ),
    "gpt-neox": ("GPTNeoXConfig", _NEOX | {"rotary_pct": 0.5}),
    "gpt-neox-sequential": ("GPTNeoXConfig", _NEOX | {"use_parallel_residual": False}),
    "phi": ("PhiConfig", _NEOX | {"partial_rotary_factor": 0.5}),
}


def save_tiny_model(family: tuple[str, dict[str, Any]], folder: Path, seed: int = 0) -> None:
    """Random weights, large enough that logits differ; biases and norms away from 0 and 1."""
    import torch
    import transformers

    config_class, arguments = family
    config = getattr(transformers, config_class)(**arguments)
    generator = torch.Generator().manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.1 if parameter.dim() == 1 else 0.15
            noise = torch.randn(parameter.shape, generator=generator) * scale
            is_norm_gain = parameter.dim() == 1 and name.endswith("weight")
            parameter.copy_(noise + (1.0 if is_norm_gain and "gemma" not in config.model_type else 0.0))
    model.save_pretrained(folder)
    save_byte_tokenizer(folder)


def save_byte_tokenizer(folder: Path) -> None:
    """256 byte tokens and a few specials; ids above have no text."""
    from fastllm.tokenizer import byte_tokenizer

    tokenizer = byte_tokenizer()
    tokenizer.backend.save(str(folder / "tokenizer.json"))
    config = {**tokenizer.special_tokens, "chat_template": tokenizer.chat_template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
