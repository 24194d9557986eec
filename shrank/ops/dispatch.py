"""What layers call: one op where the native kernels may run, plain PyTorch where they may not."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from types import ModuleType

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from . import availability, cpu, multi, native, pivoted_reference, reference, self_check
from .availability import is_known_to_run
from .conv import CONV, check_low_rank_conv, window_of
from .gated import GATED, check_low_rank_gated
from .linear import LINEAR, check_low_rank_linear
from .multi import Multi, check_low_rank_linear_multi
from .pivoted import PIVOTED, check_low_rank_pivoted
from .registration import Op


class Backend(Enum):
    """Who computes low-rank layers.

    Attributes:
        AUTO: The native kernels where they may run, else PyTorch; on a CPU by kernels for a few rows or by
            oneDNN's products, where those are faster. The default.
        TORCH: PyTorch, one call for each step.
        NATIVE: The native kernels. A call that they cannot run raises a RuntimeError with every reason.
    """

    AUTO = "auto"
    TORCH = "torch"
    NATIVE = "native"


TORCH = Backend.TORCH  # an attribute of a module takes a third of the time of one of an Enum
_BY_NAME: dict[object, Backend] = {spelling: each for each in Backend for spelling in (each, each.value)}


def _parse(value: Backend | str, source: str) -> Backend:
    try:
        return _BY_NAME[value]
    except (KeyError, TypeError):  # TypeError: it cannot even be a key
        raise ValueError(f"{source} is {value!r}, wanted {', '.join(b.value for b in Backend)}") from None


native.problems()  # loads the extension, and asks no driver: torch.ops.shrank is complete once shrank is imported


class _Process:
    """What holds for the whole process, threads included."""

    backend = _parse(os.environ.get("SHRANK_BACKEND", "auto"), "SHRANK_BACKEND")


process = _Process()


def current_backend() -> Backend:
    """The backend of the process at this moment; a call costs 0.04 us more than process.backend."""
    return process.backend


@contextmanager
def backend(value: Backend | str) -> Iterator[None]:
    """Choose who computes low-rank layers until the block ends, in the whole process.

    The environment variable SHRANK_BACKEND chooses from outside. A call's own `backend` goes before both.

    Args:
        value: A `Backend` or its value: "auto", "torch" or "native".

    Yields:
        Nothing; the choice before is in force again after the block.

    Raises:
        ValueError: The name is unknown.

    Example:
        with shrank.backend("torch"):
            y = model(x)
    """
    before, process.backend = process.backend, _parse(value, "backend")
    try:
        yield
    finally:
        process.backend = before


def low_rank_linear(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
    *,
    backend: Backend | str | None = None,
) -> Tensor:
    """Multiply by a low-rank matrix: activation((x @ down.T) @ up.T + bias) + residual.

    Args:
        x: (..., K).
        down: (R, K), the first factor.
        up: (N, R), the second factor.
        bias: (N,).
        activation: none, relu, gelu (by erf), gelu_tanh or silu.
        residual: (..., N), added after the activation.
        backend: Who computes this call; by default the process's backend decides.

    Returns:
        (..., N), in the dtype of x. The native kernels compute activation and residual in fp32 and round once, PyTorch
        rounds after each.

    Raises:
        RuntimeError: Shapes, dtypes, devices or the activation do not fit, whoever computes; or the backend is NATIVE
            and the native kernels cannot run, with every reason.
        ValueError: The backend is unknown.
    """
    if _runs_native(LINEAR, backend, (x, down, up, bias, residual)):
        return LINEAR.call(x, down, up, bias, activation, residual)
    if _are_tensors(x, down, up, bias, residual):
        check_low_rank_linear(x, down, up, bias, activation, residual, _autocast_casts(x))
    torch_ops = _by_pytorch(backend, x, down, up, bias, residual)
    return torch_ops.low_rank_linear(x, down, up, bias, activation, residual)


def low_rank_linear_multi(
    x: Tensor,
    down: Sequence[Tensor],
    up: Sequence[Tensor],
    bias: Sequence[Tensor | None] | None = None,
    pivot_bias: Sequence[Tensor | None] | None = None,
    order: Sequence[Tensor | None] | None = None,
    *,
    backend: Backend | str | None = None,
) -> list[Tensor]:
    """Multiply by several low-rank matrices: (x @ down[i].T) @ up[i].T + bias[i], as query, key and value are.

    Args:
        x: (..., K).
        down: (R, K) of each layer, the first factors; every R is its own.
        up: (N, R) of each layer, the second factors; every N is its own. Of a pivoted layer (N - R, R).
        bias: (N,) or None of each layer; None where no layer has one. Of a pivoted layer (N - R,).
        pivot_bias: (R,) of each pivoted layer, or None; None where no layer has one.
        order: (N,) of each pivoted layer, as `low_rank_pivoted` takes it, None of others; None where no layer is
            pivoted.
        backend: Who computes this call; by default the process's backend decides.

    Returns:
        (..., N) of each layer, with the bits that `low_rank_linear` or `low_rank_pivoted` gives. On few rows of x, the
        native kernels compute up to three layers with the launches of one.

    Raises:
        RuntimeError: As of `low_rank_linear`; also the numbers of factors differ.
        ValueError: The backend is unknown.
    """
    lists = (down, up, *([None] * len(down) if each is None else each for each in (bias, pivot_bias, order)))
    tensors = (x, *(each for of_one in lists for each in of_one))
    counts_fit = all(len(each) == len(down) for each in lists)
    if counts_fit and _runs_native(Multi(len(down)), backend, tensors):
        return multi.call(x, *lists)
    if _are_tensors(*tensors):
        check_low_rank_linear_multi(x, *lists, _autocast_casts(x))
    return [
        _by_pytorch(backend, *given).low_rank_linear(*given)
        if op is LINEAR
        else pivoted_reference.low_rank_pivoted(*given)
        for op, given in multi.alone(x, *lists)
    ]


def low_rank_gated(
    x: Tensor,
    gate_down: Tensor,
    gate_up: Tensor,
    gate_bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None = None,
    activation: str = "silu",
    *,
    gate_pivot_bias: Tensor | None = None,
    gate_order: Tensor | None = None,
    pivot_bias: Tensor | None = None,
    order: Tensor | None = None,
    backend: Backend | str | None = None,
) -> Tensor:
    """Multiply what two low-rank matrices make of x: activation(gate) * value, as the MLPs of language models do.

    gate is (x @ gate_down.T) @ gate_up.T + gate_bias, value is (x @ down.T) @ up.T + bias.

    Args:
        x: (..., K).
        gate_down: (S, K), the first factor of the gate.
        gate_up: (N, S), the second factor of the gate.
        gate_bias: (N,).
        down: (R, K), the first factor of the value.
        up: (N, R), the second factor of the value.
        bias: (N,).
        activation: Of the gate: none, relu, gelu (by erf), gelu_tanh or silu.
        gate_pivot_bias: (S,), of the gate's pivots.
        gate_order: (N,), where the gate is pivoted, as of `low_rank_pivoted`: gate_up is then (N - S, S), and gate_bias
            (N - S,).
        pivot_bias: (R,), of the value's pivots.
        order: (N,), where the value is pivoted, likewise.
        backend: Who computes this call; by default the process's backend decides.

    Returns:
        (..., N), in the dtype of x. The native kernels compute activation and product in fp32 and round once, PyTorch
        rounds after each.

    Raises:
        RuntimeError: As of `low_rank_linear`.
        ValueError: The backend is unknown.
    """
    given = (x, gate_down, gate_up, gate_bias, down, up, bias, gate_pivot_bias, gate_order, pivot_bias, order)
    if _runs_native(GATED, backend, given):
        return GATED.call(*given, activation)
    if _are_tensors(*given):
        check_low_rank_gated(*given, activation, _autocast_casts(x))
    torch_ops = _by_pytorch(backend, x, down, up, bias, gate_down, gate_up, gate_bias, gate_pivot_bias, pivot_bias)
    return torch_ops.low_rank_gated(*given, activation)


def low_rank_pivoted(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    order: Tensor,
    bias: Tensor | None = None,
    pivot_bias: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
    *,
    backend: Backend | str | None = None,
) -> Tensor:
    """Multiply by a low-rank matrix in pivoted storage: activation(z) + residual, where z has R outputs that h is.

    down holds R rows of the matrix itself, the pivots, and up the other rows in terms of these. With h = x @ down.T, z
    is h + pivot_bias and h @ up.T + bias, each output in its place.

    Args:
        x: (..., K).
        down: (R, K), the rows of the pivots.
        up: (N - R, R), the other rows in terms of these; none where R is N.
        order: (N,), int32: for every output, its place among the pivots and then the others. Every place occurs once,
            which is not checked: that would wait for the device.
        bias: (N - R,), of the other outputs.
        pivot_bias: (R,), of the pivots' outputs.
        activation: none, relu, gelu (by erf), gelu_tanh or silu.
        residual: (..., N), added after the activation.
        backend: Who computes this call; by default the process's backend decides.

    Returns:
        (..., N), in the dtype of x. The native kernels compute activation and residual in fp32 and round once, PyTorch
        rounds after each.

    Raises:
        RuntimeError: As of `low_rank_linear`.
        ValueError: The backend is unknown.
    """
    given = (x, down, up, bias, pivot_bias, order)
    if _runs_native(PIVOTED, backend, (*given, residual)):
        return PIVOTED.call(*given, activation, residual)
    if _are_tensors(*given, residual):
        check_low_rank_pivoted(*given, activation, residual, _autocast_casts(x))
    return pivoted_reference.low_rank_pivoted(*given, activation, residual)


def low_rank_conv(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    up_groups: int = 1,
    activation: str = "none",
    residual: Tensor | None = None,
    *,
    backend: Backend | str | None = None,
) -> Tensor:
    """Convolve with a low-rank kernel in 1 to 3 dimensions: activation(up * (down * x) + bias) + residual.

    `*` is a convolution, and that with `up` is pointwise.

    Args:
        x: (B, C, *in) or, without a batch, (C, *in).
        down: (R, C / groups, *kernel), the first factor.
        up: (N, R / up_groups, 1, ...), the second factor.
        bias: (N,).
        stride: Of the convolution with down, one number or one for each dimension.
        padding: Zeros: one number, one for each dimension, or two for each (before, after); "same" or "valid".
        dilation: Of the convolution with down, one number or one for each dimension.
        groups: Of the convolution with down.
        up_groups: Of the convolution with up.
        activation: none, relu, gelu (by erf), gelu_tanh or silu.
        residual: Shaped as the result, added after the activation.
        backend: Who computes this call; by default the process's backend decides.

    Returns:
        (B, N, *out) or, without a batch, (N, *out), in the dtype of x, with channels last if those of x are.

    Raises:
        RuntimeError: As of `low_rank_linear`; also numbers of the window do not fit.
        ValueError: The backend is unknown.
    """
    d = down.dim() - 2
    if d >= 1 and x.dim() == d + 1:
        y = low_rank_conv(
            x[None],
            down,
            up,
            bias,
            stride,
            padding,
            dilation,
            groups,
            up_groups,
            activation,
            None if residual is None else residual[None],
            backend=backend,
        )
        return y[0]
    window = window_of(down, stride, padding, dilation, groups, up_groups)
    if _runs_native(CONV, backend, (x, down, up, bias, residual)):
        return CONV.call(x, down, up, bias, *window, activation, residual)
    if _are_tensors(x, down, up, bias, residual):
        check_low_rank_conv(x, down, up, bias, window, activation, residual, _autocast_casts(x))
    return reference.low_rank_conv(x, down, up, bias, window, activation, residual)


def _are_tensors(*given: Tensor | None) -> bool:
    """Whether there is anything to check: not in a symbolic trace; all else that is no tensor, PyTorch refuses."""
    return all(each is None or isinstance(each, Tensor) for each in given)


def _autocast_casts(x: Tensor) -> bool:
    kind = x.device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def _chosen(backend: Backend | str | None) -> Backend:
    return current_backend() if backend is None else _parse(backend, "backend")


def _by_pytorch(backend: Backend | str | None, x: Tensor, *others: Tensor | None) -> ModuleType:
    """The ops in PyTorch for these tensors, of which the first two others are down and up."""
    return (_chosen(backend) is Backend.AUTO and cpu.fastest(x, *others)) or reference


def _runs_native(op: Op | Multi, backend: Backend | str | None, tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether the op runs, and not PyTorch; RuntimeError with every reason if it was insisted on and cannot."""
    chosen = process.backend if backend is None else _parse(backend, "backend")
    if chosen is TORCH:
        return False
    if not is_dynamo_compiling() and is_known_to_run(op.name, tensors):
        return True
    if chosen is Backend.AUTO and not availability.is_on_cuda(tensors[0]):
        return False  # nobody reads the reasons; and CUDA devices are not asked for, which would initialise the driver
    of_tensors = availability.why_not_these(tensors, op.names)
    if of_tensors and chosen is Backend.AUTO:
        return False
    reasons = (*availability.why_not_here(), *of_tensors)
    for name in op.relies_on:
        reasons = reasons or self_check.why_not_op(name, tensors[0])
    if reasons and chosen is Backend.NATIVE:
        raise RuntimeError("backend is native, but the native kernels cannot run:\n- " + "\n- ".join(reasons))
    if not reasons:
        availability.note_that_it_ran(op.name, tensors[0])
    return not reasons
