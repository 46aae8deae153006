"""GPT-2: learned positions, LayerNorm with bias, matrices stored [in, out]."""

from __future__ import annotations

from fastllm.families.base import Family, HfConfig, layer_norm, rule
from fastllm.spec import AttnSpec, EmbedSpec, HeadSpec, LayerSpec, MlpSpec, ModelSpec


def _gpt2(config: HfConfig) -> ModelSpec:
    config.refuse("scale_attn_weights", [True], "unscaled attention")
    config.refuse("scale_attn_by_inverse_layer_idx", [False], "attention scaled by the layer")
    config.refuse("add_cross_attention", [False], "cross attention")
    hidden, heads = config.size("n_embd", 768), config.size("n_head", 12)
    norm = layer_norm(config, "layer_norm_epsilon")
    layer = LayerSpec(
        pre_attn=norm,
        pre_ffn=norm,
        attn=AttnSpec(heads, heads, max(1, hidden // heads), qkv_bias=True, out_bias=True),
        ffn=MlpSpec(
            config.size("n_inner", 4 * hidden),
            gated=False,
            act=config.activation("activation_function", "gelu_new"),
            bias=True,
        ),
    )
    positions = config.size("n_positions", 1024)
    return ModelSpec(
        family="gpt2",
        embed=EmbedSpec(config.size("vocab_size", 50257), hidden, learned_positions=positions),
        kinds=[layer],
        layer_kind=[0] * config.size("n_layer", 12),
        head=HeadSpec(tied=config.flag("tie_word_embeddings", True), final_norm=norm),
        max_len=positions,
        eos=config.eos(),
    )


GPT2 = Family(
    "gpt2",
    "GPT2LMHeadModel",
    _gpt2,
    {
        "embed.tokens": rule("transformer.wte"),
        "embed.positions": rule("transformer.wpe"),
        "layers.{i}.pre_attn_norm": rule("transformer.h.{i}.ln_1"),
        "layers.{i}.attn.qkv": rule("transformer.h.{i}.attn.c_attn", transform="transpose"),
        "layers.{i}.attn.out": rule("transformer.h.{i}.attn.c_proj", transform="transpose"),
        "layers.{i}.pre_ffn_norm": rule("transformer.h.{i}.ln_2"),
        "layers.{i}.ffn.up": rule("transformer.h.{i}.mlp.c_fc", transform="transpose"),
        "layers.{i}.ffn.down": rule("transformer.h.{i}.mlp.c_proj", transform="transpose"),
        "final_norm": rule("transformer.ln_f"),
        "head": rule("lm_head"),
    },
    ignored=(r".*\.attn\.(bias|masked_bias)",),
    prefix="transformer.",
)
