"""`shrank::low_rank_conv` as torch knows it: what schema.py has of the linear op, for 1 to 3 dimensions."""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference
from .reference import Window, channels_last, output_sizes
from .schema import check_alike, register, run_in_autocast, wants_grad


def check_low_rank_conv(x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None, window: Window, activation: str,
                        residual: Tensor | None, casts: bool = False) -> None:
    """Raise RuntimeError on shapes, numbers, names, dtypes and devices that do not fit, as torch's own functions do.

    casts: autocast makes the dtypes alike.
    """
    if activation not in reference.ACTIVATIONS:
        raise RuntimeError(_law(f"activation is {activation!r}, wanted one of {', '.join(reference.ACTIVATIONS)}"))
    if not 3 <= down.dim() <= 5:
        raise RuntimeError(_law(f"down is {_shape(down)}, wanted (R, C / groups, 1 to 3 kernel sizes)"))
    if x.dim() != down.dim():
        raise RuntimeError(_law(f"x is {_shape(x)}, wanted {down.dim()} dimensions as down {_shape(down)} has"))
    _check_channels(x, down, up, window)
    if bias is not None and (bias.dim() != 1 or bias.size(0) != up.size(0)):
        raise RuntimeError(_law(f"bias is {_shape(bias)}, wanted ({up.size(0)},) for up {_shape(up)}"))
    _check_window(x, down, window)
    wanted = (x.size(0), up.size(0), *output_sizes(x, down, window))
    if residual is not None and tuple(residual.shape) != wanted:
        raise RuntimeError(_law(f"residual is {_shape(residual)}, wanted {wanted}"))
    check_alike("low_rank_conv", casts, x=x, down=down, up=up, bias=bias, residual=residual)


def _check_channels(x: Tensor, down: Tensor, up: Tensor, window: Window) -> None:
    groups, up_groups, C, R = window.groups, window.up_groups, x.size(1), down.size(0)
    if groups < 1 or up_groups < 1:
        raise RuntimeError(_law(f"groups are {groups} and {up_groups}, wanted at least 1"))
    if C % groups or R % groups:
        raise RuntimeError(_law(f"groups is {groups}, wanted a divisor of the {C} channels of x and of the rank {R}"))
    if down.size(1) != C // groups:
        raise RuntimeError(_law(f"down is {_shape(down)}, wanted (R, {C // groups}, ...) for x {_shape(x)} in {groups} "
                                "groups"))
    if up.dim() == 0 or R % up_groups or up.size(0) % up_groups:
        raise RuntimeError(_law(f"up_groups is {up_groups}, wanted a divisor of the rank {R} and of the outputs of up "
                                f"{_shape(up)}"))
    if up.dim() != down.dim() or up.size(1) != R // up_groups or any(size != 1 for size in up.shape[2:]):
        raise RuntimeError(_law(f"up is {_shape(up)}, wanted (N, {R // up_groups}, 1, ...) for down {_shape(down)} and "
                                f"{up_groups} up_groups"))


def _check_window(x: Tensor, down: Tensor, window: Window) -> None:
    d = down.dim() - 2
    lengths = {"stride": (d,), "dilation": (d,), "padding": (d, 2 * d)}
    for name, least in (("stride", 1), ("dilation", 1), ("padding", 0)):
        sizes = getattr(window, name)
        if len(sizes) not in lengths[name]:
            raise RuntimeError(_law(f"{name} is {list(sizes)}, wanted {' or '.join(map(str, lengths[name]))} numbers"))
        if any(size < least for size in sizes):
            raise RuntimeError(_law(f"{name} is {list(sizes)}, wanted numbers from {least} on"))
    if any(size < 1 for size in down.shape[2:]):
        raise RuntimeError(_law(f"the kernel of down is {_shape(down)[2:]}, wanted numbers from 1 on"))
    for i, (begin, end) in enumerate(window.pads()):
        reach = window.dilation[i] * (down.size(2 + i) - 1) + 1
        if x.size(2 + i) + begin + end < reach:
            raise RuntimeError(_law(f"x is {_shape(x)}, wanted at least {reach} numbers in padded dimension {i} for "
                                    f"the kernel of down {_shape(down)}"))


