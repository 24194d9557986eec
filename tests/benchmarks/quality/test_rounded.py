"""The published ways to round and to correct: each is best at what it minimises, and changes nothing at full rank."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from benchmarks.quality import rounded
from benchmarks.quality.baselines import Statistics, layers, statistics
from benchmarks.quality.corrected import planned, table
from benchmarks.quality.rounded import METHODS, Rounded
from shrank.calibration.batches import as_batches
from shrank.linalg import Grid, Storage
from tests.common.models import WIDTH, draw, mlp
from tests.common.tolerances import assert_close

GROUP = 8


@pytest.fixture(scope="module")
def seen() -> dict[str, Statistics]:
    x = draw(400, WIDTH) @ torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(3)).exp()
    return statistics(mlp(1), as_batches([x]), None, ())


def made(method: str, seen: dict[str, Statistics]) -> tuple[nn.Module, Rounded]:
    model = mlp(1)
    return model, Rounded(model, METHODS[method], seen, list(layers(model, ())), GROUP)


def errors(method: str, rank: int, seen: dict[str, Statistics]) -> tuple[Tensor, Tensor]:
    """Of the numbers, and of the outputs."""
    model, found = made(method, seen)
    error = (found.at(rank, False)[0].weight - model[0].weight).detach().double()
    return error.norm(), (error @ seen["0"].inputs.double() * error).sum()


@pytest.mark.parametrize("method", METHODS)
def test_weights_are_on_the_grid_of_their_groups(method: str, seen) -> None:
    if method == "AWQ":
        return  # whose grid is of scaled columns
    held = made(method, seen)[1].rounded["0"].unflatten(1, (-1, GROUP))
    for group in held.flatten(0, 1):
        distinct = group.unique()
        assert len(distinct) <= 16
    assert (held.unflatten(1, (-1, 1)).flatten(0, 2).abs().amax(-1) > 0).all()


def test_each_is_best_at_what_it_minimises(seen) -> None:
    found = {method: errors(method, 4, seen) for method in METHODS}
    plain, outputs = ({m: e[i].item() for m, e in found.items()} for i in (0, 1))
    rounding = ("RTN", "AWQ", "GPTQ")
    assert min(rounding, key=plain.get) == "RTN"
    assert outputs["GPTQ"] < outputs["AWQ"] <= outputs["RTN"]
    of_rtn = [method for method in METHODS if method.startswith("RTN")]
    assert min(of_rtn, key=plain.get) == "RTN + ZeroQuant-V2"
    assert min(of_rtn, key=outputs.get) == "RTN + QERA / EoRA"
    assert outputs["RTN + LQER"] < outputs["RTN"]
    assert min(METHODS, key=outputs.get) == "GPTQ + EoRA"


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.correct])
def test_at_full_rank_the_weight_is_as_it_was(method: str, seen) -> None:
    model, found = made(method, seen)
    assert_close(found.at(WIDTH, False)[0].weight, model[0].weight)
    assert (found.at(4, True)[0].weight - found.at(4, False)[0].weight).abs().max() < 1e-2


def test_a_plan_says_one_form_for_all() -> None:
    model = mlp(2)
    plan = planned(model, ["0"], Storage(Grid(4, GROUP), True, Grid(8)), 4)
    assert plan["0"].rank == 4 and plan["0"].storage.corrected and not plan["1"].changes
    row = {"group": 8, "rank": 4, "factors": "int8", "bytes, of bfloat16 dense": 0.5, "cosine": 0.9}
    assert table([{"method": "RTN", **row}]).splitlines()[-1] == "| 8 | 4 | int8 | 0.500 | 0.9000 |"


def test_the_scale_reaches_half_a_step_beyond_the_largest_number() -> None:
    assert_close(rounded._scale(torch.tensor([[1.0, -15.0]]), 4), torch.tensor([[2.0]]))
