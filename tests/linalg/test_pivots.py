"""Pivoted storage: the same matrix in fewer numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from shrank.linalg import FactorizationError, Factors, PivotedFactors, factorize, pivoted, unpivoted
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


def ill_conditioned(N: int, K: int) -> Tensor:
    """(1, N, K): rows of norms that spread over four magnitudes, many of them nearly alike, and a falling spectrum."""
    basis = draw(N // 4, K, dtype=torch.float64) * torch.logspace(0, -3, N // 4, dtype=torch.float64)[:, None]
    mixed = draw(N, N // 4, dtype=torch.float64) @ basis
    return (mixed * torch.logspace(0, -4, N, dtype=torch.float64).flip(0)[:, None] + 1e-5 * draw(N, K))[None].float()


def scaled(N: int) -> Tensor:
    """(1, N, N) with rows that differ in norm by a hundred, the smallest first."""
    return draw(1, N, N) * torch.logspace(-2, 0, N)[:, None]


MATRICES = {"random": draw(1, 96, 96), "tall": draw(1, 200, 60), "ill": ill_conditioned(160, 80), "scaled": scaled(96)}
each_matrix = pytest.mark.parametrize("W", MATRICES.values(), ids=MATRICES)


@each_matrix
@pytest.mark.parametrize("R", [1, 20, 40])
def test_entries_and_growth_are_bounded(W: Tensor, R: int) -> None:
    factors = factorize(W, R)
    found = pivoted(factors)
    N = W.shape[1]
    assert found.up.abs().max() <= 2.001
    # Of an orthonormal (N, R), the trace of (P^T P)^-1 is at most R (N - R + 1): de Hoog and Mattheij, 2007. Exchanges
    # only lower the largest entries.
    assert found.growth**2 <= R * (N - R + 1)
    assert R + found.up.double().square().sum() <= R * (N - R + 1)
    assert found.rounding < 1e-5


@each_matrix
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_cast_costs_little_more_than_of_plain_factors(W: Tensor, dtype: torch.dtype) -> None:
    factors = factorize(W.double(), 40)
    whole, exact = factors.merge().double()[0], pivoted(factors)
    plain = unpivoted(exact)

    def lost(matrix: Tensor) -> float:
        return ((matrix - whole).norm() / whole.norm()).item()

    def cast(x: Tensor) -> Tensor:
        return x.to(dtype).double()

    by_pivots = lost(rows(replace(exact, down=cast(exact.down), up=cast(exact.up))))
    by_plain = lost((cast(plain.up) @ cast(plain.down))[0])
    assert by_pivots <= 6 * by_plain
    # Fitted to what rounding left, it is nearer still.
    fitted = pivoted(factors, dtype)
    assert fitted.down.dtype == fitted.up.dtype == dtype
    assert lost(rows(fitted)) <= by_pivots


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_rounding_took_away_is_told(dtype: torch.dtype) -> None:
    factors = factorize(draw(3, 40, 30, dtype=torch.float64), 11)
    found = pivoted(factors, dtype)
    whole = factors.merge().flatten(0, 1)
    lost = ((rows(found) - whole).norm() / whole.norm()).item()
    assert found.rounding == pytest.approx(lost, rel=1e-3, abs=1e-12)


def test_pivots_that_do_not_fit_a_dtype_are_refused() -> None:
    factors = factorize(1e6 * draw(1, 20, 20, dtype=torch.float64), 5)
    with pytest.raises(FactorizationError, match="the pivots do not fit float16"):
        pivoted(factors, torch.float16)


def test_outputs_that_are_alike_are_not_all_missed() -> None:
    """Each of them can be missed alone, and all at once not: only one of a kind says anything."""
    kinds = torch.linalg.qr(draw(8, 8, dtype=torch.float64))[0]
    up = kinds.repeat_interleave(16, 0) / 4
    found = pivoted(Factors(draw(1, 8, 30, dtype=torch.float64), up[None], 0.0, 1.0))
    chosen = (found.order < 8).nonzero()[:, 0] // 16
    assert chosen.tolist() == list(range(8)) and found.up.abs().max() < 1.001


def test_rows_that_bear_the_others_are_found_where_they_are() -> None:
    up = 1e-4 * draw(60, 20, dtype=torch.float64)
    up[::3] = torch.linalg.qr(draw(20, 20, dtype=torch.float64))[0]  # the only rows that say anything, scattered
    factors = Factors(draw(1, 20, 30), up.float()[None], 0.0, 1.0)
    found = pivoted(factors)
    assert found.order[::3].lt(20).all() and found.growth < 100
    assert_close(rows(found).float(), factors.merge()[0])
