"""Plans with corrections, carried out: what the layers compute, what the plan says, and the way back."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import shrank
from shrank import CorrectedLinear
from shrank.layers.quantized import is_quantized, quantized_of
from shrank.linalg import Grid, Shape, Storage, nearest
from tests.common.corrected import RANK, STORAGES, corrected, corrections
from tests.common.models import WIDTH, Mixed, draw, mlp, seeded
from tests.common.tolerances import assert_close

each_storage = pytest.mark.parametrize("storage", STORAGES.values(), ids=STORAGES)


def data() -> list[Tensor]:
    return [draw(64, WIDTH) * torch.logspace(-1, 1, WIDTH), draw(64, WIDTH) + 1]


def calibration(model: nn.Module) -> shrank.Calibration:
    return shrank.calibrate(model, data(), inputs=True)


def error(model: nn.Module, wanted: nn.Module) -> float:
    with torch.no_grad():
        return sum((model(x) - wanted(x)).square().sum().item() for x in data())


@each_storage
@pytest.mark.parametrize("calibrated", [False, True], ids=["plain", "data"])
def test_layers_become_what_the_plan_says(storage: Storage, calibrated: bool) -> None:
    model = mlp(2)
    seen = calibration(model) if calibrated else None
    small = corrected(model, storage, seen)
    for number in (0, 1):
        layer = small[number]
        assert type(layer) is CorrectedLinear and layer.rank == RANK and layer.storage == storage
        assert is_quantized(layer.base.weight) and not layer.base.weight.requires_grad
        assert is_quantized(layer[0].weight) == is_quantized(layer[1].weight) == (storage.factor_grid is not None)
        assert layer.bias is layer.base.bias and layer[1].bias is None
        assert {p.requires_grad for p in layer.parameters() if not is_quantized(p)} == {True}
    plain = replace(storage, corrected=False, factor_grid=None)
    alone = shrank.apply(copy.deepcopy(model), _of_storage(model, plain), seen)
    assert error(small, model) < error(alone, model)
    if not calibrated:
        assert torch.equal(quantized_of(small[0].base.weight).values, nearest(model[0].weight, storage.grid).values)
    errors = [(layer.error, other.error) for layer, other in zip(small.shrank_plan, alone.shrank_plan, strict=True)]
    assert all(0 < one < other for one, other in errors)


def _of_storage(model: nn.Module, storage: Storage) -> shrank.RankPlan:
    plan = corrections(model, STORAGES["int4"])
    return replace(plan, layers=tuple(replace(layer, rank=None, storage=storage) for layer in plan))


@each_storage
def test_the_plan_can_be_read_off_and_written(storage: Storage, tmp_path) -> None:
    small = corrected(mlp(2), storage)
    plan = shrank.describe(small)
    assert [(layer.rank, layer.storage, layer.shape) for layer in plan] == [(RANK, storage, Shape(WIDTH, WIDTH))] * 2
    plan.save(tmp_path / "plan.json")
    assert shrank.RankPlan.load(tmp_path / "plan.json") == plan
    again = shrank.apply(mlp(2), plan)
    assert torch.equal(again(draw(3, WIDTH)), small(draw(3, WIDTH)))
    assert str(storage) in str(plan) and "grow" not in plan.summary


@each_storage
def test_auto_fact_takes_such_a_plan_with_data(storage: Storage) -> None:
    model = mlp(2)
    small = shrank.auto_fact(model, corrections(model, storage), calibrate=data(), deepcopy=True)
    assert_close(small(data()[0]), corrected(model, storage, calibration(model))(data()[0]))


@each_storage
def test_merging_gives_the_sum_as_a_dense_layer(storage: Storage) -> None:
    small, x = corrected(mlp(2), storage), draw(3, WIDTH)
    layer = small[0]
    wanted = quantized_of(layer.base.weight).dequantized() + layer.up.detach() @ layer.down.detach()
    merged = shrank.merge(copy.deepcopy(small))
    assert {type(m) for m in merged} == {nn.Linear}
    assert_close(merged[0].weight, wanted)
    if storage.activations is None:
        assert_close(merged(x), small(x))


def test_the_bias_takes_up_the_mean_error() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH)))
    x = draw(512, WIDTH) + 3
    small = shrank.apply(
        copy.deepcopy(model),
        corrections(model, STORAGES["int4"]),
        shrank.calibrate(model, [x], inputs=True, loss="none"),
    )
    with torch.no_grad():
        lacking = (small(x) - model(x)).mean(0)
        before = model[0].bias - small[0].bias
    assert before.abs().max() > 10 * lacking.abs().max()


def test_what_is_no_linear_layer_is_refused_and_nothing_is_changed() -> None:
    model = seeded(Mixed)
    plan = shrank.make_plan(model, {"*": None})
    for name, says in (("stem", "no Conv2d with weights of few bits"), ("mixer", "no Conv1D")):
        wanted = replace(plan[name], rank=RANK, storage=STORAGES["int4"])
        with pytest.raises(ValueError, match=says):
            shrank.apply(model, replace(plan, layers=(wanted,)))
    head = replace(plan["mixer"], fqn="head", kind="Linear", size=512, shape=Shape(16, 32, pivoted=True))
    with pytest.raises(ValueError, match="a correction has no pivots"):
        shrank.apply(model, replace(plan, layers=(replace(head, rank=RANK, storage=STORAGES["int4"]),)))
    head = replace(head, shape=Shape(16, 32), rank=RANK, storage=Storage(Grid(4, 24), True))
    with pytest.raises(ValueError, match="do not divide its 32 inputs"):
        shrank.apply(model, replace(plan, layers=(head,)))
    assert type(model.head) is nn.Linear


def test_a_corrected_layer_is_compressed_no_further() -> None:
    small = corrected(mlp(2))
    with pytest.warns(UserWarning, match="already low-rank"):
        shrank.auto_fact(small, 0.5)
    assert {type(layer) for layer in small} == {CorrectedLinear}


def test_training_reaches_the_factors_and_the_bias_alone() -> None:
    small = corrected(mlp(2)).train()
    base = quantized_of(small[0].base.weight).values.clone()
    optimizer = torch.optim.SGD([p for p in small.parameters() if p.requires_grad], lr=0.1)
    before = copy.deepcopy({name: p.detach() for name, p in small.named_parameters() if p.requires_grad})
    small(draw(8, WIDTH)).square().sum().backward()
    optimizer.step()
    after = {name: p.detach() for name, p in small.named_parameters() if p.requires_grad}
    assert {name.partition(".")[2] for name in after} == {"led_base.bias", "led_unit.0.weight", "led_unit.1.weight"}
    assert all(not torch.equal(after[name], before[name]) for name in after)
    assert torch.equal(quantized_of(small[0].base.weight).values, base)


def test_healing_trains_the_factors() -> None:
    model = mlp(2)
    small = corrected(model)
    before = error(small, model)
    shrank.heal(small, model, data() * 4, steps=40, held_out=data())
    assert error(small, model) < before
