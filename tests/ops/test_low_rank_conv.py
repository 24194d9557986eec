"""shrank::low_rank_conv: values, gradients, and what torch expects of an op; on every implementation there is."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.export import Dim, export, load, save
from torch.library import opcheck

from shrank.ops import reference
from shrank.ops.reference import Window
from tests.common.cases import DTYPES
from tests.common.conv_cases import ENDS, SHAPES, ConvCase
from tests.common.tolerances import assert_close

op = torch.ops.shrank.low_rank_conv
op_train = torch.ops.shrank.low_rank_conv_train
FULL = ConvCase((6, 5), (3, 2), 16, 24, 8, padding=(1, 0, 0, 1), activation="gelu", residual=True, last=True)
FIRST = replace(FULL, last=False)
BOTH = pytest.mark.parametrize("full", [FIRST, FULL], ids=["channels_first", "channels_last"])


def in_reference(x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None, *rest) -> Tensor:
    return reference.low_rank_conv(x, down, up, bias, Window(*rest[:5]), *rest[5:])


def doubled(arguments: tuple) -> tuple:
    return tuple(a.detach().double().requires_grad_(a.requires_grad) if isinstance(a, Tensor) else a for a in arguments)


def is_last(tensor: Tensor) -> bool:
    return tensor.movedim(1, -1).is_contiguous()


def assert_as_good_as_torch(actual: Tensor, arguments: tuple) -> None:
    assert_close(actual, in_reference(*doubled(arguments)), in_reference(*arguments))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ENDS + SHAPES, ids=str)
def test_values_and_memory_format(case: ConvCase, dtype: torch.dtype, device: str) -> None:
    arguments = case.tensors(dtype, device)
    y, (_, h, z) = op(*arguments), op_train(*arguments)
    assert y.dtype == dtype
    assert_as_good_as_torch(y, arguments)
    for output in (y, h, z)[:2 if case.activation == "none" else 3]:
        ambiguous = arguments[0].is_contiguous() and is_last(arguments[0])
        assert is_last(output) if case.last and not ambiguous else output.is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ENDS[::3] + SHAPES, ids=str)
def test_gradients(case: ConvCase, dtype: torch.dtype, device: str) -> None:
    arguments = case.tensors(dtype, device, requires_grad=True)
    inputs = [a for a in arguments if isinstance(a, Tensor)]
    grad = torch.randn(op(*arguments).shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)

    def gradients(call, arguments: tuple, grad: Tensor) -> tuple:
        return torch.autograd.grad(call(*arguments), [a for a in arguments if isinstance(a, Tensor)], grad)

    exact = gradients(in_reference, doubled(arguments), grad.double())
    baseline = gradients(in_reference, arguments, grad)
    for tensor, found, wanted, torchs in zip(inputs, gradients(op, arguments, grad), exact, baseline, strict=True):
        assert found.dtype == tensor.dtype and found.shape == tensor.shape
        assert_close(found, wanted, torchs)


@BOTH
@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_gradcheck_twice(full: ConvCase, activation: str, device: str) -> None:
    case = replace(full, input=(3, 3), C=4, N=4, R=2, groups=2, activation=activation)
    arguments = case.tensors(torch.float64, device, requires_grad=True)
    assert torch.autograd.gradcheck(op, arguments)
    assert torch.autograd.gradgradcheck(op, arguments)


@BOTH
@pytest.mark.parametrize("wanted", range(5))
def test_only_the_gradients_that_are_wanted(full: ConvCase, wanted: int, device: str) -> None:
    arguments = list(full.tensors(torch.float64, device))
    where = [0, 1, 2, 3, 10][wanted]
    arguments[where].requires_grad_()
    op(*arguments).sum().backward()
    exact = [a.detach().clone().requires_grad_(a.requires_grad) if isinstance(a, Tensor) else a for a in arguments]
    in_reference(*exact).sum().backward()
    assert_close(arguments[where].grad, exact[where].grad)


@pytest.mark.parametrize(("activation", "saved"), [("none", 0), ("silu", 1)])
def test_h_is_saved_for_gradients_and_only_then(activation: str, saved: int, device: str) -> None:
    case = replace(FULL, activation=activation)
    shapes = []

    def pack(tensor: Tensor) -> Tensor:
        shapes.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = op(*case.tensors(torch.float32, device))
        assert shapes == []
        op(*case.tensors(torch.float32, device, requires_grad=True))
    assert shapes.count((case.B, case.R, *y.shape[2:])) == 1  # h
    assert shapes.count(tuple(y.shape)) == saved  # the pre-activation


@pytest.mark.parametrize("case", [FULL, FIRST, ConvCase((7,), (3,), 8, 5, 3, bias=False), replace(FULL, B=0),
                                  ConvCase((3, 4, 5), (2, 2, 2), 8, 8, 8, groups=4, activation="silu", last=True)],
                         ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(case: ConvCase, dtype: torch.dtype, device: str) -> None:
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {}  # compiled code rounds less often
    opcheck(op, case.tensors(dtype, device), **tolerance)
    opcheck(op, case.tensors(dtype, device, requires_grad=True), **tolerance)
    opcheck(op_train, case.tensors(dtype, device), **tolerance)


@BOTH
def test_inputs_stay_and_outputs_are_new(full: ConvCase, device: str) -> None:
    for case in [full, replace(full, activation="none"), replace(full, activation="none", residual=False)]:
        arguments = case.tensors(torch.float32, device)
        before = [a.clone() if isinstance(a, Tensor) else a for a in arguments]
        outputs = [op(*arguments), *op_train(*arguments)]
        for a, b in zip(arguments, before, strict=True):
            assert torch.equal(a, b) if isinstance(a, Tensor) else a == b
        addresses = [t.data_ptr() for t in [*arguments, *outputs] if isinstance(t, Tensor) and t.numel()]
        assert len(set(addresses)) == len(addresses)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strides_do_not_matter(dtype: torch.dtype, device: str) -> None:
    x, down, up, bias, *rest, residual = FULL.tensors(dtype, device)
    for format_of_down in (torch.contiguous_format, torch.channels_last):
        strided = (x.transpose(2, 3).contiguous().transpose(2, 3), down.to(memory_format=format_of_down),
                   up.repeat(1, 2, 1, 1)[:, ::2], bias.repeat_interleave(2)[::2], *rest,
                   residual.repeat(1, 1, 1, 2)[..., ::2][..., :residual.size(-1)])
        y = op(*strided)
        assert y.is_contiguous()
        assert_as_good_as_torch(y, strided)
        assert_as_good_as_torch(op(x, strided[1], up, bias, *rest, residual.contiguous()),
                                (x, strided[1], up, bias, *rest, residual.contiguous()))
    flat = torch.cat([x.movedim(1, -1).flatten()[:1], x.movedim(1, -1).flatten()])[1:]  # not 16-byte aligned
    offset = flat.view(x.movedim(1, -1).shape).movedim(-1, 1)
    assert is_last(offset)
    assert_as_good_as_torch(op(offset, down, up, bias, *rest, residual), (x, down, up, bias, *rest, residual))


def test_where_x_may_be_read_either_way_the_weights_decide(device: str) -> None:
    x, down, up, bias, *rest = ConvCase((8, 1), (3, 1), 1, 8, 8).tensors(torch.float32, device)
    assert x.is_contiguous() and is_last(x)
    assert op(x, down, up, bias, *rest).is_contiguous()
    x, down, up, bias, *rest = ConvCase((1, 1), (3, 3), 4, 8, 8, padding=(2, 2)).tensors(torch.float32, device)
    y = op(x, down.to(memory_format=torch.channels_last), up, bias, *rest)
    assert is_last(y) and not y.is_contiguous()


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_non_finite_values_as_in_torch(activation: str, device: str) -> None:
    values = torch.tensor([0.0, -0.0, 1e30, -1e30, float("inf"), -float("inf"), float("nan"), 1e-40], device=device)
    one = torch.ones(1, 1, 1, device=device)
    for value in values:
        arguments = (value.reshape(1, 1, 1), one, one, None, [1], [0], [1], 1, 1, activation, None)
        torch.testing.assert_close(op(*arguments), in_reference(*arguments), equal_nan=True)


def test_deterministic(device: str) -> None:
    arguments = FULL.tensors(torch.float32, device)
    assert torch.equal(op(*arguments), op(*arguments))


@BOTH
def test_training_and_inference_agree_to_the_bit(full: ConvCase, device: str) -> None:
    for activation in reference.ACTIVATIONS:
        case = replace(full, activation=activation)
        y = op(*case.tensors(torch.bfloat16, device))
        assert torch.equal(y, op(*case.tensors(torch.bfloat16, device, requires_grad=True)))
        with torch.inference_mode():
            assert torch.equal(y, op(*case.tensors(torch.bfloat16, device)))


@pytest.mark.parametrize("residual", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(residual: torch.dtype, device: str) -> None:
    *rest, r = FULL.tensors(torch.float32, device, requires_grad=True)
    arguments = (*rest, r.to(residual))
    with torch.autocast(device, torch.bfloat16):
        y = op(*arguments)
        baseline = in_reference(*arguments)
    assert y.dtype == baseline.dtype
    assert_close(y.bfloat16(), in_reference(*doubled(arguments)), baseline.bfloat16())
    y.sum().backward()
    assert arguments[0].grad.dtype == arguments[1].grad.dtype == torch.float32


@BOTH
@pytest.mark.parametrize("requires_grad", [False, True])
def test_compiles_whole_for_any_batch_and_image(full: ConvCase, requires_grad: bool, device: str) -> None:
    torch._dynamo.reset()  # it counts what it compiled of a function, whatever the parameters of the test
    _, *weights, _ = full.tensors(torch.float32, device, requires_grad)
    for weight in weights[:3]:
        torch._dynamo.mark_static(weight)  # as a module's parameters are
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: list) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    def layer(x: Tensor) -> Tensor:
        return op(x, *weights, None)

    recorded = torch.compile(layer, fullgraph=True, dynamic=True, backend=backend)
    inductor = torch.compile(layer, fullgraph=True, dynamic=True)
    for B, *size in ((4, 11, 13), (5, 9, 7), (7, 10, 19)):  # no size of the weights: Dynamo would guard that equality
        x = torch.randn(B, full.C, *size, device=device)
        x = (x.to(memory_format=torch.channels_last) if full.last else x).requires_grad_(requires_grad)
        expected = layer(x)
        recorded(x)
        assert_close(inductor(x), expected)
        assert inductor(x).stride() == expected.stride()
        if requires_grad:
            assert_close(torch.autograd.grad(inductor(x).sum(), x)[0], torch.autograd.grad(expected.sum(), x)[0])
    assert len(graphs) == 1


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        _, down, up, bias, *_ = FULL.tensors(torch.float32, "cpu")
        self.down, self.up, self.bias = (torch.nn.Parameter(t) for t in (down, up, bias))

    def forward(self, x: Tensor) -> Tensor:
        return op(x, self.down, self.up, self.bias, *FULL.window, "silu").relu()


def test_export_keeps_the_op() -> None:
    net = Net().eval()
    program = export(net, (torch.randn(2, FULL.C, 6, 5),), dynamic_shapes=({0: Dim("B")},))
    assert op.default in {node.target for node in program.graph.nodes}
    buffer = io.BytesIO()
    save(program, buffer)
    buffer.seek(0)
    x = torch.randn(5, FULL.C, 6, 5)
    assert_close(load(buffer).module()(x), net(x))


def test_c_plus_plus_runs_where_it_should(on_cpp: bool) -> None:
    """Guards the two runs of this file against testing the same implementation twice."""
    assert torch._C._dispatch_has_kernel_for_dispatch_key("shrank::low_rank_conv", "CPU") == on_cpp
