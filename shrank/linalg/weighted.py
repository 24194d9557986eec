"""The best approximation of a rank in the norm of a metric, by eigenvectors alone: no Cholesky factor, and the only
inverses are of matrices that shrinkage keeps well-conditioned.

Without gradients the best W' of rank R is U U^T W, with U the leading eigenvectors of W C W^T (DRONE, Chen et al. 2021;
SVD-LLM, Wang et al. 2024, reach the same minimiser through a Cholesky factor of C); with them R W C W^T R takes its
place (K-FAC SVD). The discarded eigenvalues add up to the squared error exactly.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .factors import Factors
from .moments import Metric
from .svd import FactorizationError, _checked, _signs

_ROWS = 2048  # of a matrix that are worked on together


def squared_errors(matrices: Tensor, metric: Metric) -> Tensor:
    """What each direction adds to the squared error if it is cut: (G, m) for matrices (G, N, K), descending, float64.

    Raises FactorizationError on NaN or infinity.
    """
    problem = _problem(_inner(matrices, metric), metric)[0]
    return torch.linalg.eigvalsh(problem).flip(-1).clamp_min(0)


def factorize_weighted(matrices: Tensor, metric: Metric, rank: int) -> Factors:
    """The approximation of rank `rank` per matrix that is best in this metric: matrices (G, N, K) -> Factors.

    `up` has orthonormal columns. In a 16-bit dtype `down` is fitted to the rounded `up`. Raises FactorizationError on
    NaN, infinity or an eigensolver that does not converge.
    """
    problem, left, right = _problem(_inner(matrices, metric), metric)
    try:
        squares, vectors = torch.linalg.eigh(problem)
    except torch.linalg.LinAlgError as error:
        raise FactorizationError(f"the eigensolver did not converge: {error}") from error
    squares, leading = squares.flip(-1).clamp_min(0), vectors[..., vectors.shape[-1] - rank :].flip(-1)
    del problem, vectors  # before the matrices in float64, which are larger still
    W = _goal(matrices, metric)
    if metric.on_inputs:
        up, down = W @ (left @ leading), leading.mT @ right  # never W @ left, which is as large as W
    else:
        up, down = left @ leading, (leading.mT @ right) @ W
    up, triangle = torch.linalg.qr(up)
    signs = _signs(up)
    up, down = up * signs, signs.mT * (triangle @ down)
    basis = left, leading, right
    shift = None if metric.mean is None else _mean_error(W, up, down, metric, basis)
    if metric.shift is not None:
        shift = shift + metric.shift
    output_error = None if metric.gradient is None else _output_error(W, up, down, metric, basis)
    up, down = rounded(up, down, matrices.dtype)
    tail, total = squares[:, rank:].sum().item(), squares.sum().item()
    return Factors(down, up, tail**0.5, total**0.5, shift, output_error)


def rounded(up: Tensor, down: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Both factors in `dtype`; in a 16-bit one `down` is fitted again to the `up` that rounding left."""
    rounded_up = up.to(dtype)
    if torch.finfo(dtype).bits == 16:
        given = rounded_up.double()
        down = torch.linalg.solve(given.mT @ given, given.mT @ up @ down)
    down = down.to(dtype)
    if not bool(down.isfinite().all()):
        raise FactorizationError(f"the factors do not fit {str(dtype).removeprefix('torch.')}")
    return rounded_up.contiguous(), down.contiguous()


def _goal(matrices: Tensor, metric: Metric) -> Tensor:
    """What to approximate, float64."""
    W = _checked(matrices).double()
    return W if metric.goal is None else metric.goal


def _inner(matrices: Tensor, metric: Metric) -> Tensor | None:
    """What the error is measured by beside the data: the gradient, else on the input side W^T W, on the output side
    nothing. The matrices in float64, several times as large as all else, are gone when it returns."""
    W = _goal(matrices, metric)
    return W.mT @ W if metric.on_inputs and metric.gradient is None else metric.gradient


def _problem(inner: Tensor | None, metric: Metric) -> tuple[Tensor, Tensor, Tensor]:
    """(P, L, M): P = V diag(squares) V^T has the leading V with up = L V, down = V^T M W on the output side, and
    up = W L V, down = V^T M on the input side."""
    if metric.on_inputs:
        root, inverse = _roots(metric.data)
        return root @ inner @ root, root, inverse
    if inner is None:
        eye = torch.eye(metric.data.shape[-1], dtype=metric.data.dtype, device=metric.data.device)
        return metric.data, eye.expand_as(metric.data), eye.expand_as(metric.data)
    root, inverse = _roots(inner)
    return root @ metric.data @ root, inverse, root


def _roots(positive: Tensor) -> tuple[Tensor, Tensor]:
    """The symmetric square root and its inverse."""
    values, vectors = torch.linalg.eigh(positive)
    # Shrinkage bounds the condition; the floor is for what float64 makes of it.
    root = values.clamp_min(values[..., -1:] * 1e-14).clamp_min(torch.finfo(values.dtype).tiny).sqrt()
    return (vectors * root[..., None, :]) @ vectors.mT, (vectors / root[..., None, :]) @ vectors.mT


def _mean_error(W: Tensor, up: Tensor, down: Tensor, metric: Metric, basis: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """(W - W') mu for the mean input mu: (G, N), from the mean output W mu where only that is known."""
    mean = metric.mean[..., None]
    if metric.on_inputs:
        return (W @ mean - up @ (down @ mean))[..., 0]
    left, leading, right = basis
    return (mean - left @ leading @ (leading.mT @ right @ mean))[..., 0]


def _output_error(W: Tensor, up: Tensor, down: Tensor, metric: Metric, basis: tuple[Tensor, Tensor, Tensor]) -> float:
    """The relative error of the outputs, whatever it does to the loss; by some rows at a time, as all would be several
    matrices as large as the weight."""
    if metric.on_inputs:
        kept, whole = (up, down), W
    else:
        left, leading, right = basis
        whole = torch.eye(W.shape[-2], dtype=W.dtype, device=W.device).expand_as(metric.data)
        kept = left @ leading, leading.mT @ right
    energies = metric.data.new_zeros(2)
    for rows in torch.arange(whole.shape[-2], device=W.device).split(_ROWS):
        part = whole[..., rows, :]
        for number, m in enumerate((part - kept[0][..., rows, :] @ kept[1], part)):
            energies[number] += (m @ metric.data * m).sum()
    lost, total = energies.clamp_min(0).tolist()
    return (lost / total) ** 0.5 if total else 0.0
