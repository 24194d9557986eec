"""make_plan: which layers, which ranks, and why not."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import shrank
from shrank import Budget, Energy, make_plan
from shrank.layers.plain import CONVOLUTIONS
from tests.common.models import WIDTH, assert_untouched, draw, fingerprint, mlp, seeded


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict(
        {
            "encoder": nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 96)),
            "decoder": nn.Sequential(nn.Linear(96, 64), nn.Conv1d(32, 64, 5)),
            "head": nn.Linear(64, 10),
        }
    )


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


@pytest.mark.parametrize(
    ("channels", "kernel", "groups", "rank", "computed"),
    [
        ((128, 16), (64, 1), 1, 7, "16 of its 16"),
        ((64, 64), (3, 3), 1, 50, "64 of its 64"),
        ((64, 128), (3,), 8, 8, "128 of its 128"),
        ((64, 24), (3, 3), 1, 20, "32 of its 32"),
        ((64, 64), (2,), 1, 40, "48 of its 64"),
    ],
)
def test_convolutions_that_a_cpu_computes_no_faster_stay_dense(
    channels: tuple, kernel: tuple, groups: int, rank: int, computed: str
) -> None:
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


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"round_to": 0}, "round_to must be at least 1, got 0"),
        ({"min_rank": 0}, "min_rank must be at least 1"),
        ({"min_features": -1}, "min_features must be at least 1"),
        ({"min_rank": 8, "max_rank": 4}, "max_rank 4 is below min_rank 8"),
    ],
)
def test_impossible_options_are_refused(options: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        shrank.make_plan(model(), 8, **options)


@pytest.mark.parametrize(
    ("call", "option", "says"),
    [
        (make_plan, "exlude", r"make_plan\(\) has no option 'exlude'; did you mean exclude\?"),
        (make_plan, "calibrations", r"did you mean calibration\?"),
        (shrank.auto_fact, "exlude", r"auto_fact\(\) has no option 'exlude'; did you mean exclude\?"),
        (shrank.auto_fact, "los", r"has no option 'los'; did you mean calibrate=shrank.Calibrate\(data, loss=\)\?"),
        (shrank.auto_fact, "max_lenght", r"did you mean calibrate=shrank.batches\(data, max_length=\)\?"),
        (shrank.auto_fact, "xyzzy", r"has no option 'xyzzy': it has allow_dense, allow_growth.*submodules"),
        (shrank.eligible, "minrank", r"eligible\(\) has no option 'minrank'; did you mean min_rank\?"),
    ],
)
def test_unknown_options_are_refused_with_the_nearest_name(call, option: str, says: str) -> None:
    net = mlp()
    before = fingerprint(net)
    with pytest.raises(TypeError, match=says):
        call(net, *((4,) if call is not shrank.eligible else ()), **{option: 1})
    assert_untouched(net, before)


def test_a_budget_that_needs_compressed_models_is_no_plan() -> None:
    with pytest.raises(ValueError, match=r"Budget\(eval_fn=\).*auto_fact\(model, budget"):
        make_plan(mlp(), Budget(eval_fn=lambda model: 1.0))


class Mine(nn.Linear):
    pass


NOTHING = {
    "subclasses": (lambda: nn.Sequential(Mine(WIDTH, WIDTH)), {}, r"test_make_plan\.Mine is a subclass of Linear"),
    "excluded": (mlp, {"exclude": "*"}, r"excluded \(3 layers\)"),
    "no-layers": (lambda: nn.Sequential(nn.ReLU()), {}, "no layer owns a weight matrix"),
    "too-small": (lambda: nn.Sequential(nn.Linear(WIDTH, 4)), {}, r"too small: its smaller side is 4.*\(1 layer\)"),
}
BUDGETS = [
    Budget(keep_params=0.5),
    Budget(keep_flops=0.5),
    Budget(max_error=0.1),
    Budget(keep_latency=0.5, table=shrank.LatencyTable({}, {})),
    Budget(eval_fn=lambda model: 1.0),
]


@pytest.mark.parametrize("budget", BUDGETS, ids=lambda b: next(n for n in vars(b) if getattr(b, n) is not None))
@pytest.mark.parametrize(("build", "options", "reason"), NOTHING.values(), ids=NOTHING)
@pytest.mark.parametrize("data", [False, True])
def test_a_plan_that_changes_nothing_is_a_plan_with_reasons(build, options, reason: str, budget: Budget, data) -> None:
    net, x = seeded(build), draw(8, WIDTH)
    before = net(x)
    with pytest.warns(UserWarning, match=f"no layer was replaced: .*{reason}"):
        same = shrank.auto_fact(net, budget, **options, **({"calibrate": [x]} if data else {}))
    plan = same.shrank_plan
    assert same is net and not plan.low_rank and plan.params_after == plan.params_before
    assert all(layer.reason for layer in plan) and torch.equal(same(x), before)
    if budget.eval_fn is None:
        assert make_plan(net, budget, **options).diff(plan) == {}
    str(plan), plan.summary, shrank.RankPlan.from_dict(plan.to_dict())


def test_order_of_modules_does_not_matter() -> None:
    net = model()
    turned = nn.ModuleDict({name: net[name] for name in ("head", "decoder", "encoder")})
    here, there = shrank.make_plan(net, Energy(0.8)), shrank.make_plan(turned, Energy(0.8))
    assert {x.fqn: x for x in here} == {x.fqn: x for x in there}
