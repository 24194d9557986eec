"""The op that gradients of pivoted layers pass on their way back: its law, its values and what torch expects of it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

from shrank.ops import pivoted_backward, pivoted_reference, reference
from tests.common.ops import DTYPES, doubled, ops_of, tensors_of
from tests.common.pivoted_cases import PivotedCase, places
from tests.common.tolerances import assert_close

NAMES = ("grad", "h", "up", "bias", "pivot_bias", "order", "activation", "needs_bias")
ACTIVATIONS = [name for name in reference.ACTIVATIONS if name != "none"]


def arguments(
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    M: tuple[int, ...] = (3, 5),
    N: int = 40,
    R: int = 8,
    activation: str = "silu",
    biases: tuple[bool, bool] = (True, True),
    order: str = "mixed",
    needs_bias: bool = True,
) -> tuple:
    """biases: whether the others and the pivots have one."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)

    of_each = [draw(size) if there else None for size, there in zip((N - R, R), biases, strict=True)]
    return (
        draw(*M, N),
        draw(*M, R),
        draw(N - R, R),
        *of_each,
        places(N, R, order, device),
        activation,
        needs_bias,
    )


def op(given: tuple) -> tuple[Tensor, Tensor]:
    return torch.ops.shrank.pivoted_backward(*given)


def assert_as_good_as_torch(found: tuple[Tensor, Tensor], given: tuple) -> None:
    exact, plain = pivoted_reference.pivoted_backward(*doubled(given)), pivoted_reference.pivoted_backward(*given)
    assert_close(found[0], exact.z, plain.z)
    if exact.bias is None:
        assert found[1].numel() == 0
    else:
        assert_close(found[1], exact.bias, plain.bias)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    "sizes",
    [
        ((3, 5), 40, 8),
        ((), 16, 4),
        ((0,), 16, 4),
        ((130,), 37, 9),
        ((65,), 264, 72),
        ((7,), 200, 136),
        ((9,), 64, 64),
        ((4,), 8, 0),
    ],
)
def test_values(dtype: torch.dtype, activation: str, sizes: tuple, device: str) -> None:
    for biases, order in (
        ((True, True), "mixed"),
        ((False, False), "first"),
        ((True, False), "last"),
        ((False, True), "mixed"),
    ):
        given = arguments(dtype, device, *sizes, activation, biases, order, any(biases))
        before = [each.clone() for each in tensors_of(given)]
        found = op(given)
        assert found[0].is_contiguous() and found[0].shape == given[0].shape
        assert all(each.dtype == dtype for each in found)
        assert_as_good_as_torch(found, given)
        assert all(map(torch.equal, before, tensors_of(given))), "inputs stay"


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_it_is_the_derivative_of_the_end(activation: str, device: str) -> None:
    """In the order of outputs, biases too: not in that of places."""
    grad, h, up, bias, pivot_bias, order, *_ = arguments(torch.float64, device, (7,), activation=activation)
    z = torch.cat((h + pivot_bias, h @ up.T + bias), 1)[:, order.long()].requires_grad_()
    (wanted,) = torch.autograd.grad(reference.ACTIVATIONS[activation](z), z, grad)
    dz, dbias = op((grad, h, up, bias, pivot_bias, order, activation, True))
    assert_close(dz, wanted)
    assert_close(dbias, wanted.sum(0))


def test_strides_do_not_matter(device: str) -> None:
    grad, h, up, bias, pivot_bias, order, *rest = arguments(torch.bfloat16, device, (6, 4))
    strided = (
        grad[0].expand_as(grad),
        h.transpose(0, 1).contiguous().transpose(0, 1),
        up.T.contiguous().T,
        bias.repeat_interleave(2)[::2],
        pivot_bias[:1].expand_as(pivot_bias),
        order.repeat_interleave(2)[::2],
        *rest,
    )
    assert_as_good_as_torch(op(strided), strided)


