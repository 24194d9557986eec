"""Why the native kernels cannot run: every reason, of this process, of a device, of the tensors of a call."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active as _are_transforms_active
from torch._C import _get_tracing_state
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.nn import Parameter
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from . import native
from .law import DTYPES, ORDER_DTYPE

OLDEST_CAPABILITY = (8, 0)


def why_not(
    x: Tensor | None = None,
    down: Tensor | None = None,
    up: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> list[str]:
    """Every reason why the native kernels cannot run here.

    Args:
        x: The input of a call of `low_rank_linear` or `low_rank_conv`. Without it, only the reasons that hold for every
            call in this process are given.
        down: The down factor of that call.
        up: The up factor of that call.
        bias: The bias of that call.
        residual: The residual of that call.

    Returns:
        The reasons, one sentence each; an empty list if the native kernels can run.
    """
    return [*why_not_here(), *(() if x is None else why_not_these((x, down, up, bias, residual), _NAMES))]


_NAMES = ("x", "down", "up", "bias", "residual")


def is_on_cuda(x: object) -> bool:
    """Whether native kernels may ever run for a call with this input. Tests that take a CPU for a GPU replace it."""
    return isinstance(x, Tensor) and x.is_cuda


def why_not_these(tensors: tuple[Tensor | None, ...], names: tuple[str, ...]) -> list[str]:
    """The reasons that hold for these tensors, and for what surrounds the call."""
    reasons = []
    for name, tensor in zip(names, tensors, strict=True):
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            reasons.append(f"{name} is a {type(tensor).__name__}, not a tensor")  # of a symbolic trace, for one
            continue
        if not tensor.is_cuda:
            reasons.append(f"{name} is on {tensor.device}, not on a CUDA device")
        elif unfit := _too_old(tensor.get_device()) or _no_image(tensor.get_device()):
            reasons.append(f"{name} is on {unfit}")
        if _is_of_places(name):
            if tensor.dtype != ORDER_DTYPE:
                reasons.append(f"{name} is {tensor.dtype}, not {ORDER_DTYPE}")
        elif tensor.dtype not in DTYPES:
            reasons.append(f"{name} is {tensor.dtype}, not one of {', '.join(map(str, DTYPES))}")
        if type(tensor) not in _PLAIN and is_traceable_wrapper_subclass(tensor):
            reasons.append(f"{name} is a {type(tensor).__name__}, which may mean something else by a product")
    return reasons + _of_surroundings()


_PLAIN = frozenset((Tensor, Parameter, type(None)))
_known: set[tuple[str, torch.device, torch.dtype]] = set()  # ops that ran: where, and with which dtype of x


def is_known_to_run(op: str, tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether a call is like one that nothing spoke against: every eager call asks, and a microsecond counts.

    Only x is looked at closely: the op itself refuses other tensors that are not on its device, or of another dtype.
    """
    for each in tensors:
        if type(each) not in _PLAIN:
            return False
    x = tensors[0]
    return (
        (op, x.device, x.dtype) in _known
        and not _are_transforms_active()
        and forward_ad._current_level < 0
        and _get_tracing_state() is None
    )


def note_that_it_ran(op: str, x: Tensor) -> None:
    """Remember a call that nothing spoke against. A CPU that stands in for a GPU is not remembered."""
    if x.get_device() >= 0 and not is_compiling():
        _known.add((op, x.device, x.dtype))


def forget() -> None:
    """As where an op may be known to be wrong from now on."""
    _known.clear()


def _is_of_places(name: str) -> bool:
    return name.partition("[")[0].endswith("order")


def _of_surroundings() -> list[str]:
    reasons = []
    if _are_transforms_active():
        reasons.append("torch.func transforms (vmap, grad, jvp, ...) are active")
    if forward_ad._current_level >= 0:
        reasons.append("forward-mode differentiation is active")
    if torch.onnx.is_in_onnx_export():
        reasons.append("ONNX has no such op")
    return reasons


def constant(function: Callable) -> Callable:
    """Let Dynamo take the answer of a function as a constant, where it would trace through a cache.

    The mark of torch.compiler.assume_constant_result, which imports all of Dynamo: a second of every `import shrank`.
    """
    function._dynamo_marked_constant = True
    return function


@constant
def why_not_here() -> tuple[str, ...]:
    return _find_why_not_here()


@constant
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


@constant
def _no_image(device: int) -> str:
    return _find_no_image(device)


@cache
def _find_no_image(device: int) -> str:
    """Why the extension has no code for a CUDA device, as where it was built for others; empty if it has."""
    if not hasattr(torch.ops.shrank, "why_no_image") or not torch.cuda.is_available():
        return ""
    if not (reason := torch.ops.shrank.why_no_image(device)):
        return ""
    found = ".".join(map(str, torch.cuda.get_device_capability(device)))
    return (
        f"{torch.cuda.get_device_name(device)} of compute capability {found}, for which the native extension has no "
        f"code ({reason}): it was built for {native.build_info()['archs']}"
    )
