"""Which path a call takes, and how a user chooses."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import shrank
from shrank.ops import dispatch
from tests.common.conv_cases import ConvCase
from tests.common.ops import EACH_OP, each_format, ops_of
from tests.common.tolerances import assert_close

CONV = ConvCase((6, 5), (3, 2), 8, 12, 4, padding=(1, 1), activation="silu", residual=True)


@each_format()
def test_without_a_gpu_pytorch_computes(tested, full) -> None:
    arguments = full.tensors(torch.float32, "cpu")
    assert ops_of(lambda: tested.function(*arguments)) == []
    assert_close(tested.function(*arguments), tested.reference(*arguments))
    assert_close(tested.function(*arguments), tested.op(*arguments))


@pytest.mark.usefixtures("native")
@each_format()
def test_auto_takes_the_op_where_it_may(tested, full) -> None:
    arguments, name = full.tensors(torch.float32, "cpu"), tested.definition.name
    assert ops_of(lambda: tested.function(*arguments)) == [name]
    training = full.tensors(torch.float32, "cpu", requires_grad=True)
    assert ops_of(lambda: tested.function(*training)) == [f"{name}_train"]
    with shrank.backend("torch"):
        assert ops_of(lambda: tested.function(*arguments)) == []
        assert ops_of(lambda: tested.function(*arguments, backend="native")) == [name]
    assert ops_of(lambda: tested.function(*arguments, backend=shrank.Backend.TORCH)) == []
    assert ops_of(lambda: tested.function(*arguments, backend="torch")) == []


@pytest.mark.usefixtures("native")
@each_format()
def test_a_call_is_recorded_by_autograd_where_that_has_something_to_record(tested, full) -> None:
    plain, training = (full.tensors(torch.float32, "cpu", requires_grad=each) for each in (False, True))
    assert tested.function(*training).requires_grad and not tested.function(*plain).requires_grad
    with torch.no_grad():
        assert not tested.function(*training).requires_grad
    with torch.inference_mode():
        assert tested.function(*training).is_inference()
    only_bias = [each.detach() if isinstance(each, Tensor) and i != 3 else each for i, each in enumerate(training)]
    y = tested.function(*only_bias)
    assert torch.autograd.grad(y.sum(), training[3])[0].isfinite().all()


@EACH_OP
def test_native_names_every_reason(tested) -> None:
    arguments = next(iter(tested.full.values())).tensors(torch.float32, "cpu")
    with pytest.raises(RuntimeError, match="cannot run") as error:
        tested.function(*arguments, backend="native")
    given = zip(tested.definition.names, tested.definition.packed(arguments), strict=False)
    of_tensors = [f"{name} is on cpu, not on a CUDA device" for name, each in given if isinstance(each, torch.Tensor)]
    assert all(reason in str(error.value) for reason in (*shrank.why_not(), *of_tensors))


def test_a_layer_names_every_reason() -> None:
    layer = shrank.LED(32, 24, 8)
    with shrank.backend("native"), pytest.raises(RuntimeError, match="cannot run") as error:
        layer(torch.randn(2, 32))
    for reason in shrank.why_not(torch.randn(2, 32), layer.down, layer.up, layer.bias):
        assert reason in str(error.value)
    assert dispatch.current_backend() is shrank.Backend.AUTO, "the context manager restores"


@pytest.mark.usefixtures("native")
def test_led_takes_the_op() -> None:
    torch._dynamo.reset()
    layer, x = shrank.LED(32, 24, 8), torch.randn(4, 32)
    expected = layer(x)
    with shrank.backend("native"):
        assert ops_of(lambda: layer(x)) == ["low_rank_linear_train"]
        assert_close(layer(x), expected)
        compiled = torch.compile(layer, fullgraph=True, dynamic=True)
        assert_close(compiled(x), expected)
        with torch.no_grad():
            assert ops_of(lambda: layer(x)) == ["low_rank_linear"]
            layer.led_unit[0].register_forward_hook(lambda *_: None)
            assert ops_of(lambda: layer(x)) == [], "a hooked stage runs itself"


CED_LAYERS = {
    "1d": ((3,), {"stride": 2}),
    "2d": ((3, 3), {"padding": "same", "dilation": 2}),
    "3d": ((2, 2, 2), {"padding": 1}),
    "even": ((4, 4), {"padding": "same"}),
    "grouped": ((3, 3), {"groups": 4, "groups_out": True}),
    "reflect": ((3, 3), {"padding": (1, 2), "padding_mode": "reflect"}),
    "circular": ((5,), {"padding": 2, "padding_mode": "circular"}),
    "no bias": ((3, 3), {"bias": False}),
}


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize(("kernel", "options"), CED_LAYERS.values(), ids=CED_LAYERS)
def test_ced_takes_the_op(kernel: tuple, options: dict) -> None:
    torch._dynamo.reset()  # it counts what it compiled of a function, whatever the parameters of the test
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
    for change in (
        lambda stage: stage.register_forward_hook(lambda *_: None),
        lambda stage: setattr(stage, "forward", stage.forward),
        nn.Sequential,
    ):
        for which in (0, 1):
            layer = shrank.CED(8, 12, 4, (3, 3))
            changed = change(layer.ced_unit[which])
            if isinstance(changed, nn.Sequential):
                layer.ced_unit[which] = changed
            with shrank.backend("native"):
                assert ops_of(lambda layer=layer: layer(x)) == []


@EACH_OP
@pytest.mark.parametrize("value", ["cuda", "", None, 1])
def test_an_unknown_backend_is_refused(tested, value: object) -> None:
    with pytest.raises(ValueError, match="wanted auto, torch, native"), shrank.backend(value):
        pass
    if value is not None:
        with pytest.raises(ValueError, match="wanted auto, torch, native"):
            tested.function(*next(iter(tested.full.values())).tensors(torch.float32, "cpu"), backend=value)


@pytest.mark.parametrize(("value", "error"), [("native", ""), ("gpu", "SHRANK_BACKEND is 'gpu'")])
def test_the_environment_sets_the_backend(value: str, error: str) -> None:
    code = "import shrank; from shrank.ops.dispatch import current_backend; print(current_backend().value)"
    ran = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env={"SHRANK_BACKEND": value, "PATH": ""},
    )
    assert (ran.stdout.strip() == value and ran.returncode == 0) if not error else error in ran.stderr


def in_two(x: Tensor, down: Tensor, up: Tensor, bias: Tensor, **options) -> Tensor:
    return F.conv2d(F.conv2d(x, down, **options), up, bias)


@pytest.mark.parametrize("padding", [1, (1, 0), "same", "valid"])
@pytest.mark.parametrize("dilation", [1, (1, 2)])
def test_numbers_may_be_one_many_or_a_word_as_for_pytorchs_own(padding: object, dilation: object) -> None:
    x, down, up, bias, *_ = CONV.tensors(torch.float32, "cpu")
    y = shrank.low_rank_conv(x, down, up, bias, padding=padding, dilation=dilation)
    assert_close(y, in_two(x, down, up, bias, padding=padding, dilation=dilation))
    assert_close(shrank.low_rank_conv(x[0], down, up, bias, padding=padding, dilation=dilation), y[0])
