"""Stages that other tools took apart: asked in forward, and named where their weights are not all they are."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
import torch.nn.utils.prune
from accelerate import cpu_offload
from torch import Tensor, nn
from torch.ao.quantization import quantize_dynamic
from torch.nn.utils import parametrizations

import shrank
from shrank import CED, LED
from shrank.model.storage import with_plain_factors
from tests.common.models import WIDTH, assert_untouched, draw, fingerprint, mlp, seeded
from tests.common.replica import replica
from tests.common.tolerances import assert_close

LAYERS = {
    "led": (lambda: LED(24, 20, 7), (3, 24)),
    "led-no-bias": (lambda: LED(24, 20, 7, bias=False), (3, 24)),
    "led-pivoted": (lambda: LED(24, 20, 7, pivot=True), (3, 24)),
    "led-pivoted-no-bias": (lambda: LED(24, 20, 7, bias=False, pivot=True), (3, 24)),
    "ced": (lambda: CED(8, 12, 4, (3, 3)), (2, 8, 5, 5)),
    "ced-grouped": (lambda: CED(8, 12, 4, (3,), groups=2, groups_out=True), (2, 8, 5)),
    "ced-pivoted": (lambda: CED(8, 12, 4, (3, 3), pivot=True), (2, 8, 5, 5)),
}
each_layer = pytest.mark.parametrize(("build", "shape"), LAYERS.values(), ids=LAYERS)


@each_layer
def test_replicas_of_data_parallel_compute_and_train(build, shape) -> None:
    layer, x = seeded(build), draw(*shape)
    made = replica(layer)
    assert torch.equal(made(x), layer(x))
    made(x).square().sum().backward()
    gradients = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    layer(x).square().sum().backward()
    for found, parameter in zip(gradients, layer.parameters(), strict=True):
        assert_close(found, parameter.grad)
    assert made.weight.dtype == torch.float32 and torch.equal(made.down, layer.down)


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@each_layer
@pytest.mark.parametrize("original", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_fsdp(build, shape, original: bool, one_process) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    layer, x = seeded(build), draw(*shape)
    expected = layer(x)
    wrapped = FullyShardedDataParallel(
        nn.Sequential(copy.deepcopy(layer)), device_id=torch.device("cpu"), use_orig_params=original
    )
    assert_close(wrapped(x), expected)
    wrapped(x).square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in wrapped.parameters())


def test_a_weight_that_was_put_in_place_of_the_parameter_is_used() -> None:
    layer, x = seeded(lambda: LED(24, 20, 7)), draw(3, 24)
    down = layer.down.detach() * 2  # as hypernetworks and meta-learning do
    del layer.led_unit[0].weight
    layer.led_unit[0].weight = down
    assert_close(layer(x), nn.functional.linear(nn.functional.linear(x, down), layer.up, layer.bias))


class Frozen(nn.Module):
    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.inner, self.weight = inner, inner.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * 0.5


def quantized(model: nn.Sequential) -> None:
    quantize_dynamic(model, {nn.Linear}, inplace=True)


def torchao(model: nn.Sequential) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model[0], Int8WeightOnlyConfig())


# What other tools make of model[0], and what is said of it.
CHANGES = {
    "pruned": (
        lambda m: torch.nn.utils.prune.l1_unstructured(m[0][1], "weight", 0.5),
        r"up stage is pruned.*prune\.remove",
    ),
    "weight-norm": (lambda m: parametrizations.weight_norm(m[0][0]), "down stage has a parametrized weight"),
    "wrapped": (
        lambda m: m[0].led_unit.__setitem__(1, Frozen(m[0][1])),
        "up stage is a tests.layers.test_plain.Frozen",
    ),
    "quantized": (quantized, "down stage is a torch.ao.*Linear.*before quantizing"),
    "torchao": (torchao, "down stage has a weight that is a torchao.*not plain numbers"),
    "hooked": (lambda m: m[0][1].register_forward_hook(lambda *args: args[2] * 2), "up stage has forward hooks"),
    "pre-hooked": (lambda m: m[0][0].register_forward_pre_hook(lambda m, a: (a[0] * 2,)), "down stage has forward pre"),
    "patched": (
        lambda m: setattr(m[0][1], "forward", lambda x, f=m[0][1].forward: f(x) * 0),
        "up stage has a forward that was patched",
    ),
    "buffer": (lambda m: m[0][0].register_buffer("scale", torch.ones(1)), "down stage carries extra state: scale"),
    "offloaded": (cpu_offload, "factors are on the meta device"),
}
each_change = pytest.mark.parametrize(("change", "cause"), CHANGES.values(), ids=CHANGES)


def changed(change, pivot: bool = False) -> nn.Sequential:
    model = shrank.auto_fact(mlp(), 8, pivot=pivot)
    change(model)
    return model


@each_change
@pytest.mark.filterwarnings("ignore")
def test_merge_names_the_layer_and_the_cause_and_changes_nothing(change, cause: str) -> None:
    model, x = changed(change), draw(2, WIDTH)
    before = model(x)
    with pytest.raises(ValueError, match=f"cannot be merged; nothing was changed:\n  0: its.*{cause}"):
        shrank.merge(model)
    assert [type(m) for m in model] == [LED] * 3
    assert torch.equal(model(x), before)


@each_change
@pytest.mark.filterwarnings("ignore")
def test_healing_does_not_lose_what_other_tools_added(change, cause: str) -> None:
    if cause.endswith("meta device"):
        return  # it is loaded for the run
    model = changed(change, pivot=True)
    with pytest.raises(ValueError, match=cause):
        with_plain_factors(model)
    assert all(m.pivoted for m in model)


def test_merging_a_fsdp_model_is_refused(one_process) -> None:
    from torch.distributed.fsdp import fully_shard

    model = shrank.auto_fact(mlp(), 8)
    fully_shard(model, mesh=dist.device_mesh.init_device_mesh("cpu", (1,)))
    with pytest.raises(ValueError, match=r"has a weight that is a torch.distributed.*DTensor"):
        shrank.merge(model)


def test_factors_are_what_the_stage_multiplies_by() -> None:
    model = shrank.auto_fact(mlp(), 8)
    torch.nn.utils.prune.l1_unstructured(model[0][1], "weight", 0.5)
    assert (model[0].up == 0).sum() == model[0].up.numel() // 2
    model[1].led_unit[1] = Frozen(model[1][1])
    with pytest.raises(RuntimeError, match=r"LED: its up stage is a tests.layers.test_plain.Frozen"):
        _ = model[1].up
    with pytest.raises(RuntimeError, match=r"its up stage is a tests.layers.test_plain.Frozen"):
        model[1].weight.sum()
    assert model[1].weight.shape == (WIDTH, WIDTH)


@pytest.mark.parametrize("pivot", [False, True])
@pytest.mark.parametrize("data", [False, True])
def test_every_parameter_owns_its_memory(pivot: bool, data: bool) -> None:
    net = seeded(lambda: nn.Sequential(nn.Conv1d(32, 48, 3, groups=2), nn.Flatten(), nn.Linear(96, 32)))
    x = draw(40, 32, 4)
    small = shrank.auto_fact(
        net,
        16,
        groups_out=True,
        pivot=pivot,
        allow_slower=True,
        allow_growth=True,
        **({"calibrate": [x]} if data else {}),
    )
    assert len(small.shrank_plan.low_rank) == 2
    for name, tensor in small.state_dict().items():
        assert tensor.untyped_storage().nbytes() == tensor.nbytes, name


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("pivot", [False, True])
@pytest.mark.filterwarnings("ignore:the dense weight of")
def test_batch_norm_folds_into_the_factors(pivot: bool, groups: int, bias: bool) -> None:
    def block() -> nn.Module:
        conv = CED(8, 12, 4, (3, 3), groups=groups, groups_out=pivot and groups > 1, bias=bias, pivot=pivot)
        return nn.Sequential(conv, nn.BatchNorm2d(12))

    net, x = seeded(block), draw(2, 8, 6, 6)
    net[1].running_mean.copy_(draw(12))
    net[1].running_var.copy_(draw(12).abs() + 0.5)
    net[1].weight.data[:3] = torch.tensor([0.0, 1e-6, -1.0])  # channels that training has all but switched off
    before = fingerprint(net)
    fused = nn.utils.fusion.fuse_conv_bn_eval(net[0], net[1])
    assert isinstance(fused, CED) and fused.rank == 4 and fused.pivoted == pivot
    assert_close(fused(x), net(x))
    assert_untouched(net, before)
    net[0].weight, net[0].bias = nn.utils.fusion.fuse_conv_bn_weights(  # in place, as YOLO's fuse() does
        net[0].weight, net[0].bias, net[1].running_mean, net[1].running_var, net[1].eps, net[1].weight, net[1].bias
    )
    assert_close(net[0](x), fused(x))


@pytest.mark.filterwarnings("ignore:the dense weight of")
def test_linear_batch_norm_folds_too() -> None:
    net, x = seeded(lambda: nn.Sequential(LED(24, 20, 7), nn.BatchNorm1d(20))), draw(5, 24)
    assert_close(nn.utils.fusion.fuse_linear_bn_eval(net[0], net[1])(x), net(x))


@each_layer
def test_a_bias_can_be_assigned_registered_and_taken_away(build, shape) -> None:
    layer, x = seeded(build), draw(*shape)
    outputs = layer.shape.out_features
    position = [-1, *[1] * (len(shape) - 2)]
    without = layer(x) - (0 if layer.bias is None else (layer.bias + 0).detach().view(position))
    for give in (lambda b: setattr(layer, "bias", b), lambda b: layer.register_parameter("bias", b)):
        give(nn.Parameter(draw(outputs)))
        assert_close(layer(x), without + draw(outputs).view(position))
        assert_close(layer.bias + 0, draw(outputs))
        give(None)
        assert layer.bias is None
        assert_close(layer(x), without)
    with pytest.raises(ValueError, match=rf"bias is for {outputs} outputs, got \(3,\)"):
        layer.bias = nn.Parameter(draw(3))


def test_writing_into_a_pivoted_bias_is_not_lost() -> None:
    layer = seeded(lambda: LED(24, 20, 7, pivot=True))
    layer.bias.data = torch.ones(20)
    assert torch.equal(layer.bias + 0, torch.ones(20))
    with torch.no_grad():
        layer.bias.copy_(torch.zeros(20))
    assert torch.equal(layer.bias + 0, torch.zeros(20))
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"LED.bias is computed"):
        layer.bias.add_(1)


@pytest.mark.parametrize("kind", ["led", "ced"])
def test_a_layer_tells_what_it_is_with_an_adapter_on_a_stage(kind: str) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    build, _ = LAYERS[kind]
    model = nn.ModuleDict({"layer": seeded(build)})
    before = shrank.describe(model)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=[f"layer.{model.layer.unit}.{i}" for i in (0, 1)]), model)
    assert shrank.describe(model).low_rank == before.low_rank
    model.layer.stages[0] = nn.Identity()
    with pytest.raises(RuntimeError, match=r"its down stage is a .*Identity, which has no (in|out)_"):
        shrank.describe(model)
