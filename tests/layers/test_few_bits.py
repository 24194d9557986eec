"""Pivoted layers that other tools quantize: as they are in 8 bits, refused in fewer."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.ao.quantization import quantize_dynamic
from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, IntxWeightOnlyConfig, quantize_
from torchao.quantization.granularity import PerGroup

import shrank
from tests.common.models import draw, seeded
from tests.common.tolerances import assert_close

REFUSAL = r"down stage of \S+, whose rows have about \d+ values in \d+ weights.*shrank\.unpivot\(model\)"


class Coarse(nn.Module):
    """As other packages have them: whole numbers and a scale, in a module of their own."""

    def __init__(self, inner: nn.Linear, levels: int) -> None:
        super().__init__()
        self.scale = inner.weight.detach().abs().amax(1, keepdim=True) / levels
        self.weight = nn.Parameter((inner.weight / self.scale).round().to(torch.int8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight * self.scale)


def coarse(levels: int):
    return lambda model: model[0].led_unit.__setitem__(0, Coarse(model[0][0], levels))


def model() -> nn.Sequential:
    return shrank.auto_fact(seeded(lambda: nn.Sequential(nn.Linear(128, 192))).eval(), 64, pivot=True)


FEW = {
    "torchao-int4": lambda m: quantize_(m, IntxWeightOnlyConfig(weight_dtype=torch.int4)),
    "torchao-int4-groups": lambda m: quantize_(m, IntxWeightOnlyConfig(torch.int4, PerGroup(32))),
    "torchao-float8": lambda m: quantize_(m, Float8WeightOnlyConfig()),
    "own-module-int4": coarse(7),
}
EIGHT = {
    "torchao-int8": lambda m: quantize_(m, Int8WeightOnlyConfig()),
    "torch-int8": lambda m: quantize_dynamic(m, {nn.Linear}, inplace=True),
    "own-module-int8": coarse(127),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("quantize", FEW.values(), ids=FEW)
def test_few_bits_are_refused_at_the_first_call_but_not_of_plain_factors(quantize) -> None:
    pivoted, x = model(), draw(5, 128)
    plain = shrank.unpivot(copy.deepcopy(pivoted))
    quantize(plain)
    assert plain(x).isfinite().all()
    quantize(pivoted)
    with pytest.raises(RuntimeError, match=REFUSAL):
        pivoted(x)


@pytest.mark.filterwarnings("ignore")
def test_compiled_they_are_refused_as_well() -> None:
    pivoted, x = model(), draw(5, 128)
    FEW["own-module-int4"](pivoted)
    torch.compiler.reset()
    with pytest.raises(RuntimeError, match="call the model once before compiling it"):
        torch.compile(pivoted, backend="eager", fullgraph=True)(x)
    with pytest.raises(RuntimeError, match=REFUSAL):
        torch.compile(pivoted, backend="eager")(x)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("quantize", EIGHT.values(), ids=EIGHT)
def test_eight_bits_run(quantize) -> None:
    pivoted, x = model(), draw(5, 128)
    expected = pivoted(x)
    quantize(pivoted)
    assert (pivoted(x) - expected).norm() < 0.1 * expected.norm()
    assert_close(torch.compile(pivoted, backend="eager")(x), pivoted(x))
