"""The linear op: its law, its outputs, and `shrank::low_rank_linear` made of them."""

from __future__ import annotations

from torch import Tensor

from . import cpu, reference
from .expand_backward import expand_backward
from .law import check_activation, check_alike, check_bias, check_down, check_residual, refusal, shape_of
from .reference import Forward, Grads
from .registration import Op, register

NAME = "low_rank_linear"


def check_low_rank_linear(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None,
    casts: bool = False,
) -> None:
    """Raise RuntimeError on shapes, names, dtypes and devices that do not fit.

    casts: autocast makes the dtypes alike.
    """
    check_activation(NAME, activation)
    check_down(NAME, x, down)
    if up.dim() != 2 or up.size(1) != down.size(0):
        raise refusal(NAME, f"up is {shape_of(up)}, wanted (N, {down.size(0)}) for down {shape_of(down)}")
    check_bias(NAME, bias, up)
    check_residual(NAME, residual, (*x.shape[:-1], up.size(0)))
    check_alike(NAME, casts, x=x, down=down, up=up, bias=bias, residual=residual)


def _forward(
    x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None, activation: str, residual: Tensor | None
) -> Forward:
    outputs = reference.low_rank_linear_forward(x, down, up, bias, activation, residual)
    return Forward(*(each.contiguous() for each in outputs))


def _infer(
    x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None, activation: str, residual: Tensor | None
) -> Tensor:
    by = cpu.fastest(x, down, up, bias, residual) or reference
    return by.low_rank_linear(x, down, up, bias, activation, residual).contiguous()


def _empty(
    x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None, activation: str, residual: Tensor | None
) -> Forward:
    return Forward(*(x.new_empty((*x.shape[:-1], factor.size(0))) for factor in (up, down)))


LINEAR = Op(
    name=NAME,
    arguments="Tensor x, Tensor down, Tensor up, Tensor? bias=None, str activation='none', Tensor? residual=None",
    outputs=Forward,
    grads=Grads,
    check=check_low_rank_linear,
    forward=_forward,
    backward=reference.low_rank_linear_backward,
    empty=_empty,
    end=expand_backward,
    end_by_pytorch=reference.expand_backward,
    infer=_infer,
)
register(LINEAR)
