"""A model as data: the Python twin of fastllm/model_spec.h. Field names are the JSON keys the core reads."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field


@dataclass
class NormSpec:
    kind: str = "none"  # "none" | "rms" | "layer"
    eps: float = 1e-6
    bias: bool = False  # LayerNorm only


@dataclass
class RopeScaling:
    """Parameters as in Hugging Face's rope_scaling; unused ones keep their default."""

    kind: str = "none"  # "none" | "linear" | "dynamic" | "llama3" | "yarn" | "longrope"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 0.0  # 0: derived from factor
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    truncate: bool = True
    original_max_len: int = 0  # tokens
    short_factor: list[float] = field(default_factory=list)
    long_factor: list[float] = field(default_factory=list)


@dataclass
class RopeSpec:
    dim: int = 0  # rotated dimensions of a head; 0: no rotary embedding
    theta: float = 10000.0
    style: str = "half"  # "half" | "interleaved"
    scaling: RopeScaling = field(default_factory=RopeScaling)


@dataclass
class AttnSpec:
    heads: int
    kv_heads: int
    head_dim: int
    qkv_bias: bool = False
    out_bias: bool = False
    q_norm: NormSpec = field(default_factory=NormSpec)  # per head, over head_dim
    k_norm: NormSpec = field(default_factory=NormSpec)
    rope: RopeSpec = field(default_factory=RopeSpec)
    scale: float = 0.0  # 0: 1 / sqrt(head_dim)
    softcap: float = 0.0  # 0: off
    window: int = 0  # tokens attended to, the current one included; 0: all
    alibi: bool = False


@dataclass
class MlpSpec:
    inner: int
    gated: bool = True
    act: str = "silu"  # "silu" | "gelu" | "gelu_tanh" | "relu"
    bias: bool = False


@dataclass
class LayerSpec:
    attn: AttnSpec
    ffn: MlpSpec
    parallel: bool = False  # attention and feed-forward read the same residual
    pre_attn: NormSpec = field(default_factory=NormSpec)
    post_attn: NormSpec = field(default_factory=NormSpec)
    pre_ffn: NormSpec = field(default_factory=NormSpec)
    post_ffn: NormSpec = field(default_factory=NormSpec)


@dataclass
class EmbedSpec:
    vocab: int
    hidden: int
    scale: float = 1.0
    learned_positions: int = 0  # rows of the table; 0: none
    position_offset: int = 0


@dataclass
class HeadSpec:
    tied: bool = False
    bias: bool = False
    softcap: float = 0.0
    scale: float = 1.0
    final_norm: NormSpec = field(default_factory=NormSpec)


@dataclass
class ModelSpec:
    family: str  # for messages only
    embed: EmbedSpec
    kinds: list[LayerSpec]
    layer_kind: list[int]  # per layer: index into kinds
    head: HeadSpec
    max_len: int  # tokens the positions were made for
    eos: list[int] = field(default_factory=list)

    def layer(self, i: int) -> LayerSpec:
        return self.kinds[self.layer_kind[i]]

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    def weight_shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Every canonical weight the model has, with its shape, in the order of the forward pass."""
        hidden, vocab = self.embed.hidden, self.embed.vocab
        yield "embed.tokens.weight", (vocab, hidden)
        if self.embed.learned_positions:
            yield "embed.positions.weight", (self.embed.learned_positions, hidden)
        for i in range(len(self.layer_kind)):
            yield from _layer_shapes(f"layers.{i}.", self.layer(i), hidden)
        yield from _norm_shapes("final_norm", self.head.final_norm, hidden)
        if not self.head.tied:
            yield "head.weight", (vocab, hidden)
        if self.head.bias:
            yield "head.bias", (vocab,)


def _norm_shapes(name: str, norm: NormSpec, size: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    if norm.kind != "none":
        yield f"{name}.weight", (size,)
        if norm.bias:
            yield f"{name}.bias", (size,)


def _layer_shapes(prefix: str, layer: LayerSpec, hidden: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    attn, ffn = layer.attn, layer.ffn
    qkv_rows = (attn.heads + 2 * attn.kv_heads) * attn.head_dim
    up_rows = 2 * ffn.inner if ffn.gated else ffn.inner
    up_name = "ffn.gate_up" if ffn.gated else "ffn.up"
    yield from _norm_shapes(prefix + "pre_attn_norm", layer.pre_attn, hidden)
    for name, rows, cols, bias in (
        ("attn.qkv", qkv_rows, hidden, attn.qkv_bias),
        ("attn.out", hidden, attn.heads * attn.head_dim, attn.out_bias),
        (up_name, up_rows, hidden, ffn.bias),
        ("ffn.down", hidden, ffn.inner, ffn.bias),
    ):
        yield f"{prefix}{name}.weight", (rows, cols)
        if bias:
            yield f"{prefix}{name}.bias", (rows,)
    yield from _norm_shapes(prefix + "attn.q_norm", attn.q_norm, attn.head_dim)
    yield from _norm_shapes(prefix + "attn.k_norm", attn.k_norm, attn.head_dim)
    yield from _norm_shapes(prefix + "post_attn_norm", layer.post_attn, hidden)
    yield from _norm_shapes(prefix + "pre_ffn_norm", layer.pre_ffn, hidden)
    yield from _norm_shapes(prefix + "post_ffn_norm", layer.post_ffn, hidden)
