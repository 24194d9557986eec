"""What torch expects of an op: opcheck, and whole graphs for any size."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from tests.common.ops import OpUnderTest, each_case, each_format, floating_of
from tests.common.tolerances import assert_close


@each_case(lambda tested: tested.odd)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(tested, case, dtype: torch.dtype, device: str) -> None:
    tolerance, of_gradients = {}, {}
    if dtype == torch.bfloat16:  # compiled code rounds less often
        tolerance = of_gradients = {"rtol": 2e-2, "atol": 2e-2}
        if not tested.definition.takes_residual:  # a product: its gradients are sums of larger numbers
            of_gradients = {"rtol": 2e-2, "atol": max(2e-2, 1e-2 * largest_gradient(tested, case, device))}
    opcheck(tested.op, case.tensors(dtype, device), **tolerance)
    opcheck(tested.op, case.tensors(dtype, device, requires_grad=True), **of_gradients)
    opcheck(tested.op_train, case.tensors(dtype, device), **tolerance)


def largest_gradient(tested: OpUnderTest, case: object, device: str) -> float:
    arguments = case.tensors(torch.float64, device, requires_grad=True)
    found = torch.autograd.grad(tested.reference(*arguments).sum(), floating_of(arguments))
    return max((float(each.abs().max()) for each in found if each.numel()), default=0.0)


@each_format()
@pytest.mark.parametrize("requires_grad", [False, True])
def test_compiles_whole_for_any_size(tested, full, requires_grad: bool, device: str) -> None:
    torch._dynamo.reset()  # it counts what it compiled of a function, whatever the parameters of the test
    (_, *weights), between, residual = tested.definition.parts(full.tensors(torch.float32, device, requires_grad))
    for weight in filter(None.__ne__, weights):
        torch._dynamo.mark_static(weight)  # as a module's parameters are
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: list) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    def layer(x: Tensor) -> Tensor:
        return tested.op(x, *weights, *between, *(full.residual_for(x) for _ in residual))

    recorded = torch.compile(layer, fullgraph=True, dynamic=True, backend=backend)
    inductor = torch.compile(layer, fullgraph=True, dynamic=True)
    for x in full.other_inputs(device):
        x.requires_grad_(requires_grad)
        expected = layer(x)
        recorded(x)
        assert_close(inductor(x), expected)
        assert inductor(x).stride() == expected.stride()
        if requires_grad:
            assert_close(torch.autograd.grad(inductor(x).sum(), x)[0], torch.autograd.grad(expected.sum(), x)[0])
    assert len(graphs) == 1
