"""Model families: each is a function from a Hugging Face config to a ModelSpec, plus the names of its weights."""

from __future__ import annotations

from fastllm.errors import LoadError
from fastllm.families.base import Family, HfConfig
from fastllm.families.gemma import GEMMA, GEMMA2, GEMMA3
from fastllm.families.gpt2 import GPT2
from fastllm.families.gpt_neox import GPT_NEOX
from fastllm.families.llama import LLAMA, MISTRAL
from fastllm.families.phi import PHI
from fastllm.families.qwen import QWEN2, QWEN3

FAMILIES: tuple[Family, ...] = (LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA, GEMMA2, GEMMA3, GPT2, GPT_NEOX, PHI)

__all__ = ["FAMILIES", "Family", "HfConfig", "family_of"]


def family_of(config: HfConfig) -> Family:
    """The family of a config: by its architecture, or by its model_type when it names none."""
    by_architecture = {f.architecture: f for f in FAMILIES}
    names = config.strings("architectures")
    for name in names:
        if name in by_architecture:
            return by_architecture[name]
    if not names:
        for family in FAMILIES:
            if family.name == config.get("model_type"):
                return family
    found = ", ".join(names) or f"model_type {config.get('model_type')!r}"
    raise LoadError(
        f"{config.where}: the architecture {found} is not supported. Supported are: {', '.join(by_architecture)}."
    )
