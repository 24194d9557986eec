"""The roofline: work from the cost formulas, the floor from the tightest roof, constants that are measured."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from benchmarks.speed import roofline
from benchmarks.speed.roofline import Floor, Roof, Work, layer_work, measure_roof
from shrank.linalg import Shape
from shrank.measuring import explain
from shrank.measuring.timing import Timing
from shrank.ops import native

ROOF = Roof(bandwidth=100.0, flops=1000.0, launch=0.5)


def test_the_tightest_roof_is_the_floor() -> None:
    assert ROOF.floor(Work(flops=2000, bytes=100)) == Floor(2.0, "compute")
    assert ROOF.floor(Work(flops=2000, bytes=300)) == Floor(3.0, "memory")
    assert ROOF.floor(Work(flops=20, bytes=3)) == Floor(0.5, "launch")
    assert Work(flops=600, bytes=300).intensity == 2.0


def test_work_of_a_layer() -> None:
    assert layer_work(Shape(30, 20), 5, 7, torch.float32) == Work(2 * 7 * 5 * (20 + 30), 4 * (7 * 20 + 7 * 30 + 5 * 50))
    assert layer_work(Shape(30, 20), None, 7, torch.bfloat16) == Work(2 * 7 * 600, 2 * (7 * 20 + 7 * 30 + 600))
    ends = layer_work(Shape(30, 20), 5, 7, torch.float16, bias=True, residual=True)
    assert ends.bytes - layer_work(Shape(30, 20), 5, 7, torch.float16).bytes == 2 * (30 + 7 * 30)


@pytest.mark.parametrize(("dtype", "rate"), [("bfloat16", "flops_half"), ("float32", "flops_float32")])
def test_select_has_the_same_floor(dtype: str, rate: str) -> None:
    """csrc/select has its own formula; with its constants, and no launch, ours must give the same."""
    if native.problems():
        pytest.skip("no native extension")
    for M, (K, N, R), bias, residual in product(
        (1, 512, 65536), ((768, 3072, 96), (4096, 4096, 1024)), (False, True), (False, True)
    ):
        facts = explain.explain((M, K, N, R), dtype, "H200", "none", bias, residual)
        roof = Roof(facts["device"]["bandwidth"], facts["device"][rate], launch=0.0)
        floor = roof.floor(layer_work(Shape(N, K), R, M, getattr(torch, dtype), bias, residual))
        assert 1e6 * floor.seconds == pytest.approx(facts["floor_us"])


def test_constants_come_from_times(monkeypatch) -> None:
    """Copies of C bytes in 2 s, products of size 8 in 4 s, calls in 3 s."""
    seconds = {"copy": 2.0, "product": 4.0, "launch": 3.0}
    timed = {}

    def clock(candidates, device, rounds):
        for name, calls in candidates.items():
            calls[0]()
            timed[name] = len(calls)
        return {name: Timing(seconds[name], 0.0) for name in candidates}

    monkeypatch.setattr(roofline, "_COPY_BYTES", {"cpu": 1000})
    monkeypatch.setattr(roofline, "_PRODUCT_SIZE", {"cpu": 8})
    monkeypatch.setattr(roofline, "time_in_turns", clock)
    assert measure_roof("cpu", torch.float32) == Roof(bandwidth=2 * 1000 / 2.0, flops=2 * 8**3 / 4.0, launch=3.0)
    assert timed.keys() == seconds.keys()


def test_this_machine_can_be_measured(monkeypatch) -> None:
    monkeypatch.setattr(roofline, "_COPY_BYTES", {"cpu": 1 << 20})
    monkeypatch.setattr(roofline, "_PRODUCT_SIZE", {"cpu": 64})
    roof = measure_roof("cpu", torch.float32, rounds=1)
    assert min(roof.bandwidth, roof.flops, roof.launch) > 0
