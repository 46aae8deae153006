"""Quantised checkpoints: which tensors make up a weight, and what their numbers mean.

A linear layer of such a checkpoint has no `weight`, but its codes, scales and perhaps zeros and groups by other names.
They are gathered here into one tensor named `weight`, which the core reads; layers that were left alone have a plain
`weight` and pass through. Methods and their names are those of AutoAWQ, AutoGPTQ / GPTQModel and compressed-tensors.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastllm.errors import LoadError
from fastllm.families import HfConfig
from fastllm.loader.compressed_tensors import compressed_tensors_schemes
from fastllm.loader.files import read_json
from fastllm.loader.scheme import Scheme, group_size
from fastllm.loader.tensors import FileTensor, Packing

METHODS = ("awq", "gptq", "compressed-tensors")
# What older tools wrote beside a config.json that says nothing -> the method if the file does not say
_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
# AutoAWQ's names in such a file -> those in a quantization_config
_OLD_NAMES = {"w_bit": "bits", "q_group_size": "group_size"}


@dataclass(frozen=True)
class _Names:
    """What a method calls the tensors of a module."""

    codes: str
    scales: str
    zeros: str
    group_of: str


_WORDS = _Names("qweight", "scales", "qzeros", "g_idx")
_COMPRESSED = "weight_scale", "weight_zero_point", "weight_g_idx"
_PACKED, _BYTES = _Names("weight_packed", *_COMPRESSED), _Names("weight", *_COMPRESSED)
_SHAPE = "weight_shape"

SchemeOf = Callable[[str], Scheme]  # of a module; raises LoadError


def quantization_of(config: HfConfig, folder: Path) -> HfConfig | None:
    """The quantization_config of a checkpoint that has one, in its config or, from older tools, in a file of its own.

    Raises LoadError unless its method is one of METHODS.
    """
    given = config.get("quantization_config", config.get("compression_config"))
    if given is not None:
        quantization = HfConfig(given, f"{config.where}: quantization_config")
    else:
        files = [folder / name for name in _FILES if (folder / name).is_file()]
        if not files:
            return None
        if len(files) > 1:
            raise LoadError(f"{folder} has both {' and '.join(_FILES)}: remove the one that is not of these weights.")
        quantization = _from_file(files[0])
    method = quantization.get("quant_method")
    if method not in METHODS:
        raise LoadError(
            f"{quantization.where} has the quant_method {method!r}; supported are {', '.join(METHODS)}. Use the "
            "unquantised checkpoint or a GGUF file."
        )
    return quantization


def _from_file(file: Path) -> HfConfig:
    """What an older tool wrote, with today's names."""
    found = read_json(file)
    for old, name in _OLD_NAMES.items():
        if old in found and found.get(name, found[old]) != found[old]:
            raise LoadError(f"{file}: {old} is {found[old]!r}, but {name} is {found[name]!r}.")
    method = "awq" if "w_bit" in found else _FILES[file.name]
    renamed = {_OLD_NAMES.get(name, name): value for name, value in found.items() if value is not None}
    return HfConfig({"quant_method": method, **renamed}, str(file))


def check_method(wanted: str | None, found: str, where: str) -> None:
    """Raises LoadError if --quantization names a method of checkpoints that is not what was found."""
    if wanted in METHODS and wanted != found:
        raise LoadError(f"quantization={wanted!r}, but {where} is {found}; leave quantization out.")


def packed_tensors(quantization: HfConfig, tensors: Mapping[str, FileTensor]) -> dict[str, FileTensor]:
    """The tensors with every quantised module's gathered into its `weight`. Raises LoadError naming what is missing."""
    method: str = quantization.get("quant_method")
    scheme_of = {"awq": _awq, "gptq": _gptq, "compressed-tensors": compressed_tensors_schemes}[method](quantization)
    gathered: dict[str, FileTensor] = {}
    used: set[str] = set()
    for name, tensor in tensors.items():
        module, _, suffix = name.rpartition(".")
        names = _names_of(method, suffix, tensor)
        if names is not None:
            gathered[f"{module}.weight"] = _gather(module, names, scheme_of(module), tensors)
            used.update(f"{module}.{part}" for part in (names.codes, names.scales, names.zeros, names.group_of, _SHAPE))
    both = [name for name in gathered if name in tensors and name not in used]
    if both:
        raise LoadError(f"{quantization.where}: the checkpoint holds {both[0]} both packed and as numbers.")
    return gathered | {name: tensor for name, tensor in tensors.items() if name not in used}


