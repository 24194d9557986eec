"""The ops as torch knows them: names, the law of shapes and dtypes, fakes, autograd and autocast.

`shrank::low_rank_linear` is what layers call. Its autograd kernel calls `shrank::low_rank_linear_train`, which also
returns what the backward pass needs. Both run reference.py on every device; the native extension adds kernels for CUDA.
conv.py has the same of `shrank::low_rank_conv`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
SCHEMAS = {
    "low_rank_linear":
        "(Tensor x, Tensor down, Tensor up, Tensor? bias=None, str activation='none', Tensor? residual=None) -> Tensor",
    "low_rank_linear_train":
        "(Tensor x, Tensor down, Tensor up, Tensor? bias=None, str activation='none', Tensor? residual=None)"
        " -> (Tensor y, Tensor h, Tensor z)",
    "low_rank_conv":
        "(Tensor x, Tensor down, Tensor up, Tensor? bias, int[] stride, int[] padding, int[] dilation, int groups=1,"
        " int up_groups=1, str activation='none', Tensor? residual=None) -> Tensor",
    "low_rank_conv_train":
        "(Tensor x, Tensor down, Tensor up, Tensor? bias, int[] stride, int[] padding, int[] dilation, int groups=1,"
        " int up_groups=1, str activation='none', Tensor? residual=None) -> (Tensor y, Tensor h, Tensor z)",
}
library = torch.library.Library("shrank", "FRAGMENT")


def check_low_rank_linear(x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None, activation: str,
                          residual: Tensor | None, casts: bool = False) -> None:
    """Raise RuntimeError on shapes, names, dtypes and devices that do not fit, as torch's own functions do.

    casts: autocast makes the dtypes alike.
    """
    if activation not in reference.ACTIVATIONS:
        raise RuntimeError(_law(f"activation is {activation!r}, wanted one of {', '.join(reference.ACTIVATIONS)}"))
    if x.dim() < 1:
        raise RuntimeError(_law("x is 0-dimensional, wanted (..., K)"))
    if down.dim() != 2 or down.size(1) != x.size(-1):
        raise RuntimeError(_law(f"down is {_shape(down)}, wanted (R, {x.size(-1)}) for x {_shape(x)}"))
    if up.dim() != 2 or up.size(1) != down.size(0):
        raise RuntimeError(_law(f"up is {_shape(up)}, wanted (N, {down.size(0)}) for down {_shape(down)}"))
    if bias is not None and (bias.dim() != 1 or bias.size(0) != up.size(0)):
        raise RuntimeError(_law(f"bias is {_shape(bias)}, wanted ({up.size(0)},) for up {_shape(up)}"))
    if residual is not None and residual.shape != (*x.shape[:-1], up.size(0)):
        raise RuntimeError(_law(f"residual is {_shape(residual)}, wanted {(*x.shape[:-1], up.size(0))}"))
    check_alike("low_rank_linear", casts, x=x, down=down, up=up, bias=bias, residual=residual)


def check_alike(op: str, casts: bool, x: Tensor, **others: Tensor | None) -> None:
    """Raise RuntimeError unless all are of one of DTYPES, the same unless autocast casts them, on the device of x."""
    for name, tensor in (("x", x), *others.items()):
        if tensor is None:
            continue
        if tensor.dtype != x.dtype and not casts:
            raise RuntimeError(f"shrank::{op}: {name} is {tensor.dtype}, wanted the {x.dtype} of x")
        if tensor.dtype not in DTYPES:
            raise RuntimeError(f"shrank::{op}: {name} is {tensor.dtype}, wanted one of {', '.join(map(str, DTYPES))}")
        if tensor.device != x.device:
            raise RuntimeError(f"shrank::{op}: {name} is on {tensor.device}, wanted the {x.device} of x")


def _law(complaint: str) -> str:
    return f"shrank::low_rank_linear: {complaint}"


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def _define() -> None:
    """Define what a C++ library that was loaded before has not (csrc/ops/register_cpu.cpp has the same schemas)."""
    namespace = torch.ops.shrank
    for name, schema in SCHEMAS.items():
        if not hasattr(namespace, name):
            library.define(name + schema, tags=torch.Tag.pt2_compliant_tag)


def register(name: str, autograd: Callable, autocast: Callable, forwards: tuple[Callable, Callable],
             fakes: tuple[Callable, Callable]) -> None:
    """Make these what torch runs for the op and, of the pairs, for the op that also returns what training needs."""
    library.impl(name, autograd, "Autograd")
    for key in ("AutocastCPU", "AutocastCUDA"):
        library.impl(name, autocast, key)
    for each, forward, fake in zip((name, f"{name}_train"), forwards, fakes, strict=True):
        library.impl(each, forward, "CompositeExplicitAutograd")
        torch.library.register_fake(f"shrank::{each}", fake, lib=library)


def _forward(x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None = None, activation: str = "none",
             residual: Tensor | None = None) -> Tensor:
    check_low_rank_linear(x, down, up, bias, activation, residual)
    return reference.low_rank_linear(x, down, up, bias, activation, residual).contiguous()


def _forward_train(x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None = None, activation: str = "none",
                   residual: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    check_low_rank_linear(x, down, up, bias, activation, residual)
    y, h, z = reference.low_rank_linear_stages(x, down, up, bias, activation, residual)
    return y.contiguous(), h.contiguous(), z.contiguous()


def _fake(x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None = None, activation: str = "none",
          residual: Tensor | None = None) -> Tensor:
    check_low_rank_linear(x, down, up, bias, activation, residual)
    return x.new_empty((*x.shape[:-1], up.size(0)))


def _fake_train(x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None = None, activation: str = "none",
                residual: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    y = _fake(x, down, up, bias, activation, residual)
    z = torch.empty_like(y) if activation != "none" else x.new_empty(0)
    return y, x.new_empty((*x.shape[:-1], down.size(0))), z


class _LowRankLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None, activation: str,
                residual: Tensor | None) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            y, h, z = torch.ops.shrank.low_rank_linear_train.default(x, down, up, bias, activation, residual)
        ctx.save_for_backward(x, down, up, bias, h, z)
        ctx.activation = activation
        return y

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        x, down, up, bias, h, z = ctx.saved_tensors
        if torch.is_grad_enabled():  # to be differentiated again: h and z must know where they come from
            _, h, z = reference.low_rank_linear_stages(x, down, up, bias, ctx.activation, None)
        needs_x, needs_down, needs_up, needs_bias, _, needs_residual = ctx.needs_input_grad
        needs = reference.Grads(needs_x, needs_down, needs_up, needs_bias, needs_residual)
        grads = reference.low_rank_linear_backward(grad, x, down, up, h, z, ctx.activation, needs)
        return grads.x, grads.down, grads.up, grads.bias, None, grads.residual


def low_rank_linear_autograd(x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None = None, activation: str = "none",
                             residual: Tensor | None = None) -> Tensor:
    """What the Autograd key runs: records the op if a gradient is wanted, then calls the kernel below autograd."""
    if torch.is_grad_enabled() and (
            down.requires_grad or up.requires_grad or x.requires_grad or (bias is not None and bias.requires_grad)
            or (residual is not None and residual.requires_grad)):
        return _LowRankLinear.apply(x, down, up, bias, activation, residual)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.shrank.low_rank_linear.default(x, down, up, bias, activation, residual)


def wants_grad(*tensors: Tensor | None) -> bool:
    """Whether an op on these must be recorded."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def run_in_autocast(op: Callable[..., Tensor], x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None,
                    residual: Tensor | None) -> Tensor:
    """As autocast treats F.linear and F.conv: `op` gets all five in the narrow dtype. A wider residual is added after,
    so that it keeps its precision."""
    dtype = torch.get_autocast_dtype(x.device.type)
    x, down, up, bias = (t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t
                         for t in (x, down, up, bias))
    fused = residual if residual is not None and residual.dtype == x.dtype else None
    with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCUDA)
                                           | torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)):
        y = op(x, down, up, bias, fused)
    return y if fused is residual else y + residual


def _autocast(x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None = None, activation: str = "none",
              residual: Tensor | None = None) -> Tensor:
    return run_in_autocast(lambda x, down, up, bias, residual: torch.ops.shrank.low_rank_linear(
        x, down, up, bias, activation, residual), x, down, up, bias, residual)


_define()
register("low_rank_linear", low_rank_linear_autograd, _autocast, (_forward, _forward_train), (_fake, _fake_train))
