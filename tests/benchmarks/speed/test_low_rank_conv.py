"""The convolutions that are measured: their cases run, agree with fp64, and cost what the formulas say."""

from __future__ import annotations

import pytest
import torch

from benchmarks.speed.low_rank_conv import CONV, Case, describe, draw, grid, tiny, work
from benchmarks.speed.low_rank_linear import check, choice
from shrank.ops import native
from tests.csrc.conftest import dev_module
from tests.csrc.test_conv_select import problem


@pytest.mark.parametrize("case", tiny(), ids=str)
def test_who_computes_something_else_is_found(case: Case) -> None:
    def without_bias(inputs, activation):
        return CONV.two_calls(inputs._replace(bias=None), activation)

    found = {"dense": CONV.dense, "torch": CONV.two_calls, "without bias": without_bias}
    inputs = draw(case, "cpu")
    assert inputs.x.movedim(1, -1).is_contiguous() and inputs.down.movedim(1, -1).is_contiguous()
    assert check(found, inputs, case.layer.activation, CONV).keys() == {"without bias"}


def test_the_floor_is_that_of_select() -> None:
    """Both count x and y once, and the weights; select's is in microseconds at the rates of a device."""
    dev = dev_module()
    h200 = dev.select.device("H200")
    for case in grid("bfloat16"):
        layer, done = case.layer, work(case)
        pads = layer.window.pads()
        begin, end = ((0,) * (3 - len(pads)) + tuple(pad[i] for pad in pads) for i in (0, 1))
        same = problem(
            dev,
            layer.batch,
            layer.C,
            layer.N,
            layer.rank,
            layer.input,
            layer.kernel,
            begin=begin,
            end=end,
            stride=(1,) * (3 - len(layer.stride)) + layer.stride,
            groups=layer.groups,
            bias=layer.bias,
        )
        least = max(done.flops / h200.flops_half, done.bytes / h200.bandwidth) * 1e6
        assert dev.select.floor_us(same, h200) == pytest.approx(least)


def test_every_case_can_be_told_and_explained() -> None:
    for case in grid("bfloat16"):
        assert describe(case)["R"] == case.layer.rank
        told = choice(case, "cpu", CONV)
        assert (told["choice"] is None) == bool(native.problems())


@pytest.mark.parametrize("case", grid("bfloat16")[:2], ids=str)
def test_the_dense_layer_has_its_own_cost(case: Case) -> None:
    assert work(case, dense=True).flops > work(case).flops
    assert getattr(torch, case.dtype).itemsize == 2
