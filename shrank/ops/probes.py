"""The problems by which kernels are checked on a card, and the rule by which an answer is right."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from . import pivoted_reference, reference
from .conv import CONV
from .expand_backward import run_named
from .gated import GATED
from .gated_backward import run_named as run_gated_named
from .law import DTYPES, ORDER_DTYPE
from .linear import LINEAR
from .multi import Multi, run_together
from .pivoted import PIVOTED
from .pivoted_backward import run_named as run_pivoted_named
from .registration import Op
from .truth import Truth

_HALF = (torch.bfloat16, torch.float16)
Results = dict[str, str]  # of every probe: what is wrong, or ""


@dataclass(frozen=True)
class Probe:
    """A family of kernels, and a problem whose every side is ragged and that has every end.

    sizes: of x, and of down and up or of those of gate and value; of the way back of h and up, of each pair. more: what
    the op takes between bias and activation.
    """

    op: Op | Multi
    family: str
    kernel: str
    sizes: tuple[torch.Size, ...]
    more: tuple = ()
    grid: tuple[int, ...] = ()
    dtypes: tuple[torch.dtype, ...] = _HALF

    def name(self, dtype: torch.dtype) -> str:
        return f"{self.op.name} {self.family} {str(dtype).removeprefix('torch.')}"

    def arguments(self, dtype: torch.dtype, device: str) -> tuple:
        """Outputs have about unit variance."""
        draw = _drawing(dtype, device)
        x, down, up = self.sizes
        tensors = [draw(*x), draw(*down, fan_in=down[1:].numel()), draw(*up, fan_in=up[1])]
        if len(x) > 2:  # a convolution: as its kernels read
            tensors[:2] = (each.to(memory_format=torch.channels_last) for each in tensors[:2])
        y = self.op.empty(*tensors, None, *self.op.pack(*self.more, "none"), None).y
        residual = torch.empty_like(y).copy_(draw(*y.shape))
        return (*tensors, draw(up[0]), *self.more, "gelu", residual)

    def run(self, given: tuple) -> NamedTuple:
        return self.op.run_named(given, self.kernel, self.grid, training=True)

    def truth(self, given: tuple) -> Truth:
        return Truth(self.op.by_pytorch, given)

    def failure(self, dtype: torch.dtype, device: str) -> str:
        """What is wrong with the kernels' answers beside PyTorch's, by the rule of the tests; "" if nothing is."""
        given = self.arguments(dtype, device)
        try:
            found = self.run(given)
            if device.startswith("cuda"):
                torch.cuda.synchronize(device)
        except torch.OutOfMemoryError:  # no fault of the kernel
            raise
        except RuntimeError as error:
            return f"it does not run: {error}"
        return self.truth(given).what_is_wrong(found)


class BackwardProbe(Probe):
    """The same of expand_backward, which the gradients of an op pass."""

    def arguments(self, dtype: torch.dtype, device: str) -> tuple:
        draw = _drawing(dtype, device)
        h, up = self.sizes
        return draw(*h[:-1], up[0]), draw(*h), draw(*up, fan_in=up[1]), draw(up[0]), "gelu", True

    def run(self, given: tuple) -> NamedTuple:
        return run_named(given, self.kernel, self.grid)

    def truth(self, given: tuple) -> Truth:
        return Truth(reference.expand_backward, given)


@dataclass(frozen=True)
class GatedProbe(Probe):
    """Of a gated layer: gate and value have other ranks."""

    pivoted: bool = False

    def arguments(self, dtype: torch.dtype, device: str) -> tuple:
        draw = _drawing(dtype, device)
        x, *pairs = self.sizes
        given, pivots = [draw(*x)], []
        for seed, (down, up) in enumerate(zip(pairs[::2], pairs[1::2], strict=True)):
            given += [draw(*down, fan_in=down[1]), draw(*up, fan_in=up[1]), draw(up[0])]
            pivots += [draw(up[1]), _order(sum(up), device, seed)] if self.pivoted else [None, None]
        return (*given, *pivots, "silu")


class GatedBackwardProbe(Probe):
    """The same of gated_backward."""

    def arguments(self, dtype: torch.dtype, device: str) -> tuple:
        draw = _drawing(dtype, device)
        given = [draw(*self.sizes[0][:-1], self.sizes[1][0])]
        for h, up in zip(self.sizes[::2], self.sizes[1::2], strict=True):
            given += [draw(*h), draw(*up, fan_in=up[1]), draw(up[0])]
        return (*given, "silu", True, True)

    def run(self, given: tuple) -> NamedTuple:
        return run_gated_named(given, self.kernel, self.grid)

    def truth(self, given: tuple) -> Truth:
        return Truth(reference.gated_backward, given)


@dataclass(frozen=True)
class PivotedProbe(Probe):
    """Of a pivoted layer. first: its pivots are the first outputs, and not anywhere."""

    first: bool = False

    def arguments(self, dtype: torch.dtype, device: str) -> tuple:
        draw, (x, down, up) = _drawing(dtype, device), self.sizes
        N = up[1] + up[0]
        order = torch.arange(N, dtype=ORDER_DTYPE, device=device) if self.first else _order(N, device)
        given = draw(*x), draw(*down, fan_in=down[1]), draw(*up, fan_in=up[1]), draw(up[0]), draw(up[1])
        return (*given, order, "gelu", draw(*x[:-1], N))


class PivotedBackwardProbe(PivotedProbe):
    """The same of pivoted_backward, with what was the residual as the gradient."""

    def arguments(self, dtype: torch.dtype, device: str) -> tuple:
        x, down, *rest, grad = super().arguments(dtype, device)
        return (grad, x @ down.mT, *rest, True)

    def run(self, given: tuple) -> NamedTuple:
        return run_pivoted_named(given, self.kernel, self.grid)

    def truth(self, given: tuple) -> Truth:
        return Truth(pivoted_reference.pivoted_backward, given)


@dataclass(frozen=True)
class MultiProbe(Probe):
    """Of several layers of one input, by the kernels for a few rows. grid: tokens, and the splits of each layer.

    pivoted: which of them are.
    """

    pivoted: tuple[int, ...] = ()

    def arguments(self, dtype: torch.dtype, device: str) -> tuple:
        draw = _drawing(dtype, device)
        x, *pairs = self.sizes
        down = [draw(*size, fan_in=size[1]) for size in pairs[::2]]
        up = [draw(*size, fan_in=size[1]) for size in pairs[1::2]]
        bias = [draw(len(each)) for each in up]
        of_pivots = [draw(len(each)) if i in self.pivoted else None for i, each in enumerate(down)]
        outputs = [len(one) + len(other) for one, other in zip(down, up, strict=True)]
        order = [_order(N, device, i) if i in self.pivoted else None for i, N in enumerate(outputs)]
        return draw(*x), down, up, bias, of_pivots, order

    def run(self, given: tuple) -> NamedTuple:
        tokens, *splits = self.grid
        return _Three(*run_together(given, tokens, splits))

    def truth(self, given: tuple) -> Truth:
        x, *lists = given
        return Truth(_three_by_pytorch, (x, *(each for layer in zip(*lists, strict=True) for each in layer)))


class _Three(NamedTuple):
    first: Tensor
    second: Tensor
    third: Tensor


def _three_by_pytorch(x: Tensor, *stored: Tensor) -> _Three:
    layers = (stored[i : i + 5] for i in range(0, len(stored), 5))
    return _Three(
        *(
            reference.low_rank_linear(x, *each[:3]) if each[4] is None else pivoted_reference.low_rank_pivoted(x, *each)
            for each in layers
        )
    )


def _order(N: int, device: str, seed: int = 0) -> Tensor:
    return torch.randperm(N, generator=torch.Generator().manual_seed(seed)).to(device, ORDER_DTYPE)


def _drawing(dtype: torch.dtype, device: str) -> Callable[..., Tensor]:
    """Always the same numbers, on every machine."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, fan_in: int = 1) -> Tensor:
        return (torch.randn(shape, generator=generator, dtype=torch.float64) / fan_in**0.5).to(device, dtype)

    return draw


