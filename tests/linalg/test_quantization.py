"""Rounding to a grid: what it stores, how far it may be off, and that GPTQ makes up for what it loses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from shrank.linalg import FactorizationError, Grid, gptq, nearest
from tests.common.models import draw
from tests.common.tolerances import assert_close

GRIDS = [Grid(3, 32), Grid(4, 32), Grid(4, 8), Grid(4), Grid(8), Grid(8, 32)]
N, K = 48, 64


def second_moment(K: int = K, tokens: int = 4 * K) -> Tensor:
    """Of correlated inputs, some of which are much larger than others."""
    mixing = draw(K, K, dtype=torch.float64) / 4 + torch.eye(K, dtype=torch.float64)
    inputs = draw(tokens, K, dtype=torch.float64) @ mixing * torch.logspace(-1, 1, K, dtype=torch.float64)
    return inputs.mT @ inputs / tokens


def lost(W: Tensor, rounded: Tensor, hessian: Tensor) -> float:
    error = W.double() - rounded.double()
    return (error @ hessian * error).sum().item()


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_weight_is_at_most_half_a_step_off_unless_its_group_was_cut(grid: Grid, dtype: torch.dtype) -> None:
    W = draw(N, K).to(dtype)
    found = nearest(W, grid)
    assert found.values.dtype == torch.int8 and found.scales.dtype == dtype
    assert found.scales.shape == (N, grid.groups(K))
    assert found.values.min() >= grid.least and found.values.max() <= grid.most
    steps = found.scales.double().repeat_interleave(K // grid.groups(K), 1)
    off = (W.double() - found.values * steps).abs() / steps.abs()
    inside = (found.values > grid.least) & (found.values < grid.most)
    assert off[inside].max() <= 0.5 + 1e-9
    assert_close(found.dequantized(), (found.values * steps).to(dtype))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_scales_survive_16_bits(grid: Grid) -> None:
    scales = nearest(draw(N, K), grid).scales
    assert torch.equal(scales.half().float(), scales)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_weights_on_the_grid_are_kept(grid: Grid) -> None:
    groups = grid.groups(K)
    values = torch.randint(grid.least, grid.most + 1, (N, groups, K // groups), generator=torch.Generator())
    values[:, :, 0] = grid.least  # so that the largest weight of every group tells its scale
    W = (values * torch.tensor([0.5, 0.25]).repeat(N // 2)[:, None, None]).flatten(1)
    assert torch.equal(nearest(W, grid).dequantized(), W)
    assert torch.equal(gptq(W, second_moment(), grid).dequantized(), W)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_gptq_loses_less_of_the_outputs_than_the_nearest_numbers(grid: Grid) -> None:
    W, hessian = draw(N, K), second_moment()
    by_gptq, by_nearest = gptq(W, hessian, grid).dequantized(), nearest(W, grid, hessian.diagonal()).dequantized()
    assert lost(W, by_gptq, hessian) < 0.8 * lost(W, by_nearest, hessian)


def test_gptq_of_inputs_that_know_nothing_of_each_other_is_the_nearest_number() -> None:
    W, energy, grid = draw(N, K), torch.logspace(-2, 2, K, dtype=torch.float64), Grid(4, 16)
    assert torch.equal(gptq(W, energy.diag(), grid).values, nearest(W, grid, energy).values)


def test_gptq_does_not_care_in_what_pieces_columns_are_worked_on(monkeypatch: pytest.MonkeyPatch) -> None:
    W, hessian = draw(N, K), second_moment()
    whole = gptq(W, hessian, Grid(4, 32))
    monkeypatch.setattr("shrank.linalg.quantization._COLUMNS", 7)
    assert torch.equal(gptq(W, hessian, Grid(4, 32)).values, whole.values)


def test_dead_inputs_and_weights_are_no_matter() -> None:
    W, hessian = draw(N, K), second_moment()
    W[3] = 0.0
    hessian[:, 5] = hessian[5] = 0.0
    for found in (gptq(W, hessian, Grid(4, 32)), nearest(W, Grid(4, 32))):
        assert found.dequantized().isfinite().all() and not found.dequantized()[3].any()


def test_important_columns_choose_the_scale() -> None:
    W = torch.ones(1, 32)
    W[0, 0] = 1.4  # cut off, it leaves room for the others
    importance = torch.ones(32, dtype=torch.float64)
    importance[0] = 1e-6
    ours, theirs = (nearest(W, Grid(4, 32), weights).dequantized() for weights in (importance, None))
    assert (ours[0, 1:] - 1).abs().max() <= (theirs[0, 1:] - 1).abs().max()


def test_what_is_no_number_is_refused() -> None:
    W = draw(N, K)
    W[0, 0] = torch.nan
    for rounding in (lambda: nearest(W, Grid(8)), lambda: gptq(W, second_moment(), Grid(8))):
        with pytest.raises(FactorizationError):
            rounding()
    with pytest.raises(FactorizationError, match="not positive definite"):
        gptq(draw(N, K), -second_moment(), Grid(4, 32))


def test_groups_must_divide_rows() -> None:
    assert Grid(4, 48).fits(96) and not Grid(4, 48).fits(K)
    with pytest.raises(ValueError, match="groups of 48 do not divide rows of 64 weights"):
        nearest(draw(N, K), Grid(4, 48))


@pytest.mark.parametrize(
    ("bits", "size", "says"), [(5, None, "3, 4 or 8, got 5"), (4, 0, "group_size must be at least")]
)
def test_a_grid_that_cannot_be(bits: int, size: int | None, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Grid(bits, size)
