"""GPTQ: columns are rounded one after another, and what each lost is made good by those still to come.

With H = X X^T over the calibration inputs (see inputs.py) and U the upper Cholesky factor of its inverse
(U^T U = H^-1), rounding input i of a weight w to q costs e = (w_i - q) / U_ii, and w_j -= e * U_ij for j > i keeps the
output nearest to what it was. Updates of inputs behind the block at hand are gathered and applied as one product.

                 block             to come
      |.........|#####|..............................|   inputs, in the order in which they are taken
      done      begin end                            in
"""

from __future__ import annotations

import torch

from fastllm.errors import LoadError
from fastllm.quantize.grid import Grid, QuantizedWeight

_BLOCK = 128  # inputs; every group size divides it, or is all inputs
_MORE_DAMPING = (1.0, 10.0, 100.0)  # times the given, until the matrix can be inverted


def gptq(
    weight: torch.Tensor, gram: torch.Tensor, grid: Grid, groups: int, *, desc_act: bool, damp: float
) -> QuantizedWeight:
    """weight: [in, out] fp32. gram: [in, in], proportional to H. desc_act: inputs by falling diagonal of H; groups are
    then made of inputs in that order, as g_idx says. Raises LoadError if H cannot be inverted."""
    inputs, outputs = weight.shape
    order = torch.argsort(gram.diagonal(), descending=True, stable=True) if desc_act else torch.arange(inputs)
    rows = weight[order]
    hessian = gram[order][:, order]
    unused = hessian.diagonal() == 0
    hessian.diagonal()[unused] = 1
    rows[unused] = 0
    factor = _inverse_factor(hessian, damp)
    group_size = inputs // groups
    codes = torch.empty(inputs, outputs, dtype=torch.uint8)
    scales, zeros = torch.empty(groups, outputs), torch.empty(groups, outputs)
    for begin in range(0, inputs, _BLOCK):
        end = min(begin + _BLOCK, inputs)
        errors = torch.empty(end - begin, outputs)
        for i in range(begin, end):
            group = i // group_size
            if i % group_size == 0:
                members = rows[i : i + group_size]
                scales[group], zeros[group] = grid.fit(members.amin(0), members.amax(0))
            code = grid.codes(rows[i], scales[group], zeros[group])
            error = (rows[i] - (code - zeros[group]) * scales[group]) / factor[i, i]
            rows[i + 1 : end].addr_(factor[i, i + 1 : end], error, alpha=-1)
            codes[i] = code.to(torch.uint8)
            errors[i - begin] = error
        rows[end:].addmm_(factor[begin:end, end:].T, errors, alpha=-1)
    back = torch.argsort(order)
    g_idx = (back // group_size).to(torch.int32)
    return QuantizedWeight(codes[back], scales.half(), zeros.to(torch.uint8), g_idx)


def _inverse_factor(hessian: torch.Tensor, damp: float) -> torch.Tensor:
    mean = hessian.diagonal().mean()
    for times in _MORE_DAMPING:
        damped = hessian.clone()
        damped.diagonal().add_(damp * times * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if failed == 0:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if failed == 0 and bool(upper.isfinite().all()):
                return upper
    raise LoadError(
        "the Hessian of a layer cannot be inverted: the weights hold NaN or infinity, or the calibration text is one "
        "thing over and over; try more text or a higher --damp-percent."
    )
