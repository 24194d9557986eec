"""Hooks on a running model leave it, and torch's settings, as they were."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from shrank.model.hooks import frozen, hooked, input_of
from tests.common.models import mlp


@pytest.mark.parametrize("before", [True, False])
def test_fused_attention_is_off_while_layers_are_looked_at(before: bool) -> None:
    model = mlp()
    torch.backends.mha.set_fastpath_enabled(before)
    try:
        with hooked([(model[0], lambda *_: None)]):
            assert not torch.backends.mha.get_fastpath_enabled() and len(model[0]._forward_hooks) == 1
        with pytest.raises(KeyError), hooked([(model[0], lambda *_: None)]):
            raise KeyError
        assert torch.backends.mha.get_fastpath_enabled() is before and not model[0]._forward_hooks
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_frozen_parameters_are_as_before_afterwards() -> None:
    model = mlp()
    model[1].weight.requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(KeyError), frozen(model):
        assert not any(p.requires_grad for p in model.parameters())
        raise KeyError
    assert [p.requires_grad for p in model.parameters()] == flags


def test_the_input_of_a_layer_however_it_is_called() -> None:
    seen = []
    layers = {"input": nn.Linear(4, 4), "x": __import__("transformers").pytorch_utils.Conv1D(4, 4)}
    for name, layer in layers.items():
        x = torch.ones(2, 4)
        with hooked([(layer, lambda m, args, kwargs, y: seen.append(input_of(args, kwargs)))]):
            layer(x)
            layer(**{name: x})
        assert seen[-1] is seen[-2] is x
