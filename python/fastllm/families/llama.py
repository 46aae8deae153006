"""Llama 1 to 3.x and everything with its shape (SmolLM2, Yi, TinyLlama, ...), and Mistral."""

from __future__ import annotations

from fastllm.families.base import Family, HfConfig, Rule, kinds_of, layer_types, rms, rope, rule
from fastllm.spec import AttnSpec, EmbedSpec, HeadSpec, LayerSpec, MlpSpec, ModelSpec, NormSpec

LLAMA_WEIGHTS: dict[str, Rule] = {
    "embed.tokens": rule("model.embed_tokens"),
    "layers.{i}.pre_attn_norm": rule("model.layers.{i}.input_layernorm"),
    "layers.{i}.attn.qkv": rule(
        "model.layers.{i}.self_attn.q_proj",
        "model.layers.{i}.self_attn.k_proj",
        "model.layers.{i}.self_attn.v_proj",
        transform="qkv_concat",
    ),
    "layers.{i}.attn.out": rule("model.layers.{i}.self_attn.o_proj"),
    "layers.{i}.pre_ffn_norm": rule("model.layers.{i}.post_attention_layernorm"),
    "layers.{i}.ffn.gate_up": rule(
        "model.layers.{i}.mlp.gate_proj", "model.layers.{i}.mlp.up_proj", transform="gate_up_concat"
    ),
    "layers.{i}.ffn.down": rule("model.layers.{i}.mlp.down_proj"),
    "final_norm": rule("model.norm"),
    "head": rule("lm_head"),
}
LLAMA_IGNORED = (r".*rotary_emb\.(inv_freq|cos_cached|sin_cached)",)


def llama_like(
    config: HfConfig,
    family: str,
    *,
    windowed: list[bool] | None = None,
    qkv_bias: bool = False,
    out_bias: bool = False,
    qk_norm: NormSpec | None = None,
    tied: bool = False,
    max_len: int = 2048,
) -> ModelSpec:
    """Pre-norm RMS, rotary attention, gated feed-forward. windowed: per layer, does it use sliding_window?"""
    hidden, heads = config.size("hidden_size"), config.size("num_attention_heads")
    head_dim = config.size("head_dim", max(1, hidden // heads))
    norm = rms(config)

    def layer(sliding: bool) -> LayerSpec:
        return LayerSpec(
            pre_attn=norm,
            pre_ffn=norm,
            attn=AttnSpec(
                heads=heads,
                kv_heads=config.size("num_key_value_heads", heads),
                head_dim=head_dim,
                qkv_bias=qkv_bias,
                out_bias=out_bias,
                q_norm=qk_norm or NormSpec(),
                k_norm=qk_norm or NormSpec(),
                rope=rope(config, head_dim),
                window=config.size("sliding_window", 4096) if sliding else 0,
            ),
            ffn=MlpSpec(
                inner=config.size("intermediate_size"),
                act=config.activation("hidden_act", "silu"),
                bias=config.flag("mlp_bias"),
            ),
        )

    stretched = rope(config, head_dim).scaling
    max_len = config.size("max_position_embeddings", max_len)
    if stretched.kind == "yarn":
        max_len = max(max_len, int(stretched.original_max_len * stretched.factor))
    elif stretched.kind in ("linear", "dynamic"):
        max_len = int(max_len * stretched.factor)
    kinds, layer_kind = kinds_of(layer(s) for s in windowed or [False] * config.size("num_hidden_layers"))
    return ModelSpec(
        family=family,
        embed=EmbedSpec(config.size("vocab_size"), hidden),
        kinds=kinds,
        layer_kind=layer_kind,
        head=HeadSpec(tied=config.flag("tie_word_embeddings", tied), final_norm=norm),
        max_len=max_len,
        eos=config.eos(),
    )


def _llama(config: HfConfig) -> ModelSpec:
    config.refuse("pretraining_tp", [0, 1], "sliced matrix products")
    bias = config.flag("attention_bias")
    return llama_like(config, "llama", qkv_bias=bias, out_bias=bias)


def _mistral(config: HfConfig) -> ModelSpec:
    # An absent sliding_window means 4096 tokens, as it did for the first Mistral; null means none.
    windowed = layer_types(config, lambda _: config.values.get("sliding_window", 4096) is not None)
    return llama_like(config, "mistral", windowed=windowed, max_len=131072)


LLAMA = Family("llama", "LlamaForCausalLM", _llama, LLAMA_WEIGHTS, LLAMA_IGNORED)
MISTRAL = Family("mistral", "MistralForCausalLM", _mistral, LLAMA_WEIGHTS, LLAMA_IGNORED)
