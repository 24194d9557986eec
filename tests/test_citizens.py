"""A replaced layer takes the place of the dense one in full: hooks, flags, attributes, containers; and auto_fact's own
arguments change what they say and nothing else."""

from __future__ import annotations

import copy
from collections import OrderedDict

import pytest
import torch
from torch import nn

import shrank
from shrank import CED, LED
from tests.common.models import WIDTH, Mixed, assert_untouched, draw, fingerprint, mlp, seeded
from tests.common.tolerances import assert_close

LAYERS = {
    "linear": (lambda: nn.Linear(WIDTH, WIDTH), (2, WIDTH)),
    "conv2d": (lambda: nn.Conv2d(16, WIDTH, 3), (2, 16, 6, 6)),
}
each_layer = pytest.mark.parametrize("build, shape", LAYERS.values(), ids=LAYERS)
REGISTER = {
    "forward": lambda m, log: m.register_forward_hook(lambda *a: log.append(1)),
    "forward-kwargs": lambda m, log: m.register_forward_hook(lambda *a: log.append(1), with_kwargs=True),
    "forward-always": lambda m, log: m.register_forward_hook(lambda *a: log.append(1), always_call=True),
    "forward-pre": lambda m, log: m.register_forward_pre_hook(lambda *a: log.append(1)),
    "forward-pre-kwargs": lambda m, log: m.register_forward_pre_hook(lambda *a: log.append(1), with_kwargs=True),
    "backward": lambda m, log: m.register_full_backward_hook(lambda *a: log.append(1)),
    "backward-pre": lambda m, log: m.register_full_backward_pre_hook(lambda *a: log.append(1)),
}


def factorised(model: nn.Module) -> nn.Module:
    return shrank.auto_fact(model, 0.5)


def merged(model: nn.Module) -> nn.Module:
    return shrank.merge(factorised(model))


def low_rank_names(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, (LED, CED))}


@each_layer
@pytest.mark.parametrize("register", REGISTER.values(), ids=REGISTER)
@pytest.mark.parametrize("change", [factorised, merged])
def test_hooks_fire_once_and_their_handles_remove_them(build, shape, register, change):
    model, log, x = nn.Sequential(build()), [], draw(*shape).requires_grad_()
    handle = register(model[0], log)
    change(model)
    model(x).sum().backward()
    assert log == [1]
    handle.remove()
    model(x).sum().backward()
    assert log == [1]


@each_layer
def test_a_hook_may_still_change_the_output(build, shape):
    model, x = nn.Sequential(build()), draw(*shape)
    model[0].register_forward_hook(lambda module, args, output: (type(module), output + 1))
    kind, shifted = shrank.auto_fact(model, 0.5)(x)
    assert kind is type(model[0])
    assert_close(shifted, model[0].forward(x) + 1)


@each_layer
def test_hooks_on_a_stage_fire_too(build, shape):
    model, log, x = shrank.auto_fact(nn.Sequential(build()), 0.5), [], draw(*shape)
    expected = model(x)
    handles = [model[0][stage].register_forward_hook(lambda *a: log.append(1)) for stage in (0, 1)]
    assert_close(model(x), expected)
    assert log == [1, 1]
    for handle in handles:
        handle.remove()
    model[0][0].forward = lambda x: log.append("patched") or type(model[0][0]).forward(model[0][0], x)
    assert_close(model(x), expected)
    assert log == [1, 1, "patched"]


@each_layer
@pytest.mark.parametrize("frozen", [(), ("weight",), ("bias",), ("weight", "bias")], ids=str)
def test_requires_grad_per_parameter(build, shape, frozen):
    model = nn.Sequential(build())
    for name in frozen:
        getattr(model[0], name).requires_grad_(False)
    shrank.auto_fact(model, 0.5)
    for parameter in (model[0].down, model[0].up):
        assert type(parameter) is nn.Parameter and parameter.is_leaf
        assert parameter.requires_grad == ("weight" not in frozen)
    assert model[0].weight.requires_grad == ("weight" not in frozen)
    assert model[0].bias.requires_grad == ("bias" not in frozen)
    shrank.merge(model)
    assert {n for n, p in model[0].named_parameters() if not p.requires_grad} == set(frozen)


@each_layer
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_dtype_device_and_mode(build, shape, dtype, training):
    model = seeded(lambda: nn.Sequential(build())).to(dtype).train(training)
    reference, baseline, x = copy.deepcopy(model).double(), copy.deepcopy(model), draw(*shape, dtype=dtype)
    shrank.auto_fact(model, 10**9, allow_growth=True)
    assert {p.dtype for p in model.parameters()} == {dtype} and model[0].weight.dtype == dtype
    assert all(module.training == training for module in model.modules())
    # Two roundings instead of one, of factors that are rounded themselves: twice PyTorch's own two-layer error.
    stages = copy.deepcopy(model[0]).double()
    assert_close(model(x), stages(x.double()), baseline=model[0][1](model[0][0](x)))
    if dtype in (torch.float32, torch.float64):
        assert_close(model(x), reference(x.double()), baseline=baseline(x))


@pytest.mark.parametrize("name", ["tag", "_private"])
def test_plain_attributes_follow_and_come_back(name):
    model = mlp(1)
    setattr(model[0], name, value := ["mine", model])
    shrank.auto_fact(model, 0.5)
    assert getattr(model[0], name) is value
    shrank.merge(model)
    assert getattr(model[0], name) is value


@each_layer
def test_the_root_may_be_a_layer(build, shape):
    layer, x = seeded(build), draw(*shape)
    expected = layer(x)
    twin = shrank.auto_fact(layer, 10**9, allow_growth=True)
    assert isinstance(twin, (LED, CED)) and twin.shrank_plan[""].rank == twin.rank
    assert_close(twin(x), expected)
    back = shrank.merge(twin)
    assert type(back) is type(layer)
    assert_close(back(x), expected)


