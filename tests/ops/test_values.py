"""What the ops compute: values, memory formats and rounding, on every implementation there is."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from shrank.ops import reference
from tests.common.conv_cases import ConvCase, is_last
from tests.common.ops import (
    CONV_OP,
    DTYPES,
    EACH_OP,
    GATED_OP,
    LINEAR_OP,
    PIVOTED_OP,
    doubled,
    each_case,
    each_format,
    is_floating,
)
from tests.common.tolerances import assert_close

LINEAR_FULL, CONV_FULL = LINEAR_OP.full["rows"], CONV_OP.full["channels_last"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_case(lambda tested: tested.values)
def test_values_and_memory_format(tested, case, dtype: torch.dtype, device: str) -> None:
    arguments = case.tensors(dtype, device)
    y, (_, *kept) = tested.op(*arguments), tested.op_train(*arguments)
    assert y.shape == case.output and y.dtype == dtype and [h.shape for h in kept] == case.kept
    tested.assert_as_good_as_torch(y, arguments)
    for output in (y, *kept):
        assert case.is_laid_out(output, arguments[0])


@each_format()
def test_inputs_stay_and_outputs_are_new(tested, full, device: str) -> None:
    plain = replace(full, activation="none")
    for case in [full, plain, *([replace(plain, residual=False)] if tested.definition.takes_residual else [])]:
        arguments = case.tensors(torch.float32, device)
        before = [a.clone() if isinstance(a, Tensor) else a for a in arguments]
        outputs = [tested.op(*arguments), *tested.op_train(*arguments)]
        for a, b in zip(arguments, before, strict=True):
            assert torch.equal(a, b) if isinstance(a, Tensor) else a == b
        addresses = [t.data_ptr() for t in [*arguments, *outputs] if isinstance(t, Tensor) and t.numel()]
        assert len(set(addresses)) == len(addresses)


@pytest.mark.parametrize("N", [40, 37])
def test_strides_of_rows_do_not_matter(N: int, device: str) -> None:
    op = LINEAR_OP.op
    x, down, up, bias, activation, residual = replace(LINEAR_FULL, N=N).tensors(torch.float32, device)
    strided = (
        x.transpose(0, 1).contiguous().transpose(0, 1),
        down.T.contiguous().T,
        up.repeat(1, 2)[:, ::2],
        bias.repeat_interleave(2)[::2],
        activation,
        residual.transpose(0, 1).contiguous().transpose(0, 1),
    )
    y = op(*strided)
    assert y.is_contiguous()
    LINEAR_OP.assert_as_good_as_torch(y, strided)
    offset = torch.cat([residual.flatten()[:1], residual.flatten()])[1:].view_as(residual)  # not 16-byte aligned
    assert_close(op(x, down, up, bias, activation, offset), op(x, down, up, bias, activation, residual))
    expanded = (x, down, up, bias[:1].expand(N), activation, residual[:, :1].expand_as(residual))
    LINEAR_OP.assert_as_good_as_torch(op(*expanded), expanded)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strides_of_images_do_not_matter(dtype: torch.dtype, device: str) -> None:
    op, check = CONV_OP.op, CONV_OP.assert_as_good_as_torch
    x, down, up, bias, *rest, residual = CONV_FULL.tensors(dtype, device)
    for format_of_down in (torch.contiguous_format, torch.channels_last):
        strided = (
            x.transpose(2, 3).contiguous().transpose(2, 3),
            down.to(memory_format=format_of_down),
            up.repeat(1, 2, 1, 1)[:, ::2],
            bias.repeat_interleave(2)[::2],
            *rest,
            residual.repeat(1, 1, 1, 2)[..., ::2][..., : residual.size(-1)],
        )
        y = op(*strided)
        assert y.is_contiguous()
        check(y, strided)
        mixed = (x, strided[1], up, bias, *rest, residual.contiguous())
        check(op(*mixed), mixed)
    flat = torch.cat([x.movedim(1, -1).flatten()[:1], x.movedim(1, -1).flatten()])[1:]  # not 16-byte aligned
    offset = flat.view(x.movedim(1, -1).shape).movedim(-1, 1)
    assert is_last(offset)
    check(op(offset, down, up, bias, *rest, residual), (x, down, up, bias, *rest, residual))


def test_where_x_may_be_read_either_way_the_weights_decide(device: str) -> None:
    x, down, up, bias, *rest = ConvCase((8, 1), (3, 1), 1, 8, 8).tensors(torch.float32, device)
    assert x.is_contiguous() and is_last(x)
    assert CONV_OP.op(x, down, up, bias, *rest).is_contiguous()
    x, down, up, bias, *rest = ConvCase((1, 1), (3, 3), 4, 8, 8, padding=(2, 2)).tensors(torch.float32, device)
    y = CONV_OP.op(x, down.to(memory_format=torch.channels_last), up, bias, *rest)
    assert is_last(y) and not y.is_contiguous()


def one_number(tested, x: Tensor, activation: str, residual: Tensor | None = None) -> tuple:
    """The arguments that pass a single number x through both factors."""
    d, between = (1, ([1], [0], [1], 1, 1)) if tested is CONV_OP else (0, ())
    one = torch.ones(1, 1, *(1,) * d, device=x.device, dtype=x.dtype)
    if tested is GATED_OP:
        return x.view_as(one), one, one, None, one, one, *[None] * 5, activation
    if tested is PIVOTED_OP:
        order = torch.zeros(1, device=x.device, dtype=torch.int32)  # of two numbers, PyTorch's gelu of infinity is NaN
        end = None if residual is None else residual.view_as(one)
        return x.view_as(one), one, one[:0], None, None, order, activation, end
    return x.view_as(one), one, one, None, *between, activation, None if residual is None else residual.view_as(one)


@EACH_OP
@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_non_finite_values_as_in_torch(tested, activation: str, device: str) -> None:
    values = torch.tensor([0.0, -0.0, 1e30, -1e30, float("inf"), -float("inf"), float("nan"), 1e-40], device=device)
    for value in values:
        arguments = one_number(tested, value, activation)
        torch.testing.assert_close(tested.op(*arguments), tested.reference(*arguments), equal_nan=True)


@EACH_OP
def test_fp16_overflows_to_infinity(tested, device: str) -> None:
    big = torch.tensor(60000.0, dtype=torch.float16, device=device)  # plus or times itself
    assert tested.op(*one_number(tested, big, "none", big)).isinf().all()


@each_format()
def test_deterministic(tested, full, device: str) -> None:
    arguments = full.tensors(torch.float32, device)
    assert torch.equal(tested.op(*arguments), tested.op(*arguments))


@each_format()
def test_training_and_inference_agree_to_the_bit(tested, full, device: str) -> None:
    for activation in reference.ACTIVATIONS:
        case = replace(full, activation=activation)
        y = tested.op(*case.tensors(torch.bfloat16, device))
        assert torch.equal(y, tested.op(*case.tensors(torch.bfloat16, device, requires_grad=True)))
        with torch.inference_mode():
            assert torch.equal(y, tested.op(*case.tensors(torch.bfloat16, device)))


@each_format()
@pytest.mark.parametrize("last", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(tested, full, last: torch.dtype, device: str) -> None:
    """last: the dtype of the last tensor, which is the residual where there is one."""
    arguments = list(full.tensors(torch.float32, device, requires_grad=True))
    at = max(i for i, each in enumerate(arguments) if is_floating(each))
    arguments[at] = arguments[at].to(last)
    with torch.autocast(device, torch.bfloat16):
        y = tested.op(*arguments)
        baseline = tested.reference(*arguments)
    assert y.dtype == baseline.dtype
    assert_close(y.bfloat16(), tested.reference(*doubled(arguments)), baseline.bfloat16())
    y.sum().backward()
    assert arguments[0].grad.dtype == arguments[1].grad.dtype == torch.float32


@EACH_OP
def test_c_plus_plus_runs_where_it_should(tested, on_cpp: bool) -> None:
    """Guards the runs of these files against testing the same implementation twice."""
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"shrank::{tested.definition.name}", "CPU") == on_cpp
