"""Architectures with convolutions: compressed, exact at full rank in every layout, merged, trained, saved."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import shrank
from shrank import CED, LED
from tests.common.conv_models import MODELS, output
from tests.common.tolerances import assert_close

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d)
POSITIONS = "encoder.pos_conv_embed.conv"
each_model = pytest.mark.parametrize("name", MODELS)
pytestmark = pytest.mark.filterwarnings("ignore:the dense weight of a")


def compressed(name: str, **options: object) -> nn.Module:
    return shrank.auto_fact(MODELS[name].make(), 0.5, **{"allow_slower": True} | options)


def dense_convolutions(model: nn.Module) -> dict[str, nn.Module]:
    """The convolutions by name that are not stages of low-rank layers."""
    stages = {id(stage) for m in model.modules() if isinstance(m, CED) for stage in m.ced_unit}
    return {fqn: m for fqn, m in model.named_modules() if isinstance(m, CONVOLUTIONS) and id(m) not in stages}


@pytest.mark.parametrize("allow_slower", [False, True])
@each_model
@torch.no_grad()
def test_it_runs_shrinks_and_says_why_not_more(name: str, allow_slower: bool) -> None:
    dense, x = MODELS[name].make(), MODELS[name].x
    small = compressed(name, allow_slower=allow_slower)
    plan, y = small.shrank_plan, output(small, x)
    assert y.shape == output(dense, x).shape and y.isfinite().all()
    assert sum(p.numel() for p in small.parameters()) == plan.params_after <= plan.params_before
    convolutions = dense_convolutions(dense)
    for fqn, module in dense_convolutions(small).items():
        assert plan[fqn].rank is None and plan[fqn].reason, fqn
        assert type(module).__name__ == type(convolutions[fqn]).__name__
    for layer in plan.low_rank:
        assert type(small.get_submodule(layer.fqn)) is (CED if layer.fqn in convolutions else LED)
    assert any(x.fqn in convolutions for x in plan.low_rank) or not allow_slower or name == "mamba"


@each_model
@torch.no_grad()
def test_full_rank_is_exact_in_every_layout(name: str) -> None:
    for layout in (torch.contiguous_format, *MODELS[name].formats):
        dense, x = MODELS[name].make().to(memory_format=layout), MODELS[name].x
        if x.dim() == (5 if layout is torch.channels_last_3d else 4):
            x = x.contiguous(memory_format=layout)
        exact = shrank.auto_fact(dense, 10**9, deepcopy=True, allow_growth=True)
        assert_close(output(exact, x), output(dense, x))
        for layer in (m for m in exact.modules() if isinstance(m, CED) and MODELS[name].formats):
            assert all(factor.is_contiguous(memory_format=layout) for factor in (layer.down, layer.up))


@each_model
@torch.no_grad()
def test_merging_gives_the_same_outputs_from_dense_layers(name: str) -> None:
    small, x = compressed(name), MODELS[name].x
    merged = shrank.merge(copy.deepcopy(small))
    assert not any(isinstance(m, CED | LED) for m in merged.modules())
    assert_close(output(merged, x), output(small, x))


@each_model
def test_a_training_step_reaches_every_factor(name: str) -> None:
    small = compressed(name).train()
    output(small, MODELS[name].x).square().mean().backward()
    layers = {fqn: m for fqn, m in small.named_modules() if isinstance(m, CED | LED)}
    for fqn, layer in layers.items():
        for factor in (layer.down, layer.up):
            assert factor.grad is not None and factor.grad.isfinite().all() and factor.grad.any(), fqn


@pytest.mark.parametrize("name", ["resnet", "video-net"])
@torch.no_grad()
def test_round_trips_are_exact(name: str, tmp_path) -> None:
    small, x = compressed(name), MODELS[name].x
    shrank.save(small, tmp_path / "model.safetensors")
    loaded = shrank.load(MODELS[name].make(), tmp_path / "model.safetensors")
    for (key, one), (other_key, other) in zip(loaded.state_dict().items(), small.state_dict().items(), strict=True):
        assert key == other_key and torch.equal(one, other), key
    assert torch.equal(output(loaded, x), output(small, x))


def test_a_weight_normed_convolution_is_replaced_per_group_once_it_is_plain() -> None:
    model, x = MODELS["wav2vec2"].make(), MODELS["wav2vec2"].x
    assert shrank.make_plan(model, 0.5, errors=False)[POSITIONS].reason == "its weight is parametrized"
    with torch.no_grad():
        expected = output(model, x)
    # Not under no_grad, where torch leaves a plain tensor as the weight.
    parametrize.remove_parametrizations(model.get_submodule(POSITIONS), "weight")
    exact = shrank.auto_fact(model, 10**9, deepcopy=True, allow_growth=True)
    assert type(exact.get_submodule(POSITIONS)) is CED
    assert_close(output(exact, x), expected)
    dense = model.get_submodule(POSITIONS).weight
    twin = shrank.auto_fact(model, 0.5).get_submodule(POSITIONS)
    assert type(twin) is CED and twin.down_groups == 2 and twin.rank % 2 == 0
    approximation = shrank.merge(nn.Sequential(twin))[0].weight  # in two groups again
    for own, block in zip(approximation.chunk(2), dense.chunk(2), strict=True):
        cut = torch.linalg.svdvals(block.flatten(1).double())[twin.rank // 2 :].norm()
        assert_close((own - block).norm(), cut.float())


def test_depthwise_convolutions_stay_dense() -> None:
    for name in ("mamba", "mobilenetv2", "convnextv2"):
        plan = compressed(name).shrank_plan
        reasons = [x.reason for x in plan if x.kind in ("Conv1d", "Conv2d") and x.shape.groups > 1]
        assert reasons and all(reason.startswith("depthwise") for reason in reasons)
