"""AWQ: inputs with large activations get finer steps, then each group's range is clipped where that helps.

A channel c of the input is divided by s_c = magnitude_c ^ ratio, normalised, in the layer before (see folds.py), and
the weights that read it are multiplied by it. The ratio with the least error of the output is taken. Errors come from
the Gram matrix G of the inputs, so no activation is kept: |D X|^2 = sum over outputs of d^T G d for D the error of the
weights.
"""

from __future__ import annotations

import torch

from fastllm.quantize.folds import Fold
from fastllm.quantize.grid import Grid, round_to_nearest
from fastllm.quantize.inputs import InputStatistics

_RATIOS = 20
_SHRINKS = tuple(1 - i / 20 for i in range(10))  # of a group's greatest magnitude


def squared_error(difference: torch.Tensor, gram: torch.Tensor) -> float:
    """Mean over tokens of the squared norm of the output that `difference` [in, out] makes."""
    return float(((gram @ difference) * difference).sum(dtype=torch.float64))


def best_scale(weight: torch.Tensor, inputs: InputStatistics, fold: Fold, grid: Grid, groups: int) -> torch.Tensor:
    """The scale of the producer's channels, [channels]. weight: [in, out], all consumers beside each other."""
    count = torch.zeros(fold.channels).index_add_(0, fold.channel_of, torch.ones_like(inputs.magnitude))
    magnitude = torch.zeros(fold.channels).index_add_(0, fold.channel_of, inputs.magnitude) / count
    best, least = torch.ones(fold.channels), float("inf")
    for step in range(_RATIOS):
        scale = magnitude.clamp(min=1e-8).pow(step / _RATIOS).clamp(min=1e-4)
        scale /= (scale.max() * scale.min()).sqrt()
        of_inputs = scale[fold.channel_of][:, None]
        rounded = round_to_nearest(weight * of_inputs, grid, groups).dequantized() / of_inputs
        error = squared_error(rounded - weight, inputs.gram)
        if error < least:
            best, least = scale, error
    return best


def best_bounds(weight: torch.Tensor, gram: torch.Tensor, grid: Grid, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Least and greatest weight of every group, [groups, out], that give the group's outputs the least error."""
    inputs, outputs = weight.shape
    size = inputs // groups
    grouped = weight.reshape(groups, size, outputs)
    blocks = gram.reshape(groups, size, groups, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # [groups, size, size]
    low, high = grouped.amin(1), grouped.amax(1)
    greatest = torch.maximum(-low, high)
    best = (low, high)
    least = torch.full_like(low, float("inf"))
    for shrink in _SHRINKS:
        bounds = torch.maximum(low, -greatest * shrink), torch.minimum(high, greatest * shrink)
        rounded = round_to_nearest(weight, grid, groups, bounds).dequantized().reshape(grouped.shape)
        difference = rounded - grouped
        error = (torch.bmm(blocks, difference) * difference).sum(1)
        better = error < least
        best = torch.where(better, bounds[0], best[0]), torch.where(better, bounds[1], best[1])
        least = torch.where(better, error, least)
    return best
