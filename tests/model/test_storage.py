"""Low-rank layers with pivots and with plain factors: what they compute, and all that was set on them, stays."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from shrank import CED, LED, describe
from shrank.layers.led import LEDConv1D
from shrank.linalg import factorize, pivoted, unpivoted
from shrank.model.storage import with_pivots, with_plain_factors
from tests.common.models import WIDTH, draw, seeded
from tests.common.tolerances import assert_close


def layers() -> nn.Module:
    return nn.ModuleDict(
        {
            "linear": LED(WIDTH, 48, 12, pivot=True),
            "no_bias": LED(48, WIDTH, 9, bias=False, pivot=True),
            "conv1d": LEDConv1D(WIDTH, WIDTH, 7, pivot=True),
            "plain": LED(WIDTH, WIDTH, 5),
            "conv": CED(16, 20, 8, (3, 3), 2, 1, pivot=True),
            "grouped": CED(16, 24, 8, (3,), 1, 1, 1, 2, groups_out=True, pivot=True),
        }
    )


INPUTS = {
    "linear": draw(5, WIDTH),
    "no_bias": draw(5, 48),
    "conv1d": draw(2, 3, WIDTH),
    "plain": draw(5, WIDTH),
    "conv": draw(2, 16, 9, 9),
    "grouped": draw(2, 16, 9),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_there_and_back_nothing_changes(dtype: torch.dtype) -> None:
    model = seeded(layers).to(dtype)
    model["linear"].requires_grad_(False)
    calls = []
    model["conv"].register_forward_hook(lambda *_: calls.append(1))
    wanted = {name: layer.double()(INPUTS[name].double()) for name, layer in seeded(layers).to(dtype).items()}
    here = {name: layer(INPUTS[name].to(dtype)) for name, layer in model.items()}
    plan = describe(model)
    model, names = with_plain_factors(model)
    assert names == [name for name in INPUTS if name != "plain"] and not any(m.pivoted for m in model.values())
    for name, layer in model.items():
        assert_close(layer(INPUTS[name].to(dtype)), wanted[name], baseline=here[name])
    up = model["no_bias"].up.double()
    assert_close((up.mT @ up).to(dtype), torch.eye(9, dtype=torch.float64))
    assert not model["linear"].down.requires_grad and not model.training
    model = with_pivots(model, names)
    assert describe(model) == plan and len(calls) == 3 - 1
    for name, layer in model.items():
        assert_close(layer(INPUTS[name].to(dtype)), wanted[name], baseline=here[name])


def test_a_model_that_is_one_layer() -> None:
    layer, x = seeded(lambda: LED(WIDTH, WIDTH, 6, pivot=True)), draw(4, WIDTH)
    plain, names = with_plain_factors(layer)
    assert names == [""] and plain is not layer and not plain.pivoted
    assert_close(plain(x), layer(x))
    assert with_pivots(plain, names).pivoted


@pytest.mark.parametrize("G", [1, 3])
def test_factors_are_those_of_the_same_matrix(G: int) -> None:
    factors = factorize(draw(G, 30, 20, dtype=torch.float64), 7)
    again = unpivoted(pivoted(factors))
    assert_close(again.merge(), factors.merge())
    assert_close(again.up.mT @ again.up, torch.eye(7, dtype=torch.float64).expand(G, 7, 7))
