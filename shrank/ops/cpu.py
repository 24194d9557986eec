"""Who computes a linear layer on a CPU: our kernels for a few rows, oneDNN's products where those are faster, or
PyTorch's own calls."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor, is_grad_enabled
from torch._C import _get_tracing_state
from torch.autograd import forward_ad
from torch.nn import Parameter

from . import host, onednn

FEWEST_INPUTS = 64  # a layer of fewer is not looked at any closer: looking takes a good part of its own time


def fastest(x: Tensor, down: Tensor, up: Tensor, *others: Tensor | None) -> ModuleType | None:
    """The module whose functions compute what has these factors, and these other tensors; None for PyTorch's calls.

    Neither autograd, nor tracers, nor torch.func, nor modes that watch every call know of the others, and autocast does
    not cast for them: only where none of these looks on.
    """
    if is_grad_enabled() or type(x) is not Tensor or torch.compiler.is_compiling() or _get_tracing_state():
        return None  # before a size is read, on which a compiled graph would depend
    if x.shape[-1:] != down.shape[1:]:
        return None  # PyTorch's own call says what does not fit
    are_few = host.are_few(x, down, up)
    if not ((are_few or onednn.is_faster(x, down, up)) and _nobody_looks_on()):
        return None
    if not all(is_plain(each, x.dtype) for each in (x, down, up, *others)):
        return None
    if are_few and down.is_contiguous() and up.is_contiguous():  # else the kernels would copy them
        return host
    return onednn if onednn.is_faster(x, down, up) else None


def is_faster_in_a_graph(x: Tensor, down: Tensor, up: Tensor) -> bool:
    """Whether a graph that is being compiled shall have the op, which computes so, in place of the products.

    Inductor's own products are those of MKL.
    """
    if (
        is_grad_enabled()
        or torch.is_autocast_enabled("cpu")
        or not (x.is_cpu and down.is_cpu and x.dtype == down.dtype and type(down) in (Tensor, Parameter))
    ):
        return False
    return host.are_few(x, down, up) or onednn.is_faster_in_a_graph(x, down, up)


def _nobody_looks_on() -> bool:
    return (
        torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
        and not torch.is_autocast_enabled("cpu")
    )


def is_plain(tensor: Tensor | None, dtype: torch.dtype) -> bool:
    """Whether a tensor, if there is one, is an ordinary one of this dtype on a CPU, and not empty."""
    return tensor is None or (
        tensor.dtype is dtype
        and tensor.is_cpu
        and type(tensor) in (Tensor, Parameter)
        and tensor.layout is torch.strided
        and tensor.numel() > 0  # oneDNN makes no product of nothing
    )
