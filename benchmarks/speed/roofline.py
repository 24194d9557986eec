"""The roofline: what a layer must do, what a device can do, and the time below which no kernel gets."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from shrank.linalg import Shape
from shrank.measuring.timing import time_in_turns

_COPY_BYTES = {"cpu": 256 << 20, "cuda": 2 << 30}
_PRODUCT_SIZE = {"cpu": 2048, "cuda": 8192}
_NODES = 2000


@dataclass(frozen=True)
class Work:
    """Floating-point operations, and bytes that must be read or written."""

    flops: int
    bytes: int

    @property
    def intensity(self) -> float:
        return self.flops / self.bytes


@dataclass(frozen=True)
class Floor:
    """The least seconds, and which roof sets them: compute, memory or launch."""

    seconds: float
    bound: str


@dataclass(frozen=True)
class Roof:
    """What a device reaches in one dtype: bytes/s of a large copy (read and written bytes both count), FLOP/s of a
    large product, seconds of an almost empty call."""

    bandwidth: float
    flops: float
    launch: float

    def floor(self, work: Work) -> Floor:
        """No kernel does the work in less, unless caches already hold its operands."""
        seconds = {"compute": work.flops / self.flops, "memory": work.bytes / self.bandwidth, "launch": self.launch}
        bound = max(seconds, key=seconds.__getitem__)
        return Floor(seconds[bound], bound)


def layer_work(
    shape: Shape, rank: int | None, tokens: int, dtype: torch.dtype, bias: bool = False, residual: bool = False
) -> Work:
    """Of a linear layer for M tokens as one fused kernel; rank None is the dense layer. Activations count nothing."""
    return Work(tokens * shape.flops(rank), dtype.itemsize * shape.traffic(tokens, rank, bias, residual))


def measure_roof(device: str, dtype: torch.dtype, rounds: int = 5) -> Roof:
    """Measure this device, in seconds: a copy larger than any cache, a large product of random numbers, and a kernel on
    one number (on CUDA a node of a graph; on a CPU a call from Python)."""
    kind = torch.device(device).type
    source = torch.rand(_COPY_BYTES[kind] // dtype.itemsize, device=device).to(dtype)
    target = torch.empty_like(source)
    size = _PRODUCT_SIZE[kind]
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    product, number = torch.empty_like(a), torch.zeros(1, device=device)
    times = time_in_turns(
        {
            "copy": [lambda: target.copy_(source)] * 2,
            "product": [lambda: torch.mm(a, b, out=product)] * 2,
            "launch": [lambda: number.add_(1)] * _NODES,
        },
        device,
        rounds,
    )
    return Roof(
        bandwidth=2 * source.nbytes / times["copy"].seconds,
        flops=2 * size**3 / times["product"].seconds,
        launch=times["launch"].seconds,
    )