def test_every_container():
    linear = lambda: nn.Linear(WIDTH, WIDTH)  # noqa: E731
    model = nn.ModuleDict(
        {
            "list": nn.ModuleList([linear(), nn.ModuleList([linear()])]),
            "sequence": nn.Sequential(OrderedDict(a=linear(), b=nn.ReLU())),
            "dict": nn.ModuleDict({"x": linear()}),
        }
    )
    model["none"] = nn.Sequential(OrderedDict(nothing=None))
    shrank.auto_fact(model, 0.5)
    assert low_rank_names(model) == {"list.0", "list.1.0", "sequence.a", "dict.x"}
    assert [name for name, _ in model["sequence"].named_children()] == ["a", "b"]


def storages(model: nn.Module) -> set[int]:
    return {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}


@pytest.mark.parametrize("options", [{}, {"groups_out": True}, {"fact_led_unit": True}], ids=str)
def test_deepcopy_leaves_the_original_alone(options):
    model = seeded(Mixed)
    before = fingerprint(model)
    result = shrank.auto_fact(model, 0.5, deepcopy=True, **options)
    assert {"stem", "grouped", "mixer", "head"} <= low_rank_names(result)
    assert not storages(result) & storages(model)
    assert_untouched(model, before)
    shrank.make_plan(model, 0.5, **options)
    assert_untouched(model, before)


def test_deepcopy_of_a_root_layer():
    layer = nn.Linear(WIDTH, WIDTH)
    before = fingerprint(layer)
    assert isinstance(shrank.auto_fact(layer, 0.5, deepcopy=True), LED)
    assert_untouched(layer, before)


@pytest.mark.parametrize("rank", [4, 0.2])
def test_calling_twice_changes_nothing(rank):
    model = shrank.auto_fact(seeded(Mixed), 0.5)
    before = fingerprint(model)
    with pytest.warns(UserWarning, match="no layer was replaced"):
        shrank.auto_fact(model, rank)
    after = fingerprint(model)
    assert after["types"] == before["types"] and after["flags"] == before["flags"]
    assert "already low-rank" in model.shrank_plan["stem"].reason


@each_layer
def test_fact_led_unit_opens_low_rank_layers(build, shape):
    model, x = nn.Sequential(seeded(build)), draw(*shape)
    shrank.auto_fact(model, 12)
    once = copy.deepcopy(model)
    shrank.auto_fact(model, 10**9, fact_led_unit=True, allow_growth=True)
    unit = type(model[0]).__name__.lower() + "_unit"
    assert low_rank_names(model) == {"0", f"0.{unit}.0", f"0.{unit}.1"}
    assert_close(model(x), once(x))
    assert (model[0].rank, model[0].weight.shape) == (once[0].rank, once[0].weight.shape)
    assert shrank.describe(model).params_after == sum(p.numel() for p in model.parameters())
    shrank.merge(model)
    assert type(model[0]) is type(build()) and not low_rank_names(model)
    assert_close(model(x), once(x))


@pytest.mark.parametrize("deepcopy", [False, True], ids=["in-place", "deepcopy"])
@pytest.mark.parametrize(
    "pick, expected",
    [
        (lambda m: [m[1]], {"1"}),
        (lambda m: [m], {"0", "1", "2.0"}),
        (lambda m: [m[2]], {"2.0"}),
        (lambda m: iter([m[0], m[2][0]]), {"0", "2.0"}),
    ],
    ids=["layer", "root", "container", "generator"],
)
def test_submodules_limit_what_changes(pick, expected, deepcopy):
    model = nn.Sequential(*mlp(2), nn.Sequential(nn.Linear(WIDTH, WIDTH)))
    result = shrank.auto_fact(model, 0.5, submodules=pick(model), deepcopy=deepcopy)
    assert low_rank_names(result) == expected
    skipped = {layer.fqn for layer in result.shrank_plan if layer.reason == "not in submodules"}
    assert skipped == {"0", "1", "2.0"} - expected


@pytest.mark.parametrize("deepcopy", [False, True], ids=["in-place", "deepcopy"])
def test_submodules_that_the_model_does_not_have_are_an_error(deepcopy):
    with pytest.raises(ValueError, match="submodules"):
        shrank.auto_fact(mlp(), 0.5, submodules=[nn.Linear(WIDTH, WIDTH)], deepcopy=deepcopy)


@pytest.mark.parametrize(
    "hold",
    [lambda m: [m], lambda m: (None, m), lambda m: {"x": m}, lambda m: m],
    ids=["list", "tuple", "dict", "attribute"],
)
def test_places_that_modules_hide_from_pytorch_follow(hold):
    model = nn.Sequential(mlp(1), nn.Identity())
    vars(model[1])["held"] = hold(model[0][0])
    shrank.auto_fact(model, 0.5)
    assert model[1].held == hold(model[0][0])
    shrank.merge(model)
    assert model[1].held == hold(model[0][0])


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_the_result_can_be_trained_wherever_it_was_made(guard):
    model, x = mlp(), draw(2, WIDTH)
    with guard():
        shrank.auto_fact(model, 0.5)
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_state_dict_hooks_are_kept_or_the_layer_stays_dense():
    model, log = mlp(1), []
    model[0].register_state_dict_post_hook(lambda *a: log.append("save"))
    model[0].register_load_state_dict_pre_hook(lambda *a: log.append("load"))
    shrank.auto_fact(model, 0.5)
    model.load_state_dict(model.state_dict())
    assert log == ["save", "load"]
