"""CED: interface, arithmetic, initialisation and old checkpoints."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import shrank
from shrank.lr_module import CED
from tests.common.tolerances import assert_close

CONV = {1: nn.functional.conv1d, 2: nn.functional.conv2d, 3: nn.functional.conv3d}
CASES = {
    "1d": ((7,), {}),
    "2d": ((3, 5), {"stride": (2, 1), "padding": (1, 2)}),
    "3d": ((3, 2, 1), {"dilation": 2}),
    "same": ((3, 3), {"padding": "same", "dilation": 2}),
    "grouped": ((3, 3), {"groups": 2}),
    "both-grouped": ((3, 3), {"groups": 4, "groups_out": True, "bias": False}),
}


@pytest.mark.parametrize(("kernel", "options"), CASES.values(), ids=CASES.keys())
def test_forward_is_the_convolution_with_the_merged_kernel(kernel: tuple, options: dict) -> None:
    torch.manual_seed(0)
    layer = CED(8, 12, 4, kernel, **options)
    x = torch.randn(2, 8, *(11,) * len(kernel))
    expected = CONV[len(kernel)](
        x, layer.dense_weight(), layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups
    )
    assert_close(layer(x), expected)
    assert_close(layer(x[0]), expected[0])  # unbatched
    assert layer(x[:0]).shape == (0, *expected.shape[1:])


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_padding_modes(mode: str) -> None:
    layer = CED(8, 12, 4, (3, 3), padding=1, padding_mode=mode)
    dense = nn.Conv2d(8, 12, (3, 3), padding=1, padding_mode=mode)
    dense.weight.data, dense.bias.data = layer.dense_weight().detach(), layer.bias.detach()
    x = torch.randn(2, 8, 9, 9)
    assert_close(layer(x), dense(x))


def test_ancestors_arguments_and_names() -> None:
    layer = CED(8, 12, r=4, kernel_size=(3, 3), stride=1, padding=0, dilation=1, groups=8, groups_out=True)
    assert layer.rank == 4 and layer.down_groups == layer.up_groups == 4  # min(rank, groups), as ShRank
    assert layer[0] is layer.ced_unit[0] and layer[1].kernel_size == (1, 1)
    assert list(layer.state_dict()) == ["ced_unit.0.weight", "ced_unit.1.weight", "ced_unit.1.bias"]
    state = {
        "ced_unit.0.weight": torch.randn(4, 8, 3),
        "ced_unit.1.weight": torch.randn(12, 4, 1),
        "ced_unit.1.bias": torch.randn(12),
    }
    old = CED(8, 12, 4, (3,))
    old.load_state_dict(state)
    assert torch.equal(old.down, state["ced_unit.0.weight"]) and torch.equal(old.up, state["ced_unit.1.weight"])


@pytest.mark.parametrize("kernel", [3, None, (), (1, 1, 1, 1)], ids=str)
def test_a_kernel_that_sets_no_dimension_is_refused(kernel: object) -> None:
    with pytest.raises(ValueError, match="kernel_size must be a tuple of 1, 2 or 3 sizes"):
        CED(8, 12, 4, kernel)


def test_groups_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="divisible by groups"):
        CED(8, 12, 6, (3,), groups=4)


def test_fresh_outputs_have_the_variance_of_a_convolution() -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 32, 30, 30)
    for options in ({}, {"groups": 4}, {"groups": 4, "groups_out": True}):
        expected = nn.Conv2d(32, 64, 3, groups=options.get("groups", 1))(x).var()
        assert 0.7 < CED(32, 64, 16, (3, 3), **options)(x).var() / expected < 1.3, options


def test_gradients() -> None:
    layer = CED(4, 6, 2, (3,), groups=2, dtype=torch.float64)
    x = torch.randn(2, 4, 7, dtype=torch.float64, requires_grad=True)
    parameters = dict(layer.named_parameters())
    assert torch.autograd.gradcheck(
        lambda x, *values: torch.func.functional_call(layer, dict(zip(parameters, values, strict=True)), x),
        (x, *parameters.values()),
    )


def test_channels_last_is_kept() -> None:
    layer = CED(8, 12, 4, (3, 3)).to(memory_format=torch.channels_last)
    x = torch.randn(2, 8, 9, 9).to(memory_format=torch.channels_last)
    assert layer(x).is_contiguous(memory_format=torch.channels_last)


def test_channels_last_brings_the_weights_into_the_kernels_layout_and_changes_no_state() -> None:
    for kernel, memory_format in (((3, 3), torch.channels_last), ((2, 3, 3), torch.channels_last_3d)):
        dense = nn.Sequential(CED(8, 12, 4, kernel))
        state = copy.deepcopy(dense.state_dict())
        last = dense.to(memory_format=memory_format)
        assert last[0].down.movedim(1, -1).is_contiguous()
        for name, value in last.state_dict().items():
            assert torch.equal(value, state[name]) and value.shape == state[name].shape
        last.load_state_dict(state)
        assert last[0].down.movedim(1, -1).is_contiguous()
        assert copy.deepcopy(last)[0].down.movedim(1, -1).is_contiguous()
        convolution = {2: nn.Conv2d, 3: nn.Conv3d}[len(kernel)](32, 32, kernel).to(memory_format=memory_format)
        assert shrank.auto_fact(convolution, 8).down.movedim(1, -1).is_contiguous()
