"""The ops on a CPU by oneDNN's products, and for which layers those are faster than the ones that PyTorch calls.

PyTorch keeps them for the code that torch.compile makes; its own calls of float32 use MKL or BLAS. They end with bias,
relu or gelu before the result is written. All else happens in place.
"""

from __future__ import annotations

import platform

import torch
from torch import Tensor
from torch.nn.functional import silu

from .reference import ACTIVATIONS

# Where they win, measured for ten layers of 128 to 4096 inputs and 1 to 4096 rows
# (benchmarks/speed/bench_cpu_layers.py): from so many multiply-adds, as a call of oneDNN costs 10 us more than one of
# MKL; and where as many weights are read for a few rows, at twice the rate.
FEWEST_PRODUCTS = 1 << 25
FEWEST_WEIGHTS = 1 << 17

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


def is_faster(dtype: torch.dtype, numbers: int, inputs: int, weights: int) -> bool:
    """Whether a layer is large enough, of so many weights and of x of so many numbers.

    `torch.backends.mkldnn.flags(enabled=False)` switches the products off.
    """
    if dtype is not torch.float32:
        return False
    if weights < FEWEST_WEIGHTS and weights * numbers < FEWEST_PRODUCTS * inputs:
        return False
    return _IS_HERE and torch._C._get_mkldnn_enabled()


def is_faster_in_a_graph(dtype: torch.dtype, numbers: int, inputs: int, weights: int) -> bool:
    """Whether a layer is as large as makes up for a call in Python, too."""
    return dtype is torch.float32 and _IS_HERE and weights * numbers >= FEWEST_PRODUCTS * inputs


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "none") -> Tensor:
    """activation(x @ weight.T + bias)"""
    name, way = _ENDS[activation]
    y = torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, name, [], way)
    return silu(y, inplace=True) if activation == "silu" else y


def low_rank_linear(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """As `reference.low_rank_linear`."""
    y = product(product(x, down), up, bias, activation)
    return y if residual is None else y.add_(residual)


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
    """As `reference.low_rank_gated`."""
    gate_h = product(x, gate_down)
    h = gate_h if down is gate_down else product(x, down)  # of two halves of one layer
    gate = _expanded(gate_h, gate_up, gate_bias, gate_pivot_bias, gate_order, activation)
    return gate.mul_(_expanded(h, up, bias, pivot_bias, order))


def _expanded(
    h: Tensor,
    up: Tensor,
    bias: Tensor | None,
    pivot_bias: Tensor | None,
    order: Tensor | None,
    activation: str = "none",
) -> Tensor:
    """A new tensor. What follows a product is the same for every column: of pivoted factors, too, for h and product."""
    others = product(h, up, bias, activation)
    if order is None:
        return others
    own = ACTIVATIONS[activation](h if pivot_bias is None else h + pivot_bias)
    return torch.cat((own, others), -1).index_select(-1, order)
