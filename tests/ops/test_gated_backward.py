"""The op that gradients of gated layers pass on their way back: its law, its values and what torch expects of it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

from shrank.ops import gated_backward, reference
from tests.common.ops import DTYPES, doubled, tensors_of
from tests.common.tolerances import assert_close

NAMES = ("grad", "gate_h", "gate_up", "gate_bias", "h", "up", "bias", "activation", "needs_gate_bias", "needs_bias")


def arguments(
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    M: tuple[int, ...] = (3, 5),
    N: int = 40,
    S: int = 8,
    R: int = 16,
    activation: str = "silu",
    biases: tuple[bool, bool] = (True, True),
) -> tuple:
    """biases: whether the gate and the value have one, whose gradient is needed then."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)

    given = [draw(*M, N)]
    for rank, bias in zip((S, R), biases, strict=True):
        given += [draw(*M, rank), draw(N, rank), draw(N) if bias else None]
    return (*given, activation, *biases)


def op(given: tuple) -> tuple[Tensor, ...]:
    return torch.ops.shrank.gated_backward(*given)


def assert_as_good_as_torch(found: tuple[Tensor, ...], given: tuple) -> None:
    exact, plain = reference.gated_backward(*doubled(given)), reference.gated_backward(*given)
    for ours, right, theirs in zip(found, exact, plain, strict=True):
        if right is None:
            assert ours.numel() == 0
        else:
            assert_close(ours, right, theirs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
@pytest.mark.parametrize(
    "sizes", [((3, 5), 40, 8, 16), ((), 16, 4, 4), ((0,), 16, 4, 8), ((130,), 37, 9, 3), ((65,), 264, 72, 40)]
)
def test_values(dtype: torch.dtype, activation: str, sizes: tuple, device: str) -> None:
    for biases in ((True, True), (False, False), (True, False), (False, True)):
        given = arguments(dtype, device, *sizes, activation, biases)
        before = [each.clone() for each in tensors_of(given)]
        found = op(given)
        for gradient in found[:2]:
            assert gradient.is_contiguous() and gradient.shape == given[0].shape
        assert all(each.dtype == dtype for each in found)
        assert_as_good_as_torch(found, given)
        assert all(map(torch.equal, before, tensors_of(given))), "inputs stay"


def test_strides_do_not_matter(device: str) -> None:
    grad, gate_h, gate_up, gate_bias, h, up, *rest = arguments(torch.bfloat16, device, (6, 4))
    strided = (
        grad[0].expand_as(grad),
        gate_h.transpose(0, 1).contiguous().transpose(0, 1),
        gate_up.T.contiguous().T,
        gate_bias.repeat_interleave(2)[::2],
        h,
        up.repeat(1, 2)[:, ::2],
        *rest,
    )
    assert_as_good_as_torch(op(strided), strided)


def test_the_same_bits_each_time(device: str) -> None:
    given = arguments(torch.float16, device, (700,), 72, 24, 40)
    assert all(map(torch.equal, op(given), op(given)))


BAD = [
    ({"grad": ()}, "grad is 0-dimensional"),
    ({"grad": (3, 5, 39)}, "gate_up is"),
    ({"grad": (15, 40)}, "gate_h is"),
    ({"gate_h": (3, 4, 8)}, "gate_h is"),
    ({"gate_h": (3, 5, 7)}, "gate_up is"),
    ({"gate_up": (40,)}, "gate_up is"),
    ({"gate_bias": (39,)}, "gate_bias is"),
    ({"h": (3, 4, 16)}, " h is"),
    ({"up": (39, 16)}, " up is"),
    ({"bias": (39,)}, " bias is"),
    ({"activation": "swish"}, "activation is 'swish'"),
    ({"gate_h": torch.float64}, "gate_h is"),
    ({"up": torch.bfloat16}, " up is"),
    ({"grad": torch.int64}, "grad is|gate_h is"),
    ({"gate_bias": "meta"}, "gate_bias is on"),
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
            made[name] = torch.zeros(change, device=device)
        else:
            made[name] = made[name].to(change)
    if how == "fake":
        with FakeTensorMode() as mode:
            made = {k: mode.from_tensor(v) if isinstance(v, Tensor) else v for k, v in made.items()}
    with pytest.raises(RuntimeError, match=named) as error:
        gated_backward.check_gated_backward(**made) if how == "check" else torch.ops.shrank.gated_backward(**made)
    assert "shrank::gated_backward: " in str(error.value) and "wanted" in str(error.value)


def test_the_schema_is_the_one_that_python_gives() -> None:
    schema = torch._C.parse_schema(f"shrank::{gated_backward.NAME}{gated_backward.SCHEMA}")
    assert torch.ops.shrank.gated_backward.default._schema == schema


@pytest.mark.parametrize("biases", [(False, True), (True, False)])
def test_opcheck(biases: tuple[bool, bool], device: str) -> None:
    opcheck(torch.ops.shrank.gated_backward.default, arguments(device=device, biases=biases))
