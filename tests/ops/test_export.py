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
from torch.export import Dim, export, load, save

import shrank
from tests.common.tolerances import assert_close

PROGRAM = Path(__file__).parents[2] / "build" / "cmake" / "run_package"


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.led = shrank.LED(64, 48, 16)
        self.norm = nn.LayerNorm(48)

    def forward(self, x: Tensor) -> Tensor:
        led = self.led
        return self.norm(torch.ops.shrank.low_rank_linear(x, led.down, led.up, led.bias, "gelu"))


@pytest.fixture
def exported():
    torch.manual_seed(0)
    net = Net().eval()
    return net, export(net, (torch.randn(5, 64),), dynamic_shapes=({0: Dim("M")},))


def test_export_keeps_the_op(exported) -> None:
    net, program = exported
    assert torch.ops.shrank.low_rank_linear.default in {node.target for node in program.graph.nodes}
    buffer = io.BytesIO()
    save(program, buffer)
    buffer.seek(0)
    x = torch.randn(9, 64)
    assert_close(load(buffer).module()(x), net(x))


@pytest.mark.skipif("SHRANK_TEST_LIBRARY" in os.environ, reason="the package is the same: compiled once is enough")
def test_aot_inductor_package_runs_in_a_cpp_program(exported, tmp_path: Path) -> None:
    assert PROGRAM.exists(), "cmake -S . -B build/cmake && cmake --build build/cmake"
    net, program = exported
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "net.pt2"))
    x = torch.randn(9, 64)
    x.numpy().tofile(tmp_path / "x")
    # Nothing of Python in its environment.
    subprocess.run([PROGRAM, package, tmp_path / "x", tmp_path / "y", "9", "64"], check=True, env={}, timeout=120)
    y = torch.from_numpy(np.fromfile(tmp_path / "y", dtype=np.float32)).view(9, 48)
    assert_close(y, net(x))
