"""shrank.low_rank_conv and CED: which path a convolution takes, and what it may be called with."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import shrank
from tests.common.conv_cases import ConvCase
from tests.common.tolerances import assert_close
from tests.ops.test_api import ops_of

CASE = ConvCase((6, 5), (3, 2), 8, 12, 4, padding=(1, 1), activation="silu", residual=True)


def in_two(x: Tensor, down: Tensor, up: Tensor, bias: Tensor, **options) -> Tensor:
    return F.conv2d(F.conv2d(x, down, **options), up, bias)


def test_without_a_gpu_pytorch_computes() -> None:
    arguments = CASE.tensors(torch.float32, "cpu")
    assert ops_of(lambda: shrank.low_rank_conv(*arguments)) == []
    assert_close(shrank.low_rank_conv(*arguments), torch.ops.shrank.low_rank_conv(*arguments))


@pytest.mark.usefixtures("native")
def test_auto_takes_the_op_where_it_may() -> None:
    arguments = CASE.tensors(torch.float32, "cpu")
    assert ops_of(lambda: shrank.low_rank_conv(*arguments)) == ["low_rank_conv"]
    training = CASE.tensors(torch.float32, "cpu", requires_grad=True)
    assert ops_of(lambda: shrank.low_rank_conv(*training)) == ["low_rank_conv_train"]
    assert ops_of(lambda: shrank.low_rank_conv(*arguments, backend="torch")) == []


def test_native_names_every_reason() -> None:
    with pytest.raises(RuntimeError, match="cannot run") as error:
        shrank.low_rank_conv(*CASE.tensors(torch.float32, "cpu"), backend="native")
    assert all(reason in str(error.value) for reason in shrank.why_not())


@pytest.mark.parametrize("padding", [1, (1, 0), "same", "valid"])
@pytest.mark.parametrize("dilation", [1, (1, 2)])
def test_numbers_may_be_one_many_or_a_word_as_for_pytorchs_own(padding: object, dilation: object) -> None:
    x, down, up, bias, *_ = CASE.tensors(torch.float32, "cpu")
    y = shrank.low_rank_conv(x, down, up, bias, padding=padding, dilation=dilation)
    assert_close(y, in_two(x, down, up, bias, padding=padding, dilation=dilation))
    assert_close(shrank.low_rank_conv(x[0], down, up, bias, padding=padding, dilation=dilation), y[0])


LAYERS = {
    "1d": ((3,), {"stride": 2}), "2d": ((3, 3), {"padding": "same", "dilation": 2}), "3d": ((2, 2, 2), {"padding": 1}),
    "even": ((4, 4), {"padding": "same"}), "grouped": ((3, 3), {"groups": 4, "groups_out": True}),
    "reflect": ((3, 3), {"padding": (1, 2), "padding_mode": "reflect"}),
    "circular": ((5,), {"padding": 2, "padding_mode": "circular"}), "no bias": ((3, 3), {"bias": False}),
}


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize(("kernel", "options"), LAYERS.values(), ids=LAYERS)
def test_ced_takes_the_op(kernel: tuple, options: dict) -> None:
    layer, x = shrank.CED(8, 12, 4, kernel, **options), torch.randn(2, 8, *(9,) * len(kernel))
    expected = layer(x)
    with shrank.backend("native"), torch.no_grad():
        assert ops_of(lambda: layer(x)) == ["low_rank_conv"]
        assert_close(layer(x), expected)
        assert_close(layer(x[0]), expected[0])
        compiled = torch.compile(layer, fullgraph=True)
        assert_close(compiled(x), expected)


@pytest.mark.usefixtures("native")
def test_a_stage_that_is_not_itself_runs_itself() -> None:
    x = torch.randn(2, 8, 9, 9)
    for change in (lambda stage: stage.register_forward_hook(lambda *_: None),
                   lambda stage: setattr(stage, "forward", stage.forward), nn.Sequential):
        for which in (0, 1):
            layer = shrank.CED(8, 12, 4, (3, 3))
            changed = change(layer.ced_unit[which])
            if isinstance(changed, nn.Sequential):
                layer.ced_unit[which] = changed
            with shrank.backend("native"):
                assert ops_of(lambda layer=layer: layer(x)) == []


def test_channels_last_brings_the_weights_into_the_kernels_layout_and_changes_no_state() -> None:
    for kernel, memory_format in (((3, 3), torch.channels_last), ((2, 3, 3), torch.channels_last_3d)):
        dense = nn.Sequential(shrank.CED(8, 12, 4, kernel))
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
