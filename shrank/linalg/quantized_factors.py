"""Dense weights and factors on a grid, and what that loses in the norm of a metric.

The down factor is rounded by the second moment C of the inputs; the up factor is fitted again to what became of it, by
least squares of the dense layer's outputs, and rounded by the second moment of the numbers between the two. Without
data C is the identity, of which GPTQ is rounding to the nearest.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .factors import Factors
from .grids import Grid
from .moments import Metric, goal_of
from .quantization import Quantized, gptq, nearest
from .svd import factorize
from .weighted import factorize_weighted

_DAMPING = 1e-8  # of the mean diagonal entry: rows of a rounded factor may be zero, or alike


@dataclass(frozen=True)
class Loss:
    """What became of a weight: its squared error and its own square in the norm of the metric; the relative error of
    the outputs; and `shift` (N,), what the bias must gain to keep the mean output, where there is one."""

    squared_error: float
    squared_norm: float
    relative_error: float
    shift: Tensor | None = None


@dataclass(frozen=True)
class QuantizedDense:
    """A weight (N, K) on a grid."""

    weight: Quantized
    loss: Loss


@dataclass(frozen=True)
class QuantizedFactors:
    """down (R, K) and up (N, R) on a grid."""

    down: Quantized
    up: Quantized
    loss: Loss


def quantized_dense(matrices: Tensor, metric: Metric | None, grid: Grid) -> QuantizedDense:
    """A weight (1, N, K) on a grid: by GPTQ in the metric, which must know the inputs; without one, to the nearest.

    Raises FactorizationError on NaN or infinity, ValueError on a metric without inputs or groups that do not divide K.
    """
    weight = goal_of(matrices, metric)[0]
    on_grid = _on_grid(weight, inputs_of(metric), grid, matrices.dtype)
    return QuantizedDense(on_grid, loss_of(weight, numbers(on_grid), metric))


def quantized_factors(
    matrices: Tensor,
    metric: Metric | None,
    rank: int,
    grid: Grid,
    factors: Factors | None = None,
    dtype: torch.dtype | None = None,
) -> QuantizedFactors:
    """Factors of a weight (1, N, K) on a grid.

    factors: those of this rank in plain numbers, if somebody has them. dtype: that of the scales, if not the matrices'.
    Raises FactorizationError on NaN, infinity or an eigensolver that does not converge; ValueError on a metric without
    inputs, or groups that do not divide K and R.
    """
    moment, dtype = inputs_of(metric), dtype or matrices.dtype
    if factors is None:
        factors = factorize(matrices, rank) if metric is None else factorize_weighted(matrices, metric, rank)
    weight = goal_of(matrices, metric)[0]
    # Columns of up share their rows' scales, rows of down have scales of their own: the strengths belong in down.
    up = factors.up[0].double()
    strengths = up.norm(dim=0).clamp_min(torch.finfo(up.dtype).tiny)
    up, plain = up / strengths, factors.down[0].double() * strengths[:, None]
    down = _on_grid(plain, moment, grid, dtype)
    D = numbers(down)
    seen, between = _seen(D, moment), _second_moment(D, moment)
    up = up + _refit(weight - up @ D, seen, between, _second_moment(D - plain, moment))
    up = _on_grid(up, between, grid, dtype)
    return QuantizedFactors(down, up, loss_of(weight, numbers(up) @ D, metric))


def _refit(residual: Tensor, seen: Tensor, between: Tensor, noise: Tensor) -> Tensor:
    """What up must gain for the outputs that down, rounded, lacks: their least squares, but for directions of h with
    less in them than rounding put into each of the K: these would take large numbers, and larger scales with them."""
    strength = noise.diagonal().sum() / residual.shape[1]
    strength = strength + _DAMPING * between.diagonal().mean() + torch.finfo(between.dtype).tiny
    damped = between + strength * torch.eye(len(between)).to(between)
    return torch.linalg.solve(damped, seen @ residual.mT).mT


def _seen(D: Tensor, moment: Tensor | None) -> Tensor:
    return D if moment is None else D @ moment


def _second_moment(D: Tensor, moment: Tensor | None) -> Tensor:
    """(R, R) of D x."""
    return _seen(D, moment) @ D.mT


def inputs_of(metric: Metric | None) -> Tensor | None:
    """The second moment (K, K) of the inputs that rounding goes by, shrunk as all of the metric is; None: not known.

    ValueError where there is a metric that knows the outputs only.
    """
    if metric is None:
        return None
    if metric.inputs is None:
        raise ValueError("to round its weights, its inputs must be observed: calibrate(..., inputs=True)")
    return metric.inputs[0]


def _on_grid(weight: Tensor, moment: Tensor | None, grid: Grid, dtype: torch.dtype) -> Quantized:
    return nearest(weight, grid, dtype=dtype) if moment is None else gptq(weight, moment, grid, dtype)


def numbers(on_grid: Quantized) -> Tensor:
    """The weights in float64, which 8 bits times 16 fit."""
    spread = on_grid.scales.double().repeat_interleave(on_grid.values.shape[1] // on_grid.scales.shape[1], 1)
    return on_grid.values.double() * spread


def loss_of(weight: Tensor, approximation: Tensor, metric: Metric | None) -> Loss:
    """What is lost by an approximation of a weight, (N, K) both, in a metric that knows the inputs."""
    weight = weight.double()
    lost = weight - approximation
    if metric is None:
        error, norm = lost.square().sum().item(), weight.square().sum().item()
        return Loss(error, norm, (error / norm) ** 0.5 if norm else 0.0)
    moment, mean = metric.inputs[0], metric.input_mean
    weighted = lost @ moment, weight @ moment
    outputs, all_outputs = ((a * b).sum().clamp_min(0).item() for a, b in zip(weighted, (lost, weight), strict=True))
    error, norm = outputs, all_outputs
    if metric.gradient is not None:
        error, norm = (_by_gradient(m, w, weight, metric) for m, w in zip((lost, weight), weighted, strict=True))
    shift = None if mean is None else lost @ mean[0]
    if metric.shift is not None:
        shift = shift + metric.shift[0]
    return Loss(error, norm, (outputs / all_outputs) ** 0.5 if all_outputs else 0.0, shift)


def _by_gradient(lost: Tensor, seen: Tensor, weight: Tensor, metric: Metric) -> float:
    """tr(Gamma E C E^T) of an error E and `seen`, E C, with Gamma the moment of the gradients at the outputs."""
    gradient = metric.gradient[0]
    on_inputs = metric.on_inputs
    felt = gradient_of_error(weight, lost, gradient) * metric.inputs[0] if on_inputs else (gradient @ lost) * seen
    return felt.sum().clamp_min(0).item()


def gradient_of_error(weight: Tensor, error: Tensor, gradient: Tensor) -> Tensor:
    """E^T Gamma E of an error E (..., N, K), of W^T Gamma W alone: what of E is no combination W X of the columns of W
    counts by the mean strength of the gradients."""
    gram = weight.mT @ weight
    strength = gradient.diagonal(dim1=-2, dim2=-1).sum() / gram.diagonal(dim1=-2, dim2=-1).sum()
    combined = torch.linalg.pinv(gram, rtol=1e-12, hermitian=True) @ (weight.mT @ error)
    rest = error.mT @ error - combined.mT @ gram @ combined
    return combined.mT @ gradient @ combined + strength * (rest + rest.mT) / 2