def _law(complaint: str) -> str:
    return f"shrank::low_rank_conv: {complaint}"


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def _forward(x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None, stride: list[int], padding: list[int],
             dilation: list[int], groups: int = 1, up_groups: int = 1, activation: str = "none",
             residual: Tensor | None = None) -> Tensor:
    window = Window(stride, padding, dilation, groups, up_groups)
    check_low_rank_conv(x, down, up, bias, window, activation, residual)
    y = reference.low_rank_conv(x, down, up, bias, window, activation, residual)
    return reference.in_format(y, channels_last(x, down))


def _forward_train(x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None, stride: list[int], padding: list[int],
                   dilation: list[int], groups: int = 1, up_groups: int = 1, activation: str = "none",
                   residual: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    window = Window(stride, padding, dilation, groups, up_groups)
    check_low_rank_conv(x, down, up, bias, window, activation, residual)
    y, h, z = reference.low_rank_conv_stages(x, down, up, bias, window, activation, residual)
    last = channels_last(x, down)
    z = reference.in_format(z, last) if activation != "none" else z
    return reference.in_format(y, last), reference.in_format(h, last), z


def _empty(x: Tensor, down: Tensor, channels: int, out: list[int]) -> Tensor:
    if channels_last(x, down):
        return x.new_empty((x.size(0), *out, channels)).movedim(-1, 1)
    return x.new_empty((x.size(0), channels, *out))


def _fake(x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None, stride: list[int], padding: list[int],
          dilation: list[int], groups: int = 1, up_groups: int = 1, activation: str = "none",
          residual: Tensor | None = None) -> Tensor:
    window = Window(stride, padding, dilation, groups, up_groups)
    check_low_rank_conv(x, down, up, bias, window, activation, residual)
    return _empty(x, down, up.size(0), output_sizes(x, down, window))


def _fake_train(x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None, stride: list[int], padding: list[int],
                dilation: list[int], groups: int = 1, up_groups: int = 1, activation: str = "none",
                residual: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    y = _fake(x, down, up, bias, stride, padding, dilation, groups, up_groups, activation, residual)
    out = list(y.shape[2:])
    z = _empty(x, down, up.size(0), out) if activation != "none" else x.new_empty(0)
    return y, _empty(x, down, down.size(0), out), z


class _LowRankConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None, window: Window, activation: str,
                residual: Tensor | None) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            y, h, z = torch.ops.shrank.low_rank_conv_train.default(x, down, up, bias, *window, activation, residual)
        ctx.save_for_backward(x, down, up, bias, h, z)
        ctx.window, ctx.activation = window, activation
        return y

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        x, down, up, bias, h, z = ctx.saved_tensors
        if torch.is_grad_enabled():  # to be differentiated again: h and z must know where they come from
            _, h, z = reference.low_rank_conv_stages(x, down, up, bias, ctx.window, ctx.activation, None)
        needs_x, needs_down, needs_up, needs_bias, _, _, needs_residual = ctx.needs_input_grad
        needs = reference.Grads(needs_x, needs_down, needs_up, needs_bias, needs_residual)
        grads = reference.low_rank_conv_backward(grad, x, down, up, h, z, ctx.window, ctx.activation, needs)
        return grads.x, grads.down, grads.up, grads.bias, None, None, grads.residual


def low_rank_conv_autograd(x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None, stride: list[int],
                           padding: list[int], dilation: list[int], groups: int = 1, up_groups: int = 1,
                           activation: str = "none", residual: Tensor | None = None) -> Tensor:
    """What the Autograd key runs: records the op if a gradient is wanted, then calls the kernel below autograd."""
    window = Window(stride, padding, dilation, groups, up_groups)
    if wants_grad(x, down, up, bias, residual):
        return _LowRankConv.apply(x, down, up, bias, window, activation, residual)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.shrank.low_rank_conv.default(x, down, up, bias, *window, activation, residual)


def _autocast(x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None, stride: list[int], padding: list[int],
              dilation: list[int], groups: int = 1, up_groups: int = 1, activation: str = "none",
              residual: Tensor | None = None) -> Tensor:
    window = Window(stride, padding, dilation, groups, up_groups)
    return run_in_autocast(lambda x, down, up, bias, residual: torch.ops.shrank.low_rank_conv(
        x, down, up, bias, *window, activation, residual), x, down, up, bias, residual)


register("low_rank_conv", low_rank_conv_autograd, _autocast, (_forward, _forward_train), (_fake, _fake_train))
