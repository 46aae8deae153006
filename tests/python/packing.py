"""Writes quantised checkpoints, independently of what reads them: numbers to codes, codes to the words of a method."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Variant:
    """One way to pack a model."""

    method: str  # awq, gptq, gptq_v2, pack, int: the last two are compressed-tensors
    bits: int = 4
    group: int = 128  # -1: the whole row
    symmetric: bool = False
    # act-order: "shared" by layers with the same input, or "own" of each layer
    order: str = ""
    scale_type: str = "float16"
    config: dict[str, Any] = field(default_factory=dict)  # merged into quantization_config

    def __str__(self) -> str:
        parts = [self.method, f"{self.bits}bit", f"g{self.group}", "sym" if self.symmetric else "asym"]
        return "-".join([*parts, *([self.order] if self.order else []), self.scale_type])


@dataclass
class Codes:
    """w = scales (codes - zeros), with the numbers of each column's group."""

    codes: Array  # [out, in], unsigned
    scales: Array  # [out, groups]
    zeros: Array  # [out, groups], unsigned like the codes
    group_of: Array  # [in]

    def numbers(self) -> Array:
        scales, zeros = self.scales.astype(np.float32)[:, self.group_of], self.zeros[:, self.group_of]
        return scales * (self.codes.astype(np.float32) - zeros.astype(np.float32))


def quantise(weight: Array, variant: Variant, rng: np.random.Generator) -> Codes:
    rows, cols = weight.shape
    group = cols if variant.group == -1 else variant.group
    count = -(-cols // group)
    group_of = np.arange(cols) // group
    if variant.order:
        group_of = group_of[rng.permutation(cols)]
    top = 2**variant.bits - 1
    scales, zeros = np.empty((rows, count), np.float32), np.empty((rows, count), np.int64)
    for g in range(count):
        part = weight[:, group_of == g]
        if variant.symmetric:
            scales[:, g] = np.abs(part).max(1) / (top // 2)
            zeros[:, g] = (top + 1) // 2
        else:
            low, high = np.minimum(part.min(1), 0), np.maximum(part.max(1), 0)
            scales[:, g] = (high - low) / top
            zeros[:, g] = np.clip(np.round(-low / scales[:, g]), 0 if variant.method != "gptq" else 1, top)
    scales = scales.astype(variant.scale_type)
    codes = np.round(weight / scales.astype(np.float32)[:, group_of]) + zeros[:, group_of]
    return Codes(np.clip(codes, 0, top).astype(np.int64), scales, zeros, group_of)


def words(codes: Array, bits: int, axis: int, order: tuple[int, ...] = ()) -> Array:
    """Codes along an axis in int32 words, element order[i] in place i; the last word filled with zeros."""
    per = 32 // bits
    moved = np.moveaxis(codes, axis, -1).astype(np.uint64)
    pad = -moved.shape[-1] % per
    moved = np.pad(moved, [(0, 0)] * (moved.ndim - 1) + [(0, pad)])
    split = moved.reshape(*moved.shape[:-1], -1, per)
    word = np.zeros(split.shape[:-1], np.uint64)
    for place in range(per):
        word |= split[..., order[place] if order else place] << np.uint64(bits * place)
    return np.ascontiguousarray(np.moveaxis(word.astype(np.uint32).view(np.int32), -1, axis))


def tensors_of(name: str, c: Codes, variant: Variant) -> dict[str, Array]:
    """The tensors of a module."""
    scales = c.scales
    half = 2 ** (variant.bits - 1)
    if variant.method == "awq":
        order = (0, 2, 4, 6, 1, 3, 5, 7)
        made = {
            "qweight": words(c.codes.T, variant.bits, 1, order),
            "qzeros": words(c.zeros.T, variant.bits, 1, order),
            "scales": scales.T,
        }
    elif variant.method in ("gptq", "gptq_v2"):
        made = {
            "qweight": words(c.codes.T, variant.bits, 0),
            "qzeros": words(c.zeros.T - (variant.method == "gptq"), variant.bits, 1),
            "scales": scales.T,
            "g_idx": c.group_of.astype(np.int32),
        }
    else:
        made = {"weight_scale": scales}
        if variant.method == "pack":
            made["weight_packed"] = words(c.codes, variant.bits, 1)
            made["weight_shape"] = np.array(c.codes.shape, np.int64)
        else:
            made["weight"] = (c.codes - half).astype(np.int8)
        if not variant.symmetric and variant.method == "pack":
            made["weight_zero_point"] = words(c.zeros, variant.bits, 0)
        elif not variant.symmetric:
            made["weight_zero_point"] = (c.zeros - half).astype(np.int8)
        if variant.order:
            made["weight_g_idx"] = c.group_of.astype(np.int32)
    return {f"{name}.{part}": np.ascontiguousarray(values) for part, values in made.items()}


def quantization_config(variant: Variant) -> dict[str, Any]:
    if variant.method == "awq":
        made = {"quant_method": "awq", "bits": 4, "group_size": variant.group, "zero_point": True, "version": "gemm"}
    elif variant.method in ("gptq", "gptq_v2"):
        made = {"quant_method": "gptq", "bits": variant.bits, "group_size": variant.group, "sym": variant.symmetric}
        made |= {"desc_act": bool(variant.order), "checkpoint_format": variant.method}
    else:
        weights = {"num_bits": variant.bits, "type": "int", "symmetric": variant.symmetric, "dynamic": False}
        if variant.group == -1:
            weights |= {"strategy": "channel", "group_size": None}
        else:
            weights |= {"strategy": "group", "group_size": variant.group}
        weights["actorder"] = "group" if variant.order else None
        form = {"pack": "pack-quantized", "int": "int-quantized"}[variant.method]
        group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
        made = {"quant_method": "compressed-tensors", "format": form, "ignore": ["lm_head"]}
        made["config_groups"] = {"group_0": group}
    return made | variant.config


_LINEAR = ("_proj.weight", ".c_attn.weight", ".c_proj.weight", ".c_fc.weight", ".fc1.weight", ".fc2.weight")


def write_packed_model(source: Path, packed: Path, dense: Path, variant: Variant, seed: int, transposed: bool) -> None:
    """The model of `source` with packed linear layers, and one with the numbers that these stand for.

    transposed: linear layers store [in, out], as GPT-2's do.
    """
    rng = np.random.default_rng(seed)
    made: dict[str, Array] = {}
    plain: dict[str, Array] = {}
    for name, values in sorted(load_file(source / "model.safetensors").items()):
        if not name.endswith(_LINEAR):
            made[name] = plain[name] = values
            continue
        weight = values.T if transposed else values
        # Layers with the same input have the same order of its columns.
        state = np.random.default_rng(seed) if variant.order == "shared" else rng
        codes = quantise(weight, variant, state)
        made |= tensors_of(name.removesuffix(".weight"), codes, variant)
        numbers = codes.numbers()
        plain[name] = np.ascontiguousarray(numbers.T if transposed else numbers)
    for folder in (packed, dense):
        shutil.copytree(source, folder)
    save_file(made, packed / "model.safetensors")
    save_file(plain, dense / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((packed / "config.json").read_text())
    config["quantization_config"] = quantization_config(variant)
    (packed / "config.json").write_text(json.dumps(config))
