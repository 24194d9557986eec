"""A problem that the native code was asked for, and tensors that have it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops.conv import CONV
from ..ops.gated import GATED
from ..ops.linear import LINEAR
from ..ops.pivoted import PIVOTED
from ..ops.registration import Op


@dataclass(frozen=True)
class Problem:
    """What a model asked for: the numbers that the native code notes (csrc/select/problem_json.cpp), by its key."""

    key: str
    numbers: dict

    @property
    def op(self) -> Op:
        if "M" not in self.numbers:
            return CONV
        if self.numbers.get("gate_R"):
            return GATED
        return PIVOTED if self.numbers.get("pivoted") else LINEAR

    @property
    def is_tunable(self) -> bool:
        """Whether there is anything to choose: where rows are not aligned, only PyTorch's own calls run."""
        return self.numbers.get("aligned", True) and self.numbers.get("channels_last", True)

    def arguments(self, device: str) -> tuple:
        """The op's arguments: random, with outputs of about unit variance."""
        n = self.numbers
        dtype = getattr(torch, n["dtype"])

        def draw(*shape: int, fan_in: int = 1) -> Tensor:
            return (torch.randn(shape, device=device) / max(fan_in, 1) ** 0.5).to(dtype)

        if self.op is GATED:
            M, K, N = (n[name] for name in "MKN")
            given, pivots = [draw(M, K)], []
            for rank in (n["gate_R"], n["R"]):
                rows = N - rank if n.get("pivoted") else N
                given += [draw(rank, K, fan_in=K), draw(rows, rank, fan_in=rank), draw(rows) if n["bias"] else None]
                pivots += [draw(rank) if n["bias"] else None, torch.randperm(N, device=device).int()]
            return (*given, *(pivots if n.get("pivoted") else [None] * 4), n["activation"])
        if self.op is PIVOTED:
            M, K, N, R = (n[name] for name in "MKNR")
            biases = (draw(N - R), draw(R)) if n["bias"] else (None, None)
            order = torch.randperm(N, device=device).int()
            residual = draw(M, N) if n["residual"] else None
            factors = draw(R, K, fan_in=K), draw(N - R, R, fan_in=R)
            return (draw(M, K), *factors, *biases, order, n["activation"], residual)
        if self.op is LINEAR:
            M, K, N, R = (n[name] for name in "MKNR")
            tensors, y = (draw(M, K), draw(R, K, fan_in=K), draw(N, R, fan_in=R)), (M, N)
            window: tuple = ()
        else:
            tensors, y, window = self._convolution(draw)
        residual = draw(*y) if n["residual"] else None
        if residual is not None and len(y) > 2:
            residual = _channels_last(residual)
        bias = draw(n["N"]) if n["bias"] else None
        return (*tensors, bias, *window, n["activation"], residual)

    def _convolution(self, draw: Callable[..., Tensor]) -> tuple:
        n = self.numbers
        # Noted in three dimensions: those before the first that is more than a point were not there.
        first = next((i for i in range(2) if n["input"][i] != 1 or n["kernel"][i] != 1), 2)
        size, kernel, out = (n[name][first:] for name in ("input", "kernel", "output"))
        C, N, R, groups, up_groups = (n[name] for name in ("C", "N", "R", "groups", "up_groups"))
        x = _channels_last(draw(n["batch"], C, *size))
        down = _channels_last(draw(R, C // groups, *kernel, fan_in=math.prod(kernel) * C // groups))
        up = draw(N, R // up_groups, *(1 for _ in size), fan_in=R // up_groups)
        pads = [pad for pair in zip(n["begin"][first:], n["end"][first:], strict=True) for pad in pair]
        window = (n["stride"][first:], pads, n["dilation"][first:], groups, up_groups)
        return (x, down, up), (n["batch"], N, *out), window


def _channels_last(tensor: Tensor) -> Tensor:
    return tensor.movedim(1, -1).contiguous().movedim(-1, 1)
