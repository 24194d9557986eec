"""What the op of pivoted storage means, in plain PyTorch: as `reference` says it of the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor
from torch.nn import functional as F

from .reference import BACKWARD, End, Forward, apart, factors_backward, finished, in_order, rows


class PivotedGrads(NamedTuple):
    x: Tensor | None
    down: Tensor | None
    up: Tensor | None
    bias: Tensor | None
    pivot_bias: Tensor | None
    order: None  # places have no gradient
    residual: Tensor | None


def low_rank_pivoted(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None,
    pivot_bias: Tensor | None,
    order: Tensor,
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """activation(cat(h + pivot_bias, h @ up.T + bias) in order) + residual with h = x @ down.T

    x: (..., K)  down: (R, K)  up: (N - R, R)  bias: (N - R,)  pivot_bias: (R,)  order: (N,)  residual: (..., N)
    ->  (..., N)
    """
    return low_rank_pivoted_forward(x, down, up, bias, pivot_bias, order, activation, residual).y


def low_rank_pivoted_forward(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None,
    pivot_bias: Tensor | None,
    order: Tensor,
    activation: str,
    residual: Tensor | None,
) -> Forward:
    """low_rank_pivoted with what lies between: h is without pivot_bias."""
    h = F.linear(x, down)
    return Forward(finished(in_order(h, up, bias, pivot_bias, order), activation, residual), h)


def pivoted_backward(
    grad: Tensor,
    h: Tensor,
    up: Tensor,
    bias: Tensor | None,
    pivot_bias: Tensor | None,
    order: Tensor,
    activation: str,
    needs_bias: bool,
) -> End:
    """Through activation and both biases, in the order of outputs: grad (..., N) times activation'(z), with z computed
    anew from h. The bias is (N,), of all outputs."""
    dz = grad if activation == "none" else BACKWARD[activation](grad, in_order(h, up, bias, pivot_bias, order))
    return End(dz, rows(dz).sum(0) if needs_bias else None)


def low_rank_pivoted_backward(
    grad: Tensor,
    x: Tensor,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None,
    pivot_bias: Tensor | None,
    order: Tensor,
    h: Tensor,
    activation: str,
    needs: PivotedGrads,
    end: Callable[..., End] = pivoted_backward,
) -> PivotedGrads:
    """The gradients for which `needs` is true, from grad (..., N) of y and the forward pass's h.

    end: what computes `pivoted_backward`.
    """
    R, needs_bias = down.size(0), bool(needs.bias or needs.pivot_bias)
    dz, sums = end(grad, h, up, bias, pivot_bias, order, activation, needs_bias)
    own, others = apart(dz, order, R)
    dx, ddown, dup = factors_backward(others, x, down, up, h, needs.x, needs.down, needs.up, own)
    dpivot_bias, dbias = (None, None) if sums is None else apart(sums, order, R)
    return PivotedGrads(
        dx,
        ddown,
        dup,
        dbias if needs.bias else None,
        dpivot_bias if needs.pivot_bias else None,
        None,
        grad if needs.residual else None,
    )
