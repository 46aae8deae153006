"""What is known about a loaded model on the Python side."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastllm.errors import LoadError
from fastllm.loader.files import read_json

log = logging.getLogger("fastllm")

# generation_config.json's name of a default -> ours
_DEFAULTS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}


@dataclass
class ModelConfig:
    """model: as the user named it. generation_config: default sampling parameters by our names."""

    model: str
    served_model_names: list[str]
    max_model_len: int  # tokens of prompt and output
    vocab_size: int  # rows of the embedding
    eos_token_ids: list[int]
    dtype: str  # of weights and activations
    generation_config: dict[str, Any] = field(default_factory=dict)
    chat_template: str | None = None  # overrides the tokenizer's
    family: str = ""


def read_generation_config(source: str, model_path: Path) -> dict[str, Any]:
    """The generation config that `source` asks for: "auto" (the model's own), "vllm" (none), or a folder."""
    if source == "vllm":
        return {}
    folder = model_path if source == "auto" else Path(source)
    file = folder / "generation_config.json"
    if not file.is_file():
        if source != "auto":
            raise LoadError(f"generation_config={source!r}: there is no {file}.")
        return {}
    return read_json(file)


def sampling_defaults(generation: dict[str, Any]) -> dict[str, Any]:
    """The defaults for SamplingParams in a generation config; what it leaves null is left out.

    What no request could ask for is left out, too, with a warning: a model's author cannot make every request fail.
    """
    from fastllm.sampling import SamplingParams

    defaults: dict[str, Any] = {}
    for theirs, ours in _DEFAULTS.items():
        value = generation.get(theirs)
        if value is None:
            continue
        try:
            SamplingParams(**{ours: value})
        except (ValueError, TypeError) as error:
            log.warning("Ignored %s=%.40r of the generation config: %s", theirs, value, error)
        else:
            defaults[ours] = value
    return defaults


def eos_of(generation: dict[str, Any]) -> list[int]:
    value = generation.get("eos_token_id")
    ids = value if isinstance(value, list) else [value]
    return [i for i in ids if type(i) is int and i >= 0]
