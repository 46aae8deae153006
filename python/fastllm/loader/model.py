"""Everything a model consists of, read from wherever it is: spec, weight bindings, tokenizer, generation config."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastllm.config import eos_of, read_generation_config
from fastllm.engine_args import EngineArgs
from fastllm.errors import LoadError
from fastllm.families import HfConfig, family_of
from fastllm.loader.bind import Binding, bind_weights
from fastllm.loader.files import read_json
from fastllm.loader.gguf import read_gguf
from fastllm.loader.gguf_model import gguf_config, gguf_tensors
from fastllm.loader.gguf_tokenizer import gguf_tokenizer, special_token
from fastllm.loader.hub import resolve_model
from fastllm.loader.quantized import check_method, describe, packed_tensors, quantization_of
from fastllm.loader.safetensors import read_folder
from fastllm.loader.tensors import FileTensor
from fastllm.spec import ModelSpec
from fastllm.tokenizer import Tokenizer, byte_tokenizer, load_tokenizer

log = logging.getLogger("fastllm")


@dataclass
class ModelFiles:
    """A model ready to be handed to the core. Bundles have no bindings: the core opens them itself."""

    path: Path
    spec_json: str
    tokenizer: Tokenizer
    bindings: list[Binding] = field(default_factory=list)
    generation: dict[str, Any] = field(default_factory=dict)  # generation_config.json
    checkpoint_dtype: str = "bfloat16"  # of most weights; block formats count as bfloat16
    is_bundle: bool = False
    quantized: str = ""  # how the weights are packed: "gptq 4 bit, groups of 128"

    @property
    def spec(self) -> dict[str, Any]:
        spec: dict[str, Any] = json.loads(self.spec_json)
        return spec


def open_model(args: EngineArgs) -> ModelFiles:
    """Finds and checks the model that `args` names; reads no weights yet. Raises LoadError."""
    path = resolve_model(args.model, args.revision, args.download_dir, args.hf_token)
    if path.is_file():
        return _open_gguf(path, args)
    if (path / "spec.json").is_file():
        return _open_bundle(path, args)
    ggufs = sorted(path.glob("*.gguf"))
    if not (path / "config.json").is_file() and len(ggufs) == 1:
        return _open_gguf(ggufs[0], args)
    return _open_folder(path, args)


def _open_folder(path: Path, args: EngineArgs) -> ModelFiles:
    if not (path / "config.json").is_file():
        raise LoadError(f"{path} is not a model folder: it has no config.json.")
    if args.load_format == "gguf":
        raise LoadError(f"load_format=gguf, but {path} is a folder of safetensors.")
    config = _overridden(read_json(path / "config.json"), args)
    if args.trust_remote_code or "auto_map" in config:
        log.info("Code from a checkpoint is never run: the model is built from its config alone.")
    hf = HfConfig(config, str(path / "config.json"))
    family = family_of(hf)
    spec = family.build(hf)
    quantization = quantization_of(hf, path)
    method = quantization.get("quant_method") if quantization else "not quantised"
    check_method(args.quantization, method, str(path))
    if args.load_format == "dummy":
        bindings = list(_dummy_bindings(spec, args.seed))
    else:
        tensors = read_folder(path)
        bindings = bind_weights(
            family, spec, packed_tensors(quantization, tensors) if quantization else tensors, str(path)
        )
    tokenizer = _external_tokenizer(args)
    if tokenizer is None and args.load_format == "dummy" and not (path / "tokenizer.json").is_file():
        tokenizer = byte_tokenizer()  # a folder with a config.json alone: random weights say nothing anyway
    files = _finished(path, spec, tokenizer or load_tokenizer(path), bindings, args)
    packed = [t for b in bindings for t in b.sources if t.packing]
    return replace(files, quantized=f"{method} {describe(packed)}") if packed else files


def _open_gguf(path: Path, args: EngineArgs) -> ModelFiles:
    if args.load_format == "safetensors":
        raise LoadError(f"load_format=safetensors, but {path} is a GGUF file.")
    check_method(args.quantization, "a GGUF file", str(path))
    file = read_gguf(path)
    config = _overridden(gguf_config(file), args)
    hf = HfConfig(config, str(path))
    family = family_of(hf)
    spec = family.build(hf)
    if args.load_format == "dummy":
        bindings = list(_dummy_bindings(spec, args.seed))
    else:
        bindings = bind_weights(family, spec, gguf_tensors(file, config), str(path))
    tokenizer = _external_tokenizer(args)
    if tokenizer is None:
        named = {f"{name}_token": special_token(file, key) for name, key in _GGUF_SPECIALS.items()}
        template = file.metadata.get("tokenizer.chat_template")
        tokenizer = Tokenizer(
            gguf_tokenizer(file),
            {name: token for name, token in named.items() if token is not None},
            template if isinstance(template, str) else None,
        )
    return _finished(path.parent, spec, tokenizer, bindings, args, where=path)


_GGUF_SPECIALS = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}


def _open_bundle(path: Path, args: EngineArgs) -> ModelFiles:
    check_method(args.quantization, "a bundle", str(path))
    spec_json = json.dumps(read_json(path / "spec.json"))
    tokenizer = _external_tokenizer(args) or load_tokenizer(path)
    generation = read_generation_config(args.generation_config, path) | args.override_generation_config
    return ModelFiles(path, spec_json, tokenizer, generation=generation, is_bundle=True)


def _overridden(config: dict[str, Any], args: EngineArgs) -> dict[str, Any]:
    return {**config, **args.hf_overrides}


def _external_tokenizer(args: EngineArgs) -> Tokenizer | None:
    if args.tokenizer in (None, args.model):
        return None
    return load_tokenizer(resolve_model(str(args.tokenizer), args.revision, args.download_dir, args.hf_token))


def _finished(
    path: Path,
    spec: ModelSpec,
    tokenizer: Tokenizer,
    bindings: list[Binding],
    args: EngineArgs,
    where: Path | None = None,
) -> ModelFiles:
    words, rows = tokenizer.backend.get_vocab_size(with_added_tokens=False), spec.embed.vocab
    if words > rows:
        raise LoadError(
            f"{where or path}: the tokenizer has {words} tokens, but the model's embedding only {rows} rows: they do "
            "not belong together."
        )
    if tokenizer.vocab_size > rows:
        log.warning("Tokens %d and up of the tokenizer have no row in the model's embedding.", rows)
    # End tokens are a fact of the model, not a sampling default: they count even if the other defaults are refused.
    own = read_generation_config("auto", path)
    spec.eos = list(dict.fromkeys([*spec.eos, *eos_of(own), *_eos_of(tokenizer)]))
    spec.eos = [token for token in spec.eos if token < spec.embed.vocab]
    generation = read_generation_config(args.generation_config, path) | args.override_generation_config
    return ModelFiles(path, spec.to_json(), tokenizer, bindings, generation, _main_dtype(bindings))


def _eos_of(tokenizer: Tokenizer) -> list[int]:
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def _main_dtype(bindings: list[Binding]) -> str:
    sizes: dict[str, int] = {}
    for tensor in (t for b in bindings for t in b.sources):
        sizes[tensor.type] = sizes.get(tensor.type, 0) + len(tensor.data)
    most = max(sizes, key=lambda kind: sizes[kind], default="BF16")
    return {"F32": "float32", "F16": "float16"}.get(most, "bfloat16")


def _dummy_bindings(spec: ModelSpec, seed: int) -> Iterator[Binding]:
    """Small random weights, all of them views of one buffer as long as the largest, in which a few million repeat."""
    shapes = dict(spec.weight_shapes())
    longest = max(int(np.prod(shape)) for shape in shapes.values())
    noise = np.random.default_rng(seed).standard_normal(min(_DUMMY_PERIOD, longest), dtype=np.float32)
    values = np.empty(longest, dtype=np.uint16)
    few = _bfloat16(noise * 0.02)

    def fill(begin: int) -> None:
        values[begin : begin + len(few)] = few[: longest - begin]

    with ThreadPoolExecutor() as pool:  # numpy copies without the GIL; a gigabyte's first touch takes seconds on one
        list(pool.map(fill, range(0, longest, len(few))))
    ones = _bfloat16(np.ones(spec.embed.hidden, dtype=np.float32))
    for name, shape in shapes.items():
        source = ones if name.endswith("norm.weight") else values
        data = source[: int(np.prod(shape))].view(np.uint8).data
        yield Binding(name, (FileTensor(name, "BF16", shape, data),))


# Elements. A prime, so that no two rows of a matrix are equal.
_DUMMY_PERIOD = 4_194_301


def _bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The bits, rounded to the nearest, of finite numbers."""
    return ((values.view(np.uint32) + 0x8000) >> 16).astype(np.uint16)