def _sizes(*sizes: tuple[int, ...]) -> tuple[torch.Size, ...]:
    return tuple(map(torch.Size, sizes))


_LINEAR = _sizes((37, 200), (40, 200), (136, 40))
_END = _sizes((37, 40), (136, 40))
_CONV = _sizes((2, 16, 9, 7), (24, 16, 3, 3), (40, 24, 1, 1))
_GATED = _sizes((37, 200), (72, 200), (136, 72), (40, 200), (136, 40))
_GATED_PIVOTED = _sizes((37, 200), (72, 200), (64, 72), (40, 200), (96, 40))
_GATED_END = _sizes((37, 72), (136, 72), (37, 40), (136, 40))
_MULTI = _sizes((37, 200), (40, 200), (136, 40), (72, 200), (72, 72), (8, 200), (200, 8))
# Pivots of a ragged panel, of a whole one, of more than one, and all outputs.
_FEW, _PANEL, _MANY, _ALL = (
    _sizes((37, 200), (R, 200), (others, R)) for R, others in ((24, 136), (64, 72), (136, 72), (72, 0))
)
_PLAIN = ([2, 1], [1, 2], [1, 1])  # stride, padding, dilation


def _backward(op: Op) -> tuple[Probe, ...]:
    """What is wrong with them is wrong with each op whose gradients pass them."""
    return (
        BackwardProbe(op, "backward", "fused", _END),
        BackwardProbe(op, "backward streamed", "fused", _END, grid=(64, 0, 1)),
        BackwardProbe(op, "backward epilogue", "gemm_epilogue", _END, dtypes=DTYPES),
    )


