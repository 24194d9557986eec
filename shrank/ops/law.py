"""What the ops refuse in the same words: the parts of their laws that do not depend on how they move over their input.

Everything that does not fit is a RuntimeError, as in torch's own functions, that names the op, what was found and what
was wanted.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .reference import ACTIVATIONS

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
ORDER_DTYPE = torch.int32  # of the places of pivoted storage


def refusal(op: str, complaint: str) -> RuntimeError:
    return RuntimeError(f"shrank::{op}: {complaint}")


def shape_of(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def check_activation(op: str, activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise refusal(op, f"activation is {activation!r}, wanted one of {', '.join(ACTIVATIONS)}")


def check_down(op: str, x: Tensor, down: Tensor, name: str = "down") -> None:
    """Refuse a first factor that is not (R, K) for x (..., K)."""
    if x.dim() < 1:
        raise refusal(op, "x is 0-dimensional, wanted (..., K)")
    if down.dim() != 2 or down.size(1) != x.size(-1):
        raise refusal(op, f"{name} is {shape_of(down)}, wanted (R, {x.size(-1)}) for x {shape_of(x)}")


def check_bias(op: str, bias: Tensor | None, up: Tensor, name: str = "bias") -> None:
    if bias is not None and (bias.dim() != 1 or bias.size(0) != up.size(0)):
        raise refusal(op, f"{name} is {shape_of(bias)}, wanted ({up.size(0)},) for up {shape_of(up)}")


def check_shape(op: str, name: str, tensor: Tensor | None, wanted: tuple[int, ...]) -> None:
    if tensor is not None and shape_of(tensor) != wanted:
        raise refusal(op, f"{name} is {shape_of(tensor)}, wanted {wanted}")


def check_residual(op: str, residual: Tensor | None, wanted: tuple[int, ...]) -> None:
    check_shape(op, "residual", residual, wanted)


def check_alike(op: str, casts: bool, **tensors: Tensor | None) -> None:
    """Refuse what is not of one of DTYPES, the dtype of the first unless autocast casts, and on the first's device."""
    first, like = next(iter(tensors.items()))
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.dtype != like.dtype and not casts:
            raise refusal(op, f"{name} is {tensor.dtype}, wanted the {like.dtype} of {first}")
        if tensor.dtype not in DTYPES:
            raise refusal(op, f"{name} is {tensor.dtype}, wanted one of {', '.join(map(str, DTYPES))}")
        if tensor.device != like.device:
            raise refusal(op, f"{name} is on {tensor.device}, wanted the {like.device} of {first}")


def check_order(op: str, order: Tensor, first: str, like: Tensor, name: str = "order") -> None:
    """Refuse another dtype and device of an order than it must have beside the first tensor, `like`.

    Its numbers are not looked at: that would wait for the device.
    """
    if order.dtype != ORDER_DTYPE:
        raise refusal(op, f"{name} is {order.dtype}, wanted {ORDER_DTYPE}")
    if order.device != like.device:
        raise refusal(op, f"{name} is on {order.device}, wanted the {like.device} of {first}")
