"""Why the native kernels cannot run."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

import shrank
from shrank.ops import availability
from shrank.ops.availability import constant
from tests.common.linear_cases import LinearCase

NAMES = ("x", "down", "up")
CASE = LinearCase((4,), 32, 24, 8, True, "silu", True)


def test_why_not_collects_all_reasons() -> None:
    x, down, up, bias, _, residual = CASE.tensors(torch.float32, "cpu")
    here = shrank.why_not()
    assert here, "no GPU here"
    reasons = shrank.why_not(x.int(), down, up, bias, residual)
    assert reasons[: len(here)] == here
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
        "Node" in reason for reason in shrank.why_not(torch.fx.Graph().placeholder("x"), down, up)
    )


def test_a_tensor_subclass_is_left_to_pytorch() -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    x, down, up, *_ = CASE.tensors(torch.float32, "cpu")
    both = TwoTensor(down, down.clone())
    assert any("TwoTensor" in reason for reason in shrank.why_not(x, both, up))
    assert not any("Parameter" in reason for reason in shrank.why_not(x, nn.Parameter(down), up))


def test_a_fake_tensor_of_a_device_that_is_elsewhere_asks_for_no_device() -> None:
    """As a model is planned, on a machine without a GPU, for one with."""
    if torch.cuda.is_available():
        assert shrank.why_not() == []
        return
    with FakeTensorMode():
        x, down, up = (torch.empty(shape, device="cuda:1") for shape in ((4, 32), (8, 32), (16, 8)))
        assert shrank.why_not(x, down, up) == shrank.why_not()
        assert shrank.low_rank_linear(x, down, up).shape == (4, 16)


def test_what_ran_once_hides_no_reason_of_another_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an op that ran, on a device, with a dtype, all later calls are believed that are like it."""
    x, down, up = torch.randn(2, 8), nn.Parameter(torch.randn(4, 8)), torch.randn(8, 4)
    monkeypatch.setattr(availability, "_known", {("op", x.device, x.dtype)})

    def is_known(*tensors: object, op: str = "op") -> bool:
        return availability.is_known_to_run(op, tensors)

    class Other(Tensor):
        pass

    assert is_known(x, down, up) and is_known(x, down, None)
    assert not is_known(x, down, up, op="another op") and not is_known(x.double(), down, up)
    assert not is_known(torch.empty(2, 8, device="meta"), down, up)
    assert not is_known(x.as_subclass(Other), down, up) and not is_known(x, down, up.as_subclass(Other))
    assert not is_known(x, down, 3) and not is_known(torch.fx.Graph().placeholder("x"), down, up)
    with forward_ad.dual_level():
        assert not is_known(x, down, up)
    seen = []
    torch.vmap(lambda each: seen.append(is_known(each, down, up)) or each)(x)
    torch.jit.trace(lambda each: seen.append(is_known(each, down, up)) or each, x, check_trace=False)
    assert len(seen) >= 2 and not any(seen)
    availability.forget()
    assert not is_known(x, down, up)


def test_a_cpu_that_stands_in_for_a_gpu_is_not_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(availability, "_known", known := set())
    x, on_a_card = torch.randn(2), torch.randn(2)
    availability.note_that_it_ran("op", x)
    assert not known
    monkeypatch.setattr(Tensor, "get_device", lambda _: 0)
    availability.note_that_it_ran("op", on_a_card)
    assert known == {("op", x.device, x.dtype)}


def test_an_order_of_places_is_no_reason_and_numbers_of_its_kind_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)  # on device -1
    names = ("x", "down", "order")
    x, down, order = torch.randn(2, 8), torch.randn(4, 8), torch.arange(4, dtype=torch.int32)
    assert availability.why_not_these((x, down, order), names) == []
    assert availability.why_not_these((x, None, order), names) == []
    assert availability.why_not_these((x, down, order.long()), names) == ["order is torch.int64, not torch.int32"]
    assert "x is torch.int32" in availability.why_not_these((x.int(), down, order), names)[0]
    assert "up is torch.int32" in availability.why_not_these((x, down, order), ("x", "down", "up"))[0]


def test_reasons_of_tensors_on_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)  # on device -1
    x, down, up = torch.randn(2, 8), torch.randn(4, 8), torch.randn(8, 4)
    assert availability.why_not_these((x, down, up), NAMES) == []

    class Other(Tensor):
        pass

    assert "int64" in availability.why_not_these((x.long(), down, up), NAMES)[0]
    assert "not a tensor" in availability.why_not_these((x, down, 3), NAMES)[0]
    assert availability.why_not_these((x.as_subclass(Other), down, up), NAMES) == []  # no wrapper: a plain tensor
    with forward_ad.dual_level():
        assert "forward-mode" in availability.why_not_these((x, down, up), NAMES)[0]
    monkeypatch.setattr(availability, "_find_too_old", lambda _: "a card that is too old")
    assert "too old" in availability.why_not_these((x, down, up), NAMES)[0]


def test_the_mark_of_constants_is_that_of_torch() -> None:
    def own() -> None: ...

    def theirs() -> None: ...

    assert vars(constant(own)) == vars(torch.compiler.assume_constant_result(theirs)) != {}


def test_importing_shrank_brings_nothing_that_takes_a_second() -> None:
    heavy = [
        "torch._dynamo",
        "torch._inductor",
        "sympy",
        "transformers",
        "accelerate",
        "diffusers",
        "peft",
        "matplotlib",
        "numpy.testing",
        "typer",
        "pandas",
    ]
    code = (
        f"import torch; before = set(sys.modules); import shrank; print(*({{*{heavy!r}}} & set(sys.modules) - before))"
    )
    found = subprocess.run([sys.executable, "-c", f"import sys; {code}"], capture_output=True, text=True, check=True)
    assert found.stdout.split() == []
