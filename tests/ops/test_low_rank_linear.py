"""shrank::low_rank_linear: values, gradients, and what torch expects of an op; on every implementation there is."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from shrank.ops import reference
from tests.common.cases import DTYPES, ENDS, MATRICES, SHAPES, Case
from tests.common.tolerances import assert_close

op = torch.ops.shrank.low_rank_linear
op_train = torch.ops.shrank.low_rank_linear_train
FULL = Case((3, 5), 24, 40, 8, True, "gelu", True)


def doubled(arguments: tuple) -> tuple:
    return tuple(a.detach().double().requires_grad_(a.requires_grad) if isinstance(a, Tensor) else a for a in arguments)


def assert_as_good_as_torch(actual: Tensor, arguments: tuple) -> None:
    assert_close(actual, reference.low_rank_linear(*doubled(arguments)), reference.low_rank_linear(*arguments))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ENDS + SHAPES + MATRICES, ids=str)
def test_values(case: Case, dtype: torch.dtype, device: str) -> None:
    arguments = case.tensors(dtype, device)
    y = op(*arguments)
    assert y.shape == (*case.batch, case.N) and y.dtype == dtype and y.is_contiguous()
    assert_as_good_as_torch(y, arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ENDS + SHAPES + MATRICES, ids=str)
def test_gradients(case: Case, dtype: torch.dtype, device: str) -> None:
    arguments = case.tensors(dtype, device, requires_grad=True)
    inputs = [a for a in arguments if isinstance(a, Tensor)]
    grad = case.tensors(dtype, device)[0].new_tensor(1.0).expand(*case.batch, case.N)

    def gradients(call, arguments: tuple, grad: Tensor) -> tuple:
        return torch.autograd.grad(call(*arguments), [a for a in arguments if isinstance(a, Tensor)], grad)

    exact = gradients(reference.low_rank_linear, doubled(arguments), grad.double())
    baseline = gradients(reference.low_rank_linear, arguments, grad)
    for tensor, found, wanted, torchs in zip(inputs, gradients(op, arguments, grad), exact, baseline, strict=True):
        assert found.dtype == tensor.dtype and found.shape == tensor.shape
        assert_close(found, wanted, torchs)


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_gradcheck_twice(activation: str, device: str) -> None:
    arguments = replace(FULL, activation=activation).tensors(torch.float64, device, requires_grad=True)
    assert torch.autograd.gradcheck(op, arguments)
    assert torch.autograd.gradgradcheck(op, arguments)


@pytest.mark.parametrize("wanted", range(5))
def test_only_the_gradients_that_are_wanted(wanted: int, device: str) -> None:
    arguments = list(FULL.tensors(torch.float64, device))
    where = [0, 1, 2, 3, 5][wanted]
    arguments[where].requires_grad_()
    op(*arguments).sum().backward()
    exact = [a.detach().clone().requires_grad_(a.requires_grad) if isinstance(a, Tensor) else a for a in arguments]
    reference.low_rank_linear(*exact).sum().backward()
    assert_close(arguments[where].grad, exact[where].grad)


@pytest.mark.parametrize(("activation", "saved"), [("none", 0), ("silu", 1)])
def test_h_is_saved_for_gradients_and_only_then(activation: str, saved: int, device: str) -> None:
    case = replace(FULL, activation=activation)
    shapes = []

    def pack(tensor: Tensor) -> Tensor:
        shapes.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        op(*case.tensors(torch.float32, device))
        assert shapes == []
        op(*case.tensors(torch.float32, device, requires_grad=True))
    assert shapes.count((*case.batch, case.R)) == 1  # h
    assert shapes.count((*case.batch, case.N)) == saved  # the pre-activation


@pytest.mark.parametrize("case", [FULL, Case((), 8, 8, 2), Case((4,), 16, 7, 3, False, "silu"), Case((0,), 16, 8, 4)],
                         ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(case: Case, dtype: torch.dtype, device: str) -> None:
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {}  # compiled code rounds less often
    opcheck(op, case.tensors(dtype, device), **tolerance)
    opcheck(op, case.tensors(dtype, device, requires_grad=True), **tolerance)
    opcheck(op_train, case.tensors(dtype, device), **tolerance)


def test_inputs_stay_and_outputs_are_new(device: str) -> None:
    for case in [FULL, replace(FULL, activation="none"), replace(FULL, activation="none", residual=False)]:
        arguments = case.tensors(torch.float32, device)
        before = [a.clone() if isinstance(a, Tensor) else a for a in arguments]
        outputs = [op(*arguments), *op_train(*arguments)]
        for a, b in zip(arguments, before, strict=True):
            assert torch.equal(a, b) if isinstance(a, Tensor) else a == b
        addresses = [t.data_ptr() for t in [*arguments, *outputs] if isinstance(t, Tensor) and t.numel()]
        assert len(set(addresses)) == len(addresses)


@pytest.mark.parametrize("N", [40, 37])
def test_strides_do_not_matter(N: int, device: str) -> None:
    x, down, up, bias, activation, residual = replace(FULL, N=N).tensors(torch.float32, device)
    strided = (x.transpose(0, 1).contiguous().transpose(0, 1), down.T.contiguous().T, up.repeat(1, 2)[:, ::2],
               bias.repeat_interleave(2)[::2], activation, residual.transpose(0, 1).contiguous().transpose(0, 1))
    y = op(*strided)
    assert y.is_contiguous()
    assert_as_good_as_torch(y, strided)
    offset = torch.cat([residual.flatten()[:1], residual.flatten()])[1:].view_as(residual)  # not 16-byte aligned
    assert_close(op(x, down, up, bias, activation, offset), op(x, down, up, bias, activation, residual))
    wide = op(x, down, up, bias[:1].expand(N), activation, residual[:, :1].expand_as(residual))
    assert_as_good_as_torch(wide, (x, down, up, bias[:1].expand(N), activation, residual[:, :1].expand_as(residual)))


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_non_finite_values_as_in_torch(activation: str, device: str) -> None:
    values = torch.tensor([[0.0, -0.0, 1e30, -1e30, float("inf"), -float("inf"), float("nan"), 1e-40]], device=device)
    one = torch.ones(1, 1, device=device)
    for x in values.T.unbind():
        y = op(x[:, None], one, one, None, activation, None)
        torch.testing.assert_close(y, reference.low_rank_linear(x[:, None], one, one, None, activation), equal_nan=True)


def test_fp16_overflows_to_infinity(device: str) -> None:
    big = torch.full((1, 1), 60000.0, dtype=torch.float16, device=device)
    one = torch.ones(1, 1, dtype=torch.float16, device=device)
    assert op(big, one, one, None, "none", big).isinf().all()


def test_deterministic(device: str) -> None:
    arguments = FULL.tensors(torch.float32, device)
    assert torch.equal(op(*arguments), op(*arguments))


def test_training_and_inference_agree_to_the_bit(device: str) -> None:
    for activation in reference.ACTIVATIONS:
        case = replace(FULL, activation=activation)
        y = op(*case.tensors(torch.bfloat16, device))
        assert torch.equal(y, op(*case.tensors(torch.bfloat16, device, requires_grad=True)))
        with torch.inference_mode():
            assert torch.equal(y, op(*case.tensors(torch.bfloat16, device)))


@pytest.mark.parametrize("residual", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(residual: torch.dtype, device: str) -> None:
    x, down, up, bias, activation, r = FULL.tensors(torch.float32, device, requires_grad=True)
    arguments = (x, down, up, bias, activation, r.to(residual))
    with torch.autocast(device, torch.bfloat16):
        y = op(*arguments)
        baseline = reference.low_rank_linear(*arguments)
    assert y.dtype == baseline.dtype
    assert_close(y.bfloat16(), reference.low_rank_linear(*doubled(arguments)), baseline.bfloat16())
    y.sum().backward()
    assert x.grad.dtype == down.grad.dtype == torch.float32


@pytest.mark.parametrize("requires_grad", [False, True])
def test_compiles_whole_for_any_number_of_tokens(requires_grad: bool, device: str) -> None:
    _, down, up, bias, activation, _ = FULL.tensors(torch.float32, device, requires_grad)
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: list) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    def layer(x: Tensor) -> Tensor:
        return op(x, down, up, bias, activation, x.new_ones(*x.shape[:-1], FULL.N))

    recorded = torch.compile(layer, fullgraph=True, dynamic=True, backend=backend)
    inductor = torch.compile(layer, fullgraph=True, dynamic=True)
    for M in (2, 5, 17):
        x = torch.randn(M, FULL.K, device=device, requires_grad=requires_grad)
        expected = layer(x)
        recorded(x)
        assert_close(inductor(x), expected)
        if requires_grad:
            assert_close(torch.autograd.grad(inductor(x).sum(), x)[0], torch.autograd.grad(expected.sum(), x)[0])
    assert len(graphs) == 1


def test_c_plus_plus_runs_where_it_should(on_cpp: bool) -> None:
    """Guards the two runs of this file against testing the same implementation twice."""
    assert torch._C._dispatch_has_kernel_for_dispatch_key("shrank::low_rank_linear", "CPU") == on_cpp