def describe(tensors: Iterable[FileTensor]) -> str:
    """The bits and groups of packed tensors in a few words: "4 bit, groups of 128"."""
    packings = [t.packing for t in tensors if t.packing]
    bits = " and ".join(str(b) for b in sorted({p.bits for p in packings}))
    sizes = sorted({p.group for p in packings})
    groups = " and ".join(f"groups of {size}" if size else "one group for each row" for size in sizes)
    return f"{bits} bit, {groups}"


def _names_of(method: str, suffix: str, tensor: FileTensor) -> _Names | None:
    if method != "compressed-tensors":
        return _WORDS if suffix == _WORDS.codes else None
    if suffix == _PACKED.codes:
        return _PACKED
    return _BYTES if suffix == _BYTES.codes and tensor.type == "I8" else None


def _gather(module: str, names: _Names, scheme: Scheme, tensors: Mapping[str, FileTensor]) -> FileTensor:
    def part(name: str, needed: bool) -> FileTensor | None:
        found = tensors.get(f"{module}.{name}")
        if found is None and needed:
            raise LoadError(f"{module} is quantised, but the checkpoint lacks {module}.{name}.")
        return found

    codes, scales = part(names.codes, True), part(names.scales, True)
    assert codes is not None and scales is not None
    packing = Packing(
        scheme.layout,
        scheme.bits,
        scheme.group,
        scales,
        part(names.zeros, scheme.has_zeros),
        part(names.group_of, scheme.has_order),
        scheme.zeros_less_one,
    )
    shape = part(_SHAPE, names is _PACKED)
    if shape is not None:
        _check_shape(codes, shape, 32 // scheme.bits if names is _PACKED else 1)
    return replace(codes, packing=packing)


def _check_shape(codes: FileTensor, stored: FileTensor, per_word: int) -> None:
    """Words filled in part hide a wrong number of columns, which the checkpoint states."""
    code = {"I64": "<2q", "I32": "<2i"}.get(stored.type)
    if code is None or stored.shape != (2,):
        raise LoadError(f"{stored.name} is {stored.type} of shape {list(stored.shape)}; needed are 2 numbers of I64.")
    rows, cols = struct.unpack(code, stored.data)
    if codes.shape != (rows, -(-cols // per_word)):
        raise LoadError(
            f"{codes.name} has shape {list(codes.shape)}, which does not hold the {rows} x {cols} codes that "
            f"{stored.name} announces."
        )


def _awq(config: HfConfig) -> SchemeOf:
    version = config.get("version", "gemm")
    if not isinstance(version, str) or version.lower() != "gemm":
        raise LoadError(f"{config.where}: the AWQ version {version!r} is not supported; it must be 'gemm'.")
    config.refuse("zero_point", [True], "AWQ without zero points")
    bits = config.size("bits", 4)
    if bits != 4:
        raise LoadError(f"{config.where}: AWQ of {bits} bits is not supported; bits must be 4.")
    scheme = Scheme("awq", bits, group_size(config, 128), has_zeros=True)
    return lambda module: scheme


def _gptq(config: HfConfig) -> SchemeOf:
    form = config.get("checkpoint_format", config.get("format", "gptq"))
    if form not in ("gptq", "gptq_v2"):
        raise LoadError(f"{config.where}: the GPTQ format {form!r} is not supported; it must be gptq or gptq_v2.")
    config.refuse("is_marlin_format", [False], "Marlin's order of weights")
    config.refuse("pack_dtype", ["int32"], "words of another size")
    rules = config.get("dynamic", {})
    if not isinstance(rules, dict):
        raise LoadError(f"{config.where}: dynamic must be an object of module patterns, got {rules!r}.")

    def scheme_of(module: str) -> Scheme:
        own = HfConfig({**config.values, **_dynamic(config, rules, module)}, config.where)
        bits = own.size("bits")
        if bits not in (4, 8):
            raise LoadError(f"{config.where}: GPTQ of {bits} bits ({module}) is not supported; bits must be 4 or 8.")
        group = group_size(own, 128)
        ordered = own.flag("desc_act") and group != 0
        return Scheme("gptq", bits, group, has_zeros=True, has_order=ordered, zeros_less_one=form == "gptq")

    scheme_of("")  # what holds without rules must be in order, whether or not a module follows it
    return scheme_of


def _dynamic(config: HfConfig, rules: Mapping[str, Any], module: str) -> Mapping[str, Any]:
    """GPTQModel's settings of single modules: the first pattern that matches; "-:" ones name unquantised modules."""
    for pattern, own in rules.items():
        try:
            matches = not pattern.startswith("-:") and re.match(pattern.removeprefix("+:"), module)
        except re.error as error:
            raise LoadError(f"{config.where}: dynamic has the malformed pattern {pattern!r}: {error}.") from error
        if matches:
            if not isinstance(own, dict):
                raise LoadError(f"{config.where}: dynamic must give an object for {pattern!r}, got {own!r}.")
            return own
    return {}
