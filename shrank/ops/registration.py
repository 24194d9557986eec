"""Makes torch ops of what an op's file says: schemas, kernels, fakes, autograd and autocast, for all ops alike.

`shrank::NAME` is what layers call. Its autograd kernel calls `shrank::NAME_train`, which also returns what the backward
pass needs. Both run the PyTorch that the op's file gives on every device; the native extension adds kernels for CUDA.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from . import reference
from .expand_backward import expand_backward
from .library import define, library
from .reference import Forward, Grads

_AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCUDA) | torch._C.DispatchKeySet(
    torch._C.DispatchKey.AutocastCPU
)


@dataclass(frozen=True)
class Op:
    """An op as its file describes it.

    arguments: its schema: x, down, up, bias, then what is its own, then activation and residual.
    pack: makes of the arguments between bias and residual what the four functions take there.
    """

    name: str
    arguments: str
    check: Callable[..., None]  # (x, down, up, bias, *packed, residual) raises what the law forbids
    forward: Callable[..., Forward]  # the same arguments -> y, h, laid out as the op promises
    backward: Callable[..., Grads]  # (grad, x, down, up, bias, h, *packed, needs, end)
    empty: Callable[..., Forward]  # as forward: new tensors, unwritten
    pack: Callable[..., tuple] = lambda *between: between

    @property
    def schemas(self) -> dict[str, str]:
        """Both ops, by name."""
        return {
            self.name: f"({self.arguments}) -> Tensor",
            f"{self.name}_train": f"({self.arguments}) -> (Tensor y, Tensor h)",
        }

    @cached_property
    def overload(self) -> Callable[..., Tensor]:
        return getattr(torch.ops.shrank, self.name).default

    @cached_property
    def train_overload(self) -> Callable[..., tuple[Tensor, Tensor]]:
        return getattr(torch.ops.shrank, f"{self.name}_train").default

    def run_named(self, given: tuple, kernel: str, grid: Sequence[int] = (), training: bool = False) -> Forward:
        """The op by the kernel of this name, whatever select would choose, on a stated tile.

        Args:
            given: The op's own arguments.
            kernel: As `shrank explain` calls it: shrink_expand, fused, gemm_expand, two_gemms_epilogue, two_gemms; of a
                convolution fused, conv_expand, two_convs_epilogue, two_convs.
            grid: Of a matrix kernel: block_m, max_rank and blocks_n, of shrink_expand tokens, 0 and splits of K; empty
                for the cheapest by the model.
            training: Whether h is wanted; otherwise it says nothing.

        Returns:
            y and h.

        Raises:
            RuntimeError: No native code is loaded, or it has no such kernel for these arguments; the text says why.
        """
        name = f"{self.name}_as"
        if not hasattr(torch.ops.shrank, name):
            raise RuntimeError(f"shrank::{name} is an op of the native extension, which is not loaded")
        return Forward(*getattr(torch.ops.shrank, name)(*self.complete(given), training, kernel, list(grid)))

    def call(self, *given: object) -> Tensor:
        """The op; where autograd has nothing to record, past its kernel, which is in Python.

        That is 1.6 of 7 us at one token (benchmarks/speed/bench_host_cost.py).
        """
        if torch.compiler.is_compiling() or torch.is_inference_mode_enabled() or _is_recorded(given):
            return self.overload(*given)
        with torch._C._AutoDispatchBelowAutograd():
            return self.overload(*given)

    def by_pytorch(self, *given: object) -> Forward:
        return self.forward(*self.packed(given))

    @cached_property
    def defaults(self) -> tuple:
        return tuple(each.default_value for each in self.overload._schema.arguments)

    def complete(self, given: tuple) -> tuple:
        """All arguments: the dispatcher leaves out those at the end that have their defaults."""
        return given + self.defaults[len(given) :]

    def packed(self, given: tuple) -> tuple:
        """All arguments, as the four functions take them."""
        x, down, up, bias, *between, residual = self.complete(given)
        return x, down, up, bias, *self.pack(*between), residual


class _LowRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx, op: Op, *given: object) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            y, h = op.train_overload(*given)
        ctx.save_for_backward(*given[:4], h)
        ctx.op, ctx.between = op, given[4:-1]
        return y

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        x, down, up, bias, h = ctx.saved_tensors
        packed, end = ctx.op.pack(*ctx.between), expand_backward
        if torch.is_grad_enabled():  # to be differentiated again: by PyTorch, and h must know where it comes from
            h, end = ctx.op.forward(x, down, up, bias, *packed, None).h, reference.expand_backward
        _, *tensors, residual = ctx.needs_input_grad
        grads = ctx.op.backward(grad, x, down, up, bias, h, *packed, Grads(*tensors[:4], residual), end)
        return None, *grads[:4], *(None for _ in ctx.between), grads.residual


def _is_recorded(given: tuple) -> bool:
    """Whether autograd wants to know of a call."""
    if torch.is_grad_enabled():
        for each in given:
            if isinstance(each, Tensor) and each.requires_grad:
                return True
    return False


def _autograd_kernel(op: Op) -> Callable[..., Tensor]:
    """Records the op if a gradient is wanted, then calls the kernel below autograd."""
    overload = op.overload  # every call of a layer on CUDA passes here: a microsecond counts

    def autograd(*given: object) -> Tensor:
        if _is_recorded(given):
            return _LowRank.apply(op, *op.complete(given))
        with torch._C._AutoDispatchBelowAutograd():
            return overload(*given)

    return autograd


def _autocast_kernel(op: Op) -> Callable[..., Tensor]:
    """As autocast treats F.linear and F.conv: the op gets all tensors in the narrow dtype. A wider residual is added
    after, so that it keeps its precision."""

    def autocast(*given: object) -> Tensor:
        *tensors, residual = given = op.complete(given)
        dtype = torch.get_autocast_dtype(given[0].device.type)
        narrow = [each.to(dtype) if _is_wide(each) else each for each in tensors]
        fused = residual if residual is not None and residual.dtype == narrow[0].dtype else None
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
            y = op.overload(*narrow, fused)
        return y if fused is residual else y + residual

    return autocast


def _is_wide(given: object) -> bool:
    return isinstance(given, Tensor) and given.is_floating_point() and given.dtype != torch.float64


def _both(op: Op, compute: Callable[..., Forward]) -> tuple[Callable[..., Tensor], Callable[..., tuple]]:
    """What computes y, and what computes all that training needs, after a look at the law."""

    def checked(*given: object) -> Forward:
        arguments = op.packed(given)
        op.check(*arguments)
        return compute(*arguments)

    return lambda *given: checked(*given).y, lambda *given: tuple(checked(*given))


def register(op: Op) -> None:
    """Make a torch op of this one, and one that also returns what training needs."""
    for name, schema in op.schemas.items():
        define(name, schema)
    library.impl(op.name, _autograd_kernel(op), "Autograd")
    for key in ("AutocastCPU", "AutocastCUDA"):
        library.impl(op.name, _autocast_kernel(op), key)
    for name, kernel, fake in zip(op.schemas, _both(op, op.forward), _both(op, op.empty), strict=True):
        library.impl(name, kernel, "CompositeExplicitAutograd")
        torch.library.register_fake(f"shrank::{name}", fake, lib=library)
