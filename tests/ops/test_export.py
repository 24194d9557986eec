"""A model with the op is exported, and runs from Python and from a C++ program that links the library."""

from __future__ import annotations

import io
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export, load, save

import shrank
from tests.common.tolerances import assert_close

PROGRAM = Path(__file__).parents[2] / "build" / "cmake" / "run_package"


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.led = shrank.LED(64, 48, 16)
        self.norm = nn.LayerNorm(48)

    def forward(self, x: Tensor) -> Tensor:
        led = self.led
        return self.norm(torch.ops.shrank.low_rank_linear(x, led.down, led.up, led.bias, "gelu"))


class Conv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ced = shrank.CED(16, 24, 8, (3, 2))

    def forward(self, x: Tensor) -> Tensor:
        ced, window = self.ced, ([1, 1], [1, 0, 0, 1], [1, 1], 1, 1)
        return torch.ops.shrank.low_rank_conv(x, ced.down, ced.up, ced.bias, *window, "silu").relu()


class Pivoted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.led = shrank.LED(64, 48, 16, pivot=True)
        self.pivot_bias = nn.Parameter(torch.randn(16))
        self.register_buffer("order", torch.randperm(48, dtype=torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        down, (up, bias) = self.led.down, self.led.led_unit[1].parameters()
        return torch.ops.shrank.low_rank_pivoted(x, down, up, bias, self.pivot_bias, self.order, "relu").square()


class Gated(nn.Module):
    """The value has pivots."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.value = shrank.LED(64, 48, 8), Pivoted()

    def forward(self, x: Tensor) -> Tensor:
        gate, led = self.gate, self.value.led
        up, bias = led.led_unit[1].parameters()
        pivots = None, None, self.value.pivot_bias, self.value.order
        return torch.ops.shrank.low_rank_gated(x, gate.down, gate.up, gate.bias, led.down, up, bias, *pivots, "gelu")


class LinearMulti(Gated):
    def forward(self, x: Tensor) -> Tensor:
        gate, led = self.gate, self.value.led
        up, bias = led.led_unit[1].parameters()
        lists = [gate.down, led.down], [gate.up, up], [gate.bias, bias]
        pivots = [None, self.value.pivot_bias], [None, self.value.order]
        return torch.cat(torch.ops.shrank.low_rank_linear_multi(x, *lists, *pivots), -1)


NETS = {"linear": (Linear, (64,)), "conv": (Conv, (16, 6, 5)), "pivoted": (Pivoted, (64,))}
NETS |= {"gated": (Gated, (64,)), "linear_multi": (LinearMulti, (64,))}


def exported(net: type[nn.Module], shape: tuple[int, ...]) -> tuple[nn.Module, ExportedProgram]:
    """A net, and its program for any number of inputs of this shape."""
    torch.manual_seed(0)
    net = net().eval()
    return net, export(net, (torch.randn(5, *shape),), dynamic_shapes=({0: Dim("M")},))


@pytest.mark.parametrize("name", NETS)
def test_export_keeps_the_op(name: str) -> None:
    kind, shape = NETS[name]
    net, program = exported(kind, shape)
    op = getattr(torch.ops.shrank, f"low_rank_{name}").default
    assert op in {node.target for node in program.graph.nodes}
    buffer = io.BytesIO()
    save(program, buffer)
    buffer.seek(0)
    x = torch.randn(9, *shape)
    assert_close(load(buffer).module()(x), net(x))


@pytest.mark.skipif("SHRANK_TEST_LIBRARY" in os.environ, reason="the package is the same: compiled once is enough")
def test_aot_inductor_package_runs_in_a_cpp_program(tmp_path: Path) -> None:
    assert PROGRAM.exists(), "cmake -S . -B build/cmake && cmake --build build/cmake"
    net, program = exported(*NETS["linear"])
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "net.pt2"))
    x = torch.randn(9, 64)
    x.numpy().tofile(tmp_path / "x")
    # Nothing of Python in its environment.
    subprocess.run([PROGRAM, package, tmp_path / "x", tmp_path / "y", "9", "64"], check=True, env={}, timeout=120)
    y = torch.from_numpy(np.fromfile(tmp_path / "y", dtype=np.float32)).view(9, 48)
    assert_close(y, net(x))
