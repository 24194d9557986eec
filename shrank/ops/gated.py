"""The op of gated layers, as in the MLPs of language models: its law, its outputs, and `shrank::low_rank_gated` made of
them."""

from __future__ import annotations

from torch import Tensor

from . import cpu, reference
from .gated_backward import gated_backward
from .law import check_activation, check_alike, check_bias, check_down, refusal, shape_of
from .reference import GatedForward, GatedGrads
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
    activation: str,
    casts: bool = False,
) -> None:
    """Raise RuntimeError on shapes, names, dtypes and devices that do not fit.

    casts: autocast makes the dtypes alike.
    """
    check_activation(NAME, activation)
    for prefix, a_down, an_up, a_bias in (("gate_", gate_down, gate_up, gate_bias), ("", down, up, bias)):
        check_down(NAME, x, a_down, f"{prefix}down")
        if an_up.dim() != 2 or an_up.size(1) != a_down.size(0):
            raise refusal(
                NAME,
                f"{prefix}up is {shape_of(an_up)}, wanted (N, {a_down.size(0)}) for {prefix}down {shape_of(a_down)}",
            )
        check_bias(NAME, a_bias, an_up, f"{prefix}bias")
    if up.size(0) != gate_up.size(0):
        raise refusal(NAME, f"up is {shape_of(up)}, wanted {gate_up.size(0)} rows, as gate_up {shape_of(gate_up)} has")
    check_alike(
        NAME, casts, x=x, gate_down=gate_down, gate_up=gate_up, gate_bias=gate_bias, down=down, up=up, bias=bias
    )


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
    activation: str,
) -> Tensor:
    by = cpu.fastest(x, down, up, bias, gate_down, gate_up, gate_bias) or reference
    return by.low_rank_gated(x, gate_down, gate_up, gate_bias, down, up, bias, activation).contiguous()


def _empty(
    x: Tensor,
    gate_down: Tensor,
    gate_up: Tensor,
    gate_bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None,
    activation: str,
) -> GatedForward:
    return GatedForward(*(x.new_empty((*x.shape[:-1], factor.size(0))) for factor in (up, gate_down, down)))


GATED = Op(
    name=NAME,
    arguments="Tensor x, Tensor gate_down, Tensor gate_up, Tensor? gate_bias, Tensor down, Tensor up,"
    " Tensor? bias=None, str activation='silu'",
    outputs=GatedForward,
    grads=GatedGrads,
    check=check_low_rank_gated,
    forward=_forward,
    backward=reference.low_rank_gated_backward,
    empty=_empty,
    end=gated_backward,
    end_by_pytorch=reference.gated_backward,
    infer=_infer,
)
register(GATED)
