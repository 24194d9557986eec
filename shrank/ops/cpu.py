"""Who computes a linear layer on a CPU: our kernels for a few rows, oneDNN's products where those are faster, or
PyTorch's own calls."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor, is_autocast_enabled, is_grad_enabled
from torch._C import _are_functorch_transforms_active as _are_transforms_active
from torch._C import _get_tracing_state
from torch._C import _len_torch_dispatch_stack as _modes_that_watch
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.nn import Parameter

from . import host, onednn

# A layer of fewer inputs, or of fewer weights where its input times these is no large number, is looked at no closer:
# looking takes a good part of its own time.
FEWEST_INPUTS = 64
FEWEST_WEIGHTS = host.FEWEST_WEIGHTS
FEWEST_NUMBERS = onednn.FEWEST_PRODUCTS * FEWEST_INPUTS
NEVER = 1 << 62  # weights that a layer of another dtype would need
_STRIDED = torch.strided


def fastest(x: Tensor, down: Tensor, up: Tensor, *others: Tensor | None) -> ModuleType | None:
    """The module whose functions compute what has these factors, and these other tensors; None for PyTorch's calls.

    Neither autograd, nor tracers, nor torch.func, nor modes that watch every call know of the others, and autocast does
    not cast for them: only where none of these looks on.
    """
    if is_grad_enabled() or type(x) is not Tensor or is_compiling() or _get_tracing_state():
        return None  # before a size is read, on which a compiled graph would depend
    shape = x.shape
    rank, inputs = down.shape
    if not shape or shape[-1] != inputs:
        return None  # PyTorch's own call says what does not fit
    dtype, numbers, weights = x.dtype, x.numel(), rank * inputs + up.numel()
    are_few = host.are_few(dtype, numbers, inputs, weights)
    if not ((are_few or onednn.is_faster(dtype, numbers, inputs, weights)) and _nobody_looks_on()):
        return None
    for each in (x, down, up, *others):
        if not is_plain(each, dtype):
            return None
    if are_few and down.is_contiguous() and up.is_contiguous():  # else the kernels would copy them
        return host
    return onednn if onednn.is_faster(dtype, numbers, inputs, weights) else None


def is_faster_in_a_graph(x: Tensor, down: Tensor, up: Tensor) -> bool:
    """Whether a graph that is being compiled shall have the op, which computes so, in place of the products.

    Inductor's own products are those of MKL.
    """
    if (
        is_grad_enabled()
        or is_autocast_enabled("cpu")
        or not (x.is_cpu and down.is_cpu and x.dtype == down.dtype and type(down) in (Tensor, Parameter))
    ):
        return False
    sizes = x.dtype, x.numel(), down.shape[1], down.numel() + up.numel()
    return host.are_few(*sizes) or onednn.is_faster_in_a_graph(*sizes)


def _nobody_looks_on() -> bool:
    return (
        _modes_that_watch() == 0
        and not _are_transforms_active()
        and forward_ad._current_level < 0
        and not is_autocast_enabled("cpu")
    )


_KINDS = frozenset((Tensor, Parameter))


def is_plain(tensor: Tensor | None, dtype: torch.dtype) -> bool:
    """Whether a tensor, if there is one, is an ordinary one of this dtype on a CPU, and not empty."""
    return tensor is None or (
        type(tensor) in _KINDS
        and tensor.dtype is dtype
        and tensor.is_cpu
        and tensor.layout is _STRIDED
        and tensor.numel() > 0  # oneDNN makes no product of nothing
    )
