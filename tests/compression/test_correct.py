"""Corrections of models that arrive quantized: the layers stay, the error shrinks, and the dense weights come from
wherever they are."""

from __future__ import annotations

import copy
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, quantize_
from torchao.quantization.granularity import PerGroup

import shrank
from shrank import CorrectedLinear
from tests.common.models import draw, hf_model, hf_outputs, seeded
from tests.common.tolerances import assert_close

K, N = 32, 48
CONFIGS = {
    "int4": lambda: IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(16)),
    "int8": Int8WeightOnlyConfig,
}


class FourBits(nn.Module):
    """A quantized layer of a library that shrank has never heard of: no parameter has two dimensions."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 7
        self.register_buffer("codes", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.codes.to(x.dtype) * self.scale.to(x.dtype), self.bias)


def dense() -> nn.Module:
    return seeded(lambda: nn.Sequential(OrderedDict(fc1=nn.Linear(K, N), act=nn.GELU(), fc2=nn.Linear(N, K))))


def by_torchao(model: nn.Module, config: str = "int4") -> nn.Module:
    model = copy.deepcopy(model)
    quantize_(model, CONFIGS[config]())
    return model


def by_another(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    model.fc1, model.fc2 = FourBits(model.fc1), FourBits(model.fc2)
    return model


QUANTIZED = {"torchao-int4": by_torchao, "torchao-int8": lambda m: by_torchao(m, "int8"), "another": by_another}
each_quantized = pytest.mark.parametrize("quantized", QUANTIZED.values(), ids=QUANTIZED)


def data() -> list[Tensor]:
    return [draw(64, K) * torch.logspace(-1, 1, K), draw(64, K) + 1]


def error(model: nn.Module, wanted: nn.Module) -> float:
    with torch.no_grad():
        return sum((model(x) - wanted(x)).square().sum().item() for x in data())


@each_quantized
def test_what_was_lost_comes_back_with_the_rank(quantized) -> None:
    model = dense()
    errors = [error(quantized(model), model)]
    for rank in (2, 8):
        errors.append(error(shrank.correct(quantized(model), model, rank, calibrate=data()), model))
    assert errors[0] > errors[1] > errors[2]
    assert_close(shrank.correct(quantized(model), model, K)(data()[0]), model(data()[0]))


@each_quantized
def test_the_layers_stay_as_they_are(quantized) -> None:
    model, x = dense(), draw(3, K)
    plain = quantized(model)
    before, first = plain(x), plain.fc1
    alone = first(x)
    corrected = shrank.correct(plain, model, 4, calibrate=data())
    assert corrected is plain and corrected.fc1.base is first and torch.equal(first(x), alone)
    assert not torch.equal(corrected(x), before)
    factors = {f"{layer}.led_unit.{stage}.weight" for layer in ("fc1", "fc2") for stage in (0, 1)}
    assert factors <= {name for name, p in corrected.named_parameters() if p.requires_grad}
    assert shrank.uncorrect(corrected).fc1 is first
    assert torch.equal(corrected(x), before)


def test_hooks_fire_once_and_come_back() -> None:
    model, log, x = dense(), [], draw(3, K)
    quantized = by_torchao(model)
    handle = quantized.fc1.register_forward_hook(lambda module, *_: log.append(type(module)))
    shrank.correct(quantized, model, 4)(x)
    shrank.uncorrect(quantized)(x)
    handle.remove()
    quantized(x)
    assert log == [CorrectedLinear, nn.Linear]


def in_folder(model: nn.Module, tmp_path) -> str:
    first, second = ({k: v for k, v in model.state_dict().items() if k.startswith(name)} for name in ("fc1", "fc2"))
    save_file(first, tmp_path / "model-1.safetensors")
    save_file(second, tmp_path / "model-2.safetensors")
    return str(tmp_path)


SOURCES = {
    "model": lambda model, _: model,
    "state": lambda model, _: model.state_dict(),
    "folder": in_folder,
    "file": lambda model, path: save_file(model.state_dict(), path / "x.safetensors") or path / "x.safetensors",
}


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
@pytest.mark.parametrize("calibrate", [False, True], ids=["plain", "data"])
@pytest.mark.parametrize("quantized", [by_torchao, by_another])
def test_dense_weights_come_from_wherever_they_are(quantized, calibrate, source, tmp_path) -> None:
    model, x = dense(), draw(3, K)
    batches = data() if calibrate else None
    wanted = shrank.correct(quantized(model), model, 4, calibrate=batches)
    found = shrank.correct(quantized(model), source(model, tmp_path), 4, calibrate=batches)
    assert_close(found(x), wanted(x))
    assert [layer.rank for layer in found.shrank_plan] == [4, 4]


def test_names_may_lack_the_base_models_prefix(tmp_path) -> None:
    whole = hf_model("bert")
    quantized = copy.deepcopy(whole)
    quantize_(quantized, Int8WeightOnlyConfig())
    state = {name.removeprefix("bert."): value for name, value in whole.state_dict().items()}
    corrected = shrank.correct(quantized, state, 2)
    assert isinstance(corrected.bert.encoder.layer[0].output.dense, CorrectedLinear)
    assert (hf_outputs(corrected) - hf_outputs(whole)).abs().max() < 1e-2


def test_the_plan_says_what_was_done_and_why_not_more() -> None:
    model = dense()
    quantized = by_torchao(model)
    quantized.fc2 = copy.deepcopy(model.fc2)
    plan = shrank.correct(quantized, model, 4, calibrate=data()).shrank_plan
    assert plan["fc1"].rank == 4 and plan["fc1"].storage.corrected and 0 < plan["fc1"].error < 0.1
    assert plan["fc2"].rank is None and plan["fc2"].reason == "it lost nothing"
    assert type(quantized.fc2) is nn.Linear
    with pytest.warns(UserWarning, match="no layer was corrected: excluded"):
        plan = shrank.correct(by_torchao(model), model, {"fc1": 3}, exclude="fc1*").shrank_plan
    assert [layer.reason for layer in plan] == ["excluded", "the rule gives it rank None"]


@pytest.mark.parametrize("batches", [None, data()], ids=["plain", "data"])
def test_a_share_is_spent_where_it_saves_most(batches) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).eval()
    with torch.no_grad():
        model[1].weight.mul_(1e-3)
        model[1].weight.add_(torch.outer(draw(64), draw(64)))  # what rounding loses here is of high rank, and small
    if batches is not None:
        batches = [draw(64, 64)]
    corrected = shrank.correct(by_torchao(model), model, 0.5, calibrate=batches)
    ranks = [layer.rank or 0 for layer in corrected.shrank_plan]
    assert sum(ranks) * 128 <= 0.5 * 2 * 64 * 64 and sum(ranks) == 32
    assert all(rank % 8 == 0 for rank in ranks)


def test_a_rule_may_ask_for_a_share_of_the_error() -> None:
    model = dense()
    corrected = shrank.correct(by_torchao(model), model, shrank.Energy(0.6))
    for name in ("fc1", "fc2"):
        layer, weight = corrected.get_submodule(name), model.get_submodule(name).weight.detach()
        base = weight - nn.Linear.forward(layer.base, torch.eye(layer.in_features)).T + layer.base.bias[:, None]
        left = (base - layer.up.detach() @ layer.down.detach()).square().sum() / base.square().sum()
        assert left <= 0.4 + 1e-4 and layer.rank < 16


def test_what_another_tool_quantized_is_in_no_plan_to_carry_out() -> None:
    plan = shrank.describe(shrank.correct(by_torchao(dense()), dense(), 4))
    assert [(layer.rank, layer.storage) for layer in plan] == [(4, shrank.Storage(corrected=True))] * 2
    with pytest.raises(ValueError, match="fc1': it corrects a weight that another tool quantized"):
        shrank.apply(dense(), plan)


def test_a_layer_of_another_tool_is_in_every_plan_with_the_reason_why_it_stays() -> None:
    plan = shrank.make_plan(by_another(dense()), 4)
    assert [(layer.fqn, layer.rank) for layer in plan] == [("fc1", None), ("fc2", None)]
    assert all("FourBits is not a supported layer type" in layer.reason for layer in plan)


def test_a_layer_as_the_root() -> None:
    linear = nn.Linear(K, N)
    corrected = shrank.correct(by_torchao(nn.Sequential(linear))[0], linear, 4)
    assert isinstance(corrected, CorrectedLinear) and corrected.shrank_plan[""].rank == 4


@pytest.mark.parametrize(
    ("source", "rank", "kind", "says"),
    [
        (3, 4, TypeError, "a model, a state dict or a safetensors folder, got 3"),
        ({}, 4, ValueError, "there is no layer to correct: there is no dense weight of its name"),
        ({"fc1.weight": draw(3, 3)}, 4, ValueError, r"fc1: \(3, 3\), wanted \(48, 32\)"),
        ("/nowhere", 4, ValueError, "/nowhere: no safetensors here"),
        (dense(), 0, ValueError, "at least 1, got 0"),
        (dense(), 1.5, ValueError, r"must lie in \(0, 1\), got 1.5"),
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(source, rank, kind, says: str) -> None:
    quantized = by_torchao(dense())
    with pytest.raises(kind, match=says):
        shrank.correct(quantized, source, rank)
    assert type(quantized.fc1) is type(quantized.fc2) is nn.Linear


def test_a_calibration_that_did_not_observe_inputs_is_refused() -> None:
    model, quantized = dense(), by_torchao(dense())
    with pytest.raises(ValueError, match=r"calibrate\(..., inputs=True\): fc1"):
        shrank.correct(quantized, model, 4, calibrate=shrank.calibrate(model, data()))
    assert type(quantized.fc1) is type(quantized.fc2) is nn.Linear
