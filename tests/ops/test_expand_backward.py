"""The op that gradients pass on their way back: its law, its values and what torch expects of it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

from shrank.ops import expand_backward, reference
from tests.common.ops import DTYPES, doubled, tensors_of
from tests.common.tolerances import assert_close

ACTIVATIONS = [name for name in reference.ACTIVATIONS if name != "none"]


def arguments(
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    M: tuple[int, ...] = (3, 5),
    N: int = 40,
    R: int = 8,
    activation: str = "gelu",
    bias: bool = True,
    needs_bias: bool = True,
) -> tuple:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)

    return draw(*M, N), draw(*M, R), draw(N, R), draw(N) if bias else None, activation, needs_bias


def op(given: tuple) -> tuple[Tensor, Tensor]:
    return torch.ops.shrank.expand_backward(*given)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("sizes", [((3, 5), 40, 8), ((), 16, 4), ((0,), 16, 4), ((130,), 37, 9), ((65,), 264, 72)])
def test_values(dtype: torch.dtype, activation: str, sizes: tuple, device: str) -> None:
    for bias, needs_bias in ((True, True), (False, False)):
        given = arguments(dtype, device, *sizes, activation, bias, needs_bias)
        before = [each.clone() for each in tensors_of(given)]
        dz, dbias = op(given)
        assert dz.is_contiguous() and dz.shape == given[0].shape and dz.dtype == dbias.dtype == dtype
        exact = reference.expand_backward(*doubled(given))
        plain = reference.expand_backward(*given)
        assert_close(dz, exact.z, plain.z)
        if needs_bias:
            assert_close(dbias, exact.bias, plain.bias)
        else:
            assert dbias.numel() == 0
        assert all(map(torch.equal, before, tensors_of(given))), "inputs stay"


def test_strides_do_not_matter(device: str) -> None:
    grad, h, up, bias, *rest = arguments(torch.bfloat16, device, (6, 4))
    strided = (
        grad[0].expand_as(grad),
        h.transpose(0, 1).contiguous().transpose(0, 1),
        up.T.contiguous().T,
        bias,
        *rest,
    )
    exact = reference.expand_backward(*doubled(strided))
    for found, wanted, plain in zip(op(strided), exact, reference.expand_backward(*strided), strict=True):
        assert_close(found, wanted, plain)


def test_the_same_bits_each_time(device: str) -> None:
    given = arguments(torch.float16, device, (700,), 72, 24)
    first, second = op(given), op(given)
    assert all(map(torch.equal, first, second))


BAD = [
    ({"grad": (3, 5, 39)}, "grad is"),
    ({"grad": (15, 40)}, "grad is"),
    ({"h": ()}, "h is 0-dimensional"),
    ({"h": (3, 5, 7)}, "up is"),
    ({"up": (40,)}, "up is"),
    ({"bias": (39,)}, "bias is"),
    ({"activation": "none"}, "activation is 'none'"),
    ({"activation": "swish"}, "activation is 'swish'"),
    ({"grad": torch.float64}, "grad is"),
    ({"up": torch.bfloat16}, "up is"),
    ({"h": torch.int64}, "h is|grad is"),
    ({"bias": "meta"}, "bias is on"),
]


@pytest.mark.parametrize("how", ["op", "fake", "check"])
@pytest.mark.parametrize(("changes", "named"), BAD, ids=str)
def test_a_bad_call_is_refused_by_name(changes: dict, named: str, how: str, device: str) -> None:
    made = dict(zip(("grad", "h", "up", "bias", "activation", "needs_bias"), arguments(device=device), strict=True))
    for name, change in changes.items():
        if name == "activation":
            made[name] = change
        elif isinstance(change, tuple):
            made[name] = torch.zeros(change, device=device)
        else:
            made[name] = made[name].to(change)
    if how == "fake":
        with FakeTensorMode() as mode:
            made = {k: mode.from_tensor(v) if isinstance(v, Tensor) else v for k, v in made.items()}
    with pytest.raises(RuntimeError, match=named) as error:
        expand_backward.check_expand_backward(**made) if how == "check" else torch.ops.shrank.expand_backward(**made)
    assert "shrank::expand_backward: " in str(error.value) and "wanted" in str(error.value)


def test_the_schema_is_the_one_that_python_gives() -> None:
    schema = torch._C.parse_schema(f"shrank::{expand_backward.NAME}{expand_backward.SCHEMA}")
    assert torch.ops.shrank.expand_backward.default._schema == schema


@pytest.mark.parametrize("needs_bias", [False, True])
def test_opcheck(needs_bias: bool, device: str) -> None:
    opcheck(torch.ops.shrank.expand_backward.default, arguments(device=device, needs_bias=needs_bias))
