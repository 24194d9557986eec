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
    "none": lambda grad, z: grad,
    "relu": lambda grad, z: torch.ops.aten.threshold_backward(grad, z, 0),
    "gelu": torch.ops.aten.gelu_backward,
    "gelu_tanh": partial(torch.ops.aten.gelu_backward, approximate="tanh"),
    "silu": _silu_backward,
}


class Stages(NamedTuple):
    """y (..., N), h (..., R) and, for the backward pass, the pre-activation z (..., N), empty without an activation."""

    y: Tensor
    h: Tensor
    z: Tensor


class Grads(NamedTuple):
    x: Tensor | None
    down: Tensor | None
    up: Tensor | None
    bias: Tensor | None
    residual: Tensor | None


def low_rank_linear(x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None = None, activation: str = "none",
                    residual: Tensor | None = None) -> Tensor:
    """activation((x @ down.T) @ up.T + bias) + residual

    x: (..., K)  down: (R, K)  up: (N, R)  bias: (N,)  residual: (..., N)  ->  (..., N)
    """
    return low_rank_linear_stages(x, down, up, bias, activation, residual).y


def low_rank_linear_stages(x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None, activation: str,
                           residual: Tensor | None) -> Stages:
    """low_rank_linear with what lies between."""
    h = F.linear(x, down)
    z = F.linear(h, up, bias)
    y = ACTIVATIONS[activation](z)
    if residual is not None:
        y = y + residual
    return Stages(y, h, z if activation != "none" else z.new_empty(0))


def low_rank_linear_backward(grad: Tensor, x: Tensor, down: Tensor, up: Tensor, h: Tensor, z: Tensor, activation: str,
                             needs: Grads) -> Grads:
    """The gradients for which `needs` is true, from grad (..., N) of y and the forward pass's h and z."""
    dz = _BACKWARD[activation](grad, z)
    M = math.prod(x.shape[:-1])
    flat_dz, flat_h, flat_x = (t.reshape(M, t.size(-1)) for t in (dz, h, x))
    dh = flat_dz @ up if needs.x or needs.down else None
    return Grads(
        x=(dh @ down).reshape(x.shape) if needs.x else None,
        down=dh.mT @ flat_x if needs.down else None,
        up=flat_dz.mT @ flat_h if needs.up else None,
        bias=flat_dz.sum(0) if needs.bias else None,
        residual=grad if needs.residual else None,
    )
