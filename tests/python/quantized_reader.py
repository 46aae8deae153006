"""Reads GPTQ and AWQ checkpoints with numpy alone, from the description of the formats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]

AWQ_OUTPUT_OF_NIBBLE = (0, 2, 4, 6, 1, 3, 5, 7)


def nibbles(words: npt.NDArray[np.int32], bits: int) -> Ints:
    """[rows, n] words to [rows, n, 32 / bits] codes, lowest bits first."""
    unsigned = words.astype(np.int64) & 0xFFFFFFFF
    return (unsigned[..., None] >> np.arange(0, 32, bits)) & ((1 << bits) - 1)


def gptq_codes(tensors: dict[str, Any], bits: int) -> tuple[Ints, Ints]:
    """Codes [in, out] and zeros [groups, out]."""
    words = nibbles(tensors["qweight"], bits)  # [in / n, out, n]
    codes = words.transpose(0, 2, 1).reshape(-1, words.shape[1])
    zeros = nibbles(tensors["qzeros"], bits)
    return codes, zeros.reshape(len(zeros), -1) + 1


def awq_codes(tensors: dict[str, Any]) -> tuple[Ints, Ints]:
    def ordered(words: npt.NDArray[np.int32]) -> Ints:
        packed = nibbles(words, 4)
        codes = np.empty_like(packed)
        for nibble, output in enumerate(AWQ_OUTPUT_OF_NIBBLE):
            codes[..., output] = packed[..., nibble]
        return codes.reshape(len(words), -1)

    return ordered(tensors["qweight"]), ordered(tensors["qzeros"])


def dequantized(tensors: dict[str, Any], config: dict[str, Any]) -> Floats:
    """The weight [out, in] of one linear layer."""
    if config["quant_method"] == "gptq":
        codes, zeros = gptq_codes(tensors, config["bits"])
        group = tensors["g_idx"]
    else:
        codes, zeros = awq_codes(tensors)
        group = np.arange(len(codes)) // (len(codes) // len(zeros))
    return np.ascontiguousarray(((codes - zeros[group]) * tensors["scales"].astype(np.float32)[group]).T)


def read_checkpoint(folder: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]], dict[str, Any]]:
    """config.json, the quantised layers' tensors by layer, and all other tensors (torch)."""
    from safetensors.torch import load_file

    config = json.loads((folder / "config.json").read_text())
    layers: dict[str, dict[str, Any]] = {}
    others = {}
    for file in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            layer, _, part = name.rpartition(".")
            if part in ("qweight", "qzeros", "scales", "g_idx"):
                layers.setdefault(layer, {})[part] = tensor.numpy()
            else:
                others[name] = tensor
    return config, layers, others


def transformers_model(folder: Path) -> Any:
    """The checkpoint with its weights made dense, fp32, in Transformers."""
    import torch
    import transformers

    config, layers, others = read_checkpoint(folder)
    quantization = config["quantization_config"]
    plain = transformers.AutoConfig.from_pretrained(folder)
    del plain.quantization_config
    state = {name: tensor.float() for name, tensor in others.items()}
    state |= {f"{name}.weight": torch.from_numpy(dequantized(t, quantization)) for name, t in layers.items()}
    model, report = getattr(transformers, config["architectures"][0]).from_pretrained(
        None, config=plain, state_dict=state, dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"], report
    return model.eval()
