"""Subclasses of supported layers: dense with a way out, or taken for their base once their outputs agree."""

from __future__ import annotations

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import shrank
from shrank import CED, LED
from shrank.model import subclasses
from tests.common.models import draw, seeded
from tests.common.tolerances import assert_close
from tests.common.zoo import build


class CastingLinear(nn.Linear):
    """As openai-whisper's."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class CastingConv1d(nn.Conv1d):
    """As openai-whisper's."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


class LateBias(nn.Linear):
    """As Falcon's."""

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.weight.T
        return y if self.bias is None else y + self.bias


class Scaled(nn.Linear):
    scale = 1.5

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale


class Standardised(nn.Conv2d):
    """As NFNet's."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight, self.bias)


class TwoInputs(nn.Linear):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return super().forward(x + y)


@pytest.fixture(autouse=True)
def forgotten(monkeypatch) -> None:
    monkeypatch.setattr(subclasses, "_trusted", set())


def speech() -> nn.Module:
    return seeded(
        lambda: nn.Sequential(
            CastingConv1d(16, 32, 3, padding=1),
            nn.Flatten(),
            CastingLinear(160, 48),
            nn.GELU(),
            LateBias(48, 32, bias=False),
        )
    )


def test_without_a_word_they_stay_dense_and_the_plan_tells_the_way_out() -> None:
    net = speech()
    with pytest.warns(UserWarning, match="no layer was replaced.*treat_as_base"):
        shrank.auto_fact(net, 0.6, calibrate=[draw(8, 16, 5)])
    for layer, base in zip(net.shrank_plan, ("Conv1d", "Linear", "Linear"), strict=True):
        assert (
            f"tests.model.test_subclasses.{type(net.get_submodule(layer.fqn)).__name__} is a subclass of {base}"
            in layer.reason
        )


@pytest.mark.parametrize("pivot", [False, True])
def test_full_rank_is_exact_and_casts_as_before(pivot: bool) -> None:
    shrank.treat_as_base(CastingLinear, CastingConv1d, LateBias)
    dense, x = speech(), draw(2, 16, 5)
    plan = shrank.make_plan(dense, 0.9, pivot=pivot, allow_growth=True)
    assert [layer.kind for layer in plan.low_rank] == ["Conv1d", "Linear", "Linear"]
    full = shrank.auto_fact(dense, 10**9, allow_growth=True, deepcopy=True)
    assert isinstance(full[0], CED) and isinstance(full[2], LED)
    assert_close(full(x), dense(x))
    half = full[2](draw(2, 160, dtype=torch.bfloat16))
    assert half.dtype == torch.bfloat16  # float32 weights, cast at the call
    assert_close(half, dense[2](draw(2, 160, dtype=torch.bfloat16)))


def test_they_are_calibrated_saved_loaded_merged_and_copied(tmp_path) -> None:
    shrank.treat_as_base(CastingLinear, CastingConv1d, LateBias)
    x = draw(64, 16, 5)
    small = shrank.auto_fact(speech(), 0.6, calibrate=[x], allow_slower=True)
    assert len(small.shrank_plan.low_rank) >= 2
    before = small(x)
    assert_close(copy.deepcopy(small)(x), before)
    shrank.save(small, tmp_path / "m.safetensors")
    subclasses._trusted.clear()  # a new process: the plan vouches for what it was made of
    loaded = shrank.load(speech(), tmp_path / "m.safetensors")
    assert torch.equal(loaded(x), before)
    assert shrank.describe(loaded).low_rank == shrank.describe(small).low_rank
    merged = shrank.merge(loaded)
    assert [type(m) for m in merged] == [type(m) for m in speech()]
    assert_close(merged(x), before)


@pytest.mark.parametrize(
    ("build_layer", "cause"),
    [
        (lambda: Scaled(32, 32), r"outputs differ from those of Linear with the same weights by 0\.[35]"),
        (lambda: Standardised(16, 16, 3), "outputs differ from those of Conv2d"),
        (lambda: TwoInputs(32, 32), "forward fails on a plain input: .*missing"),
    ],
)
def test_what_computes_something_else_is_not_believed(build_layer, cause) -> None:
    net = seeded(lambda: nn.Sequential(build_layer()))
    shrank.treat_as_base(type(net[0]))
    plan = shrank.make_plan(net, 4, allow_slower=True)
    assert not plan.low_rank
    assert re.search(f"treat_as_base does not hold: .*{cause}", plan["0"].reason)


def test_the_subclasses_of_a_model() -> None:
    net = speech().append(nn.utils.parametrizations.weight_norm(nn.Linear(32, 32)))
    assert subclasses.subclasses_in(net) == [CastingConv1d, CastingLinear, LateBias]


@pytest.mark.parametrize("wrong", [nn.Linear, nn.ReLU, "Linear", nn.Linear(2, 2)])
def test_only_subclasses_are_taken(wrong) -> None:
    with pytest.raises(TypeError, match="is no subclass of Linear, Conv1d, Conv2d, Conv3d"):
        shrank.treat_as_base(wrong)


def test_falcon(tmp_path) -> None:
    from transformers.models.falcon.modeling_falcon import FalconLinear

    shrank.treat_as_base(FalconLinear)
    model, inputs = build("falcon")
    with torch.no_grad():
        before = model(**inputs)[0]
        exact = shrank.auto_fact(model, 10**9, allow_growth=True, deepcopy=True)
        assert exact.shrank_plan.low_rank
        assert_close(exact(**inputs)[0], before)
    small = shrank.auto_fact(model, 8)
    expected = small(**inputs)[0]
    small.save_pretrained(tmp_path)
    subclasses._trusted.clear()
    assert_close(type(small).from_pretrained(tmp_path).eval()(**inputs)[0], expected)
