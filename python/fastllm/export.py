"""Writes a model as a bundle: a folder that a C++ host opens without Python, and that this package opens too."""

from __future__ import annotations

import json
from pathlib import Path

from fastllm import _core
from fastllm.client import core_bindings
from fastllm.engine_args import EngineArgs
from fastllm.errors import InvalidArgument
from fastllm.loader.model import open_model
from fastllm.tokenizer import Tokenizer

_DTYPES = ("float32", "bfloat16", "float16")


def export(model: str, out_dir: str | Path, dtype: str = "bfloat16") -> Path:
    """Writes spec.json, model.safetensors with canonical names, tokenizer and generation config to `out_dir`.

    model: as in EngineArgs. dtype: "float32", "bfloat16" or "float16". Raises LoadError if the model cannot be read,
    InvalidArgument if it is a bundle already, the type is unknown, or the folder is not empty.
    """
    if dtype not in _DTYPES:
        raise InvalidArgument(f"dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}.")
    out = Path(out_dir)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InvalidArgument(f"{out} exists and is not an empty folder.")
    files = open_model(EngineArgs(model=model))
    if files.is_bundle:
        raise InvalidArgument(f"{model} is a bundle already.")
    out.mkdir(parents=True, exist_ok=True)
    _core.export_weights(files.spec_json, core_bindings(files), str(out / "model.safetensors"), dtype)
    (out / "spec.json").write_text(json.dumps(files.spec, indent=1) + "\n")
    _write_tokenizer(files.tokenizer, out)
    if files.generation:
        (out / "generation_config.json").write_text(json.dumps(files.generation, indent=2) + "\n")
    (out / "README.md").write_text(
        f"A fastllm bundle of {model} ({dtype}): `fastllm serve {out.name}`, or fastllm::Engine::open in C++.\n"
    )
    return out


def _write_tokenizer(tokenizer: Tokenizer, out: Path) -> None:
    tokenizer.backend.save(str(out / "tokenizer.json"))
    config: dict[str, object] = dict(tokenizer.special_tokens)
    template = tokenizer.chat_template
    if isinstance(template, dict):
        config["chat_template"] = [{"name": name, "template": text} for name, text in template.items()]
    elif template is not None:
        (out / "chat_template.jinja").write_text(template)
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")
