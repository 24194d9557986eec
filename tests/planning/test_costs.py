"""Costs: what a layer costs at a rank, in weights, operations and seconds."""

from __future__ import annotations

import pytest
from torch import nn

import shrank
from shrank import Budget, LatencyTable
from shrank.linalg import Shape
from shrank.planning.costs import Flops, Latency, Params, PricedLayer
from tests.common.models import draw

SHAPE, PIVOTED = Shape(32, 16), Shape(32, 16, pivoted=True)


def test_weights_are_those_of_the_factors_and_of_an_index() -> None:
    layer = PricedLayer("a", None, per_token=True)
    assert Params(0.5).of(layer, None, SHAPE) == 512 and Params(0.5).of(layer, 4, SHAPE) == 4 * (32 + 16)
    assert Params(0.5).of(layer, 4, PIVOTED) == 4 * (32 + 16 - 4) + 32
    assert Params(0.5).of(layer, None, PIVOTED) == 512


def test_operations_grow_with_tokens() -> None:
    for tokens, times in ((None, 1), (7, 7), (0, 0)):
        assert Flops(0.5).of(PricedLayer("a", tokens, per_token=True), 4, SHAPE) == times * 2 * 4 * (32 + 16)
    with pytest.raises(ValueError, match="conv: keep_flops needs a calibration"):
        Flops(0.5).of(PricedLayer("conv", None, per_token=False), 4, SHAPE)


def test_time_is_that_of_the_storage() -> None:
    table = LatencyTable({"a": {"dense": 9.0, "plain": {"4": 5.0}, "pivoted": {"4": 7.0}}}, {})
    cost, layer = Latency(0.5, table), PricedLayer("a", 3, per_token=True)
    assert [cost.of(layer, *x) for x in ((None, SHAPE), (4, SHAPE), (4, PIVOTED))] == [9.0, 5.0, 7.0]


def test_a_convolution_with_a_rank_of_its_own_is_paid_for_every_position() -> None:
    model = nn.Sequential(nn.Conv1d(32, 32, 3), nn.Flatten(), nn.Linear(32 * 14, 32)).eval()
    found = shrank.calibrate(model, [draw(50, 32, 16)])
    budget = Budget(keep_flops=0.5, overrides={"0": 8})
    plan = shrank.make_plan(model, budget, calibration=found, allow_slower=True)
    spent = sum(x.shape.flops(x.rank) * found.tokens(x.fqn) for x in plan)
    dense = sum(x.shape.flops(None) * found.tokens(x.fqn) for x in plan)
    assert plan["0"].rank == 8 and 0.4 * dense < spent <= 0.5 * dense
