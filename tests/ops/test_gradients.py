"""The derivatives of the ops, first and second, and what is kept for them; on every implementation there is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from shrank.ops import reference
from tests.common.ops import DTYPES, doubled, each_case, each_format, floating_of, is_floating, tensors_of
from tests.common.tolerances import assert_close


def gradients(call: Callable[..., Tensor], arguments: tuple, grads: list[Tensor]) -> list[Tensor]:
    y = call(*arguments)
    return [d for grad in grads for d in torch.autograd.grad(y, floating_of(arguments), grad, retain_graph=True)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_case(lambda tested: tested.gradients)
def test_gradients(tested, case, dtype: torch.dtype, device: str) -> None:
    arguments = case.tensors(dtype, device, requires_grad=True)
    drawn = torch.randn(case.output, generator=torch.Generator().manual_seed(1))
    grads = [drawn.to(device, dtype), torch.ones((), device=device, dtype=dtype).expand(case.output)]
    exact = gradients(tested.reference, doubled(arguments), [grad.double() for grad in grads])
    baseline = gradients(tested.reference, arguments, grads)
    found = gradients(tested.op, arguments, grads)
    for tensor, ours, wanted, torchs in zip(floating_of(arguments) * 2, found, exact, baseline, strict=True):
        assert ours.dtype == tensor.dtype and ours.shape == tensor.shape
        assert_close(ours, wanted, torchs)


@each_format(lambda tested: tested.small)
@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_gradcheck_twice(tested, full, activation: str, device: str) -> None:
    arguments = replace(full, activation=activation).tensors(torch.float64, device, requires_grad=True)
    assert torch.autograd.gradcheck(tested.op, arguments)
    assert torch.autograd.gradgradcheck(tested.op, arguments)


@each_format()
def test_only_the_gradients_that_are_wanted(tested, full, device: str) -> None:
    arguments = full.tensors(torch.float64, device)
    whole = max(len(tensors_of(case.tensors(torch.float64, device))) for case in tested.full.values())
    assert whole == len(tested.definition.names)
    for wanted in (i for i, each in enumerate(arguments) if is_floating(each)):
        given = list(full.tensors(torch.float64, device))
        given[wanted].requires_grad_()
        tested.op(*given).sum().backward()
        exact = doubled(given)
        tested.reference(*exact).sum().backward()
        assert_close(given[wanted].grad, exact[wanted].grad)
        assert [a.grad is not None for a in tensors_of(given)].count(True) == 1


@each_format()
@pytest.mark.parametrize("activation", ["none", "silu"])
def test_h_is_saved_for_gradients_and_only_then(tested, full, activation: str, device: str) -> None:
    case = replace(full, activation=activation)
    shapes = []

    def pack(tensor: Tensor) -> Tensor:
        shapes.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        tested.op(*case.tensors(torch.float32, device))
        assert shapes == []
        tested.op(*case.tensors(torch.float32, device, requires_grad=True))
    assert all(shapes.count(h) == case.kept.count(h) for h in case.kept)
    assert case.output not in shapes  # nothing as large as y
