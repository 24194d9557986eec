"""quantize_factors, and plans with bits: what is rounded, what it costs, what stays, and what others do with it."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_

import shrank
from shrank import LED, Calibrate, Grid, Storage
from shrank.layers.quantized import activations_of, is_quantized, plain, quantized_of
from tests.common.models import assert_untouched, draw, fingerprint, hf_inputs, hf_model, seeded
from tests.common.tolerances import assert_close

K = 32
GRIDS = [Grid(8), Grid(4, 8), Grid(4), Grid(8, 8)]
each_grid = pytest.mark.parametrize("grid", GRIDS, ids=str)
RANKS = {"0": 16, "2": 8, "*": None}


def build() -> nn.Sequential:
    return nn.Sequential(nn.Linear(K, 48), nn.GELU(), nn.Linear(48, K, bias=False), nn.GELU(), nn.Linear(K, K))


def dense() -> nn.Sequential:
    return seeded(build)


def data(rows: int = 512) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    mixing = torch.randn(K, K, generator=generator)
    return [torch.randn(rows, K, generator=generator) @ mixing / K**0.5]


def low_rank(pivot: bool = False) -> nn.Module:
    return shrank.auto_fact(dense(), RANKS, pivot=pivot)


def quantized(grid: Grid = GRIDS[0], **options: object) -> nn.Module:
    return shrank.quantize_factors(low_rank(), grid.bits, grid.group_size, **options)


def distance(model: nn.Module, other: nn.Module, x: Tensor) -> float:
    return ((model(x) - other(x)).norm() / other(x).norm()).item()


@each_grid
def test_factors_are_rounded_and_the_plan_says_so(grid: Grid) -> None:
    before, model = low_rank(), quantized(grid)
    for name in ("0", "2"):
        layer, planned = model.get_submodule(name), model.shrank_plan[name]
        assert isinstance(layer, LED) and layer.storage == planned.storage == Storage(grid)
        assert all(is_quantized(stage.weight) and type(stage) is nn.Linear for stage in layer.led_unit)
        assert planned.bytes() == layer.shape.bytes(layer.rank, Storage(grid))
        merged, exact = layer.dense_weight(), before.get_submodule(name).dense_weight()
        assert_close(merged, plain(layer.led_unit[1].weight) @ plain(layer.led_unit[0].weight))
        assert planned.error == pytest.approx(((merged - exact).norm() / exact.norm()).item(), rel=1e-3)
        assert 0 < planned.error < (0.02 if grid.bits == 8 else 0.3)
    assert not is_quantized(model[4].weight) and "dense=True" in model.shrank_plan["4"].reason
    assert {x.fqn: x.storage for x in shrank.describe(model)} == {"0": Storage(grid), "2": Storage(grid)}
    assert f"{grid}" in str(model.shrank_plan) and "2 in few bits" in model.shrank_plan.summary


@pytest.mark.parametrize("grid", [Grid(4, 8), Grid(4)], ids=str)
def test_data_decides_what_is_lost(grid: Grid) -> None:
    before, (x,) = low_rank(), data()
    by_data = quantized(grid, calibrate=data(), dense=True)
    assert distance(by_data, before, x) < 0.9 * distance(quantized(grid, dense=True), before, x)
    # The bias takes up the mean error.
    assert_close(by_data[0](x).mean(0), before[0](x).mean(0), baseline=before[0](x).mean(0) + 1e-3)


def test_pivoted_layers_get_plain_factors_first() -> None:
    model, before = low_rank(pivot=True), low_rank()
    shrank.quantize_factors(model)
    assert not model[0].pivoted and not model.shrank_plan["0"].shape.pivoted
    assert distance(model, before, data()[0]) < 0.02


@each_grid
def test_dense_layers_too(grid: Grid) -> None:
    model = quantized(grid, dense=True)
    assert type(model[4]) is nn.Linear and quantized_of(model[4].weight).grid == grid
    assert [x.storage.grid for x in shrank.describe(model)] == [grid] * 3
    assert [x.rank for x in shrank.describe(model)] == [16, 8, None]


def test_layers_that_are_left_out_say_why() -> None:
    model = shrank.quantize_factors(low_rank(), 4, 8, dense=True, exclude="0")
    assert model.shrank_plan["0"].reason == "excluded" and not is_quantized(model[0].led_unit[0].weight)
    model = shrank.quantize_factors(low_rank(), 4, 16, include=["0", "2"])
    assert model.shrank_plan["2"].reason == "groups of 16 do not divide its 48 inputs and rank 8"
    conv = nn.Sequential(shrank.CED(16, 16, 4, (3,)), LED(16, 16, 4).double(), LED(16, 16, 4))
    plan = shrank.quantize_factors(conv).shrank_plan
    assert plan["0"].reason == "torchao computes no Conv1d with weights of few bits"
    assert plan["1"].reason == "torchao has no weights of few bits in float64"
    with pytest.warns(UserWarning, match=r"no weight was rounded: its factors are int8 already"):
        again = shrank.quantize_factors(nn.Sequential(conv[2]))
    assert again.shrank_plan["0"].storage == Storage(Grid(8))


def test_inputs_of_8_bits() -> None:
    model, x = quantized(activations="int8", dense=True), data()[0]
    assert model[0].storage == Storage(Grid(8), activations="int8")
    assert activations_of(model[4].weight) == "int8"
    assert 0 < distance(model, quantized(dense=True), x) < 0.05


def test_bad_arguments_change_nothing() -> None:
    model = low_rank()
    before = fingerprint(model)
    for given, message in (
        ({"bits": 5}, "bits must be 3, 4 or 8, got 5"),
        ({"group_size": 0}, "group_size must be at least 1"),
        ({"activations": "fp8"}, "activations must be 'int8' or None, got 'fp8'"),
        ({"calibrate": [torch.full((4, K), torch.nan)]}, "NaN or infinity"),
    ):
        with pytest.raises(ValueError, match=message):
            shrank.quantize_factors(model, **given)
    assert_untouched(model, before)


@each_grid
@pytest.mark.parametrize("by_data", [False, True])
def test_compressed_and_rounded_in_one_call(grid: Grid, by_data: bool) -> None:
    given = {"calibrate": Calibrate(data(), loss="none")} if by_data else {}
    model = shrank.auto_fact(dense(), RANKS, bits=grid.bits, group_size=grid.group_size, **given)
    assert [x.storage.grid for x in model.shrank_plan] == [grid] * 3
    assert [x.rank for x in shrank.describe(model)] == [16, 8, None]
    apart = shrank.auto_fact(dense(), RANKS, pivot=False, **given)
    x = data()[0]
    assert distance(model, dense(), x) < 1.1 * distance(apart, dense(), x) + (0.02 if grid.bits == 8 else 0.2)
    for layer in model.shrank_plan:
        weight = dense().get_submodule(layer.fqn).weight
        if not by_data:
            error = model.get_submodule(layer.fqn).weight.detach().clone() if layer.rank else None
            merged = plain(model.get_submodule(layer.fqn).weight) if error is None else error
            assert layer.error == pytest.approx(((merged - weight).norm() / weight.norm()).item(), rel=1e-3)


def test_a_plan_tells_the_error_that_applying_it_has() -> None:
    model, seen = dense(), shrank.calibrate(dense(), data(), inputs=True)
    planned = shrank.make_plan(model, 0.6, bits=4, group_size=8, calibration=seen)
    assert all(layer.rank is None or layer.rank % 8 == 0 for layer in planned)
    done = shrank.apply(model, planned, seen).shrank_plan
    for one, other in zip(planned, done, strict=True):
        assert one.error == pytest.approx(other.error) and one.storage == other.storage


def test_a_budget_keeps_layers_dense_in_few_bits() -> None:
    model = shrank.auto_fact(dense(), shrank.Budget(keep_params=0.8), calibrate=data(), bits=8, round_to=8)
    assert all(layer.storage.grid == Grid(8) for layer in model.shrank_plan)


def test_block_by_block() -> None:
    model = shrank.auto_fact(dense(), RANKS, calibrate=data(), anchored=True, bits=8)
    assert all(layer.storage.grid == Grid(8) and layer.error is not None for layer in model.shrank_plan)


def test_what_cannot_be_rounded_is_said_before_anything_changes() -> None:
    model = dense()
    before = fingerprint(model)
    plan = shrank.make_plan(model, RANKS, pivot=True)
    grids = replace(plan, layers=tuple(replace(layer, storage=Storage(Grid(8))) for layer in plan))
    with pytest.raises(ValueError, match="int8 of pivoted factors loses too much: plan it with pivot=False"):
        shrank.apply(model, grids)
    plain_plan = shrank.make_plan(model, RANKS, bits=8)
    with pytest.raises(ValueError, match=r"observed outputs, and weights are rounded by their inputs: .*inputs=True"):
        shrank.apply(model, plain_plan, shrank.calibrate(model, data()))
    with pytest.raises(ValueError, match="pivoted factors lose too much in few bits"):
        shrank.auto_fact(model, 0.5, bits=8, pivot=True)
    with pytest.raises(ValueError, match="give bits=3, 4 or 8"):
        shrank.make_plan(model, 0.5, group_size=8)
    assert_untouched(model, before)


def test_layers_of_other_types() -> None:
    model = hf_model("gpt2")
    plan = shrank.make_plan(model, 8, bits=8, min_features=8)
    conv1d = [x for x in plan if x.kind == "Conv1D"]
    assert conv1d and all(x.storage.grid for x in conv1d if x.rank)
    kept = shrank.make_plan(model, {"*": None}, bits=8, min_features=8)
    assert all("torchao computes no Conv1D with weights" in x.reason for x in kept if x.kind == "Conv1D")
    small = shrank.apply(model, plan)
    assert small(**hf_inputs(small)).logits.isfinite().all()


def test_merged_again() -> None:
    model, x = quantized(Grid(4, 8), dense=True), data()[0]
    expected = model(x)
    merged = shrank.merge(model)
    assert all(type(m.weight) is nn.Parameter and type(m) is nn.Linear for m in (merged[0], merged[2], merged[4]))
    assert_close(merged(x), expected)


def test_the_dense_weight_reads_right() -> None:
    layer = quantized()[0]
    weight = layer.weight
    assert (weight.dtype, weight.shape, weight.requires_grad) == (torch.float32, (48, K), False)
    with pytest.warns(UserWarning, match="multiplied out"):
        assert_close(weight + 0, layer.up @ layer.down)
    doubled = 2 * layer.dense_weight()
    layer.weight.mul_(2)
    assert_close(layer.dense_weight(), doubled)
    with pytest.raises(RuntimeError, match="cannot be assigned to factors of int8: merge the model first"):
        layer.weight = nn.Parameter(torch.zeros(48, K))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes_copies_and_pickles(dtype: torch.dtype, tmp_path) -> None:
    model = quantized(dense=True)
    twin = copy.deepcopy(model).to(dtype)
    x = data(4)[0]
    assert twin(x.to(dtype)).dtype is dtype and twin[0].weight.dtype is dtype
    assert distance(copy.deepcopy(twin).float(), model, x) < 0.02
    torch.save(twin, tmp_path / "x.pt")
    assert torch.equal(torch.load(tmp_path / "x.pt", weights_only=False)(x.to(dtype)), twin(x.to(dtype)))
    other = quantized(dense=True).to(dtype)
    other.load_state_dict(twin.state_dict())
    assert torch.equal(other(x.to(dtype)), twin(x.to(dtype)))


def test_compiled_and_exported() -> None:
    model, x = quantized(Grid(4, 8), dense=True), data(16)[0]
    wanted = model(x)
    torch._dynamo.reset()
    with torch.no_grad():
        assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), wanted)
        assert_close(torch.export.export(model, (x,)).module()(x), wanted)


def test_fusing_leaves_them_alone() -> None:
    model, x = nn.Sequential(quantized()), data(16)[0]
    expected = model(x)
    shrank.fuse(model)
    assert torch.equal(model(x), expected)


def test_weights_of_few_bits_do_not_train() -> None:
    model, x = quantized(dense=True), data(16)[0]
    model(x).square().sum().backward()
    trained = [name for name, p in model.named_parameters() if p.grad is not None]
    assert trained == ["0.led_unit.1.bias", "4.bias"]
    with pytest.raises(ValueError, match=r"weights of few bits do not train, .*: heal the model first"):
        shrank.heal(model, dense(), data(), steps=1)


def test_lora_on_top() -> None:
    from peft import LoraConfig, inject_adapter_in_model

    model, x = nn.ModuleDict({"net": quantized(dense=True)}), data(4)[0]
    expected = model["net"](x)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["net.0.led_unit.0", "net.4"]), model)
    assert_close(model["net"](x), expected)
    model["net"](x).sum().backward()
    assert any(p.grad is not None for name, p in model.named_parameters() if "lora" in name)
    with pytest.raises(ValueError, match="merge the adapter first"):
        shrank.save(model, "never.safetensors")


def test_what_others_quantized_is_left_alone() -> None:
    model = dense()
    quantize_(model, Int8WeightOnlyConfig())
    before = [m.weight for m in model if isinstance(m, nn.Linear)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for done in (shrank.auto_fact(model, 8, bits=8), shrank.quantize_factors(model, dense=True)):
            assert all("Int8Tensor, not a plain parameter" in layer.reason for layer in done.shrank_plan)
    assert all(m.weight is w for m, w in zip((m for m in model if isinstance(m, nn.Linear)), before, strict=True))


class Params4bit(nn.Parameter):
    """As bitsandbytes has it: half as many bytes as numbers, in a column."""


def bitsandbytes_layer() -> nn.Module:
    kind = type("Linear4bit", (nn.Linear,), {"__module__": "bitsandbytes.nn.modules"})
    layer = kind(K, K)
    layer.weight = Params4bit(torch.zeros(K * K // 2, 1, dtype=torch.uint8), requires_grad=False)
    return layer


def gptq_layer() -> nn.Module:
    kind = type("TorchQuantLinear", (nn.Module,), {"__module__": "gptqmodel.nn_modules.qlinear.torch"})
    layer = kind()
    layer.in_features = layer.out_features = K
    for name, shape in (("qweight", (K // 8, K)), ("qzeros", (1, K // 8)), ("scales", (1, K))):
        layer.register_buffer(name, torch.zeros(shape))
    return layer


@pytest.mark.parametrize(
    ("made", "reason"), [(bitsandbytes_layer, "bitsandbytes.nn.modules.Linear4bit"), (gptq_layer, "")]
)
def test_layers_of_other_quantizers(made, reason: str) -> None:
    model = nn.Sequential(nn.Linear(K, K), made())
    before = fingerprint(model)["types"]
    plan = shrank.make_plan(model, 8, bits=8)
    assert all(layer.rank is None and reason in layer.reason for layer in plan if layer.fqn == "1")
    shrank.apply(model, plan)
    assert fingerprint(model)["types"]["1"] == before["1"]


def test_a_sample_of_shapes() -> None:
    model = shrank.quantize_factors(nn.Sequential(LED(65, 33, 7), LED(33, 9, 3, bias=False)), 4, dense=True)
    assert model(draw(2, 65)).shape == (2, 9)
    assert model[0].storage == Storage(Grid(4))
