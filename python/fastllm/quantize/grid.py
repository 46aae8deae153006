"""The numbers a weight may take: codes, scales and zeros of one linear layer.

Weights stand as they are stored, [in, out]; group g of the inputs has a row of scales and zeros. A weight is
(code - zero) * scale; scales are fp16 numbers from the start, so that what is measured is what is written.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastllm.quantize.config import QuantizeConfig

_SMALLEST = 2.0**-24  # the least positive fp16


@dataclass(frozen=True)
class Grid:
    """bits and symmetry of the codes. least_zero: 1 where the format stores zero - 1 and has no room for -1."""

    bits: int
    sym: bool
    least_zero: int

    @property
    def max_code(self) -> int:
        return (1 << self.bits) - 1

    def fit(self, low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scales and zeros, fp32, that cover [low, high] and 0."""
        low, high = low.clamp(max=0), high.clamp(min=0)
        if self.sym:
            scale = _as_scale(2 * torch.maximum(-low, high) / self.max_code)
            return scale, torch.full_like(scale, (self.max_code + 1) // 2)
        scale = _as_scale((high - low) / self.max_code)
        zero = torch.round(-low / scale)
        moved = zero < self.least_zero
        scale = torch.where(moved, _as_scale(high / (self.max_code - self.least_zero)), scale)
        return scale, zero.clamp(self.least_zero, self.max_code)

    def codes(self, weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        """The nearest codes, as fp32."""
        return (torch.round(weight / scale) + zero).clamp_(0, self.max_code)


@dataclass(frozen=True)
class QuantizedWeight:
    codes: torch.Tensor  # [in, out] uint8
    scales: torch.Tensor  # [groups, out] fp16
    zeros: torch.Tensor  # [groups, out] uint8
    g_idx: torch.Tensor  # [in] int32: the group of an input

    def dequantized(self) -> torch.Tensor:
        """[in, out] fp32."""
        group = self.g_idx.long()
        return (self.codes.float() - self.zeros[group].float()) * self.scales[group].float()

    def columns(self, begin: int, end: int) -> QuantizedWeight:
        """Outputs [begin, end) alone, copied."""
        codes, scales, zeros = (t[:, begin:end].contiguous() for t in (self.codes, self.scales, self.zeros))
        return QuantizedWeight(codes, scales, zeros, self.g_idx.clone())


def grid_of(config: QuantizeConfig) -> Grid:
    return Grid(config.bits, config.symmetric, least_zero=1 if config.method == "gptq" else 0)


def round_to_nearest(
    weight: torch.Tensor, grid: Grid, groups: int, bounds: tuple[torch.Tensor, torch.Tensor] | None = None
) -> QuantizedWeight:
    """Every weight to its nearest code. bounds: least and greatest of every group, [groups, out], if not the weights'
    own; what lies outside is clipped."""
    inputs, outputs = weight.shape
    grouped = weight.reshape(groups, inputs // groups, outputs)
    low, high = (grouped.amin(1), grouped.amax(1)) if bounds is None else bounds
    scale, zero = grid.fit(low, high)
    clipped = torch.minimum(torch.maximum(grouped, low[:, None]), high[:, None])
    codes = grid.codes(clipped, scale[:, None], zero[:, None]).reshape(inputs, outputs)
    g_idx = torch.arange(inputs, dtype=torch.int32) // (inputs // groups)
    return QuantizedWeight(codes.to(torch.uint8), scale.half(), zero.to(torch.uint8), g_idx)


def _as_scale(value: torch.Tensor) -> torch.Tensor:
    """Rounded to fp16 and never 0; 1 for a group of zeros."""
    return torch.where(value == 0, 1.0, value.half().float().clamp(_SMALLEST, 65504.0))
