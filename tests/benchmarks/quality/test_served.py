"""How models are timed: the forms in which they are served compute what they did."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import shrank
from benchmarks.quality import sizes
from benchmarks.quality.served import Served, Work, in_floats, in_int8
from shrank import Budget, CorrectedLinear
from shrank.layers.quantized import is_quantized
from tests.common.models import WIDTH, draw, mlp
from tests.common.tolerances import assert_close


def small() -> nn.Module:
    return shrank.auto_fact(mlp(3), Budget(keep_bytes=0.1, group_sizes=(8,)))


def test_weights_of_few_bits_become_plain_numbers() -> None:
    model, x = small(), draw(9, WIDTH)
    plain = in_floats(model)
    assert any(is_quantized(p) for p in model.parameters()) and not any(is_quantized(p) for p in plain.parameters())
    with torch.no_grad():
        assert_close(plain(x), model(x))


@pytest.mark.parametrize("pivot", [True, False])
def test_int8_is_near(pivot: bool) -> None:
    model, x = shrank.auto_fact(mlp(3), 0.6, pivot=pivot), draw(9, WIDTH)
    quantized = in_int8(model)
    assert not any(isinstance(module, nn.Linear) for module in quantized.modules())
    with torch.no_grad():
        wanted = model(x)
        assert (quantized(x) - wanted).norm() < 0.03 * wanted.norm()


def test_convolutions_have_no_form_in_int8() -> None:
    assert in_int8(nn.Sequential(nn.Conv2d(2, 2, 1), nn.Linear(2, 2))) is None


def test_speeds_are_beside_the_dense_model() -> None:
    dense, x = mlp(3), draw(16, WIDTH)
    served = Served(dense, Work(lambda model: model(x), len(x), "tokens"))
    names = ["tokens/s, fp32", "times dense, fp32", "tokens/s, int8", "times dense, int8"]
    assert list(served.figures(small())) == names
    assert served.figures(None)["times dense, fp32"] == 1.0
    corrected = nn.Sequential(*(CorrectedLinear(layer, 4) for layer in mlp(3)[:1]), *mlp(3)[1:])
    assert served.figures(corrected)["tokens/s, int8"] > 0


def test_speeds_are_added_to_rows_that_were_measured() -> None:
    rows = [{"method": "a", "bytes": 1.0, "cosine": 1.0}, {"method": "shrank", "bytes": 0.2501, "budget": 0.25}]
    speed = {"times dense, fp32": 1.5, "tokens/s, fp32": 7.0}
    found = sizes.with_speed(copy.deepcopy(rows), {"method": "shrank", "bytes": 0.2502, "budget": 0.25, **speed})
    assert found[0] == rows[0] and found[1].pop("speed measured")["torch"] == torch.__version__
    assert found[1] == rows[1] | speed
    with pytest.raises(ValueError, match=r"the quality of \('b', 0\.5\) was not measured"):
        sizes.with_speed(rows, {"method": "b", "bytes": 0.5, **speed})
    shown = {**found[1], "cosine": 0.5}
    assert sizes.table([rows[0] | speed, shown, rows[0]]).splitlines()[-1] in (
        "| a | 1 | 1 |  |  |",
        "| shrank | 0.2501 | 0.5 | 1.5 | 7 |",
    )
