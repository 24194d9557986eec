"""Makes torch ops of what an op's file says: schemas, kernels, fakes, autograd and autocast, for all ops alike.

`shrank::NAME` is what layers call. Its autograd kernel calls `shrank::NAME_train`, which also returns what the backward
pass needs. Both run the PyTorch that the op's file gives on every device; the native extension adds kernels for CUDA.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor, is_grad_enabled, is_inference_mode_enabled
from torch._C import _AutoDispatchBelowAutograd
from torch.compiler import is_dynamo_compiling

from .library import define, library, native_op

NO_AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCUDA) | torch._C.DispatchKeySet(
    torch._C.DispatchKey.AutocastCPU
)


@dataclass(frozen=True)
class Op:
    """An op as its file describes it.

    Its arguments are tensors, of which the first is x; then what is no tensor; and at the end, maybe, a residual.

    arguments: its schema.
    pack: makes of the arguments that are no tensors what the four functions take there.
    end: what `backward` gets to go through the end of the layer; end_by_pytorch: the same, to be differentiated again.
    """

    name: str
    arguments: str
    outputs: type[tuple]  # y, and what the backward pass needs of the forward pass
    grads: type[tuple]  # the gradients of the tensors, and of the residual
    check: Callable[..., None]  # (*tensors, *packed, [residual]) raises what the law forbids
    forward: Callable[..., NamedTuple]  # the same arguments -> outputs, laid out as the op promises
    backward: Callable[..., tuple]  # (grad, *tensors, *outputs but y, *packed, needs, end) -> grads
    empty: Callable[..., NamedTuple]  # as forward: new tensors, unwritten
    end: Callable[..., tuple]
    end_by_pytorch: Callable[..., tuple]
    pack: Callable[..., tuple] = lambda *between: between
    infer: Callable[..., Tensor] | None = None  # as forward, but y alone: where something is faster at that
    uses: tuple[str, ...] = ()  # other ops whose kernels it may run

    @property
    def relies_on(self) -> tuple[str, ...]:
        """The ops whose kernels may run."""
        return (self.name, *self.uses)

    @property
    def schemas(self) -> dict[str, str]:
        """Both ops, by name."""
        outputs = ", ".join(f"Tensor {name}" for name in self.outputs._fields)
        return {
            self.name: f"({self.arguments}) -> Tensor",
            f"{self.name}_train": f"({self.arguments}) -> ({outputs})",
        }

    @property
    def takes_residual(self) -> bool:
        return "residual" in self.grads._fields

    @property
    def names(self) -> tuple[str, ...]:
        """Of all tensors among the arguments."""
        return self.grads._fields

    @property
    def tensors(self) -> int:
        """How many arguments are tensors, without a residual."""
        return len(self.names) - self.takes_residual

    @cached_property
    def overload(self) -> Callable[..., Tensor]:
        return getattr(torch.ops.shrank, self.name).default

    @cached_property
    def eager(self) -> Callable[..., Tensor]:
        """What the overload calls, without a frame of Python's in between: 0.15 us (torch/_ops.py)."""
        return self.overload._op

    @cached_property
    def train_overload(self) -> Callable[..., tuple[Tensor, ...]]:
        return getattr(torch.ops.shrank, f"{self.name}_train").default

    def run_named(self, given: tuple, kernel: str, grid: Sequence[int] = (), training: bool = False) -> NamedTuple:
        """The op by the kernel of this name, whatever select would choose, on a stated tile.

        Args:
            given: The op's own arguments.
            kernel: As `shrank explain` calls it: shrink_expand, fused, gemm_expand, apart, two_gemms_epilogue or
                two_gemms; of a convolution fused, conv_expand, two_convs_epilogue, two_convs.
            grid: Of a matrix kernel: block_m, max_rank and blocks_n, of shrink_expand tokens, 0 and splits of K; empty
                for the cheapest by the model.
            training: Whether what is kept for gradients is wanted; otherwise it says nothing.

        Returns:
            y and what is kept.

        Raises:
            RuntimeError: No native code is loaded, or it has no such kernel for these arguments; the text says why.
        """
        run = native_op(f"{self.name}_as")
        return self.outputs(*run(*self.complete(given), training, kernel, list(grid)))

    def call(self, *given: object) -> Tensor:
        """The op; where autograd has nothing to record, past its kernel, which is in Python.

        That is 1.6 of 7 us at one token (benchmarks/speed/bench_host_cost.py).
        """
        if is_dynamo_compiling():
            return self.overload(*given)
        if is_inference_mode_enabled() or (is_grad_enabled() and is_recorded(given)):
            return self.eager(*given)
        with _AutoDispatchBelowAutograd():
            return self.eager(*given)

    def by_pytorch(self, *given: object) -> NamedTuple:
        return self.forward(*self.packed(given))

    def y_of(self, *arguments: object) -> Tensor:
        """As `forward`, but y alone."""
        return self.infer(*arguments) if self.infer else self.forward(*arguments).y

    @cached_property
    def defaults(self) -> tuple:
        return tuple(each.default_value for each in self.overload._schema.arguments)

    def complete(self, given: tuple) -> tuple:
        """All arguments: the dispatcher leaves out those at the end that have their defaults."""
        return given + self.defaults[len(given) :]

    def packed(self, given: tuple) -> tuple:
        """All arguments, as the four functions take them."""
        tensors, between, residual = self.parts(given)
        return *tensors, *self.pack(*between), *residual

    def parts(self, given: tuple) -> tuple[tuple, tuple, tuple]:
        """All arguments: the tensors, those that are none, and the residual, if the op takes one."""
        given, first = self.complete(given), self.tensors
        last = len(given) - self.takes_residual
        return given[:first], given[first:last], given[last:]


