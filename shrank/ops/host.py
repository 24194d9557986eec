"""The kernels for a CPU: a low-rank layer of a few rows of x, as when a language model makes one token.

Such a layer takes as long as its weights take to be read. BLAS and oneDNN read them at a third to two thirds of the
rate of memory, and each stage is a call; these are one call (csrc/host).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import silu
from torch.torch_version import TorchVersion

from .native import OLDEST_TORCH
from .reference import ACTIVATIONS

LIBRARY = Path(__file__).parents[1] / "_host.abi3.so"
# Where they win, measured for layers of 64 to 4096 inputs (benchmarks/speed/bench_cpu_layers.py): of more rows the
# products take longer than the weights, and those of numbers of 16 bits, which are widened first, do sooner.
MOST_ROWS = {torch.float32: 8, torch.bfloat16: 2}
FEWEST_WEIGHTS = {torch.float32: 1 << 16, torch.bfloat16: 1 << 13}  # of less, calls take as long as the products


@cache
def problems() -> tuple[str, ...]:
    """Why the kernels for a CPU are not loaded; empty if they are. The first call loads them."""
    if not LIBRARY.exists():
        return ("this installation of shrank has no kernels for a CPU: it was built without a C++ compiler for x86",)
    if TorchVersion(torch.__version__) < OLDEST_TORCH:
        return (f"the kernels for a CPU need torch {OLDEST_TORCH} or newer, this is {torch.__version__}",)
    if (found := torch.backends.cpu.get_cpu_capability()) not in ("AVX2", "AVX512"):
        return (f"the kernels for a CPU need AVX2, PyTorch uses {found}",)
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        return (f"the kernels for a CPU do not load with torch {torch.__version__}: {error}",)
    return ()


IS_HERE = not problems()


def _missing(*_: object) -> Tensor:
    raise RuntimeError("; ".join(problems()))


def are_few(dtype: torch.dtype, numbers: int, inputs: int, weights: int) -> bool:
    """Whether x, of so many numbers, has so few rows, and the layer so many weights, that the kernels are faster."""
    return IS_HERE and dtype in MOST_ROWS and numbers <= MOST_ROWS[dtype] * inputs and weights >= FEWEST_WEIGHTS[dtype]


# (x, down, up, bias, residual, order, pivot_bias): the op, without a frame of Python's before it.
rows: Callable[..., Tensor] = torch.ops.shrank.low_rank_rows.default._op if IS_HERE else _missing


def _finished(z: Tensor, activation: str, residual: Tensor | None) -> Tensor:
    """activation(z) + residual, of an activation: PyTorch's compute several numbers at once."""
    y = silu(z, inplace=True) if activation == "silu" else ACTIVATIONS[activation](z)
    return y if residual is None else y.add_(residual)


def low_rank_linear(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """As `reference.low_rank_linear`."""
    if activation == "none":
        return rows(x, down, up, bias, residual)
    return _finished(rows(x, down, up, bias), activation, residual)


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
    gate = _finished(rows(x, gate_down, gate_up, gate_bias, None, gate_order, gate_pivot_bias), activation, None)
    return gate.mul_(rows(x, down, up, bias, None, order, pivot_bias))


def low_rank_pivoted(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    order: Tensor,
    bias: Tensor | None = None,
    pivot_bias: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """As `dispatch.low_rank_pivoted`."""
    if activation == "none":
        return rows(x, down, up, bias, residual, order, pivot_bias)
    return _finished(rows(x, down, up, bias, None, order, pivot_bias), activation, residual)
