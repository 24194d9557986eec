"""The best approximation of a rank in the norm of a metric, by eigenvectors alone: no Cholesky factor, and the only
inverses are of matrices that shrinkage keeps well-conditioned.

Without gradients the best W' of rank R is U U^T W, with U the leading eigenvectors of W C W^T (DRONE, Chen et al. 2021;
SVD-LLM, Wang et al. 2024, reach the same minimiser through a Cholesky factor of C); with them R W C W^T R takes its
place (K-FAC SVD). The discarded eigenvalues add up to the squared error exactly.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from . import parts
from .factors import Factors
from .moments import Metric
from .svd import FactorizationError, _checked, _signs

# Columns are made orthonormal by the Cholesky factor of their Gram matrix, which costs as many units as the square of
# their condition number. Up to the first share a second time makes up for it (Yamamoto et al., 2015), and is worth it
# from that of a dtype's unit.
_CHOLESKY, _LEFT = 1e-4, 0.125


@dataclass(frozen=True)
class _Basis:
    """The approximation as a projection on the smaller side: W P of the matrices on the input side, P W on the output
    side, with P = up @ down; up (G, m, R), down (G, R, m). squares: the eigenvalues (G, m), descending."""

    up: Tensor
    down: Tensor
    squares: Tensor

    @property
    def lost(self) -> Tensor:
        """I - P."""
        eye = torch.eye(self.up.shape[-2], dtype=self.up.dtype, device=self.up.device).expand(len(self.up), -1, -1)
        return torch.baddbmm(eye, self.up, self.down, alpha=-1)


def squared_errors(matrices: Tensor, metric: Metric) -> Tensor:
    """What each direction adds to the squared error if it is cut: (G, m) for matrices (G, N, K), descending, float64.

    Raises FactorizationError on NaN or infinity.
    """
    problem = _problem(_inner(_checked(matrices), metric), metric)[0]
    return torch.linalg.eigvalsh(problem).flip(-1).clamp_min(0)


def factorize_weighted(matrices: Tensor, metric: Metric, rank: int) -> Factors:
    """The approximation of rank `rank` per matrix that is best in this metric: matrices (G, N, K) -> Factors.

    `up` has orthonormal columns. In a 16-bit dtype `down` is fitted to the rounded `up`. Raises FactorizationError on
    NaN, infinity or an eigensolver that does not converge.
    """
    matrices = _checked(matrices)
    gram = parts.gram(matrices, _right(metric)) if metric.on_inputs else None
    basis = _basis(gram if metric.on_inputs and metric.gradient is None else metric.gradient, metric, rank)
    output_error = None if metric.gradient is None else _output_error(gram, metric, basis)
    shift = None if metric.mean is None else _mean_error(matrices, metric, basis)
    up, down = _on_inputs(matrices, metric, basis, gram) if metric.on_inputs else _on_outputs(matrices, metric, basis)
    tail, total = basis.squares[:, rank:].sum().item(), basis.squares.sum().item()
    return Factors(down, up, tail**0.5, total**0.5, shift, output_error)


def rounded(up: Tensor, down: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Both factors in `dtype`; in a 16-bit one `down` is fitted again to the `up` that rounding left."""
    rounded_up = up.new_empty(up.shape, dtype=dtype)
    return rounded_up, _in_dtype(_fit(rounded_up, parts.parts(up, 1), down), dtype)


def _fit(rounded_up: Tensor, columns: Iterable[tuple[slice, Tensor]], small: Tensor) -> Tensor:
    """Round columns, which come some rows at a time; what is to be multiplied by them, fitted to what rounding left."""
    given_given, given_exact = small.new_zeros(2, len(small), rounded_up.shape[-1], rounded_up.shape[-1])
    is_coarse = torch.finfo(rounded_up.dtype).bits == 16
    for rows, exact in columns:
        rounded_up[:, rows] = exact
        if is_coarse:
            given = rounded_up[:, rows].double()
            given_given.baddbmm_(given.mT, given)
            given_exact.baddbmm_(given.mT, exact)
    return torch.linalg.solve(given_given, given_exact @ small) if is_coarse else small


def _in_dtype(down: Tensor, dtype: torch.dtype) -> Tensor:
    down = down.to(dtype).contiguous()
    if not bool(down.isfinite().all()):
        raise FactorizationError(f"the factors do not fit {str(dtype).removeprefix('torch.')}")
    return down


def _right(metric: Metric) -> Tensor | None:
    """What stands on the right of the layer's own matrices in those to approximate."""
    return metric.towards if metric.towards_inputs else None


def _inner(matrices: Tensor, metric: Metric) -> Tensor | None:
    """What the error is measured by beside the data: the gradient, else on the input side W^T W, on the output side
    nothing."""
    if metric.on_inputs and metric.gradient is None:
        return parts.gram(matrices, _right(metric))
    return metric.gradient