PROBES = (
    Probe(LINEAR, "shrink_expand", "shrink_expand", _LINEAR, grid=(16, 0, 1)),
    Probe(LINEAR, "shrink_expand split", "shrink_expand", _LINEAR, grid=(8, 0, 2)),
    Probe(LINEAR, "fused", "fused", _LINEAR),
    Probe(LINEAR, "expand", "gemm_expand", _LINEAR),
    Probe(LINEAR, "expand streamed", "gemm_expand", _LINEAR, grid=(64, 0, 1)),
    Probe(LINEAR, "epilogue", "two_gemms_epilogue", _LINEAR, dtypes=DTYPES),
    *_backward(LINEAR),
    MultiProbe(Multi(3), "shrink_expand", "shrink_expand", _MULTI, grid=(16, 1, 2, 1)),
    MultiProbe(Multi(3), "shrink_expand of 8", "shrink_expand", _MULTI, grid=(8, 2, 1, 4)),
    MultiProbe(Multi(3), "shrink_expand mixed", "shrink_expand", _MULTI, grid=(16, 1, 2, 1), pivoted=(0, 2)),
    MultiProbe(Multi(3), "shrink_expand pivoted", "shrink_expand", _MULTI, grid=(8, 2, 1, 4), pivoted=(0, 1, 2)),
    GatedProbe(GATED, "shrink_expand", "shrink_expand", _GATED, grid=(16, 0, 1)),
    GatedProbe(GATED, "shrink_expand split", "shrink_expand", _GATED, grid=(8, 0, 2)),
    GatedProbe(GATED, "fused", "fused", _GATED),
    GatedProbe(GATED, "expand", "gemm_expand", _GATED),
    GatedProbe(GATED, "expand streamed", "gemm_expand", _GATED, grid=(64, 0, 1)),
    GatedProbe(GATED, "epilogue", "two_gemms_epilogue", _GATED, dtypes=DTYPES),
    GatedProbe(GATED, "shrink_expand pivoted", "shrink_expand", _GATED_PIVOTED, grid=(16, 0, 1), pivoted=True),
    GatedProbe(GATED, "shrink_expand pivoted split", "shrink_expand", _GATED_PIVOTED, grid=(8, 0, 2), pivoted=True),
    GatedBackwardProbe(GATED, "backward", "fused", _GATED_END),
    GatedBackwardProbe(GATED, "backward streamed", "fused", _GATED_END, grid=(64, 0, 1)),
    GatedBackwardProbe(GATED, "backward epilogue", "gemm_epilogue", _GATED_END, dtypes=DTYPES),
    PivotedProbe(PIVOTED, "shrink_expand", "shrink_expand", _FEW, grid=(16, 0, 1)),
    PivotedProbe(PIVOTED, "shrink_expand split", "shrink_expand", _MANY, grid=(8, 0, 2), first=True),
    PivotedProbe(PIVOTED, "shrink_expand all", "shrink_expand", _ALL, grid=(16, 0, 1)),
    PivotedProbe(PIVOTED, "fused", "fused", _FEW),
    PivotedProbe(PIVOTED, "fused panel", "fused", _PANEL, first=True),
    PivotedProbe(PIVOTED, "fused many", "fused", _MANY),
    PivotedProbe(PIVOTED, "fused all", "fused", _ALL),
    PivotedProbe(PIVOTED, "expand", "gemm_expand", _FEW, first=True),
    PivotedProbe(PIVOTED, "expand many", "gemm_expand", _MANY),
    PivotedProbe(PIVOTED, "expand streamed", "gemm_expand", _PANEL, grid=(64, 0, 1)),
    PivotedProbe(PIVOTED, "expand streamed many", "gemm_expand", _MANY, grid=(64, 0, 1)),
    PivotedProbe(PIVOTED, "expand streamed all", "gemm_expand", _ALL, grid=(64, 0, 1)),
    PivotedProbe(PIVOTED, "epilogue", "two_gemms_epilogue", _FEW, dtypes=DTYPES),
    PivotedProbe(PIVOTED, "epilogue all", "two_gemms_epilogue", _ALL, dtypes=DTYPES),
    PivotedBackwardProbe(PIVOTED, "backward", "fused", _FEW),
    PivotedBackwardProbe(PIVOTED, "backward panel", "fused", _PANEL, first=True),
    PivotedBackwardProbe(PIVOTED, "backward many", "fused", _MANY),
    PivotedBackwardProbe(PIVOTED, "backward streamed", "fused", _MANY, grid=(64, 0, 1)),
    PivotedBackwardProbe(PIVOTED, "backward streamed all", "fused", _ALL, grid=(64, 0, 1)),
    PivotedBackwardProbe(PIVOTED, "backward epilogue", "gemm_epilogue", _FEW, dtypes=DTYPES),
    Probe(CONV, "chunks", "fused", _CONV, (*_PLAIN, 1, 1)),
    Probe(
        CONV,
        "analytic",
        "fused",
        _sizes((2, 16, 9, 7), (24, 16, 3, 29), (40, 24, 1, 1)),
        ([2, 1], [1, 14], [1, 1], 1, 1),
    ),
    Probe(CONV, "numbers", "fused", _sizes((2, 3, 9, 7), (24, 3, 3, 3), (40, 24, 1, 1)), (*_PLAIN, 1, 1)),
    Probe(CONV, "depthwise", "fused", _sizes((2, 40, 9, 7), (40, 1, 3, 3), (72, 40, 1, 1)), (*_PLAIN, 40, 1)),
    Probe(CONV, "expand", "conv_expand", _CONV, (*_PLAIN, 1, 1)),
    Probe(CONV, "epilogue", "two_convs_epilogue", _CONV, (*_PLAIN, 1, 1), dtypes=DTYPES),
    *_backward(CONV),
)


@torch.no_grad()
def check(device: str) -> Iterator[tuple[str, str]]:
    """Run every family in every dtype on a device, in this process: (name, what is wrong or "")."""
    for probe in PROBES:
        for dtype in probe.dtypes:
            yield probe.name(dtype), probe.failure(dtype, device)


def names() -> list[str]:
    """Of all probes in all their dtypes, in the order in which they run."""
    return [probe.name(dtype) for probe in PROBES for dtype in probe.dtypes]