def test_the_same_bits_each_time(device: str) -> None:
    given = arguments(torch.float16, device, (700,), 112, 40)
    assert all(map(torch.equal, op(given), op(given)))


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_not_finite_stays_where_it_belongs(dtype: torch.dtype, value: float, device: str) -> None:
    """In one pivot and in the others, of the row in which h has it."""
    given = arguments(dtype, device, (70,), 200, 136, "gelu")
    h, order = given[1].clone(), given[5]
    h[3, 40] = value
    hurt, whole = op((given[0], h, *given[2:])), op(given)
    same = (order != 40) & (order < 136)
    assert torch.equal(hurt[0][3, same], whole[0][3, same])
    assert torch.equal(hurt[0][4:], whole[0][4:]) and torch.equal(hurt[0][:3], whole[0][:3])
    assert torch.equal(hurt[1][same], whole[1][same])


@pytest.mark.parametrize("bias", ["both", "pivots", "others", "none"])
@pytest.mark.parametrize("activation", ["none", "gelu"])
def test_the_way_back_of_the_layer_passes_it_where_there_is_an_activation(
    activation: str, bias: str, device: str
) -> None:
    given = PivotedCase((5,), 24, 40, 8, bias, activation).tensors(torch.float32, device, requires_grad=True)
    y = torch.ops.shrank.low_rank_pivoted(*given)
    passed = ops_of(lambda: y.sum().backward())
    assert passed == ([] if activation == "none" else [pivoted_backward.NAME])


BAD = [
    ({"grad": (3, 5, 39)}, "grad is"),
    ({"grad": (15, 40)}, "grad is"),
    ({"grad": ()}, "grad is"),
    ({"h": ()}, "h is 0-dimensional"),
    ({"h": (3, 5, 7)}, "up is"),
    ({"up": (32,)}, "up is"),
    ({"up": (31, 8)}, "grad is|bias is"),
    ({"bias": (31,)}, " bias is"),
    ({"bias": (40,)}, " bias is"),
    ({"pivot_bias": (7,)}, "pivot_bias is"),
    ({"pivot_bias": (1, 8)}, "pivot_bias is"),
    ({"order": (8,)}, "order is"),
    ({"order": (1, 40)}, "order is"),
    ({"order": torch.int64}, "order is"),
    ({"order": "meta"}, "order is on"),
    ({"activation": "none"}, "activation is 'none'"),
    ({"activation": "swish"}, "activation is 'swish'"),
    ({"grad": torch.float64}, "grad is"),
    ({"up": torch.bfloat16}, "up is"),
    ({"pivot_bias": torch.float16}, "pivot_bias is"),
    ({"h": torch.int64}, "h is|grad is"),
    ({"bias": "meta"}, " bias is on"),
]


@pytest.mark.parametrize("how", ["op", "fake", "check"])
@pytest.mark.parametrize(("changes", "named"), BAD, ids=str)
def test_a_bad_call_is_refused_by_name(changes: dict, named: str, how: str, device: str) -> None:
    made = dict(zip(NAMES, arguments(device=device), strict=True))
    for name, change in changes.items():
        if name == "activation":
            made[name] = change
        elif isinstance(change, tuple):
            made[name] = torch.zeros(change, device=device, dtype=made[name].dtype)
        else:
            made[name] = made[name].to(change)
    if how == "fake":
        with FakeTensorMode() as mode:
            made = {k: mode.from_tensor(v) if isinstance(v, Tensor) else v for k, v in made.items()}
    with pytest.raises(RuntimeError, match=named) as error:
        pivoted_backward.check_pivoted_backward(**made) if how == "check" else torch.ops.shrank.pivoted_backward(**made)
    assert "shrank::pivoted_backward: " in str(error.value) and "wanted" in str(error.value)


def test_the_schema_is_the_one_that_python_gives() -> None:
    schema = torch._C.parse_schema(f"shrank::{pivoted_backward.NAME}{pivoted_backward.SCHEMA}")
    assert torch.ops.shrank.pivoted_backward.default._schema == schema


@pytest.mark.parametrize("needs_bias", [False, True])
@pytest.mark.parametrize("biases", [(False, True), (True, False)])
def test_opcheck(biases: tuple[bool, bool], needs_bias: bool, device: str) -> None:
    opcheck(torch.ops.shrank.pivoted_backward.default, arguments(device=device, biases=biases, needs_bias=needs_bias))
