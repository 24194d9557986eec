"""What torch expects of an op: opcheck, and whole graphs for any size."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from tests.common.ops import each_case, each_format
from tests.common.tolerances import assert_close


@each_case(lambda tested: tested.odd)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(tested, case, dtype: torch.dtype, device: str) -> None:
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {}  # compiled code rounds less often
    opcheck(tested.op, case.tensors(dtype, device), **tolerance)
    opcheck(tested.op, case.tensors(dtype, device, requires_grad=True), **tolerance)
    opcheck(tested.op_train, case.tensors(dtype, device), **tolerance)


@each_format()
@pytest.mark.parametrize("requires_grad", [False, True])
def test_compiles_whole_for_any_size(tested, full, requires_grad: bool, device: str) -> None:
    torch._dynamo.reset()  # it counts what it compiled of a function, whatever the parameters of the test
    _, *weights, _ = full.tensors(torch.float32, device, requires_grad)
    for weight in weights[:3]:
        torch._dynamo.mark_static(weight)  # as a module's parameters are
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: list) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    def layer(x: Tensor) -> Tensor:
        return tested.op(x, *weights, full.residual_for(x))

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
