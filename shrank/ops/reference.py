"""What the ops mean, in plain PyTorch: the fallback, and the oracle of the tests."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda z: z,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
}


def _silu_backward(grad: Tensor, z: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return torch.ops.aten.silu_backward(grad, z)
    sigmoid = z.sigmoid()  # PyTorch's kernel cannot be differentiated again
    return grad * sigmoid * (1 + z * (1 - sigmoid))


BACKWARD: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "relu": lambda grad, z: torch.ops.aten.threshold_backward(grad, z, 0),
    "gelu": torch.ops.aten.gelu_backward,
    "gelu_tanh": partial(torch.ops.aten.gelu_backward, approximate="tanh"),
    "silu": _silu_backward,
}


class Forward(NamedTuple):
    """y (..., N) and, for the backward pass, h (..., R)."""

    y: Tensor
    h: Tensor


class End(NamedTuple):
    """The gradients of the pre-activation and, where it is wanted, of the bias."""

    z: Tensor
    bias: Tensor | None


class Grads(NamedTuple):
    x: Tensor | None
    down: Tensor | None
    up: Tensor | None
    bias: Tensor | None
    residual: Tensor | None


class GatedForward(NamedTuple):
    """y (..., N) and, for the backward pass, h of the gate and of the value."""

    y: Tensor
    gate_h: Tensor
    h: Tensor


class GatedEnd(NamedTuple):
    """The gradients of the gate before its activation, of the value and, where it is wanted, of either bias."""

    gate: Tensor
    value: Tensor
    gate_bias: Tensor | None
    bias: Tensor | None


def low_rank_linear(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """activation((x @ down.T) @ up.T + bias) + residual

    x: (..., K)  down: (R, K)  up: (N, R)  bias: (N,)  residual: (..., N)  ->  (..., N)
    """
    return low_rank_linear_forward(x, down, up, bias, activation, residual).y


def low_rank_linear_forward(
    x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None, activation: str, residual: Tensor | None
) -> Forward:
    """low_rank_linear with what lies between."""
    h = F.linear(x, down)
    return Forward(finished(F.linear(h, up, bias), activation, residual), h)


def finished(z: Tensor, activation: str, residual: Tensor | None) -> Tensor:
    """activation(z) + residual"""
    y = ACTIVATIONS[activation](z)
    return y if residual is None else y + residual


def expand_backward(grad: Tensor, h: Tensor, up: Tensor, bias: Tensor | None, activation: str, needs_bias: bool) -> End:
    """Through activation and bias: grad (..., N) times activation'(z), with z = h @ up.T + bias computed anew.

    The pre-activation is not kept for this: it is as large as y, and h (..., R) gives it again.
    """
    dz = grad if activation == "none" else BACKWARD[activation](grad, F.linear(h, up, bias))
    return End(dz, rows(dz).sum(0) if needs_bias else None)


def rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(math.prod(tensor.shape[:-1]), tensor.size(-1))  # -1 would say nothing of an empty tensor


def low_rank_linear_backward(
    grad: Tensor,
    x: Tensor,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None,
    h: Tensor,
    activation: str,
    needs: Grads,
    end: Callable[..., End] = expand_backward,
) -> Grads:
    """The gradients for which `needs` is true, from grad (..., N) of y and the forward pass's h.

    end: what computes `expand_backward`.
    """
    dz, dbias = end(grad, h, up, bias, activation, bool(needs.bias))
    dx, ddown, dup = factors_backward(dz, x, down, up, h, needs.x, needs.down, needs.up)
    return Grads(dx, ddown, dup, dbias, grad if needs.residual else None)


def factors_backward(
    dz: Tensor,
    x: Tensor,
    down: Tensor,
    up: Tensor,
    h: Tensor,
    needs_x: object,
    needs_down: object,
    needs_up: object,
    own: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of x, down and up that are needed, from that of z = h @ up.T with h = x @ down.T.

    own: a gradient of h (..., R) that comes past up.
    """
    flat_dz, flat_h, flat_x = map(rows, (dz, h, x))
    dh = None
    if needs_x or needs_down:
        dh = flat_dz @ up if own is None else torch.addmm(rows(own), flat_dz, up)
    return (
        (dh @ down).reshape(x.shape) if needs_x else None,
        dh.mT @ flat_x if needs_down else None,
        flat_dz.mT @ flat_h if needs_up else None,
    )


