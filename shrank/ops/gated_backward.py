"""The way back through the end of a gated low-rank layer: `shrank::gated_backward`.

The autograd kernel of the op calls it. It runs PyTorch on every device; the native extension adds kernels for CUDA.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import reference
from .law import check_activation, check_alike, check_bias, refusal, shape_of
from .library import define, library, native_op
from .reference import GatedEnd

NAME = "gated_backward"
SCHEMA = (
    "(Tensor grad, Tensor gate_h, Tensor gate_up, Tensor? gate_bias, Tensor h, Tensor up, Tensor? bias, str activation,"
    " bool needs_gate_bias, bool needs_bias) -> (Tensor gate, Tensor value, Tensor gate_bias, Tensor bias)"
)


def check_gated_backward(
    grad: Tensor,
    gate_h: Tensor,
    gate_up: Tensor,
    gate_bias: Tensor | None,
    h: Tensor,
    up: Tensor,
    bias: Tensor | None,
    activation: str,
    needs_gate_bias: bool,
    needs_bias: bool,
) -> None:
    """Raise RuntimeError on shapes, names, dtypes and devices that do not fit."""
    check_activation(NAME, activation)
    if grad.dim() < 1:
        raise refusal(NAME, "grad is 0-dimensional, wanted (..., N)")
    for h_name, an_h, up_name, an_up, bias_name, a_bias in (
        ("gate_h", gate_h, "gate_up", gate_up, "gate_bias", gate_bias),
        ("h", h, "up", up, "bias", bias),
    ):
        if an_h.dim() != grad.dim() or an_h.shape[:-1] != grad.shape[:-1]:
            raise refusal(
                NAME, f"{h_name} is {shape_of(an_h)}, wanted the shape of grad {shape_of(grad)} with R columns"
            )
        if tuple(an_up.shape) != (grad.size(-1), an_h.size(-1)):
            raise refusal(NAME, f"{up_name} is {shape_of(an_up)}, wanted {(grad.size(-1), an_h.size(-1))}")
        check_bias(NAME, a_bias, an_up, bias_name)
    check_alike(NAME, False, grad=grad, gate_h=gate_h, gate_up=gate_up, gate_bias=gate_bias, h=h, up=up, bias=bias)


def gated_backward(*given: object) -> GatedEnd:
    """reference.gated_backward, by the op."""
    *_, needs_gate_bias, needs_bias = given
    gate, value, gate_bias, bias = _overload(*given)
    return GatedEnd(gate, value, gate_bias if needs_gate_bias else None, bias if needs_bias else None)


def run_named(given: tuple, kernel: str, grid: Sequence[int] = ()) -> GatedEnd:
    """The op by the kernel of this name, fused or gemm_epilogue, as `Op.run_named` runs others.

    Raises:
        RuntimeError: No native code is loaded, or it has no such kernel for these arguments; the text says why.
    """
    return GatedEnd(*native_op(f"{NAME}_as")(*given, kernel, list(grid)))


def _by_pytorch(grad: Tensor, *rest: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_gated_backward(grad, *rest)
    found = reference.gated_backward(grad, *rest)
    # An op has no optional results: an empty one is none.
    biases = (grad.new_empty(0) if each is None else each for each in (found.gate_bias, found.bias))
    return found.gate.contiguous(), found.value.contiguous(), *biases


def _empty(grad: Tensor, *rest: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_gated_backward(grad, *rest)
    *_, needs_gate_bias, needs_bias = rest
    biases = (grad.new_empty(grad.size(-1) if needed else 0) for needed in (needs_gate_bias, needs_bias))
    return grad.new_empty(grad.shape), grad.new_empty(grad.shape), *biases


define(NAME, SCHEMA)
_overload = torch.ops.shrank.gated_backward.default
library.impl(NAME, _by_pytorch, "CompositeExplicitAutograd")
torch.library.register_fake(f"shrank::{NAME}", _empty, lib=library)
