"""What every family is made of: the config it reads, the rules for its weights, and the parts they share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fastllm.errors import LoadError
from fastllm.spec import LayerSpec, ModelSpec, NormSpec, RopeScaling, RopeSpec

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}

# What would take memory before a weight is looked for, far beyond any model.
_LARGEST = {
    **dict.fromkeys(("num_hidden_layers", "n_layer"), 4096),
    **dict.fromkeys(("hidden_size", "n_embd"), 1 << 20),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "n_head", "head_dim"), 1 << 16),
    "vocab_size": 1 << 24,
}


class HfConfig:
    """A Hugging Face config.json, read with types and bounds: a wrong value is a LoadError that names it."""

    def __init__(self, values: Mapping[str, Any], where: str = "config.json") -> None:
        if not isinstance(values, Mapping):
            raise LoadError(f"{where} must be a JSON object, not {type(values).__name__}.")
        self.values = values
        self.where = where

    def get(self, key: str, default: Any = None) -> Any:
        value = self.values.get(key)
        return default if value is None else value

    def size(self, key: str, default: int | None = None, *, minimum: int = 1) -> int:
        value = self.get(key, default)
        maximum = _LARGEST.get(key, 2**31 - 1)
        if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= maximum:
            raise LoadError(
                f"{self.where}: {key} must be a whole number from {minimum} to {maximum}, got {value!r:.40}."
            )
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e30:
            raise LoadError(f"{self.where}: {key} must be a number, got {value!r}.")
        return float(value)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise LoadError(f"{self.where}: {key} must be true or false, got {value!r}.")
        return value

    def strings(self, key: str) -> list[str]:
        value = self.get(key, [])
        if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
            raise LoadError(f"{self.where}: {key} must be a list of strings, got {value!r}.")
        return value

    def refuse(self, key: str, allowed: Iterable[Any], why: str) -> None:
        """Raises when a field that changes the computation has a value outside `allowed`; absent is allowed."""
        value = self.values.get(key)
        choices = list(allowed)
        if value is not None and value not in choices:
            listed = " or ".join(repr(c) for c in choices) or "absent"
            raise LoadError(f"{self.where}: {key}={value!r} is not supported ({why}); it must be {listed}.")

    def activation(self, key: str, default: str) -> str:
        name = self.get(key, default)
        if not isinstance(name, str) or name not in _ACTIVATIONS:
            raise LoadError(
                f"{self.where}: the activation {key}={name!r} is not supported; use one of {sorted(_ACTIVATIONS)}."
            )
        return _ACTIVATIONS[name]

    def eos(self) -> list[int]:
        value = self.get("eos_token_id", [])
        ids = value if isinstance(value, list) else [value]
        if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
            raise LoadError(f"{self.where}: eos_token_id must be a token id or a list of them, got {value!r}.")
        return list(ids)


@dataclass(frozen=True)
class Rule:
    """Where a canonical weight comes from. Names lack ".weight" / ".bias" and may contain {i}, the layer."""

    sources: tuple[str, ...]
    transform: str = "copy"
    add_one: bool = False


def rule(*sources: str, transform: str = "copy", add_one: bool = False) -> Rule:
    return Rule(sources, transform, add_one)


@dataclass(frozen=True)
class Family:
    name: str  # Hugging Face's model_type
    architecture: str
    spec: Callable[[HfConfig], ModelSpec]
    weights: Mapping[str, Rule]  # canonical name without its suffix -> rule
    ignored: tuple[str, ...] = ()  # regular expressions of checkpoint names that carry no weights
    prefix: str = "model."  # of checkpoint names, which some checkpoints lack

    def build(self, config: HfConfig) -> ModelSpec:
        """The spec of a model of this family. Raises LoadError for whatever would change the computation unseen."""
        return self.spec(config)


def rms(config: HfConfig, key: str = "rms_norm_eps", default: float = 1e-6) -> NormSpec:
    return NormSpec("rms", config.number(key, default))


def layer_norm(config: HfConfig, key: str, default: float = 1e-5) -> NormSpec:
    return NormSpec("layer", config.number(key, default), bias=True)


def kinds_of(layers: Iterable[LayerSpec]) -> tuple[list[LayerSpec], list[int]]:
    """Distinct layers in order of first use, and for each layer its index among them."""
    kinds: list[LayerSpec] = []
    index: list[int] = []
    for layer in layers:
        if layer not in kinds:
            kinds.append(layer)
        index.append(kinds.index(layer))
    return kinds, index


def layer_types(config: HfConfig, default: Callable[[int], bool]) -> list[bool]:
    """Per layer: does it attend through the sliding window? From layer_types, else from `default`(layer)."""
    count = config.size("num_hidden_layers")
    given = config.strings("layer_types")
    if not given:
        return [default(i) for i in range(count)]
    unknown = sorted(set(given) - {"full_attention", "sliding_attention"})
    if unknown:
        raise LoadError(
            f"{config.where}: layer_types contains {unknown[0]!r}; supported are 'full_attention' and "
            "'sliding_attention'."
        )
    if len(given) != count:
        raise LoadError(f"{config.where}: layer_types has {len(given)} entries for {count} layers.")
    return [t == "sliding_attention" for t in given]


_ROPE_KEYS = {
    "default": set[str](),
    "linear": {"factor"},
    "dynamic": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": {"factor", "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate"}
    | {"original_max_position_embeddings"},
    "longrope": {"factor", "short_factor", "long_factor", "attention_factor", "original_max_position_embeddings"},
}


def rope(config: HfConfig, head_dim: int, *, theta: float = 10000.0, partial: float = 1.0) -> RopeSpec:
    """The rotary embedding, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling`."""
    given = config.get("rope_parameters", config.get("rope_scaling", {}))
    if not isinstance(given, dict):
        raise LoadError(f"{config.where}: rope_parameters must be an object, got {given!r}.")
    params = HfConfig(given, f"{config.where}: rope_parameters")
    theta = params.number("rope_theta", config.number("rope_theta", theta))
    partial = params.number("partial_rotary_factor", config.number("partial_rotary_factor", partial))
    if not 0.0 < partial <= 1.0:
        raise LoadError(f"{config.where}: partial_rotary_factor must be in (0, 1], got {partial}.")
    return RopeSpec(dim=int(head_dim * partial), theta=theta, scaling=_rope_scaling(params, config))


def _rope_scaling(params: HfConfig, config: HfConfig) -> RopeScaling:
    kind = params.get("rope_type", params.get("type", "default"))
    if kind == "su":  # longrope's first name
        kind = "longrope"
    if not isinstance(kind, str) or kind not in _ROPE_KEYS:
        raise LoadError(f"{config.where}: the rope type {kind!r} is not supported; use one of {sorted(_ROPE_KEYS)}.")
    common = {"rope_theta", "rope_type", "type", "partial_rotary_factor"}
    unknown = sorted(k for k, v in params.values.items() if v is not None and k not in common | _ROPE_KEYS[kind])
    # Keys that a kind does not read are left over by some exporters; anything else would change the maths unseen.
    unknown = [k for k in unknown if all(k not in keys for keys in _ROPE_KEYS.values())]
    if unknown:
        raise LoadError(f"{config.where}: rope_parameters of type {kind!r} has the unknown key {unknown[0]!r}.")
    if kind == "default":
        return RopeScaling()
    max_len = config.size("max_position_embeddings")
    original = params.size("original_max_position_embeddings", config.size("original_max_position_embeddings", max_len))
    scaling = RopeScaling(kind=kind, original_max_len=original)
    if kind == "longrope":
        scaling.factor = params.number("factor", max_len / original)
        scaling.short_factor = _numbers(params, "short_factor")
        scaling.long_factor = _numbers(params, "long_factor")
    else:
        scaling.factor = params.number("factor")
    for key in _ROPE_KEYS[kind] & {"low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow"}:
        setattr(scaling, key, params.number(key, getattr(scaling, key)))
    for key in _ROPE_KEYS[kind] & {"attention_factor", "mscale", "mscale_all_dim"}:
        setattr(scaling, key, params.number(key, 0.0))
    scaling.truncate = params.flag("truncate", True)
    return scaling


def _numbers(config: HfConfig, key: str) -> list[float]:
    value = config.get(key)
    if not isinstance(value, list) or not all(isinstance(v, int | float) for v in value):
        raise LoadError(f"{config.where}: {key} must be a list of numbers.")
    return [float(v) for v in value]