# ---- pivots: h is R of the outputs itself, and up makes the others


def in_order(h: Tensor, up: Tensor, bias: Tensor | None, pivot_bias: Tensor | None, order: Tensor) -> Tensor:
    """The pivots' outputs and the others, each in its place."""
    own = h if pivot_bias is None else h + pivot_bias.to(h.dtype)  # autocast narrows h alone
    return torch.cat((own, F.linear(h, up, bias)), -1).index_select(-1, order)


def apart(outputs: Tensor, order: Tensor, R: int, dim: int = -1) -> tuple[Tensor, Tensor]:
    """The way back of `in_order`: what belongs to the R pivots, and to the others."""
    places = torch.empty_like(outputs).index_copy_(dim, order.long(), outputs)
    return places.narrow(dim, 0, R), places.narrow(dim, R, places.size(dim) - R)


def all_rows(up: Tensor, order: Tensor, groups: int = 1) -> Tensor:
    """The second factor (N, R / groups, ...) that makes all outputs: rows of the unit matrix for pivots.

    up: (N - R, R / groups, ...). groups: each has pivots of its own, which are its outputs.
    """
    unit = torch.eye(up.size(1), dtype=up.dtype, device=up.device).repeat(groups, 1)
    return torch.cat((unit.view(*unit.shape, *up.shape[2:]), up)).index_select(0, order)


# ---- gated layers


def low_rank_gated(
    x: Tensor,
    gate_down: Tensor,
    gate_up: Tensor,
    gate_bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None = None,
    gate_pivot_bias: Tensor | None = None,
    gate_order: Tensor | None = None,
    pivot_bias: Tensor | None = None,
    order: Tensor | None = None,
    activation: str = "silu",
) -> Tensor:
    """activation((x @ gate_down.T) @ gate_up.T + gate_bias) * ((x @ down.T) @ up.T + bias)

    x: (..., K)  gate_down: (S, K)  gate_up: (N, S)  down: (R, K)  up: (N, R)  biases: (N,)  ->  (..., N)
    With an order, the factors of the gate or of the value are pivoted, as those of low_rank_pivoted.
    """
    pivots = gate_pivot_bias, gate_order, pivot_bias, order
    return low_rank_gated_forward(x, gate_down, gate_up, gate_bias, down, up, bias, *pivots, activation).y


