"""The ops on a CPU by oneDNN's products, and where those are faster than the ones that PyTorch calls.

PyTorch keeps them for the code that torch.compile makes; its own calls of float32 use MKL or BLAS. They end with bias,
relu or gelu before the result is written. All else happens in place.
"""

from __future__ import annotations

import platform

import torch
from torch import Tensor, is_grad_enabled
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.nn.functional import silu

from .reference import Forward, GatedForward

# Where they win, measured for nine layers of 128 to 4096 inputs and 1 to 4096 rows (benchmarks/speed/bench_onednn.py):
# from so many multiply-adds, as a call of oneDNN costs 10 us more than one of MKL; and where as many weights are read
# for a few rows, at twice the rate.
FEWEST_PRODUCTS = 1 << 25
FEWEST_WEIGHTS = 1 << 17
FEWEST_INPUTS = 128  # a layer of fewer is not looked at any closer: it would need thousands of rows

# What oneDNN calls an activation, and which of its ways to compute it. Silu is faster in place after the product, as
# are sums and products with another tensor.
_ENDS = {
    "none": ("none", ""),
    "relu": ("relu", ""),
    "gelu": ("gelu", "none"),
    "gelu_tanh": ("gelu", "tanh"),
    "silu": ("none", ""),
}
# Measured on x86 alone; on ARM the products are others.
_IS_HERE = (
    torch.backends.mkldnn.is_available()
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    and platform.machine() in ("x86_64", "AMD64")
)


def is_faster(x: Tensor, down: Tensor, up: Tensor, *others: Tensor | None) -> bool:
    """Whether to compute so what has these factors, and these other tensors: large enough, float32 on a CPU, and nobody
    looks on.

    Neither autograd, nor tracers, nor torch.func, nor modes that watch every call know these products, and autocast
    does not cast for them. `torch.backends.mkldnn.flags(enabled=False)` switches them off.
    """
    if is_grad_enabled() or type(x) is not Tensor or torch.compiler.is_compiling():
        return False  # before a size is read, on which a compiled graph would depend
    if x.shape[-1:] != down.shape[1:]:
        return False  # PyTorch's own call says what does not fit
    weights = down.numel() + up.numel()
    if weights < FEWEST_WEIGHTS and weights * x.numel() < FEWEST_PRODUCTS * down.shape[1]:
        return False
    return _IS_HERE and _nobody_looks_on() and all(map(_is_plain, (x, down, up, *others)))


def is_faster_in_a_graph(x: Tensor, down: Tensor, up: Tensor) -> bool:
    """Whether a graph that is being compiled shall have the op, which computes so, in place of the products.

    Inductor's own products are those of MKL. Of a few rows they are faster than a call of the op, which is in Python.
    """
    if is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return False
    if not (x.is_cpu and x.dtype is torch.float32 and down.is_cpu and down.dtype is torch.float32 and _IS_HERE):
        return False
    return (down.numel() + up.numel()) * x.numel() >= FEWEST_PRODUCTS * down.shape[1]


def _nobody_looks_on() -> bool:
    return (
        torch._C._get_mkldnn_enabled()
        and torch._C._get_tracing_state() is None
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
        and not torch.is_autocast_enabled("cpu")
    )


def _is_plain(tensor: Tensor | None) -> bool:
    return tensor is None or (
        tensor.dtype is torch.float32
        and tensor.is_cpu
        and type(tensor) in (Tensor, Parameter)
        and tensor.layout is torch.strided
        and tensor.numel() > 0  # oneDNN makes no product of nothing
    )


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "none") -> Tensor:
    """activation(x @ weight.T + bias)"""
    name, way = _ENDS[activation]
    y = torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, name, [], way)
    return silu(y, inplace=True) if activation == "silu" else y


def low_rank_linear(*given: object) -> Tensor:
    """As `reference.low_rank_linear`."""
    return low_rank_linear_forward(*given).y


def low_rank_linear_forward(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
) -> Forward:
    h = product(x, down)
    y = product(h, up, bias, activation)
    return Forward(y if residual is None else y.add_(residual), h)


def low_rank_gated(*given: object) -> Tensor:
    """As `reference.low_rank_gated`."""
    return low_rank_gated_forward(*given).y


def low_rank_gated_forward(
    x: Tensor,
    gate_down: Tensor,
    gate_up: Tensor,
    gate_bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None = None,
    activation: str = "silu",
) -> GatedForward:
    gate_h = product(x, gate_down)
    h = gate_h if down is gate_down else product(x, down)  # of two halves of one layer
    return GatedForward(product(gate_h, gate_up, gate_bias, activation).mul_(product(h, up, bias)), gate_h, h)
