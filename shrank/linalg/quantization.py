"""Matrices rounded to the numbers of a grid, each weight alone or so that the others make up for it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .grids import Grid
from .svd import FactorizationError, _checked

# Shares of the scale that reaches the largest weight of a group, of which the one of least error is taken.
_SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
_COLUMNS = 128  # that are rounded before the columns behind them make up for it
_DAMPING = 0.01  # of the mean diagonal entry, as in GPTQ
_LEAST = 1e-30  # where nothing is seen


@dataclass(frozen=True)
class Quantized:
    """A matrix on a grid: values (N, K), int8 whatever the bits, and scales (N, groups) in the dtype of the layer."""

    values: Tensor
    scales: Tensor
    grid: Grid

    def dequantized(self) -> Tensor:
        """The weights (N, K) in the dtype of the scales."""
        groups = self.values.unflatten(1, (self.scales.shape[1], -1)).to(self.scales.dtype)
        return (groups * self.scales[..., None]).flatten(1)


def nearest(
    weight: Tensor, grid: Grid, importance: Tensor | None = None, dtype: torch.dtype | None = None
) -> Quantized:
    """Every weight of a matrix (N, K) rounded to the nearest number of the grid.

    importance: (K,), of each column's error in the choice of scales; None: all alike. dtype: that of the scales, if not
    the weight's.
    """
    W = _checked(weight).double()
    scales = _scales(W, grid, importance, dtype or weight.dtype)
    spread = scales.double().repeat_interleave(W.shape[1] // scales.shape[1], 1)
    return Quantized(_rounded(W, spread, grid).to(torch.int8), scales, grid)


def gptq(weight: Tensor, hessian: Tensor, grid: Grid, dtype: torch.dtype | None = None) -> Quantized:
    """A matrix (N, K) on a grid, each column rounded in turn and the others moved to make up for its error.

    The columns of most energy come first; the scales are those of the weights before any moved. Raises
    FactorizationError on NaN or infinity.

    hessian: (K, K), the second moment of the inputs, float64, positive semi-definite. dtype: that of the scales, if not
    the weight's.

    Source: GPTQ (Frantar et al., ICLR 2023), with its activation order and static groups.
    """
    W = _checked(weight).double()
    energy = hessian.diagonal()
    scales = _scales(W, grid, energy, dtype or weight.dtype)
    order = energy.argsort(descending=True, stable=True)
    spread = scales.double().repeat_interleave(W.shape[1] // scales.shape[1], 1).mT[order].contiguous()
    columns, inverse = W.mT[order].contiguous(), _inverse_factor(hessian[order][:, order])
    values = torch.empty_like(columns)
    for start in range(0, len(columns), _COLUMNS):
        end = min(start + _COLUMNS, len(columns))
        errors = torch.empty_like(columns[start:end])
        for j in range(start, end):
            values[j] = _rounded(columns[j], spread[j], grid)
            error = torch.addcmul(columns[j], values[j], spread[j], value=-1).div_(inverse[j, j])
            columns[j + 1 : end].addr_(inverse[j, j + 1 : end], error, alpha=-1)
            errors[j - start] = error
        columns[end:].addmm_(inverse[start:end, end:].mT, errors, alpha=-1)
    return Quantized(values[order.argsort()].mT.to(torch.int8).contiguous(), scales, grid)


def _inverse_factor(hessian: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse."""
    strength = (_DAMPING * hessian.diagonal().mean()).clamp_min(_LEAST)
    damped = hessian + strength * torch.eye(len(hessian)).to(hessian)
    factor, failed = torch.linalg.cholesky_ex(damped)
    if failed:
        raise FactorizationError("the second moment of its inputs is not positive definite")
    return torch.linalg.cholesky(torch.cholesky_inverse(factor), upper=True)


def _rounded(weights: Tensor, scales: Tensor, grid: Grid) -> Tensor:
    return (weights / scales).round_().clamp_(grid.least, grid.most)


def _scales(W: Tensor, grid: Grid, importance: Tensor | None, dtype: torch.dtype) -> Tensor:
    """(N, groups): for every group the scale, of a few, whose rounding has the least error. A negative one puts the
    largest weight at the end of the grid that reaches one further."""
    groups = W.unflatten(1, (grid.groups(W.shape[1]), -1))
    importance = 1.0 if importance is None else importance.view(groups.shape[1:]).clamp_min(0)
    extreme = groups.gather(2, groups.abs().argmax(2, keepdim=True))
    # Scales are stored in 16 bits; the rounding of weights must know the scale that they will have.
    stored = dtype if torch.finfo(dtype).bits == 16 else torch.float16
    least = torch.finfo(stored).tiny
    best, found = torch.full_like(extreme, torch.inf), torch.full_like(extreme, least)
    for share in _SHARES:
        scale = (share * extreme / grid.least).to(stored).double()
        scale = torch.where(scale.abs() < least, least, scale)
        lost = (groups - _rounded(groups, scale, grid) * scale).square_().mul_(importance).sum(2, keepdim=True)
        found = torch.where(lost < best, scale, found)
        best = torch.minimum(lost, best)
    return found[..., 0].to(dtype)
