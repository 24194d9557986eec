"""Products of weights with matrices in a higher precision, in which only a part of a weight is at a time: the whole
would be several times as large as all else.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_NUMBERS = 1 << 22  # of a weight at a time: 32 MiB in float64


def parts(matrices: Tensor, dim: int, dtype: torch.dtype = torch.float64) -> Iterator[tuple[slice, Tensor]]:
    """Matrices (G, N, K) in this dtype, some of their rows, with dim=1, or columns, with dim=2, at a time."""
    size = matrices.shape[dim]
    step = max(1, _NUMBERS * size // max(matrices.numel(), 1))
    for start in range(0, size, step):
        stop = min(start + step, size)
        yield slice(start, stop), matrices.narrow(dim, start, stop - start).to(dtype)


def times(matrices: Tensor, right: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """W X for right X (G, K, R), in this dtype."""
    product = matrices.new_empty(*matrices.shape[:2], right.shape[-1], dtype=dtype)
    for rows, part in parts(matrices, 1, right.dtype):
        product[:, rows] = part @ right
    return product


def before(left: Tensor, matrices: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """X W for left X (G, R, N), in this dtype."""
    product = matrices.new_empty(len(matrices), left.shape[1], matrices.shape[2], dtype=dtype)
    for columns, part in parts(matrices, 2, left.dtype):
        product[..., columns] = left @ part
    return product


def gram(matrices: Tensor, right: Tensor | None = None) -> Tensor:
    """(W X)^T (W X) for right X (G, K, R), by default the identity."""
    side = matrices.shape[2] if right is None else right.shape[2]
    product = matrices.new_zeros(len(matrices), side, side, dtype=torch.float64)
    for _, part in parts(matrices, 1):
        seen = part if right is None else part @ right
        product.baddbmm_(seen.mT, seen)
    return product


def through(matrices: Tensor, moment: Tensor) -> Tensor:
    """W C W^T for a second moment C of inputs (G, K, K), or (G, K) if that is diagonal."""
    side = matrices.shape[1]
    product = matrices.new_zeros(len(matrices), side, side, dtype=torch.float64)
    if moment.ndim == 2:
        for columns, part in parts(matrices, 2):
            product.baddbmm_(part * moment[:, None, columns], part.mT)
        return product
    for rows, part in parts(matrices, 1):
        seen = part @ moment
        for others, other in parts(matrices, 1):
            product[:, rows, others] = seen @ other.mT
    return product
