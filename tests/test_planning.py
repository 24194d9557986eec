"""make_plan: which layers, which ranks, and why not."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import shrank
from shrank import Energy
from shrank.plain import CONVOLUTIONS


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({
        "encoder": nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 96)),
        "decoder": nn.Sequential(nn.Linear(96, 64), nn.Conv1d(32, 64, 5)),
        "head": nn.Linear(64, 10),
    })


def ranks(rank: object = 8, **options: object) -> dict[str, int | None]:
    return {x.fqn: x.rank for x in shrank.make_plan(model(), rank, **options)}


def chosen(**options: object) -> set[str]:
    return {fqn for fqn, rank in ranks(**options).items() if rank is not None}


EVERYTHING = {"encoder.0", "encoder.2", "decoder.0", "decoder.1"}


def test_planning_changes_nothing() -> None:
    net = model()
    before = copy.deepcopy(net.state_dict())
    shrank.make_plan(net, Energy(0.9))
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), before.values(), strict=True))
    assert all(type(m).__name__ not in ("LED", "CED") for m in net.modules())


def test_selection() -> None:
    assert chosen() == EVERYTHING
    assert chosen(include="encoder.*") == {"encoder.0", "encoder.2"}
    assert chosen(include=["*.0"], exclude=["decoder.*"]) == {"encoder.0"}
    assert chosen(exclude=lambda module, fqn: isinstance(module, nn.Conv1d)) == EVERYTHING - {"decoder.1"}
    assert chosen(min_features=8) == EVERYTHING | {"head"}


def test_submodules_are_modules_at_or_below_which_layers_change() -> None:
    net = model()
    plan = shrank.make_plan(net, 8, submodules=[net["encoder"], net["decoder"][1]])
    assert {x.fqn for x in plan.low_rank} == {"encoder.0", "encoder.2", "decoder.1"}
    assert plan["decoder.0"].reason == "not in submodules"


def test_every_refusal_has_a_reason() -> None:
    plan = shrank.make_plan(model(), {"encoder.0": 60, "encoder.2": None, "*": 8}, exclude="decoder.0")
    assert plan["encoder.0"].reason == "rank 60 saves nothing (break-even rank 32)"
    assert plan["encoder.2"].reason == "the rule keeps it dense"
    assert plan["decoder.0"].reason == "excluded"
    assert plan["head"].reason.startswith("too small")
    assert all(x.reason for x in plan)


def test_rounding_and_bounds() -> None:
    assert ranks(0.5)["encoder.0"] == 16
    assert ranks(0.5, round_to=12)["encoder.0"] == 12
    assert ranks(3, round_to=8)["encoder.0"] == 8  # not to zero
    assert ranks(0.01)["encoder.0"] is None
    assert ranks(0.01, min_rank=2)["encoder.0"] == 2
    assert ranks(0.9, max_rank=5)["encoder.0"] == 5
    assert shrank.make_plan(model(), 8, round_to=65)["encoder.0"].reason.startswith("no multiple of 65")


def test_rank_is_a_multiple_of_the_groups() -> None:
    net = nn.Conv2d(32, 64, 3, groups=8)
    assert shrank.make_plan(net, 12, min_features=1, allow_slower=True)[""].rank == 8
    assert shrank.make_plan(net, 12, min_features=1, round_to=3, allow_growth=True)[""].rank == 24


@pytest.mark.parametrize(("channels", "kernel", "groups", "rank", "computed"), [
    ((128, 16), (64, 1), 1, 7, "16 of its 16"),
    ((64, 64), (3, 3), 1, 50, "64 of its 64"),
    ((64, 128), (3,), 8, 8, "128 of its 128"),
    ((64, 24), (3, 3), 1, 20, "32 of its 32"),
    ((64, 64), (2,), 1, 40, "48 of its 64"),
])
def test_convolutions_that_a_cpu_computes_no_faster_stay_dense(channels: tuple, kernel: tuple, groups: int, rank: int,
                                                               computed: str) -> None:
    net = nn.Sequential(CONVOLUTIONS[len(kernel)](*channels, kernel, groups=groups))
    plan = shrank.make_plan(net, rank, min_features=1)
    assert plan["0"].reason.startswith(f"rank {rank} computes as {computed} channels, and a second stage: no faster")
    for permission in ("allow_slower", "allow_growth"):
        permitted = shrank.make_plan(net, rank, min_features=1, **{permission: True})
        assert permitted["0"].rank == rank
        assert type(shrank.auto_fact(copy.deepcopy(net), permitted)[0]) is shrank.CED  # a plan is carried out as it is


def test_convolutions_that_gain_a_block_of_channels_are_replaced() -> None:
    assert shrank.make_plan(nn.Conv2d(64, 32, 3), 14)[""].rank == 14
    assert shrank.make_plan(nn.Conv2d(64, 16, 1), 7)[""].rank == 7  # one tap: a linear layer


def test_growth_needs_permission_and_stops_at_full_rank() -> None:
    assert ranks(10**6)["encoder.0"] is None
    assert ranks(10**6, allow_growth=True)["encoder.0"] == 64


def test_nothing_grows_without_permission() -> None:
    for rank in (1, 8, 31, 32, 33, 0.1, 0.5, 0.99, Energy(0.5), Energy(0.99)):
        for layer in shrank.make_plan(model(), rank, min_features=1):
            assert layer.params_after <= layer.size and (layer.rank is None or layer.params_after < layer.size)


def test_expected_error_is_what_applying_gives() -> None:
    net = model()
    plan = shrank.make_plan(net, 8)
    for layer in plan.low_rank:
        dense = net.get_submodule(layer.fqn).weight
        twin = shrank.auto_fact(copy.deepcopy(net), plan).get_submodule(layer.fqn)
        measured = ((twin.dense_weight() - dense).norm() / dense.norm()).item()
        assert measured == pytest.approx(layer.error, rel=1e-4)
    assert all(x.error is None for x in shrank.make_plan(net, 8, errors=False))


@pytest.mark.parametrize(("options", "says"), [
    ({"round_to": 0}, "round_to must be at least 1, got 0"),
    ({"min_rank": 0}, "min_rank must be at least 1"),
    ({"min_features": -1}, "min_features must be at least 1"),
    ({"min_rank": 8, "max_rank": 4}, "max_rank 4 is below min_rank 8"),
])
def test_impossible_options_are_refused(options: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        shrank.make_plan(model(), 8, **options)


def test_unknown_options_are_refused() -> None:
    with pytest.raises(TypeError, match="ratio"):
        shrank.make_plan(model(), 8, ratio=0.5)


def test_order_of_modules_does_not_matter() -> None:
    net = model()
    turned = nn.ModuleDict({name: net[name] for name in ("head", "decoder", "encoder")})
    here, there = shrank.make_plan(net, Energy(0.8)), shrank.make_plan(turned, Energy(0.8))
    assert {x.fqn: x for x in here} == {x.fqn: x for x in there}
