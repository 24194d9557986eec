"""CPU inference: the overhead of a low-rank layer."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import linear

import shrank
from benchmarks.speed.turns import in_turns

CALLS = 2000


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
def bench_layer_overhead(grad: bool, benchmark, report) -> None:
    """LED.forward against two bare F.linear calls on the same tensors, M=1, K=N=64, R=16."""
    layer, x = shrank.LED(64, 64, 16), torch.randn(1, 64)
    down, up, bias = layer.down, layer.up, layer.bias

    def bare() -> None:
        for _ in range(CALLS):
            linear(linear(x, down), up, bias)

    def low_rank() -> None:
        for _ in range(CALLS):
            layer.forward(x)

    with torch.set_grad_enabled(grad):
        seconds = in_turns({"bare": bare, "low-rank": low_rank}, 41)
        report("microseconds, two F.linear", 1e6 * seconds["bare"] / CALLS, "-")
        report("relative cost", seconds["low-rank"] / seconds["bare"], "<= 1.1")
        benchmark(low_rank)