def _problem(inner: Tensor | None, metric: Metric) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The eigenproblem, whose eigenvectors are in the basis of those of the norm's one matrix, which follow: the roots
    of its eigenvalues (G, m) and the vectors (G, m, m); None for the identity."""
    positive, other = (metric.data, inner) if metric.on_inputs else (inner, metric.data)
    if positive is None:
        return other, None, None
    values, vectors = _eigh(positive)
    # Shrinkage bounds the condition; the floor is for what float64 makes of it.
    roots = values.clamp_min(values[..., -1:] * 1e-14).clamp_min(torch.finfo(values.dtype).tiny).sqrt()
    problem = vectors.mT @ (other @ vectors)
    return problem.mul_(roots[..., None, :]).mul_(roots[..., None]), roots, vectors


def _basis(inner: Tensor | None, metric: Metric, rank: int) -> _Basis:
    problem, roots, vectors = _problem(inner, metric)
    squares, leading = _eigh(problem)
    squares, leading = squares.flip(-1).clamp_min(0), leading[..., leading.shape[-1] - rank :].flip(-1)
    if roots is None:
        return _Basis(leading, leading.mT, squares)
    larger, smaller = vectors @ (leading * roots[..., None]), vectors @ (leading / roots[..., None])
    return _Basis(larger, smaller.mT, squares) if metric.on_inputs else _Basis(smaller, larger.mT, squares)


def _eigh(symmetric: Tensor) -> tuple[Tensor, Tensor]:
    try:
        return torch.linalg.eigh(symmetric)
    except torch.linalg.LinAlgError as error:
        raise FactorizationError(f"the eigensolver did not converge: {error}") from error


def _on_outputs(matrices: Tensor, metric: Metric, basis: _Basis) -> tuple[Tensor, Tensor]:
    """The factors, of which all but `down` is on the smaller side."""
    exact, triangle = torch.linalg.qr(basis.up)
    small = triangle @ basis.down
    if metric.towards is not None and not metric.towards_inputs:
        small = small @ metric.towards
    up = exact.new_empty(exact.shape, dtype=matrices.dtype)
    small, signs = _fit(up, parts.parts(exact, 1), small), _signs(exact)
    small = signs.mT * small
    if (right := _right(metric)) is None:
        down = parts.before(small, matrices, matrices.dtype)
    else:
        down = parts.before(small, matrices) @ right
    return up.mul_(signs.to(up.dtype)), _in_dtype(down, matrices.dtype)


def _on_inputs(matrices: Tensor, metric: Metric, basis: _Basis, gram: Tensor) -> tuple[Tensor, Tensor]:
    """The factors, of which all but `up` is on the smaller side; gram: of the matrices to approximate."""
    columns, triangle = _orthonormal(matrices, _right(metric), basis.up, gram)
    up = matrices.new_empty(*matrices.shape[:2], basis.up.shape[-1])
    small = _fit(up, columns, triangle @ basis.down)
    signs = _signs(up)
    return up.mul_(signs), _in_dtype(signs.mT * small, matrices.dtype)


def _orthonormal(
    matrices: Tensor, right: Tensor | None, left_of: Tensor, gram: Tensor
) -> tuple[Iterable[tuple[slice, Tensor]], Tensor]:
    """An orthonormal basis of the columns of W T X, some rows at a time, and the triangle before it (T: `right`).

    Never all of them in float64, but where they are nearly dependent.
    """
    eps, X = torch.finfo(torch.float64).eps, left_of
    from_right = X if right is None else right @ X
    factor, failed = torch.linalg.cholesky_ex(X.mT @ (gram @ X))
    lost = eps * _condition(factor) ** 2
    if bool(failed.any()) or not lost < _CHOLESKY:
        exact, triangle = torch.linalg.qr(parts.times(matrices, from_right))
        return parts.parts(exact, 1), triangle
    columns, triangle = torch.linalg.solve_triangular(factor.mT, from_right, upper=True, left=False), factor.mT
    if lost > _LEFT * torch.finfo(matrices.dtype).eps:
        again = torch.linalg.cholesky(parts.gram(matrices, columns))
        columns = torch.linalg.solve_triangular(again.mT, columns, upper=True, left=False)
        triangle = again.mT @ triangle
    return ((rows, part @ columns) for rows, part in parts.parts(matrices, 1)), triangle


def _condition(triangles: Tensor) -> float:
    """About the largest condition number of these."""
    diagonal = triangles.diagonal(dim1=-2, dim2=-1)
    return (diagonal.amax(-1) / diagonal.amin(-1)).max().item()


def _mean_error(matrices: Tensor, metric: Metric, basis: _Basis) -> Tensor:
    """(W - W') mu for the mean input mu: (G, N), from the mean output W mu where only that is known."""
    lost = basis.lost @ metric.mean[..., None]
    if metric.on_inputs:
        right = _right(metric)
        lost = parts.times(matrices, lost if right is None else right @ lost)
    return lost[..., 0] if metric.shift is None else lost[..., 0] + metric.shift


def _output_error(gram: Tensor | None, metric: Metric, basis: _Basis) -> float:
    """The relative error of the outputs, whatever it does to the loss."""
    E = basis.lost
    after = E @ metric.data
    lost = ((E if gram is None else gram @ E) * after).sum().clamp_min(0).item()
    total = (metric.data.diagonal(dim1=-2, dim2=-1) if gram is None else gram * metric.data).sum().item()
    return (lost / total) ** 0.5 if total > 0 else 0.0
