"""What the ops mean, in plain PyTorch: the oracle of the tests."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import linear


def low_rank_linear(x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None = None) -> Tensor:
    """x: (..., K)  down: (R, K)  up: (N, R)  bias: (N,)  ->  (..., N)"""
    return linear(linear(x, down), up, bias)
