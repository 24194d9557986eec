"""Which path a call takes, why, and how a user chooses."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import shrank
from shrank.ops import dispatch, reference
from tests.common.cases import Case
from tests.common.tolerances import assert_close

CASE = Case((4,), 32, 24, 8, True, "silu", True)


class Recorded(TorchDispatchMode):
    """The names of the ops of shrank that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "shrank":
            self.names.append(func._opname)
        return func(*args, **kwargs or {})


def ops_of(call) -> list[str]:
    with Recorded() as recorded:
        call()
    return recorded.names


def test_without_a_gpu_pytorch_computes() -> None:
    arguments = CASE.tensors(torch.float32, "cpu")
    assert ops_of(lambda: shrank.low_rank_linear(*arguments)) == []
    assert_close(shrank.low_rank_linear(*arguments), reference.low_rank_linear(*arguments))


@pytest.mark.usefixtures("native")
def test_auto_takes_the_op_where_it_may() -> None:
    arguments = CASE.tensors(torch.float32, "cpu")
    assert ops_of(lambda: shrank.low_rank_linear(*arguments)) == ["low_rank_linear"]
    training = CASE.tensors(torch.float32, "cpu", requires_grad=True)
    assert ops_of(lambda: shrank.low_rank_linear(*training)) == ["low_rank_linear_train"]
    with shrank.backend("torch"):
        assert ops_of(lambda: shrank.low_rank_linear(*arguments)) == []
        assert ops_of(lambda: shrank.low_rank_linear(*arguments, backend="native")) == ["low_rank_linear"]
    assert ops_of(lambda: shrank.low_rank_linear(*arguments, backend=shrank.Backend.TORCH)) == []


@pytest.mark.usefixtures("native")
def test_led_takes_the_op() -> None:
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


def test_native_names_every_reason() -> None:
    layer = shrank.LED(32, 24, 8)
    with shrank.backend("native"), pytest.raises(RuntimeError, match="cannot run") as error:
        layer(torch.randn(2, 32))
    for reason in shrank.why_not(torch.randn(2, 32), layer.down, layer.up, layer.bias):
        assert reason in str(error.value)
    assert dispatch.current_backend() is shrank.Backend.AUTO, "the context manager restores"


def test_why_not_collects_all_reasons() -> None:
    x, down, up, bias, _, residual = CASE.tensors(torch.float32, "cpu")
    here = shrank.why_not()
    assert here, "no GPU here"
    reasons = shrank.why_not(x.int(), down, up, bias, residual)
    assert reasons[:len(here)] == here
    for name in ("x", "down", "up", "bias", "residual"):
        assert f"{name} is on cpu, not on a CUDA device" in reasons
    assert any(reason.startswith("x is torch.int32") for reason in reasons)


def test_why_not_knows_what_surrounds_a_call() -> None:
    x, down, up, *_ = CASE.tensors(torch.float32, "cpu")
    seen = []

    def ask(x: Tensor) -> Tensor:
        seen.append(shrank.why_not(x, down, up))
        return x

    torch.vmap(ask)(x)
    assert any("torch.func" in reason for reason in seen[-1])
    with forward_ad.dual_level():
        ask(x)
    assert any("forward-mode" in reason for reason in seen[-1])
    ask(x)
    assert not any("forward-mode" in reason or "torch.func" in reason for reason in seen[-1])
    assert any("Proxy" in reason for reason in shrank.why_not(torch.fx.Graph().placeholder("x"), down, up)) or any(
        "Node" in reason for reason in shrank.why_not(torch.fx.Graph().placeholder("x"), down, up))


def test_a_tensor_subclass_is_left_to_pytorch() -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    x, down, up, *_ = CASE.tensors(torch.float32, "cpu")
    both = TwoTensor(down, down.clone())
    assert any("TwoTensor" in reason for reason in shrank.why_not(x, both, up))
    assert not any("Parameter" in reason for reason in shrank.why_not(x, nn.Parameter(down), up))


@pytest.mark.parametrize("value", ["cuda", "", None, 1])
def test_an_unknown_backend_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match="wanted auto, torch, native"), shrank.backend(value):
        pass
    if value is not None:
        with pytest.raises(ValueError, match="wanted auto, torch, native"):
            shrank.low_rank_linear(*CASE.tensors(torch.float32, "cpu"), backend=value)


@pytest.mark.parametrize(("value", "error"), [("native", ""), ("gpu", "SHRANK_BACKEND is 'gpu'")])
def test_the_environment_sets_the_backend(value: str, error: str) -> None:
    code = "import shrank; from shrank.ops.dispatch import current_backend; print(current_backend().value)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False,
                         env={"SHRANK_BACKEND": value, "PATH": ""})
    assert (ran.stdout.strip() == value and ran.returncode == 0) if not error else error in ran.stderr


def test_a_fake_tensor_of_a_device_that_is_elsewhere_asks_for_no_device() -> None:
    """As a model is planned, on a machine without a GPU, for one with."""
    if torch.cuda.is_available():
        assert shrank.why_not() == []
        return
    with FakeTensorMode():
        x, down, up = (torch.empty(shape, device="cuda:1") for shape in ((4, 32), (8, 32), (16, 8)))
        assert shrank.why_not(x, down, up) == shrank.why_not()
        assert shrank.low_rank_linear(x, down, up).shape == (4, 16)
