"""The problems by which kernels are checked on a card, and the rule by which an answer is right."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..util.closeness import distance, stray_elements
from .conv import CONV
from .law import DTYPES
from .linear import LINEAR
from .reference import Forward
from .registration import Op

_HALF = (torch.bfloat16, torch.float16)
Results = dict[str, str]  # of every probe: what is wrong, or ""


@dataclass(frozen=True)
class Probe:
    """A family of kernels, and a problem whose every side is ragged and that has every end.

    sizes: of x, down and up. more: what the op takes between bias and activation.
    """

    op: Op
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
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int, fan_in: int = 1) -> Tensor:
            return (torch.randn(shape, generator=generator, dtype=torch.float64) / fan_in**0.5).to(device, dtype)

        x, down, up = self.sizes
        tensors = [draw(*x), draw(*down, fan_in=down[1:].numel()), draw(*up, fan_in=up[1])]
        if len(x) > 2:  # a convolution: as its kernels read
            tensors[:2] = (each.to(memory_format=torch.channels_last) for each in tensors[:2])
        y = self.op.empty(*tensors, None, *self.op.pack(*self.more, "none"), None).y
        residual = torch.empty_like(y).copy_(draw(*y.shape))
        return (*tensors, draw(up[0]), *self.more, "gelu", residual)

    def failure(self, dtype: torch.dtype, device: str) -> str:
        """What is wrong with the kernels' y, h and z beside PyTorch's, by the rule of the tests; "" if nothing is."""
        given = self.arguments(dtype, device)
        try:
            found = self.op.run_named(given, self.kernel, self.grid, training=True)
            if device.startswith("cuda"):
                torch.cuda.synchronize(device)
        except torch.OutOfMemoryError:  # no fault of the kernel
            raise
        except RuntimeError as error:
            return f"it does not run: {error}"
        return Truth(self.op, given).what_is_wrong(found)


class Truth:
    """What an op must give: of its own arguments, in fp64 and as PyTorch computes in their dtype."""

    def __init__(self, op: Op, given: tuple) -> None:
        self.exact = op.forward(
            *op.packed(tuple(each.double() if isinstance(each, Tensor) else each for each in given))
        )
        self.plain = op.forward(*op.packed(given))

    def what_is_wrong(self, found: Forward) -> str:
        """With y, h and z of a kernel, by the rule of the tests; "" if nothing is."""
        for name, one, two, three in zip(Forward._fields, found, self.exact, self.plain, strict=True):
            if far := distance(one, two, three) or stray_elements(one, two):
                return f"{name} has {far}"
        return ""


def _sizes(*sizes: tuple[int, ...]) -> tuple[torch.Size, ...]:
    return tuple(map(torch.Size, sizes))


_LINEAR = _sizes((37, 200), (40, 200), (136, 40))
_CONV = _sizes((2, 16, 9, 7), (24, 16, 3, 3), (40, 24, 1, 1))
_PLAIN = ([2, 1], [1, 2], [1, 1])  # stride, padding, dilation
PROBES = (
    Probe(LINEAR, "fused", "fused", _LINEAR),
    Probe(LINEAR, "expand", "gemm_expand", _LINEAR),
    Probe(LINEAR, "expand streamed", "gemm_expand", _LINEAR, grid=(64, 0, 1)),
    Probe(LINEAR, "epilogue", "two_gemms_epilogue", _LINEAR, dtypes=DTYPES),
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
