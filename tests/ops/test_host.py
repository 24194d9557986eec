"""The kernels for a CPU: that they compute what PyTorch's calls do, of any size, and refuse what does not fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from shrank.ops import host, pivoted_reference, reference
from tests.common import gated_cases, linear_cases, pivoted_cases
from tests.common.gated_cases import GatedCase
from tests.common.linear_cases import LinearCase
from tests.common.ops import needs_host_kernels
from tests.common.pivoted_cases import PivotedCase
from tests.common.tolerances import assert_close

pytestmark = needs_host_kernels
# Every remainder of the rows of x by two, of those of a weight by four, and of its columns by eight.
RESIDUES = [LinearCase((M,), 16 + K, 12 + K % 4, 8 + K) for M in (1, 2, 3, 5) for K in range(8)]
THREADS = LinearCase((3,), 600, 1500, 200, True, "silu", True)  # so large that threads share it out
DTYPES = list(host.MOST_ROWS)


def doubled(arguments: tuple) -> list:
    return [each.double() if isinstance(each, Tensor) and each.is_floating_point() else each for each in arguments]


def is_as_good(found: Tensor, arguments: tuple, compute: Callable[..., Tensor]) -> None:
    assert found.dtype == arguments[0].dtype and found.is_contiguous()
    assert_close(found, compute(*doubled(arguments)), compute(*arguments))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case", [THREADS, *RESIDUES, *linear_cases.ENDS, *linear_cases.SHAPES, *linear_cases.MATRICES], ids=str
)
def test_a_linear_layer_is_as_good_as_pytorchs(case: LinearCase, dtype: torch.dtype) -> None:
    arguments = case.tensors(dtype, "cpu")
    is_as_good(host.low_rank_linear(*arguments), arguments, reference.low_rank_linear)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*gated_cases.ENDS, *gated_cases.SHAPES], ids=str)
def test_a_gated_layer_is_as_good_as_pytorchs(case: GatedCase, dtype: torch.dtype) -> None:
    arguments = case.tensors(dtype, "cpu")
    is_as_good(host.low_rank_gated(*arguments), arguments, reference.low_rank_gated)


def pivoted(case: PivotedCase, dtype: torch.dtype) -> tuple:
    """The arguments, with the order where functions have it."""
    x, down, up, bias, pivot_bias, order, *end = case.tensors(dtype, "cpu")
    return x, down, up, order, bias, pivot_bias, *end


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*pivoted_cases.ENDS, *pivoted_cases.SHAPES], ids=str)
def test_a_pivoted_layer_is_as_good_as_pytorchs(case: PivotedCase, dtype: torch.dtype) -> None:
    arguments = case.tensors(dtype, "cpu")
    is_as_good(host.low_rank_pivoted(*pivoted(case, dtype)), arguments, pivoted_reference.low_rank_pivoted)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_change_no_bit(threads: int) -> None:
    arguments = THREADS.tensors(torch.float32, "cpu")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        found = host.low_rank_linear(*arguments)
        torch.set_num_threads(1)
        assert torch.equal(found, host.low_rank_linear(*arguments))
    finally:
        torch.set_num_threads(before)


def test_a_row_has_the_same_bits_whatever_is_beside_it() -> None:
    x, *rest = replace(THREADS, batch=(7,), activation="none", residual=False).tensors(torch.float32, "cpu")
    whole = host.low_rank_linear(x, *rest)
    for m in range(7):
        assert torch.equal(host.low_rank_linear(x[m:], *rest), whole[m:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite_passes_as_in_pytorch(dtype: torch.dtype) -> None:
    x, down, up, bias, activation, _ = replace(THREADS, activation="relu", residual=False).tensors(dtype, "cpu")
    for place, value in (((0, 3), float("inf")), ((1, 4), float("nan")), ((2, 5), -float("inf"))):
        x[place] = value
    found, wanted = (ops.low_rank_linear(x, down, up, bias, activation) for ops in (host, reference))
    assert torch.equal(found.isnan(), wanted.isnan())


def test_inputs_are_left_as_they_are() -> None:
    for case, op in ((THREADS, host.low_rank_linear), (GatedCase((2,), 64, 96, 16, 24), host.low_rank_gated)):
        arguments = case.tensors(torch.bfloat16, "cpu")
        before = [each.clone() if isinstance(each, Tensor) else each for each in arguments]
        op(*arguments)
        assert all(
            torch.equal(one, other) for one, other in zip(arguments, before, strict=True) if isinstance(one, Tensor)
        )


def test_what_lies_between_is_rounded_as_two_layers_round_it() -> None:
    x, down, up = torch.tensor([[256.0, 1.0]]), torch.tensor([[1.0, 1.0], [1.0, 0.0]]), torch.tensor([[1.0, -1.0]])
    assert host.low_rank_linear(x, down, up) == 1
    assert host.low_rank_linear(x.bfloat16(), down.bfloat16(), up.bfloat16()) == 0, (
        "257 has nine bits, of which one goes"
    )


@pytest.mark.parametrize("number", [0, 1, 2, 3, 5], ids=["x", "down", "up", "bias", "residual"])
def test_any_layout_is_read(number: int) -> None:
    arguments = list(THREADS.tensors(torch.float32, "cpu"))
    wanted = host.low_rank_linear(*arguments)
    arguments[number] = arguments[number].repeat_interleave(2, -1)[..., ::2]
    assert torch.equal(host.low_rank_linear(*arguments), wanted)


X, DOWN, UP = torch.ones(2, 16), torch.ones(4, 16), torch.ones(6, 4)
ORDER = torch.arange(10, dtype=torch.int32)
REFUSED = {
    "x is 0-dimensional": (X[0, 0], DOWN, UP),
    r"down is \[4, 15\], wanted \(R, 16\)": (X, DOWN[:, 1:], UP),
    r"down is \[16\]": (X, DOWN[0], UP),
    r"up is \[6, 3\], wanted \(N, 4\)": (X, DOWN, UP[:, 1:]),
    "x is float64, wanted float32 or bfloat16": (X.double(), DOWN.double(), UP.double()),
    "x is Int, wanted float32": (X.int(), DOWN, UP),
    "down is BFloat16, wanted the Float of x": (X, DOWN.bfloat16(), UP),
    "up is Half, wanted the Float of x": (X, DOWN, UP.half()),
    r"bias is \[5\], wanted \(6\)": (X, DOWN, UP, torch.ones(5)),
    "bias is Double": (X, DOWN, UP, torch.ones(6).double()),
    r"residual is \[2, 5\]": (X, DOWN, UP, None, torch.ones(2, 5)),
    r"order is \[9\], wanted \(10\)": (X, DOWN, UP, None, None, ORDER[:-1]),
    "order is Long, wanted Int": (X, DOWN, UP, None, None, ORDER.long()),
    "order has 10, wanted places of 10": (X, DOWN, UP, None, None, ORDER + 1),
    "order has -1, wanted places": (X, DOWN, UP, None, None, ORDER - 1),
    r"pivot_bias is \[3\], wanted \(4\)": (X, DOWN, UP, None, None, ORDER, torch.ones(3)),
    "pivot_bias is given without an order": (X, DOWN, UP, None, None, None, torch.ones(4)),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_does_not_fit_is_refused(message: str) -> None:
    with pytest.raises(RuntimeError, match=f"shrank::low_rank_rows: {message}"):
        host.rows(*REFUSED[message])


def test_why_they_are_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    fresh = host.problems.__wrapped__
    assert fresh() == ()
    with monkeypatch.context() as patch:
        patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
        assert fresh() == ("the kernels for a CPU need AVX2, PyTorch uses DEFAULT",)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "2.9.1")
        assert fresh() == ("the kernels for a CPU need torch 2.10 or newer, this is 2.9.1",)
    broken = tmp_path / "_host.abi3.so"
    monkeypatch.setattr(host, "LIBRARY", broken)
    assert "has no kernels for a CPU" in fresh()[0]
    broken.write_bytes(b"no library")
    assert "do not load with torch" in fresh()[0]
