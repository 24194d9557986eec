"""The gated layers that are measured: their cases run, agree with fp64, and cost what the formulas say."""

from __future__ import annotations

import pytest

from benchmarks.speed.low_rank_gated import GATED, Case, describe, draw, grid, tiny, work
from benchmarks.speed.low_rank_linear import check, choice
from shrank.ops import native
from tests.csrc.conftest import dev_module


@pytest.mark.parametrize("case", tiny(), ids=str)
def test_who_computes_something_else_is_found(case: Case) -> None:
    def without_gate(inputs, activation):
        return GATED.two_calls(inputs, "none")

    found = {"dense": GATED.dense, "torch": GATED.two_calls, "without activation": without_gate}
    assert check(found, draw(case, "cpu"), case.layer.activation, GATED).keys() == {"without activation"}


def test_the_floor_is_that_of_select() -> None:
    """Both count x and y once, and the weights; select's is in microseconds at the rates of a device."""
    dev = dev_module()
    h200 = dev.select.device("H200")
    for case in grid("bfloat16"):
        layer, done = case.layer, work(case)
        same = dev.select.LinearProblem(case.M, layer.K, layer.N, case.R, activation=layer.activation, gate_R=case.R)
        least = max(done.flops / h200.flops_half, done.bytes / h200.bandwidth) * 1e6
        assert dev.select.floor_us(same, h200) == pytest.approx(least)


def test_the_dense_layers_cost_more() -> None:
    for case in grid("bfloat16"):
        assert work(case, dense=True).flops > work(case).flops


def test_every_case_can_be_told_and_explained() -> None:
    for case in grid("bfloat16"):
        assert describe(case)["R"] == case.R
        told = choice(case, "cpu", GATED)
        assert (told["choice"] is None) == bool(native.problems())
