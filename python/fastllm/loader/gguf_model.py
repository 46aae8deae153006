"""A GGUF file seen as a Hugging Face checkpoint: its config, and its tensors under the names the families know."""

from __future__ import annotations

import re
import struct
from dataclasses import replace
from typing import Any

from fastllm.errors import LoadError
from fastllm.loader.gguf import GgufFile
from fastllm.loader.tensors import FileTensor

_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}

_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_ROPE_FACTORS = "rope_freqs.weight"


def gguf_config(file: GgufFile) -> dict[str, Any]:
    """The config.json the model would have had. Raises LoadError naming what is missing or unsupported."""
    meta = file.metadata
    arch = meta.get("general.architecture")
    if arch not in _ARCHITECTURES:
        raise LoadError(
            f"{file.path}: the GGUF architecture {arch!r} is not supported; supported are {', '.join(_ARCHITECTURES)}."
        )

    def value(key: str, default: Any = None) -> Any:
        found = meta.get(f"{arch}.{key}", default)
        if found is None:
            raise LoadError(f"{file.path} lacks the metadata {arch}.{key}.")
        return found

    if meta.get(f"{arch}.expert_count", 0):
        raise LoadError(f"{file.path}: mixtures of experts are not supported.")
    heads, hidden = value("attention.head_count"), value("embedding_length")
    config: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[arch]],
        "model_type": arch,
        "hidden_size": hidden,
        "intermediate_size": value("feed_forward_length"),
        "num_hidden_layers": value("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": value("attention.head_count_kv", heads),
        "max_position_embeddings": value("context_length"),
        "rms_norm_eps": value("attention.layer_norm_rms_epsilon"),
        "rope_parameters": _rope(file, arch),
        "vocab_size": _vocab_size(file, arch),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": "blk.0.attn_output.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_down.bias" in file.tensors,
    }
    if f"{arch}.attention.key_length" in meta:
        config["head_dim"] = value("attention.key_length")
    for key in ("bos", "eos"):
        if f"tokenizer.ggml.{key}_token_id" in meta:
            config[f"{key}_token_id"] = meta[f"tokenizer.ggml.{key}_token_id"]
    end_of_turn = meta.get("tokenizer.ggml.eot_token_id")
    if "eos_token_id" in config and end_of_turn not in (None, config["eos_token_id"]):
        config["eos_token_id"] = [config["eos_token_id"], end_of_turn]
    return config


def _vocab_size(file: GgufFile, arch: str) -> int:
    """Rows of the embedding: the tokenizer and the metadata may name fewer."""
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise LoadError(f"{file.path} lacks the tensor token_embd.weight.")
    return embedding.shape[0]


def _rope(file: GgufFile, arch: str) -> dict[str, Any]:
    meta = file.metadata
    theta = meta.get(f"{arch}.rope.freq_base", 10000.0)
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    sizes = [meta.get(f"{arch}.{key}", 0) for key in ("embedding_length", "attention.head_count")]
    head_dim = meta.get(f"{arch}.attention.key_length")
    if head_dim is None and all(type(size) is int and size > 0 for size in sizes):
        head_dim = sizes[0] // sizes[1]
    rotated = meta.get(f"{arch}.rope.dimension_count", head_dim)
    if type(rotated) is int and type(head_dim) is int and 0 < rotated < head_dim:
        rope["partial_rotary_factor"] = rotated / head_dim
    kind = meta.get(f"{arch}.rope.scaling.type", "none")
    original = meta.get(f"{arch}.rope.scaling.original_context_length")
    if kind in ("linear", "yarn"):
        rope |= {"rope_type": kind, "factor": meta.get(f"{arch}.rope.scaling.factor", 1.0)}
        if original:
            rope["original_max_position_embeddings"] = original
    elif kind != "none":
        raise LoadError(f"{file.path}: the rope scaling {kind!r} is not supported; supported are linear and yarn.")
    factors = file.tensors.get(_ROPE_FACTORS)
    if factors is not None:
        if factors.type != "F32" or kind != "none":
            raise LoadError(f"{file.path}: {_ROPE_FACTORS} must be F32 and the only rope scaling of the model.")
        # Llama 3's scaling, already applied per frequency.
        values = list(struct.unpack(f"<{len(factors.data) // 4}f", factors.data))
        rope |= {"rope_type": "longrope", "short_factor": values, "long_factor": values, "attention_factor": 1.0}
    return rope


def gguf_tensors(file: GgufFile, config: dict[str, Any]) -> dict[str, FileTensor]:
    """The tensors under their Hugging Face names. llama q and k keep their rotary pairing, marked for the core."""
    is_llama = config["model_type"] == "llama"
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // max(1, heads)
    tensors: dict[str, FileTensor] = {}
    for name, tensor in file.tensors.items():
        if name == _ROPE_FACTORS:
            continue
        module, _, suffix = name.rpartition(".")
        layer = re.fullmatch(r"blk\.(\d+)\.(\w+)", module)
        if layer and layer.group(2) in _LAYER_NAMES:
            renamed = f"model.layers.{layer.group(1)}.{_LAYER_NAMES[layer.group(2)]}.{suffix}"
        else:
            renamed = f"{_NAMES.get(module, module)}.{suffix}"
        paired = is_llama and layer is not None and layer.group(2) in ("attn_q", "attn_k")
        tensors[renamed] = replace(tensor, interleaved_head_dim=head_dim if paired else 0)
    return tensors
