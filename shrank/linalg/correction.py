"""What rounding a weight lost, in a few directions: W ~ Q + up @ down, with Q the weight on a grid.

The error E = W - Q is approximated as a weight is, by the leading eigenvectors of E C E^T, or with gradients of
R E C E^T R, which needs no inverse of C. QERA (Zhang et al., ICLR 2025) and EoRA (Liu et al., 2024) find the same
optimum of the one-sided norm by an SVD of E C^1/2.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from .factors import Factors
from .grids import Grid, Storage
from .moments import Metric, goal_of
from .quantization import Quantized
from .quantized_factors import (
    Loss,
    QuantizedDense,
    QuantizedFactors,
    _on_grid,
    gradient_of_error,
    inputs_of,
    loss_of,
    numbers,
    quantized_dense,
    quantized_factors,
)
from .svd import factorize, spectrum
from .weighted import factorize_weighted, rounded, squared_errors


@dataclass(frozen=True)
class Lost:
    """The weight (N, K) that a layer should have, the one that it has, and the norm that the difference counts in.

    metric: of the layer, with its inputs; None for the norm of Frobenius. What it goes towards is the `weight`.
    """

    weight: Tensor
    rounded: Tensor
    metric: Metric | None

    @cached_property
    def error(self) -> Tensor:
        """(1, N, K), float64."""
        return (self.weight.double() - self.rounded.double())[None]

    @cached_property
    def norm(self) -> Metric | None:
        """As the metric, of a layer whose weight is the error; ValueError if it does not know the inputs."""
        return None if self.metric is None else _metric_of_error(self.weight.double()[None], self.error, self.metric)

    @property
    def squared_norm(self) -> float:
        """Of the weight, in the unit of the errors."""
        return loss_of(self.weight, self.weight, self.metric).squared_norm

    def left(self) -> Tensor:
        """What corrections of rank 0, 1, ..., m leave of the squared error: (m + 1,), float64.

        In the unit of `squared_errors` and of `Loss`. Raises FactorizationError on NaN or infinity.
        """
        if not self.error.any():
            return self.error.new_zeros(min(self.error.shape[1:]) + 1)
        squares = spectrum(self.error).square() if self.norm is None else squared_errors(self.error, self.norm)
        left = squares[0].flip(0).cumsum(0).flip(0)
        return torch.cat((left, left.new_zeros(1)))

    def correction(self, rank: int, dtype: torch.dtype) -> Factors:
        """The factors (1, R, K) and (1, N, R) in this dtype whose product is nearest to the error.

        Raises FactorizationError on NaN, infinity or an eigensolver that does not converge.
        """
        if not self.error.any():
            down, up = torch.zeros(rank, self.error.shape[2], dtype=dtype), torch.zeros(self.error.shape[1], rank)
            return Factors(*(each.to(self.error.device, dtype)[None] for each in (down, up)), 0.0, 0.0)
        plain = self.norm is None
        found = factorize(self.error, rank) if plain else factorize_weighted(self.error, self.norm, rank)
        up, down = rounded(found.up, found.down, dtype)
        return replace(found, up=up, down=down)

    def loss(self, added: Tensor) -> Loss:
        """What is lost with these numbers (N, K) added to the weight that the layer has."""
        return loss_of(self.weight, self.rounded.double() + added.double(), self.metric)


def corrected_errors(matrices: Tensor, metric: Metric | None, grid: Grid, on_grid: Quantized | None = None) -> Tensor:
    """What a weight (1, N, K) loses on a grid with corrections of rank 0, 1, ..., m: (m + 1,), float64.

    Squared, in the unit of `squared_errors`; of one rounding of the weight, by which `quantized_corrected` begins.
    on_grid: the weight as `quantized_dense` rounds it, if somebody has it. Raises FactorizationError on NaN or
    infinity, ValueError on a metric without inputs or groups that do not divide K.
    """
    weight = goal_of(matrices, metric)[0]
    if on_grid is None:
        on_grid = _on_grid(weight, inputs_of(metric), grid, matrices.dtype)
    return Lost(weight, numbers(on_grid), metric).left()


@dataclass(frozen=True)
class QuantizedCorrected:
    """A weight (N, K) on a grid and the factors that are added, down (R, K) and up (N, R): plain, or on a grid too."""

    weight: Quantized
    down: Tensor | Quantized
    up: Tensor | Quantized
    loss: Loss


def quantized_corrected(
    matrices: Tensor, metric: Metric | None, rank: int, grid: Grid, factor_grid: Grid | None = None, again: int = 0
) -> QuantizedCorrected:
    """A weight (1, N, K) on a grid, with the factors of this rank that give most of the rest back.

    factor_grid: that of the factors; None: in the dtype of the matrices. again: how often the weight is rounded once
    more, without what the factors hold, and these are fitted to what that loses; the best time counts. Raises
    FactorizationError on NaN, infinity or an eigensolver that does not converge; ValueError on a metric without inputs,
    or groups that do not divide K or R.
    """
    weight = goal_of(matrices, metric)[0]
    best = last = _rounded(weight, torch.zeros_like(weight), metric, rank, grid, matrices.dtype)
    for _ in range(again):
        last = _rounded(weight, last.added, metric, rank, grid, matrices.dtype)
        best = min(best, last, key=lambda each: each.loss.squared_error)
    if factor_grid is None:
        return QuantizedCorrected(best.on_grid, best.factors.down[0], best.factors.up[0], best.loss)
    lost = best.lost
    held = quantized_factors(lost.error, lost.norm, rank, factor_grid, best.factors, matrices.dtype)
    loss = lost.loss(numbers(held.up) @ numbers(held.down))
    return QuantizedCorrected(best.on_grid, held.down, held.up, loss)


def on_grids(
    matrices: Tensor, metric: Metric | None, rank: int | None, storage: Storage
) -> QuantizedDense | QuantizedFactors | QuantizedCorrected:
    """A weight (1, N, K) as this storage has it, dense for rank None; raises as the functions for each."""
    if rank is None:
        return quantized_dense(matrices, metric, storage.grid)
    if storage.corrected:
        return quantized_corrected(matrices, metric, rank, storage.grid, storage.factor_grid)
    return quantized_factors(matrices, metric, rank, storage.grid)


@dataclass(frozen=True)
class _Try:
    """A rounded weight with its best factors, their product, and what is lost."""

    on_grid: Quantized
    lost: Lost
    factors: Factors
    added: Tensor
    loss: Loss


def _rounded(weight: Tensor, held: Tensor, metric: Metric | None, rank: int, grid: Grid, dtype: torch.dtype) -> _Try:
    """The weight without what is held already, on the grid, and factors of what it lacks of the whole."""
    on_grid = _on_grid(weight - held, inputs_of(metric), grid, dtype)
    lost = Lost(weight, numbers(on_grid), metric)
    factors = lost.correction(rank, dtype)
    added = (factors.up.double() @ factors.down.double())[0]
    return _Try(on_grid, lost, factors, added, lost.loss(added))


def _metric_of_error(weight: Tensor, error: Tensor, metric: Metric) -> Metric:
    """The metric of a layer of this weight, as it is of one whose weight is the error."""
    inputs, gradient = inputs_of(metric)[None], metric.gradient
    if metric.on_inputs:
        data, mean = inputs, metric.input_mean
    else:
        data = error @ inputs @ error.mT
        mean = None if metric.input_mean is None else (error @ metric.input_mean[..., None])[..., 0]
    if metric.on_inputs and gradient is not None:
        gradient = gradient_of_error(weight, error, gradient)
    return Metric(
        data,
        gradient,
        metric.on_inputs,
        mean,
        shift=metric.shift,
        inputs=inputs,
        input_mean=metric.input_mean,
    )
