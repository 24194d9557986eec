"""The op of pivoted storage, where h is outputs itself: its law, its outputs, and `shrank::low_rank_pivoted` made of
them."""

from __future__ import annotations

from torch import Tensor

from . import pivoted_reference
from .law import (
    check_activation,
    check_alike,
    check_bias,
    check_down,
    check_order,
    check_residual,
    check_shape,
    refusal,
    shape_of,
)
from .pivoted_backward import pivoted_backward
from .pivoted_reference import PivotedGrads
from .reference import Forward
from .registration import Op, register

NAME = "low_rank_pivoted"


def check_low_rank_pivoted(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None,
    pivot_bias: Tensor | None,
    order: Tensor,
    activation: str,
    residual: Tensor | None,
    casts: bool = False,
) -> None:
    """Raise RuntimeError on shapes, names, dtypes and devices that do not fit.

    casts: autocast makes the dtypes alike.
    """
    check_activation(NAME, activation)
    check_down(NAME, x, down)
    R = down.size(0)
    if up.dim() != 2 or up.size(1) != R:
        raise refusal(NAME, f"up is {shape_of(up)}, wanted (N - R, {R}) for down {shape_of(down)}")
    check_bias(NAME, bias, up)
    check_shape(NAME, "pivot_bias", pivot_bias, (R,))
    check_shape(NAME, "order", order, (R + up.size(0),))
    check_residual(NAME, residual, (*x.shape[:-1], R + up.size(0)))
    check_alike(NAME, casts, x=x, down=down, up=up, bias=bias, pivot_bias=pivot_bias, residual=residual)
    check_order(NAME, order, "x", x)


def _forward(*given: object) -> Forward:
    return Forward(*(each.contiguous() for each in pivoted_reference.low_rank_pivoted_forward(*given)))


def _empty(x: Tensor, down: Tensor, up: Tensor, *_: object) -> Forward:
    R = down.size(0)
    return Forward(*(x.new_empty((*x.shape[:-1], outputs)) for outputs in (R + up.size(0), R)))


PIVOTED = Op(
    name=NAME,
    arguments="Tensor x, Tensor down, Tensor up, Tensor? bias, Tensor? pivot_bias, Tensor order,"
    " str activation='none', Tensor? residual=None",
    outputs=Forward,
    grads=PivotedGrads,
    check=check_low_rank_pivoted,
    forward=_forward,
    backward=pivoted_reference.low_rank_pivoted_backward,
    empty=_empty,
    end=pivoted_backward,
    end_by_pytorch=pivoted_reference.pivoted_backward,
)
register(PIVOTED)
