"""The way back through the end of a low-rank layer, for both ops: `shrank::expand_backward`.

The autograd kernels of the ops call it. It runs PyTorch on every device; the native extension adds kernels for CUDA.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import reference
from .law import check_activation, check_alike, check_bias, refusal, shape_of
from .library import define, library, native_op
from .reference import End

NAME = "expand_backward"
SCHEMA = "(Tensor grad, Tensor h, Tensor up, Tensor? bias, str activation, bool needs_bias) -> (Tensor z, Tensor bias)"


def check_expand_backward(
    grad: Tensor, h: Tensor, up: Tensor, bias: Tensor | None, activation: str, needs_bias: bool
) -> None:
    """Raise RuntimeError on shapes, names, dtypes and devices that do not fit."""
    check_activation(NAME, activation)
    if activation == "none":
        raise refusal(NAME, "activation is 'none', wanted one: without it, grad is the gradient of z")
    if h.dim() < 1:
        raise refusal(NAME, "h is 0-dimensional, wanted (..., R)")
    if up.dim() != 2 or up.size(1) != h.size(-1):
        raise refusal(NAME, f"up is {shape_of(up)}, wanted (N, {h.size(-1)}) for h {shape_of(h)}")
    if grad.shape != (*h.shape[:-1], up.size(0)):
        raise refusal(NAME, f"grad is {shape_of(grad)}, wanted {(*h.shape[:-1], up.size(0))}")
    check_bias(NAME, bias, up)
    check_alike(NAME, False, h=h, grad=grad, up=up, bias=bias)


def expand_backward(grad: Tensor, h: Tensor, up: Tensor, bias: Tensor | None, activation: str, needs_bias: bool) -> End:
    """reference.expand_backward, by the op where there is an activation, without which there is nothing to compute."""
    if activation == "none":
        return reference.expand_backward(grad, h, up, bias, activation, needs_bias)
    dz, dbias = _overload(grad, h, up, bias, activation, needs_bias)
    return End(dz, dbias if needs_bias else None)


def run_named(given: tuple, kernel: str, grid: Sequence[int] = ()) -> End:
    """The op by the kernel of this name, fused or gemm_epilogue, as `Op.run_named` runs others.

    Raises:
        RuntimeError: No native code is loaded, or it has no such kernel for these arguments; the text says why.
    """
    return End(*native_op(f"{NAME}_as")(*given, kernel, list(grid)))


def _by_pytorch(
    grad: Tensor, h: Tensor, up: Tensor, bias: Tensor | None, activation: str, needs_bias: bool
) -> tuple[Tensor, Tensor]:
    check_expand_backward(grad, h, up, bias, activation, needs_bias)
    found = reference.expand_backward(grad, h, up, bias, activation, needs_bias)
    # An op has no optional results: an empty one is none.
    return found.z.contiguous(), found.z.new_empty(0) if found.bias is None else found.bias


def _empty(
    grad: Tensor, h: Tensor, up: Tensor, bias: Tensor | None, activation: str, needs_bias: bool
) -> tuple[Tensor, Tensor]:
    check_expand_backward(grad, h, up, bias, activation, needs_bias)
    return grad.new_empty(grad.shape), grad.new_empty(up.size(0) if needs_bias else 0)


define(NAME, SCHEMA)
_overload = torch.ops.shrank.expand_backward.default
library.impl(NAME, _by_pytorch, "CompositeExplicitAutograd")
torch.library.register_fake(f"shrank::{NAME}", _empty, lib=library)
