"""Seals: no loader may take them for a weight, and low-rank layers know their own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import shrank
from shrank.layers.seal import is_seal, seal, sealed_names
from shrank.saving.checks import seals
from tests.common.models import Mixed, mlp, seeded


@pytest.mark.parametrize("shape", [(4, 6), (6, 4), (6,), (7, 7), (4, 3, 6), (4, 3, 1, 1), (1, 1)])
def test_a_seal_cannot_be_copied_into_a_weight(shape):
    with pytest.raises(RuntimeError):
        torch.zeros(shape).copy_(seal(shape))
    assert is_seal(seal(shape)) and is_seal(seal(shape).to(torch.bfloat16))
    assert bytes(seal(shape).tolist()).startswith(b"shrank")


@pytest.mark.parametrize("value", [torch.zeros(6), torch.zeros(6, 1), torch.zeros(2), torch.empty(6, device="meta")])
def test_other_tensors_are_none(value):
    assert not is_seal(value)


def test_names_of_seals_belong_to_every_layer_with_factors():
    names = ["a.led_unit.0.weight", "a.led_unit.1.led_unit.0.weight", "ced_unit.0.weight", "b.weight", "misled_unit.0"]
    assert sealed_names(names) == {"a.weight", "a.led_unit.1.weight", "weight"}


def sealed_state(model: nn.Module) -> dict[str, torch.Tensor]:
    return model.state_dict() | seals(model)


def test_a_sealed_state_fits_the_low_rank_model_alone():
    def low_rank() -> nn.Module:
        return shrank.auto_fact(seeded(Mixed), 4, allow_slower=True)

    state, model = sealed_state(low_rank()), low_rank()
    for parameter in model.parameters():
        parameter.data.zero_()
    assert not model.load_state_dict(state).unexpected_keys
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    with pytest.raises(RuntimeError, match=r"size mismatch for stem\.weight"):
        seeded(Mixed).load_state_dict(state, strict=False)


def test_a_dense_weight_is_no_seal():
    state = shrank.auto_fact(mlp(1), 4).state_dict() | {"0.weight": torch.zeros(32, 32)}
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "0\.weight"'):
        shrank.auto_fact(mlp(1), 4).load_state_dict(state)
