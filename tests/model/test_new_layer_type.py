"""A layer type that shrank does not have, added by one class: compressed, pivoted, priced, saved, loaded and merged."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import shrank
from shrank import LED
from shrank.linalg import Shape
from shrank.model import adapters
from shrank.model.adapters import Target, register
from tests.common.models import assert_same_state, draw, fingerprint, seeded
from tests.common.tolerances import assert_close


class Reversed(nn.Module):
    """A linear layer that stores its weight from the last output to the first."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight, self.bias = (
            nn.Parameter(torch.randn(outputs, inputs) / inputs**0.5),
            nn.Parameter(torch.zeros(outputs)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.flip(0), self.bias)


class LowRankReversed(LED):
    kind = "Reversed"

    def dense_weight(self) -> Tensor:
        return super().dense_weight().flip(0)

    def blocks_of(self, weight: Tensor) -> Tensor:
        return weight.flip(0)[None]


class ReversedTarget(Target):
    """All that shrank has to know."""

    kind = "Reversed"

    def shape(self) -> Shape:
        return Shape(*self.module.weight.shape)

    def matrices(self, shape: Shape) -> Tensor:
        return self.module.weight.detach().flip(0)[None]

    def twin(self, rank: int, shape: Shape) -> LowRankReversed:
        return LowRankReversed(shape.in_features, shape.out_features, rank, pivot=shape.pivoted, **self._meta())

    @staticmethod
    def dense_from(layer: LowRankReversed) -> Reversed:
        with torch.device("meta"):
            return Reversed(layer.in_features, layer.out_features)


@pytest.fixture(autouse=True)
def registered(monkeypatch) -> None:
    for table in ("ADAPTERS", "_BY_KIND"):
        monkeypatch.setattr(adapters, table, dict(getattr(adapters, table)))
    register(Reversed, ReversedTarget)


def net() -> nn.Module:
    return seeded(lambda: nn.Sequential(Reversed(48, 64), nn.GELU(), nn.Linear(64, 48), nn.GELU(), Reversed(48, 32)))


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("pivot", [False, True])
def test_full_rank_is_exact_and_priced(pivot: bool) -> None:
    dense, x = net(), draw(5, 48)
    assert_close(shrank.auto_fact(dense, 10**9, allow_growth=True, deepcopy=True)(x), dense(x))
    small = shrank.auto_fact(dense, 12, pivot=pivot, deepcopy=True)
    assert [layer.kind for layer in small.shrank_plan.low_rank] == ["Reversed", "Linear", "Reversed"]
    assert all(layer.shape.pivoted == pivot for layer in small.shrank_plan.low_rank)
    assert small.shrank_plan.params_after == parameters(small) < parameters(dense)


@pytest.mark.parametrize("pivot", [False, True])
def test_with_data_saved_loaded_healed_and_merged(pivot: bool, tmp_path) -> None:
    dense, x = net(), draw(400, 48)
    small = shrank.auto_fact(dense, 0.7, calibrate=[x[:200], x[200:]], pivot=pivot, deepcopy=True)
    plan = small.shrank_plan
    assert "Reversed" in {layer.kind for layer in plan.low_rank} and plan.params_after == parameters(small)
    before = small(x)
    measured = shrank.measure_errors(plan, dense, small, [x])
    assert all(0 <= layer.measured < 1 for layer in measured.low_rank)
    shrank.save(small, tmp_path / "m.safetensors")
    loaded = shrank.load(net(), tmp_path / "m.safetensors")
    assert_same_state(fingerprint(loaded)["state"], fingerprint(small)["state"])
    assert torch.equal(loaded(x), before) and shrank.describe(loaded).low_rank == shrank.describe(small).low_rank
    merged = shrank.merge(loaded)
    assert [type(m) for m in merged] == [type(m) for m in dense]
    assert_close(merged(x), before)
    shrank.heal(small, dense, [x[i : i + 50] for i in range(0, 400, 50)], steps=2)
    assert {layer.kind for layer in shrank.describe(small).low_rank} == {layer.kind for layer in plan.low_rank}