class _LowRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx, op: Op, *given: object) -> Tensor:
        with _AutoDispatchBelowAutograd():
            y, *kept = op.train_overload(*given)
        tensors, ctx.between, _ = op.parts(given)
        ctx.save_for_backward(*tensors, *kept)
        ctx.op = op
        return y

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        op, count, saved = ctx.op, ctx.op.tensors, ctx.saved_tensors  # asked once: a checkpoint gives them once
        tensors, kept = saved[:count], saved[count:]
        packed, end = op.pack(*ctx.between), op.end
        if torch.is_grad_enabled():  # to be differentiated again: by PyTorch, and h must know where it comes from
            _, *kept = op.forward(*tensors, *packed, *[None] * op.takes_residual)
            end = op.end_by_pytorch
        _, *needs = ctx.needs_input_grad
        wanted, _, of_residual = op.parts(tuple(needs))
        grads = op.backward(grad, *tensors, *kept, *packed, op.grads(*wanted, *of_residual), end)
        return None, *grads[:count], *(None for _ in ctx.between), *grads[count:]


def is_recorded(given: tuple) -> bool:
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
        if is_recorded(given):
            return _LowRank.apply(op, *op.complete(given))
        with _AutoDispatchBelowAutograd():
            return overload(*given)

    return autograd


def _autocast_kernel(op: Op) -> Callable[..., Tensor]:
    """As autocast treats F.linear and F.conv: the op gets all tensors in the narrow dtype. A wider residual is added
    after, so that it keeps its precision."""

    def autocast(*given: object) -> Tensor:
        tensors, between, residual = op.parts(given)
        dtype = torch.get_autocast_dtype(given[0].device.type)
        narrow = [narrowed(each, dtype) for each in tensors]
        fits = [each if each is not None and each.dtype == narrow[0].dtype else None for each in residual]
        with torch._C._ExcludeDispatchKeyGuard(NO_AUTOCAST):
            y = op.overload(*narrow, *between, *fits)
        return sum((each for each, fused in zip(residual, fits, strict=True) if each is not fused), y)

    return autocast


def narrowed(given: object, dtype: torch.dtype) -> object:
    """As autocast changes an argument."""
    wide = isinstance(given, Tensor) and given.is_floating_point() and given.dtype != torch.float64
    return given.to(dtype) if wide else given


def _checked(op: Op, compute: Callable[..., object]) -> Callable[..., object]:
    """A kernel that looks at the law first."""

    def kernel(*given: object) -> object:
        arguments = op.packed(given)
        op.check(*arguments)
        return compute(*arguments)

    return kernel


def register(op: Op) -> None:
    """Make a torch op of this one, and one that also returns what training needs."""
    for name, schema in op.schemas.items():
        define(name, schema)
    library.impl(op.name, _autograd_kernel(op), "Autograd")
    for key in ("AutocastCPU", "AutocastCUDA"):
        library.impl(op.name, _autocast_kernel(op), key)
    kernels = op.y_of, lambda *arguments: tuple(op.forward(*arguments))
    fakes = lambda *arguments: op.empty(*arguments).y, lambda *arguments: tuple(op.empty(*arguments))
    for name, kernel, fake in zip(op.schemas, kernels, fakes, strict=True):
        library.impl(name, _checked(op, kernel), "CompositeExplicitAutograd")
        torch.library.register_fake(f"shrank::{name}", _checked(op, fake), lib=library)
