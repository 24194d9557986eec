"""The op of gated layers, as in the MLPs of language models: its law, its outputs, and `shrank::low_rank_gated` made of
them. Gate and value may each be pivoted."""

from __future__ import annotations

from torch import Tensor

from . import cpu, reference
from .gated_backward import gated_backward
from .gated_reference import GatedGrads, low_rank_gated_backward
from .law import (
    check_activation,
    check_alike,
    check_bias,
    check_down,
    check_order,
    check_shape,
    refusal,
    shape_of,
)
from .linear import LINEAR
from .pivoted import PIVOTED
from .reference import GatedForward
from .registration import Op, register

NAME = "low_rank_gated"


def check_low_rank_gated(
    x: Tensor,
    gate_down: Tensor,
    gate_up: Tensor,
    gate_bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None,
    gate_pivot_bias: Tensor | None,
    gate_order: Tensor | None,
    pivot_bias: Tensor | None,
    order: Tensor | None,
    activation: str,
    casts: bool = False,
) -> None:
    """Raise RuntimeError on shapes, names, dtypes and devices that do not fit.

    casts: autocast makes the dtypes alike.
    """
    check_activation(NAME, activation)
    outputs = _outputs(x, "gate_", gate_down, gate_up, gate_bias, gate_pivot_bias, gate_order)
    found = _outputs(x, "", down, up, bias, pivot_bias, order)
    if found != outputs:
        raise refusal(NAME, f"up is {shape_of(up)}, of {found} outputs, wanted the {outputs} of the gate")
    check_alike(
        NAME,
        casts,
        x=x,
        gate_down=gate_down,
        gate_up=gate_up,
        gate_bias=gate_bias,
        down=down,
        up=up,
        bias=bias,
        gate_pivot_bias=gate_pivot_bias,
        pivot_bias=pivot_bias,
    )
    for name, places in (("gate_order", gate_order), ("order", order)):
        if places is not None:
            check_order(NAME, places, "x", x, name)


def _outputs(
    x: Tensor,
    prefix: str,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None,
    pivot_bias: Tensor | None,
    order: Tensor | None,
) -> int:
    """How many outputs a layer has, after a look at its shapes."""
    check_down(NAME, x, down, f"{prefix}down")
    R = down.size(0)
    if up.dim() != 2 or up.size(1) != R:
        wanted = f"({'N' if order is None else 'N - R'}, {R})"
        raise refusal(NAME, f"{prefix}up is {shape_of(up)}, wanted {wanted} for {prefix}down {shape_of(down)}")
    check_bias(NAME, bias, up, f"{prefix}bias")
    if order is None:
        if pivot_bias is not None:
            raise refusal(NAME, f"{prefix}pivot_bias is {shape_of(pivot_bias)}, wanted none without {prefix}order")
        return up.size(0)
    check_shape(NAME, f"{prefix}pivot_bias", pivot_bias, (R,))
    check_shape(NAME, f"{prefix}order", order, (R + up.size(0),))
    return R + up.size(0)


def _forward(*given: object) -> GatedForward:
    return GatedForward(*(each.contiguous() for each in reference.low_rank_gated_forward(*given)))


def _infer(
    x: Tensor,
    gate_down: Tensor,
    gate_up: Tensor,
    gate_bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None,
    gate_pivot_bias: Tensor | None,
    gate_order: Tensor | None,
    pivot_bias: Tensor | None,
    order: Tensor | None,
    activation: str,
) -> Tensor:
    factors = gate_down, gate_up, gate_bias, down, up, bias
    pivots = gate_pivot_bias, gate_order, pivot_bias, order
    by = cpu.fastest(x, down, up, bias, gate_down, gate_up, gate_bias, gate_pivot_bias, pivot_bias) or reference
    return by.low_rank_gated(x, *factors, *pivots, activation).contiguous()


def _empty(
    x: Tensor,
    gate_down: Tensor,
    gate_up: Tensor,
    gate_bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None,
    gate_pivot_bias: Tensor | None,
    gate_order: Tensor | None,
    pivot_bias: Tensor | None,
    order: Tensor | None,
    activation: str,
) -> GatedForward:
    outputs = up if order is None else order
    return GatedForward(*(x.new_empty((*x.shape[:-1], each.size(0))) for each in (outputs, gate_down, down)))


GATED = Op(
    name=NAME,
    arguments="Tensor x, Tensor gate_down, Tensor gate_up, Tensor? gate_bias, Tensor down, Tensor up,"
    " Tensor? bias=None, Tensor? gate_pivot_bias=None, Tensor? gate_order=None, Tensor? pivot_bias=None,"
    " Tensor? order=None, str activation='silu'",
    outputs=GatedForward,
    grads=GatedGrads,
    check=check_low_rank_gated,
    forward=_forward,
    backward=low_rank_gated_backward,
    empty=_empty,
    end=gated_backward,
    end_by_pytorch=reference.gated_backward,
    infer=_infer,
    uses=(LINEAR.name, PIVOTED.name),
)
register(GATED)
