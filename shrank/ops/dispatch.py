"""What layers call: one op where the native kernels may run, plain PyTorch where they may not, and why they may not."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from functools import cache

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from . import native, reference
from .conv import check_low_rank_conv
from .reference import Window
from .schema import DTYPES, check_low_rank_linear

OLDEST_CAPABILITY = (8, 0)


class Backend(Enum):
    """AUTO: native kernels where they may run, else PyTorch. TORCH: PyTorch. NATIVE: native kernels, or an error."""

    AUTO = "auto"
    TORCH = "torch"
    NATIVE = "native"


def _parse(value: Backend | str, source: str) -> Backend:
    try:
        return Backend(value)
    except ValueError:
        raise ValueError(f"{source} is {value!r}, wanted {', '.join(b.value for b in Backend)}") from None


native.problems()  # loads the extension, and asks no driver: torch.ops.shrank is complete once shrank is imported


class _Setting:
    """Of the whole process, threads included. Layers read it on every call."""

    backend = _parse(os.environ.get("SHRANK_BACKEND", "auto"), "SHRANK_BACKEND")


setting = _Setting()


@contextmanager
def backend(value: Backend | str) -> Iterator[None]:
    """`with shrank.backend("torch"):` decides for the whole process, until the block ends, who runs low-rank layers.

    SHRANK_BACKEND sets it from outside. Raises ValueError on an unknown name.
    """
    before, setting.backend = setting.backend, _parse(value, "backend")
    try:
        yield
    finally:
        setting.backend = before


def low_rank_linear(x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None = None, activation: str = "none",
                    residual: Tensor | None = None, *, backend: Backend | str | None = None) -> Tensor:
    """activation((x @ down.T) @ up.T + bias) + residual

    x: (..., K)  down: (R, K)  up: (N, R)  bias: (N,)  residual: (..., N)  ->  (..., N)
    activation: none, relu, gelu (by erf), gelu_tanh or silu. backend: of this call alone.
    Native kernels compute activation and residual in fp32 and round once; PyTorch rounds after each.
    Whoever computes, shapes, dtypes, devices and activations that do not fit raise a RuntimeError, as in torch's own
    functions; so does backend NATIVE, with every reason, where the native kernels cannot run. An unknown backend is a
    ValueError.
    """
    if _runs_native(backend, x, down, up, bias, residual):
        return torch.ops.shrank.low_rank_linear(x, down, up, bias, activation, residual)
    if _are_tensors(x, down, up, bias, residual):
        check_low_rank_linear(x, down, up, bias, activation, residual, _autocast_casts(x))
    return reference.low_rank_linear(x, down, up, bias, activation, residual)


def low_rank_conv(x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None = None, stride: int | Sequence[int] = 1,
                  padding: int | str | Sequence[int] = 0, dilation: int | Sequence[int] = 1, groups: int = 1,
                  up_groups: int = 1, activation: str = "none", residual: Tensor | None = None, *,
                  backend: Backend | str | None = None) -> Tensor:
    """activation(up * (down * x) + bias) + residual, where * is a convolution and up a pointwise one

    x: (B, C, *in) or (C, *in)  down: (R, C/groups, *kernel)  up: (N, R/up_groups, 1, ...)  bias: (N,)
    residual: as y  ->  y: (B, N, *out) or (N, *out), with its channels last if those of x are.
    1 to 3 dimensions. padding: zeros on both sides of each dimension, or before and after each in turn (twice as many
    numbers), or "same" or "valid". activation, backend, rounding and errors: as low_rank_linear.
    """
    d = down.dim() - 2
    if d >= 1 and x.dim() == d + 1:
        y = low_rank_conv(x[None], down, up, bias, stride, padding, dilation, groups, up_groups, activation,
                          None if residual is None else residual[None], backend=backend)
        return y[0]
    stride, dilation = _sizes("stride", stride, d), _sizes("dilation", dilation, d)
    window = Window(stride, _paddings(padding, stride, dilation, down), dilation, groups, up_groups)
    if _runs_native(backend, x, down, up, bias, residual):
        return torch.ops.shrank.low_rank_conv(x, down, up, bias, *window, activation, residual)
    if _are_tensors(x, down, up, bias, residual):
        check_low_rank_conv(x, down, up, bias, window, activation, residual, _autocast_casts(x))
    return reference.low_rank_conv(x, down, up, bias, window, activation, residual)


def _are_tensors(*given: Tensor | None) -> bool:
    """Whether there is anything to check: not in a symbolic trace; all else that is no tensor, PyTorch refuses."""
    return all(each is None or isinstance(each, Tensor) for each in given)


def _autocast_casts(x: Tensor) -> bool:
    kind = x.device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def _sizes(name: str, value: int | Sequence[int], d: int) -> list[int]:
    sizes = list(value) if isinstance(value, (list, tuple)) else [value] * d
    if not all(isinstance(size, int) or hasattr(size, "__index__") for size in sizes):
        raise RuntimeError(f"shrank::low_rank_conv: {name} is {value!r}, wanted whole numbers")
    return sizes


def _paddings(padding: int | str | Sequence[int], stride: list[int], dilation: list[int], down: Tensor) -> list[int]:
    d = len(stride)
    if not isinstance(padding, str):
        return _sizes("padding", padding, d)
    if padding == "valid":
        return [0] * d
    if padding != "same":
        raise RuntimeError(f"shrank::low_rank_conv: padding is {padding!r}, wanted numbers, 'same' or 'valid'")
    if any(each != 1 for each in stride):
        raise RuntimeError(f"shrank::low_rank_conv: padding is 'same' with stride {stride}, wanted stride 1")
    totals = [each * (size - 1) for each, size in zip(dilation, down.shape[2:], strict=True)]
    return [side for total in totals for side in (total // 2, total - total // 2)]


def _runs_native(backend: Backend | str | None, *tensors: Tensor | None) -> bool:
    """Whether the op runs, and not PyTorch; RuntimeError with every reason if it was insisted on and cannot."""
    chosen = setting.backend if backend is None else _parse(backend, "backend")
    if chosen is Backend.TORCH:
        return False
    of_tensors = _why_not_these(*tensors)
    if of_tensors and chosen is Backend.AUTO:
        return False  # tensors of a CPU are no reason to ask for CUDA devices, which would initialise the driver
    reasons = [*_why_not_here(), *of_tensors]
    if reasons and chosen is Backend.NATIVE:
        raise RuntimeError("backend is native, but the native kernels cannot run:\n- " + "\n- ".join(reasons))
    return not reasons


def why_not(x: Tensor | None = None, down: Tensor | None = None, up: Tensor | None = None, bias: Tensor | None = None,
            residual: Tensor | None = None) -> list[str]:
    """Every reason why the native kernels cannot run here, on these tensors if given; empty if they can."""
    return [*_why_not_here(), *(() if x is None else _why_not_these(x, down, up, bias, residual))]


def _why_not_these(x: Tensor, down: Tensor | None, up: Tensor | None, bias: Tensor | None,
                   residual: Tensor | None) -> list[str]:
    """The reasons that hold for these tensors, and for what surrounds the call."""
    reasons = []
    for name, tensor in (("x", x), ("down", down), ("up", up), ("bias", bias), ("residual", residual)):
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            reasons.append(f"{name} is a {type(tensor).__name__}, not a tensor")  # of a symbolic trace, for one
            continue
        if not tensor.is_cuda:
            reasons.append(f"{name} is on {tensor.device}, not on a CUDA device")
        elif too_old := _too_old(tensor.get_device()):
            reasons.append(f"{name} is on {too_old}")
        if tensor.dtype not in DTYPES:
            reasons.append(f"{name} is {tensor.dtype}, not one of {', '.join(map(str, DTYPES))}")
        kind = type(tensor)
        if kind is not Tensor and kind is not Parameter and is_traceable_wrapper_subclass(tensor):
            reasons.append(f"{name} is a {kind.__name__}, which may mean something else by a product")
    if torch._C._are_functorch_transforms_active():
        reasons.append("torch.func transforms (vmap, grad, jvp, ...) are active")
    if forward_ad._current_level >= 0:
        reasons.append("forward-mode differentiation is active")
    if torch.onnx.is_in_onnx_export():
        reasons.append("ONNX has no such op")
    return reasons


# Dynamo traces through caches; it takes the answers of these two as constants instead.
@torch.compiler.assume_constant_result
def _why_not_here() -> tuple[str, ...]:
    return _find_why_not_here()


@torch.compiler.assume_constant_result
def _too_old(device: int) -> str:
    return _find_too_old(device)


@cache
def _find_why_not_here() -> tuple[str, ...]:
    """The reasons that hold for every tensor of this process."""
    reasons = list(native.problems())
    if torch.version.cuda is None:
        reasons.append(f"torch {torch.__version__} is built without CUDA")
    elif not torch.cuda.is_available():
        reasons.append(f"torch {torch.__version__} sees no CUDA device")
    driver, built = (native.build_info().get(key) for key in ("driver", "cuda"))
    if driver and int(driver.split(".")[0]) < int(built.split(".")[0]):
        reasons.append(f"the driver runs CUDA up to {driver}, the native extension was built for {built}")
    return tuple(reasons)


@cache
def _find_too_old(device: int) -> str:
    """What is wrong with a CUDA device that the kernels cannot run on; empty for all others."""
    if not torch.cuda.is_available():
        return ""  # a fake tensor, of a device that is elsewhere
    capability = torch.cuda.get_device_capability(device)
    if capability >= OLDEST_CAPABILITY:
        return ""
    found, wanted = (".".join(map(str, c)) for c in (capability, OLDEST_CAPABILITY))
    return f"{torch.cuda.get_device_name(device)} of compute capability {found}, older than {wanted}"
