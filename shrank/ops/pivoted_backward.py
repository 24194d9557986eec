"""The way back through the end of a pivoted low-rank layer: `shrank::pivoted_backward`.

The autograd kernel of the op calls it. It runs PyTorch on every device; the native extension adds kernels for CUDA.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import pivoted_reference
from .law import check_activation, check_alike, check_bias, check_order, check_shape, refusal, shape_of
from .library import define, library, native_op
from .reference import End

NAME = "pivoted_backward"
SCHEMA = (
    "(Tensor grad, Tensor h, Tensor up, Tensor? bias, Tensor? pivot_bias, Tensor order, str activation,"
    " bool needs_bias) -> (Tensor z, Tensor bias)"
)


def check_pivoted_backward(
    grad: Tensor,
    h: Tensor,
    up: Tensor,
    bias: Tensor | None,
    pivot_bias: Tensor | None,
    order: Tensor,
    activation: str,
    needs_bias: bool,
) -> None:
    """Raise RuntimeError on shapes, names, dtypes and devices that do not fit."""
    check_activation(NAME, activation)
    if activation == "none":
        raise refusal(NAME, "activation is 'none', wanted one: without it, grad is the gradient of z")
    if h.dim() < 1:
        raise refusal(NAME, "h is 0-dimensional, wanted (..., R)")
    R = h.size(-1)
    if up.dim() != 2 or up.size(1) != R:
        raise refusal(NAME, f"up is {shape_of(up)}, wanted (N - R, {R}) for h {shape_of(h)}")
    N = R + up.size(0)
    check_shape(NAME, "grad", grad, (*h.shape[:-1], N))
    check_bias(NAME, bias, up)
    check_shape(NAME, "pivot_bias", pivot_bias, (R,))
    check_shape(NAME, "order", order, (N,))
    check_alike(NAME, False, h=h, grad=grad, up=up, bias=bias, pivot_bias=pivot_bias)
    check_order(NAME, order, "h", h)


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
    """pivoted_reference.pivoted_backward, by the op where there is an activation, without which there is nothing to
    compute."""
    given = (grad, h, up, bias, pivot_bias, order, activation, needs_bias)
    if activation == "none":
        return pivoted_reference.pivoted_backward(*given)
    dz, dbias = _overload(*given)
    return End(dz, dbias if needs_bias else None)


def run_named(given: tuple, kernel: str, grid: Sequence[int] = ()) -> End:
    """The op by the kernel of this name, fused or gemm_epilogue, as `Op.run_named` runs others.

    Raises:
        RuntimeError: No native code is loaded, or it has no such kernel for these arguments; the text says why.
    """
    return End(*native_op(f"{NAME}_as")(*given, kernel, list(grid)))


def _by_pytorch(*given: object) -> tuple[Tensor, Tensor]:
    check_pivoted_backward(*given)
    found = pivoted_reference.pivoted_backward(*given)
    # An op has no optional results: an empty one is none.
    return found.z.contiguous(), found.z.new_empty(0) if found.bias is None else found.bias


def _empty(grad: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    check_pivoted_backward(grad, *rest)
    *_, needs_bias = rest
    return grad.new_empty(grad.shape), grad.new_empty(grad.size(-1) if needs_bias else 0)


define(NAME, SCHEMA)
_overload = torch.ops.shrank.pivoted_backward.default
library.impl(NAME, _by_pytorch, "CompositeExplicitAutograd")
torch.library.register_fake(f"shrank::{NAME}", _empty, lib=library)
