"""Codes in the 32-bit words of the two checkpoint formats.

GPTQ (version 1)                                  AWQ (GEMM)
qweight [in * bits / 32, out]  code i of a        qweight [in, out / 8]  eight neighbouring outputs share a word,
                               column at bit      qzeros [groups, out / 8]  from the lowest nibble on: 0 2 4 6 1 3 5 7
                               i * bits           scales [groups, out] fp16
qzeros [groups, out * bits / 32]  zero - 1
scales [groups, out] fp16; g_idx [in]
"""

from __future__ import annotations

import torch

from fastllm.quantize.config import QuantizeConfig
from fastllm.quantize.grid import QuantizedWeight

_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def pack(weight: QuantizedWeight, config: QuantizeConfig) -> dict[str, torch.Tensor]:
    """The tensors of one linear layer, by the ends of their names."""
    if config.method == "awq":
        return {
            "qweight": _pack_rows(_awq_ordered(weight.codes), 4),
            "qzeros": _pack_rows(_awq_ordered(weight.zeros), 4),
            "scales": weight.scales,
        }
    return {
        "qweight": _pack_rows(weight.codes.T, config.bits).T.contiguous(),
        "qzeros": _pack_rows(weight.zeros - 1, config.bits),
        "scales": weight.scales,
        "g_idx": weight.g_idx,
    }


def _awq_ordered(codes: torch.Tensor) -> torch.Tensor:
    rows, columns = codes.shape
    return codes.reshape(rows, columns // 8, 8)[:, :, list(_AWQ_ORDER)].reshape(rows, columns)


def _pack_rows(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """[rows, n] uint8 to [rows, n * bits / 32] int32, the first code in the lowest bits."""
    words = codes.reshape(codes.shape[0], -1, 32 // bits).long()
    shifts = torch.arange(0, 32, bits)
    packed = (words << shifts).sum(-1)
    return torch.where(packed >= 1 << 31, packed - (1 << 32), packed).to(torch.int32)
