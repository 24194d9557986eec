"""Fingerprints: equal for equal values, different wherever anything differs, and never of an address or a `repr`."""

from __future__ import annotations

import threading
from collections import UserDict, deque, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BatchEncoding

from shrank.util.fingerprint import Unhashable, fingerprint
from tests.common.models import HF_MODELS, draw, hf_inputs, hf_model, mlp, tokens
from tests.common.processes import in_processes

Pair = namedtuple("Pair", "x note")
WEIGHT = 1.0


@dataclass(frozen=True)
class Box:
    x: object


class Terse:
    """Its repr hides what it holds, or shows an address."""

    def __init__(self, x: object) -> None:
        self.x = x

    def __repr__(self) -> str:
        return "Terse()"


class Scaled:
    __slots__ = ("scale",)

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def __call__(self, output: Tensor, batch: object) -> Tensor:
        return self.scale * output.sum()


def scaled(scale: float) -> Callable:
    return lambda output, batch: scale * output.sum()


def reads_a_global(output: Tensor, batch: object) -> Tensor:
    return WEIGHT * output.sum()


def middle(value: float) -> Tensor:
    x = draw(2000)
    x[1000] = value
    return x


CONTAINERS: list[Callable[[object], object]] = [
    lambda x: x,
    lambda x: [x],
    lambda x: (x,),
    lambda x: {"x": x},
    lambda x: UserDict(x=x),
    lambda x: Pair(x, 1),
    Box,
    Terse,
    lambda x: SimpleNamespace(x=x),
    lambda x: deque([x]),
    lambda x: {1: [Terse(Box(x))]},
    lambda x: BatchEncoding({"x": x}),
    lambda x: partial(scaled, x),
    lambda x: lambda: x,
]
VALUES: list[Callable[[float], object]] = [
    middle,
    lambda value: middle(value).numpy(),
    lambda value: middle(value).to(torch.bfloat16),
    lambda value: value,
    lambda value: nn.Parameter(middle(value)),
    lambda value: {value, 3.0},
]


@pytest.mark.parametrize("contain", CONTAINERS)
@pytest.mark.parametrize("make", VALUES)
def test_values_in_containers_are_told_apart(contain, make) -> None:
    assert fingerprint(contain(make(1.0))) == fingerprint(contain(make(1.0))) != fingerprint(contain(make(2.0)))


def test_kinds_are_told_apart() -> None:
    x = draw(4)
    values = [
        [x],
        (x,),
        {"x": x},
        UserDict(x=x),
        Pair(x, 1),
        Box(x),
        Terse(x),
        x.double(),
        x[None],
        x,
        1,
        1.0,
        "1",
        True,
        None,
        torch.float32,
        torch.float16,
        range(3),
        np.zeros(2),
        np.zeros(2, dtype=int),
        F.relu,
        F.gelu,
        torch.relu,
    ]
    assert len({fingerprint(value) for value in values}) == len(values)


def test_functions_are_their_code_and_what_they_read(monkeypatch) -> None:
    def one(output, batch):
        return output.sum()

    def other(output, batch):
        return output.mean()

    double = lambda output, batch: 2 * output.sum()  # noqa: E731
    triple = lambda output, batch: 3 * output.sum()  # noqa: E731
    losses = [
        one,
        other,
        double,
        triple,
        scaled(1.0),
        scaled(2.0),
        Scaled(1.0),
        Scaled(2.0),
        partial(scaled, 1.0),
        Scaled(1.0).__call__,
        partial(one, batch=None),
        reads_a_global,
    ]
    assert len({fingerprint(loss) for loss in losses}) == len(losses)
    assert fingerprint(scaled(2.0)) == fingerprint(scaled(2.0)) and fingerprint(Scaled(2.0)) == fingerprint(Scaled(2.0))
    before = fingerprint(reads_a_global)
    monkeypatch.setitem(globals(), "WEIGHT", 2.0)
    assert fingerprint(reads_a_global) != before


CHANGES: list[Callable[[nn.Sequential], object]] = [
    lambda m: m.append(nn.ReLU()),
    lambda m: m.append(nn.GELU()),
    lambda m: m.append(nn.LayerNorm(32, eps=1e-3)),
    lambda m: m.append(nn.LayerNorm(32, eps=1e-5)),
    lambda m: m.append(nn.Dropout(0.5)),
    lambda m: m.double(),
    lambda m: m.register_buffer("scale", torch.ones(2), persistent=False),
    lambda m: setattr(m, "scale", 2),
    lambda m: setattr(m, "scale", 3),
    lambda m: m[0].register_forward_hook(lambda module, args, output: 2 * output),
    lambda m: m[0].register_forward_hook(lambda module, args, output: 3 * output),
    lambda m: setattr(m, "forward", partial(F.linear, weight=m[0].weight)),
]


def test_models_differ_by_state_structure_and_settings() -> None:
    found = {fingerprint(mlp())}
    assert found == {fingerprint(mlp().train())}
    for change in CHANGES:
        model = mlp()
        change(model)
        found.add(fingerprint(model))
    assert len(found) == 1 + len(CHANGES)


@pytest.mark.parametrize("family", HF_MODELS)
def test_running_and_offloading_change_nothing(family: str) -> None:
    model = hf_model(family)
    before = fingerprint(model)
    with torch.no_grad():
        model(**hf_inputs(model))
    assert fingerprint(model) == before
    cpu_offload(next(m for m in model.modules() if isinstance(m, nn.ModuleList)), execution_device="cpu")
    assert any(p.is_meta for p in model.parameters()) and fingerprint(model) == before
    model.config.layer_norm_eps = 0.1
    assert fingerprint(model) != before


def test_recurrent_models_are_known_by_their_weights() -> None:
    models = [nn.LSTM(4, 4) for _ in range(2)]
    assert fingerprint(models[0]) != fingerprint(models[1])
    models[1].load_state_dict(models[0].state_dict())
    assert fingerprint(models[0]) == fingerprint(models[1])


@pytest.mark.parametrize(
    "value",
    [
        (i for i in range(3)),
        threading.Lock(),
        open(__file__),  # noqa: SIM115
        torch.empty(2, device="meta"),
        tokens(3).to_sparse(),
    ],
    ids=lambda v: type(v).__name__,
)
def test_what_has_no_value_is_named(value: object) -> None:
    with pytest.raises(Unhashable, match=r"\[0\]\['deep'\]\.x is a "):
        fingerprint({"deep": Box(value)})


def _of_a_model(rank: int) -> str:
    return fingerprint(hf_model("gpt2"))


def test_a_model_that_generates_is_known_in_another_process(tmp_path) -> None:
    assert in_processes(_of_a_model, folder=tmp_path, joined=False) == [_of_a_model(0)] * 2