def low_rank_gated_forward(
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
    """low_rank_gated with what lies between: both h are without the biases of pivots."""
    gate_h, h = F.linear(x, gate_down), F.linear(x, down)
    gate = ACTIVATIONS[activation](_expanded(gate_h, gate_up, gate_bias, gate_pivot_bias, gate_order))
    return GatedForward(gate * _expanded(h, up, bias, pivot_bias, order), gate_h, h)


def _expanded(h: Tensor, up: Tensor, bias: Tensor | None, pivot_bias: Tensor | None, order: Tensor | None) -> Tensor:
    return F.linear(h, up, bias) if order is None else in_order(h, up, bias, pivot_bias, order)


def gated_backward(
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
) -> GatedEnd:
    """Through product, activation and biases: grad (..., N) of activation(z) * value, both computed anew from h."""
    z, value = F.linear(gate_h, gate_up, gate_bias), F.linear(h, up, bias)
    dgate, dvalue = grad * value, grad * ACTIVATIONS[activation](z)
    if activation != "none":
        dgate = BACKWARD[activation](dgate, z)
    return GatedEnd(
        dgate,
        dvalue,
        rows(dgate).sum(0) if needs_gate_bias else None,
        rows(dvalue).sum(0) if needs_bias else None,
    )


# ---- convolutions


class Window(NamedTuple):
    """How a convolution moves: a number of stride and dilation for each dimension; of padding one for each, or two, for
    before and after; groups of either stage."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int = 1
    up_groups: int = 1

    def pads(self) -> list[tuple[int, int]]:
        """Zeros before and after each dimension."""
        padding = list(self.padding)
        if len(padding) == len(self.stride):
            return [(each, each) for each in padding]
        return list(zip(padding[::2], padding[1::2], strict=True))


def output_sizes(x: Tensor, down: Tensor, window: Window) -> list[int]:
    return [
        (x.size(2 + i) + begin + end - window.dilation[i] * (down.size(2 + i) - 1) - 1) // window.stride[i] + 1
        for i, (begin, end) in enumerate(window.pads())
    ]


def channels_last(x: Tensor, down: Tensor) -> bool:
    """Whether outputs are channels last, innermost and without gaps: as x; where x may be read either way, as down."""
    return _is_channels_last(x) and (not x.is_contiguous() or (_is_channels_last(down) and not down.is_contiguous()))


def _is_channels_last(tensor: Tensor) -> bool:
    return tensor.movedim(1, -1).is_contiguous()


def in_format(tensor: Tensor, last: bool) -> Tensor:
    return tensor.movedim(1, -1).contiguous().movedim(-1, 1) if last else tensor.contiguous()


CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def low_rank_conv(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None,
    window: Window,
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """activation(conv(x, down) convolved with up, a point, + bias) + residual

    x: (B, C, *in)  down: (R, C/groups, *kernel)  up: (N, R/up_groups, 1, ...)  bias: (N,)  residual: (B, N, *out)
    ->  (B, N, *out)
    """
    return low_rank_conv_forward(x, down, up, bias, window, activation, residual).y


def low_rank_conv_forward(
    x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None, window: Window, activation: str, residual: Tensor | None
) -> Forward:
    """low_rank_conv with what lies between; h is (B, R, *out)."""
    convolve = CONVOLUTIONS[down.dim() - 2]
    x, padding = padded(x, window)
    h = convolve(x, down, None, window.stride, padding, window.dilation, window.groups)
    return Forward(finished(convolve(h, up, bias, groups=window.up_groups), activation, residual), h)


def padded(x: Tensor, window: Window) -> tuple[Tensor, list[int]]:
    """x with the padding that PyTorch's convolutions cannot do, and the padding that is left to them."""
    pads = window.pads()
    if all(begin == end for begin, end in pads):
        return x, [begin for begin, _ in pads]
    return F.pad(x, [each for pair in reversed(pads) for each in pair]), [0] * len(pads)


def low_rank_conv_backward(
    grad: Tensor,
    x: Tensor,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None,
    h: Tensor,
    window: Window,
    activation: str,
    needs: Grads,
    end: Callable[..., End] = expand_backward,
) -> Grads:
    """The gradients for which `needs` is true, from grad (B, N, *out) of y and the forward pass's h.

    end: what computes `expand_backward`.
    """
    dh, dup, dbias = _pointwise_backward(grad, h, up, bias, window.up_groups, activation, needs, end)
    dx = ddown = None
    if needs.x or needs.down:
        wide, padding = padded(x, window)
        d = len(padding)
        dx, ddown, _ = torch.ops.aten.convolution_backward(
            dh,
            wide,
            down,
            None,
            window.stride,
            padding,
            window.dilation,
            False,
            [0] * d,
            window.groups,
            [bool(needs.x), bool(needs.down), False],
        )
        if needs.x and wide is not x:
            for i, (begin, _) in enumerate(window.pads()):
                dx = dx.narrow(2 + i, begin, x.size(2 + i))
    return Grads(dx, ddown, dup, dbias, grad if needs.residual else None)


def _pointwise_backward(
    grad: Tensor,
    h: Tensor,
    up: Tensor,
    bias: Tensor | None,
    groups: int,
    activation: str,
    needs: Grads,
    end: Callable[..., End],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dh, dup and dbias of the second stage. With channels last, and no groups, pixels are rows of matrices."""
    needs_h = bool(needs.x or needs.down)
    if groups > 1 or not _is_channels_last(grad) or not _is_channels_last(h):
        dz = grad
        if activation != "none":
            dz = BACKWARD[activation](grad, CONVOLUTIONS[up.dim() - 2](h, up, bias, groups=groups))
        ones = [1] * (dz.dim() - 2)
        zeros = [0] * len(ones)
        return torch.ops.aten.convolution_backward(
            dz,
            h,
            up,
            [up.size(0)] if needs.bias else None,
            ones,
            zeros,
            ones,
            False,
            zeros,
            groups,
            [needs_h, bool(needs.up), bool(needs.bias)],
        )
    h_rows = h.movedim(1, -1)
    dz, dbias = end(grad.movedim(1, -1), h_rows, up.flatten(1), bias, activation, bool(needs.bias))
    dh = (dz @ up.flatten(1)).movedim(-1, 1) if needs_h else None
    return dh, (rows(dz).mT @ rows(h_rows)).view_as(up) if needs.up else None, dbias
