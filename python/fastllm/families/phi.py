"""Phi 1, 1.5 and 2: one norm feeds attention and feed-forward in parallel, partial rotary embedding, biased head."""

from __future__ import annotations

from fastllm.families.base import Family, HfConfig, layer_norm, rope, rule
from fastllm.families.llama import LLAMA_IGNORED, LLAMA_WEIGHTS
from fastllm.spec import AttnSpec, EmbedSpec, HeadSpec, LayerSpec, MlpSpec, ModelSpec


def _phi(config: HfConfig) -> ModelSpec:
    config.refuse("qk_layernorm", [False], "LayerNorm on q and k")
    hidden, heads = config.size("hidden_size"), config.size("num_attention_heads")
    head_dim = max(1, hidden // heads)
    norm = layer_norm(config, "layer_norm_eps")
    layer = LayerSpec(
        parallel=True,
        pre_attn=norm,
        attn=AttnSpec(
            heads,
            config.size("num_key_value_heads", heads),
            head_dim,
            qkv_bias=True,
            out_bias=True,
            rope=rope(config, head_dim, partial=0.5),
        ),
        ffn=MlpSpec(
            config.size("intermediate_size"), gated=False, act=config.activation("hidden_act", "gelu_new"), bias=True
        ),
    )
    return ModelSpec(
        family="phi",
        embed=EmbedSpec(config.size("vocab_size"), hidden),
        kinds=[layer],
        layer_kind=[0] * config.size("num_hidden_layers"),
        head=HeadSpec(tied=config.flag("tie_word_embeddings"), bias=True, final_norm=norm),
        max_len=config.size("max_position_embeddings", 2048),
        eos=config.eos(),
    )


PHI = Family(
    "phi",
    "PhiForCausalLM",
    _phi,
    LLAMA_WEIGHTS
    | {
        "layers.{i}.attn.out": rule("model.layers.{i}.self_attn.dense"),
        "layers.{i}.ffn.up": rule("model.layers.{i}.mlp.fc1"),
        "layers.{i}.ffn.down": rule("model.layers.{i}.mlp.fc2"),
        "final_norm": rule("model.final_layernorm"),
    },
    LLAMA_IGNORED,
)
