"""GPT-NeoX and Pythia: parallel residual, partial rotary embedding, q, k and v of each head stored together."""

from __future__ import annotations

from fastllm.families.base import Family, HfConfig, layer_norm, rope, rule
from fastllm.spec import AttnSpec, EmbedSpec, HeadSpec, LayerSpec, MlpSpec, ModelSpec


def _gpt_neox(config: HfConfig) -> ModelSpec:
    hidden, heads = config.size("hidden_size"), config.size("num_attention_heads")
    head_dim = max(1, hidden // heads)
    norm = layer_norm(config, "layer_norm_eps")
    bias = config.flag("attention_bias", True)
    rotary = rope(
        config,
        head_dim,
        theta=config.number("rotary_emb_base", 10000.0),
        partial=config.number("rotary_pct", 0.25),
    )
    layer = LayerSpec(
        parallel=config.flag("use_parallel_residual", True),
        pre_attn=norm,
        pre_ffn=norm,
        attn=AttnSpec(heads, heads, head_dim, qkv_bias=bias, out_bias=bias, rope=rotary),
        ffn=MlpSpec(
            config.size("intermediate_size"), gated=False, act=config.activation("hidden_act", "gelu"), bias=True
        ),
    )
    return ModelSpec(
        family="gpt_neox",
        embed=EmbedSpec(config.size("vocab_size"), hidden),
        kinds=[layer],
        layer_kind=[0] * config.size("num_hidden_layers"),
        head=HeadSpec(tied=config.flag("tie_word_embeddings"), final_norm=norm),
        max_len=config.size("max_position_embeddings", 2048),
        eos=config.eos(),
    )


GPT_NEOX = Family(
    "gpt_neox",
    "GPTNeoXForCausalLM",
    _gpt_neox,
    {
        "embed.tokens": rule("gpt_neox.embed_in"),
        "layers.{i}.pre_attn_norm": rule("gpt_neox.layers.{i}.input_layernorm"),
        "layers.{i}.attn.qkv": rule("gpt_neox.layers.{i}.attention.query_key_value", transform="qkv_grouped"),
        "layers.{i}.attn.out": rule("gpt_neox.layers.{i}.attention.dense"),
        "layers.{i}.pre_ffn_norm": rule("gpt_neox.layers.{i}.post_attention_layernorm"),
        "layers.{i}.ffn.up": rule("gpt_neox.layers.{i}.mlp.dense_h_to_4h"),
        "layers.{i}.ffn.down": rule("gpt_neox.layers.{i}.mlp.dense_4h_to_h"),
        "final_norm": rule("gpt_neox.final_layer_norm"),
        "head": rule("embed_out"),
    },
    ignored=(r".*\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",),
    prefix="gpt_neox.",
)
