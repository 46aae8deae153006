"""Folders with nothing but a config.json, for --load-format dummy: models of known shapes with random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_COMMON: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "torch_dtype": "bfloat16",
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 8192,
}
# hidden, inner, layers, heads, kv heads, head_dim, vocabulary, rope theta, tied
_SHAPES: dict[str, tuple[int, int, int, int, int, int, int, float, bool]] = {
    "llama3-8b": (4096, 14336, 32, 32, 8, 128, 128256, 500000.0, False),
    "llama3.2-1b": (2048, 8192, 16, 32, 8, 64, 128256, 500000.0, True),
    "smollm2-135m": (576, 1536, 30, 9, 3, 64, 49152, 100000.0, True),
    "tiny": (64, 192, 2, 4, 2, 16, 512, 10000.0, True),
}
NAMES = tuple(_SHAPES)


def config_of(name: str) -> dict[str, Any]:
    hidden, inner, layers, heads, kv_heads, head_dim, vocab, theta, tied = _SHAPES[name]
    return {
        **_COMMON,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": vocab,
        "rope_theta": theta,
        "tie_word_embeddings": tied,
    }


def write_folder(name: str, parent: Path) -> Path:
    """parent/name with the shape's config.json."""
    folder = parent / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_of(name), indent=1), encoding="utf-8")
    return folder
