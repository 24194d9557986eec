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


_BACKWARD: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
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
    dz = grad if activation == "none" else _BACKWARD[activation](grad, F.linear(h, up, bias))
    return End(dz, _rows(dz).sum(0) if needs_bias else None)


def _rows(tensor: Tensor) -> Tensor:
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
    flat_dz, flat_h, flat_x = map(_rows, (dz, h, x))
    dh = flat_dz @ up if needs.x or needs.down else None
    return Grads(
        x=(dh @ down).reshape(x.shape) if needs.x else None,
        down=dh.mT @ flat_x if needs.down else None,
        up=flat_dz.mT @ flat_h if needs.up else None,
        bias=dbias,
        residual=grad if needs.residual else None,
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
            dz = _BACKWARD[activation](grad, CONVOLUTIONS[up.dim() - 2](h, up, bias, groups=groups))
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
    return dh, (_rows(dz).mT @ _rows(h_rows)).view_as(up) if needs.up else None, dbias
