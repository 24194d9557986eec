"""Pivoted storage: the same matrix in fewer numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from shrank.linalg import Factors, PivotedFactors, factorize, pivoted
from tests.common.models import draw
from tests.common.tolerances import assert_close

SHAPES = [(1, 40, 24, 10), (1, 24, 40, 23), (1, 64, 64, 1), (3, 20, 12, 7)]  # G, N, K, R of a group
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def rows(found: PivotedFactors) -> Tensor:
    """The matrices (G N, K) that pivoted factors mean, in float64."""
    down, up = found.down.double(), found.up.double()
    return torch.cat((down.flatten(0, 1), (up @ down).flatten(0, 1)))[found.order.long()]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("G", "N", "K", "R"), SHAPES)
def test_the_matrix_is_the_same(G: int, N: int, K: int, R: int, dtype: torch.dtype) -> None:
    factors = factorize(draw(G, N, K, dtype=dtype), R)
    expected = factors.up.double() @ factors.down.double()
    found = pivoted(factors)
    assert found.down.shape == (G, R, K) and found.up.shape == (G, N - R, R) and found.order.shape == (G * N,)
    assert found.order.dtype == torch.int32 and found.order.sort().values.tolist() == list(range(G * N))
    baseline = (factors.up.float() @ factors.down.float()).to(dtype).flatten(0, 1)
    assert_close(rows(found).to(dtype), expected.flatten(0, 1), baseline)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rounding_hardly_grows(dtype: torch.dtype) -> None:
    found = pivoted(factorize(draw(1, 96, 96, dtype=dtype), 48))
    assert found.growth * torch.finfo(dtype).eps < (0.5 if dtype == torch.bfloat16 else 6e-5)
    if dtype == torch.bfloat16:
        assert found.up.abs().max() <= 1.6  # rows of nearly the largest volume


def test_rows_in_one_piece_are_taken_only_if_they_bear_the_others() -> None:
    up = 1e-4 * draw(60, 20, dtype=torch.float64)
    up[::3] = torch.linalg.qr(draw(20, 20, dtype=torch.float64))[0]  # the only rows that say anything, scattered
    factors = Factors(draw(1, 20, 30), up.float()[None], 0.0, 1.0)
    found = pivoted(factors)
    assert found.order[::3].lt(20).all() and found.growth < 100
    assert_close(rows(found).float(), factors.merge()[0])


def test_a_window_needs_no_gather() -> None:
    found = pivoted(factorize(draw(1, 48, 48), 24))
    starts = (found.order == 0).nonzero()[0, 0]
    assert found.order[starts : starts + 24].tolist() == list(range(24))
