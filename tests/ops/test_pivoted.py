"""What the op of pivoted storage is beside a plain low-rank layer: the same matrix, and outputs that h is."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import shrank
from shrank.linalg import Factors, pivoted
from shrank.ops import pivoted_reference, reference
from tests.common.ops import DTYPES, PIVOTED_OP, doubled, floating_of
from tests.common.pivoted_cases import ENDS, SHAPES, PivotedCase
from tests.common.tolerances import assert_close

FULL = PIVOTED_OP.full["rows"]


def with_plain_factors(arguments: tuple) -> tuple:
    """The arguments of low_rank_linear for the same dense matrix and bias: ones and zeros in the pivots' rows of up."""
    x, down, up, bias, pivot_bias, order, activation, residual = arguments
    eye = torch.eye(up.size(1), dtype=up.dtype, device=up.device)
    biases = [up.new_zeros(len(own)) if each is None else each for each, own in ((pivot_bias, eye), (bias, up))]
    return (
        x,
        down,
        torch.cat((eye, up)).index_select(0, order),
        torch.cat(biases).index_select(0, order),
        activation,
        residual,
    )


@pytest.mark.parametrize("case", ENDS[::7] + SHAPES, ids=str)
@pytest.mark.parametrize("order", ["mixed", "first", "last"])
def test_the_values_and_gradients_of_the_same_matrix(case: PivotedCase, order: str, device: str) -> None:
    arguments = replace(case, order=order).tensors(torch.float64, device, requires_grad=True)
    plain = with_plain_factors(arguments)
    y, wanted = PIVOTED_OP.op(*arguments), torch.ops.shrank.low_rank_linear(*plain)
    assert_close(y, wanted)
    grad = torch.randn(case.output, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(device)
    leaves = floating_of(arguments)
    of_y, of_wanted = (torch.autograd.grad(each, leaves, grad, materialize_grads=True) for each in (y, wanted))
    for one, other in zip(of_y, of_wanted, strict=True):
        assert_close(one, other)


def test_it_computes_what_pivoted_storage_holds(device: str) -> None:
    """A matrix of low rank, brought into this storage."""
    generator = torch.Generator().manual_seed(0)
    down, up, x = (torch.randn(size, generator=generator, dtype=torch.float64) for size in ((8, 24), (40, 8), (5, 24)))
    found = pivoted(Factors(down[None], up[None], 0.0, 1.0))
    factors = [each.to(device) for each in (found.down[0], found.up[0], found.order)]
    assert_close(shrank.low_rank_pivoted(x.to(device), *factors).cpu(), x @ down.T @ up.T)


def test_the_function_takes_the_order_first_and_all_else_may_be_missing(device: str) -> None:
    x, down, up, bias, pivot_bias, order, activation, residual = FULL.tensors(torch.float64, device)
    y = shrank.low_rank_pivoted(x, down, up, order)
    assert_close(y, pivoted_reference.low_rank_pivoted(x, down, up, None, None, order))
    y = shrank.low_rank_pivoted(x, down, up, order, bias, pivot_bias, activation, residual)
    assert_close(y, PIVOTED_OP.reference(x, down, up, bias, pivot_bias, order, activation, residual))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strides_do_not_matter(dtype: torch.dtype, device: str) -> None:
    x, down, up, bias, pivot_bias, order, activation, residual = FULL.tensors(dtype, device)
    strided = (
        x.transpose(0, 1).contiguous().transpose(0, 1),
        down.T.contiguous().T,
        up.repeat(1, 2)[:, ::2],
        bias.repeat_interleave(2)[::2],
        torch.cat((pivot_bias[:1], pivot_bias))[1:],  # not 16-byte aligned
        order.repeat_interleave(2)[::2],
        activation,
        residual.transpose(0, 1).contiguous().transpose(0, 1),
    )
    for y in (PIVOTED_OP.op(*strided), PIVOTED_OP.op_train(*strided)[0]):
        assert y.is_contiguous()
        PIVOTED_OP.assert_as_good_as_torch(y, strided)
    offset = (*strided[:5], torch.cat((order[:1], order))[1:], *strided[6:])
    assert torch.equal(PIVOTED_OP.op(*offset), PIVOTED_OP.op(*strided))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["none", "gelu"])
def test_a_pivot_is_as_exact_as_h_itself(activation: str, dtype: torch.dtype, device: str) -> None:
    """Bit by bit where nothing is added: it passes by up."""
    case = PivotedCase((5,), 24, 40, 8, "none", activation)
    arguments = case.tensors(dtype, device)
    y, h = PIVOTED_OP.op_train(*arguments)
    own = y.index_select(-1, arguments[5].argsort()[: case.R])
    if activation == "none":
        assert torch.equal(own, h)
    assert_close(own, reference.ACTIVATIONS[activation](h.double()), reference.ACTIVATIONS[activation](h))


@pytest.mark.parametrize("how", ["reference", "op"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("R", [8, 24, 136])
def test_what_is_not_finite_stays_where_it_belongs(
    R: int, value: float, dtype: torch.dtype, how: str, device: str
) -> None:
    """In one pivot and in the others, which all depend on it. A product with ones and zeros would spread it."""
    x, down, *rest = PivotedCase((5,), 40, R + 24, R, "both", "none", True).tensors(dtype, device)
    order = rest[3]
    x, hurt = x.abs(), down.clone()
    hurt[R // 2, 0] = value
    compute = getattr(PIVOTED_OP, how)
    y, whole = compute(x, hurt, *rest), compute(x, down, *rest)
    touched = (order == R // 2) | (order >= R)
    assert not y[:, touched].isfinite().any()
    assert_close(y[:, ~touched], PIVOTED_OP.reference(*doubled((x, down, *rest)))[:, ~touched], whole[:, ~touched])


@pytest.mark.parametrize("bias", ["both", "pivots", "others", "none"])
def test_h_is_without_the_bias_of_pivots(bias: str, device: str) -> None:
    arguments = PivotedCase((5,), 24, 40, 8, bias, "relu").tensors(torch.float64, device)
    _, h = PIVOTED_OP.op_train(*arguments)
    assert_close(h, arguments[0] @ arguments[1].T)


def test_where_all_outputs_are_pivots_the_weight_is_down(device: str) -> None:
    arguments = PivotedCase((5,), 24, 16, 16, "both", "none").tensors(torch.float64, device, requires_grad=True)
    x, down, up, _, pivot_bias, order, *_ = arguments
    y = PIVOTED_OP.op(*arguments)
    assert_close(y, (x @ down.T + pivot_bias)[:, order.long()])
    y.sum().backward()
    assert up.grad.shape == (0, 16) and torch.equal(pivot_bias.grad, torch.full_like(pivot_bias, 5))


def test_the_order_has_no_gradient_and_stays(device: str) -> None:
    arguments = FULL.tensors(torch.float32, device, requires_grad=True)
    order: Tensor = arguments[5]
    before = order.clone()
    PIVOTED_OP.op(*arguments).sum().backward()
    assert order.grad is None and torch.equal(order, before)
