"""Truncated SVD of a stack of matrices, exact, by the eigenvectors of the smaller Gram matrix.

Eckart-Young: the best rank-R approximation of W in Frobenius norm is U_R U_R^T W with U_R the leading left singular
vectors, and these are the leading eigenvectors of W W^T. The projection form needs no division by a singular value, so
it is exact at full rank and for rank-deficient W.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import parts
from .factors import Factors

# How far the squared error may exceed the optimum: half of 1e-5 on the error itself.
_EXCESS = 1e-5
# Backward error of a float32 Gram matrix and its eigh, in units of eps * largest eigenvalue. Measured on random and
# trained 192..1536 matrices: at most 4; tests/linalg/test_svd.py holds the resulting error to the optimum.
_BACKWARD_ERROR = 8.0


class FactorizationError(RuntimeError):
    """A matrix that cannot be factorised; the layer that owns it stays dense."""


def _gram(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """The smaller Gram matrices: W W^T (G, N, N) if N <= K, else W^T W (G, K, K); only their lower triangles, which is
    what eigh reads."""
    rows, cols = matrices.shape[-2:]
    wide = matrices if rows <= cols else matrices.mT
    size = wide.shape[-2]
    gram = wide.new_zeros(len(wide), size, size, dtype=dtype)
    step = max(64, -(-size // 8))
    for _, W in parts.parts(wide, 2, dtype):
        for start in range(0, size, step):
            stop = min(start + step, size)
            gram[:, start:stop, :stop] += W[:, start:stop] @ W[:, :stop].mT
    return gram


def spectrum(matrices: Tensor) -> Tensor:
    """Singular values (G, min(N, K)), descending, float64; raises FactorizationError on NaN or infinity."""
    matrices = _checked(matrices)
    if matrices.dtype == torch.float64:
        return torch.linalg.svdvals(matrices)
    return torch.linalg.eigvalsh(_gram(matrices, torch.float64)).flip(-1).clamp_min(0).sqrt()


def energy_curve(spectrum: Tensor) -> Tensor:
    """Share of the squared Frobenius norm kept by ranks 0..m per group: (m + 1,), from 0 to 1."""
    squares = spectrum.double().square().sum(0)
    kept = torch.cat([squares.new_zeros(1), squares.cumsum(0)])
    return kept / kept[-1] if kept[-1] > 0 else torch.ones_like(kept)


def factorize(matrices: Tensor, rank: int) -> Factors:
    """The best approximation of rank `rank` per matrix: matrices (G, N, K) -> Factors, in the matrices' dtype.

    The singular values are split evenly (sqrt on each side) and the largest entry of every singular vector of the
    smaller side is positive. Raises FactorizationError on NaN, infinity or an eigensolver that does not converge.
    """
    matrices = _checked(matrices)
    singular, vectors = _leading(matrices, rank)
    # A floor keeps the split finite for zero singular values; the product does not depend on it.
    root = singular[:, None, :rank].clamp_min(_tiny(singular)).sqrt().to(vectors.dtype)
    # U U^T W, or W V V^T where V is the smaller side; scaling the vectors is cheaper than scaling the product.
    if matrices.shape[-2] <= matrices.shape[-1]:
        up, down = vectors * root, parts.before((vectors / root).mT, matrices, matrices.dtype)
    else:
        up, down = parts.times(matrices, vectors / root, matrices.dtype), (vectors * root).mT
    squares = singular.double().square()
    tail, total = squares[:, rank:].sum().item(), squares.sum().item()
    down, up = down.to(matrices.dtype).contiguous(), up.to(matrices.dtype).contiguous()
    if matrices.dtype == torch.float16 and not (_is_finite(down) and _is_finite(up)):
        raise FactorizationError("the factors do not fit float16")
    return Factors(down, up, tail**0.5, total**0.5)


def _leading(matrices: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """All singular values (G, m), descending, and the leading singular vectors of the smaller side (G, m, rank)."""
    if matrices.dtype != torch.float64:
        squares, vectors = _eigh(_gram(matrices, torch.float32), rank)
        if not _single_precision_suffices(squares, rank):
            squares, vectors = _eigh(_gram(matrices, torch.float64), rank)
        return squares.clamp_min(0).sqrt(), vectors * _signs(vectors)
    # The Gram matrix would halve the digits of float64 weights.
    try:
        U, S, Vh = torch.linalg.svd(matrices, full_matrices=False)
    except torch.linalg.LinAlgError as error:
        raise FactorizationError(f"the SVD did not converge: {error}") from error
    vectors = (U if matrices.shape[-2] <= matrices.shape[-1] else Vh.mT)[..., :rank]
    return S, vectors * _signs(vectors)


def _eigh(gram: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """All eigenvalues, descending, and the eigenvectors of the `rank` largest."""
    try:
        values, vectors = torch.linalg.eigh(gram)
    except torch.linalg.LinAlgError as error:
        raise FactorizationError(f"the eigensolver did not converge: {error}") from error
    return values.flip(-1), vectors[..., vectors.shape[-1] - rank :].flip(-1)


def _single_precision_suffices(squares: Tensor, rank: int) -> bool:
    """Whether float32 eigenvectors are as good as exact ones for cutting at `rank`, and tell the error as well.

    They are exact for a Gram matrix off by e, which turns the kept vector i towards the cut vector j by at most
    e / (gap of their eigenvalues) and so costs at most e^2 / gap, and never more than the gap (Davis-Kahan). The sum
    of the cut eigenvalues is off by about e as well.
    """
    kept, cut = squares[:, :rank, None], squares[:, None, rank:]
    error = _BACKWARD_ERROR * torch.finfo(squares.dtype).eps * squares[:, 0]
    gap = kept - cut
    excess = torch.minimum(gap, error[:, None, None].square() / gap).sum((-2, -1))
    return bool((torch.maximum(excess, error) <= _EXCESS * cut.clamp_min(0).sum((-2, -1))).all())


def _signs(columns: Tensor) -> Tensor:
    """+1 or -1 per column (G, 1, R), so that its entry of largest magnitude becomes positive."""
    largest = columns.gather(-2, columns.abs().argmax(-2, keepdim=True))
    return torch.where(largest < 0, -1.0, 1.0).to(columns.dtype)


def _checked(matrices: Tensor) -> Tensor:
    if not _is_finite(matrices):
        raise FactorizationError("the weight holds NaN or infinity")
    return matrices.detach()


def _is_finite(tensor: Tensor) -> bool:
    # One reduction settles it unless finite numbers add up to infinity; a boolean copy is needed only then.
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())


def _tiny(singular: Tensor) -> float:
    largest = singular.max().item() if singular.numel() else 0.0
    return max(largest * 1e-8, torch.finfo(torch.float32).tiny)
