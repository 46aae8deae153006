"""Gemma 1, 2 and 3 (text): scaled embeddings, norms stored as w - 1, gated tanh-GELU."""

from __future__ import annotations

import math
from dataclasses import replace

from fastllm.families.base import Family, HfConfig, Rule, kinds_of, layer_types, rms, rope, rule
from fastllm.families.llama import LLAMA_IGNORED, LLAMA_WEIGHTS
from fastllm.spec import AttnSpec, EmbedSpec, HeadSpec, LayerSpec, MlpSpec, ModelSpec, NormSpec, RopeSpec


def _gemma_like(
    config: HfConfig,
    family: str,
    *,
    windowed: list[bool],
    ropes: tuple[RopeSpec, RopeSpec],  # of full and of windowed layers
    sandwich: bool,  # norms after attention and feed-forward too
    qk_norm: NormSpec | None = None,
    scale: float = 0.0,
) -> ModelSpec:
    hidden = config.size("hidden_size")
    bias = config.flag("attention_bias")
    config.refuse("use_bidirectional_attention", [False], "only causal attention is implemented")
    norm = rms(config)
    after = norm if sandwich else NormSpec()

    def layer(sliding: bool) -> LayerSpec:
        return LayerSpec(
            pre_attn=norm,
            post_attn=after,
            pre_ffn=norm,
            post_ffn=after,
            attn=AttnSpec(
                heads=config.size("num_attention_heads"),
                kv_heads=config.size("num_key_value_heads", config.size("num_attention_heads")),
                head_dim=config.size("head_dim", 256),
                qkv_bias=bias,
                out_bias=bias,
                q_norm=qk_norm or NormSpec(),
                k_norm=qk_norm or NormSpec(),
                rope=ropes[sliding],
                scale=scale,
                softcap=config.number("attn_logit_softcapping", 0.0),
                window=config.size("sliding_window", 4096) if sliding else 0,
            ),
            ffn=MlpSpec(config.size("intermediate_size"), act=_activation(config)),
        )

    kinds, layer_kind = kinds_of(layer(s) for s in windowed)
    return ModelSpec(
        family=family,
        embed=EmbedSpec(config.size("vocab_size"), hidden, scale=hidden**0.5),
        kinds=kinds,
        layer_kind=layer_kind,
        head=HeadSpec(
            tied=config.flag("tie_word_embeddings", True),
            softcap=config.number("final_logit_softcapping", 0.0),
            final_norm=norm,
        ),
        max_len=config.size("max_position_embeddings", 8192),
        eos=config.eos(),
    )


def _activation(config: HfConfig) -> str:
    # Early Gemma configs say "gelu" although the models were trained with the tanh form.
    key = "hidden_activation" if config.get("hidden_activation") is not None else "hidden_act"
    return "gelu_tanh" if config.get(key) == "gelu" else config.activation(key, "gelu_pytorch_tanh")


def _gemma(config: HfConfig) -> ModelSpec:
    plain = rope(config, config.size("head_dim", 256))
    count = config.size("num_hidden_layers")
    return _gemma_like(config, "gemma", windowed=[False] * count, ropes=(plain, plain), sandwich=False)


def _query_scale(config: HfConfig) -> float:
    return 1.0 / math.sqrt(config.size("query_pre_attn_scalar", 256))


def _gemma2(config: HfConfig) -> ModelSpec:
    plain = rope(config, config.size("head_dim", 256))
    windowed = layer_types(config, lambda i: i % 2 == 0)
    return _gemma_like(
        config, "gemma2", windowed=windowed, ropes=(plain, plain), sandwich=True, scale=_query_scale(config)
    )


def _gemma3(config: HfConfig) -> ModelSpec:
    head_dim = config.size("head_dim", 256)
    period = config.size("sliding_window_pattern", config.size("_sliding_window_pattern", 6))
    windowed = layer_types(config, lambda i: (i + 1) % period != 0)
    return _gemma_like(
        config,
        "gemma3_text",
        windowed=windowed,
        ropes=(_rope_of(config, "full_attention", head_dim), _rope_of(config, "sliding_attention", head_dim)),
        sandwich=True,
        qk_norm=rms(config),
        scale=_query_scale(config),
    )


def _rope_of(config: HfConfig, kind: str, head_dim: int) -> RopeSpec:
    per_kind = config.get("rope_parameters", {})
    if isinstance(per_kind, dict) and isinstance(per_kind.get(kind), dict):
        return rope(HfConfig({**config.values, "rope_parameters": per_kind[kind]}, config.where), head_dim)
    if kind == "full_attention":
        return rope(config, head_dim, theta=1e6)
    return RopeSpec(dim=head_dim, theta=config.number("rope_local_base_freq", 10000.0))


def _norms_plus_one(rules: dict[str, Rule]) -> dict[str, Rule]:
    return {name: replace(r, add_one=name.endswith("norm")) for name, r in rules.items()}


_SANDWICH = LLAMA_WEIGHTS | {
    "layers.{i}.post_attn_norm": rule("model.layers.{i}.post_attention_layernorm"),
    "layers.{i}.pre_ffn_norm": rule("model.layers.{i}.pre_feedforward_layernorm"),
    "layers.{i}.post_ffn_norm": rule("model.layers.{i}.post_feedforward_layernorm"),
}
_QK_NORM = {
    "layers.{i}.attn.q_norm": rule("model.layers.{i}.self_attn.q_norm"),
    "layers.{i}.attn.k_norm": rule("model.layers.{i}.self_attn.k_norm"),
}

GEMMA = Family("gemma", "GemmaForCausalLM", _gemma, _norms_plus_one(LLAMA_WEIGHTS), LLAMA_IGNORED)
GEMMA2 = Family("gemma2", "Gemma2ForCausalLM", _gemma2, _norms_plus_one(_SANDWICH), LLAMA_IGNORED)
GEMMA3 = Family("gemma3_text", "Gemma3ForCausalLM", _gemma3, _norms_plus_one(_SANDWICH | _QK_NORM), LLAMA_IGNORED)
