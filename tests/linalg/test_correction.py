"""Corrections of rounded weights: what they leave is what the eigenvalues say, and no less can be left."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from shrank.linalg import (
    FactorizationError,
    Grid,
    Lost,
    Metric,
    Quantized,
    corrected_errors,
    gptq,
    metric,
    nearest,
    quantized_corrected,
    quantized_dense,
)
from tests.common.models import draw
from tests.common.tolerances import assert_close, assert_optimal
from tests.linalg.test_weighted import SIZES, moments_of, seen

EVERY_NORM = [(gradients, centred) for gradients in (False, True) for centred in (False, True)]
FOUR = Grid(4, 8)
each_size = pytest.mark.parametrize(("N", "K"), SIZES)


def layer(N: int, K: int, gradients: bool = True, centred: bool = False) -> tuple[Tensor, Metric]:
    """A weight (N, K) and its metric."""
    W, inputs, given = seen(N, K)
    return W, metric(W[None], moments_of(W, inputs, given if gradients else None, of_inputs=True), centred)


def rounded(N: int, K: int, *how: bool) -> Lost:
    W, norm = layer(N, K, *how)
    return Lost(W, gptq(W, norm.inputs[0], FOUR).dequantized(), norm)


def roots(lost: Lost) -> tuple[Tensor, Tensor]:
    """R (N, N) and S (K, K): the squared error of an approximation A of the error E is |R (E - A) S|^2."""
    W, norm = lost.weight, lost.metric
    left = torch.eye(len(W)).double() if norm.gradient is None else norm.gradient[0]
    if norm.gradient is not None and norm.on_inputs:  # Gamma among the columns of W, its mean strength elsewhere
        inverse, columns = torch.linalg.pinv(W), W @ torch.linalg.pinv(W)
        strength = left.trace() / W.square().sum()
        left = inverse.T @ left @ inverse + strength * (torch.eye(len(W)).double() - columns)
    return tuple((V * L.clamp_min(0).sqrt()) @ V.T for L, V in map(torch.linalg.eigh, (left, norm.inputs[0])))


@pytest.mark.parametrize(("gradients", "centred"), EVERY_NORM)
@each_size
def test_every_rank_leaves_what_the_curve_says_and_no_factors_leave_less(N, K, gradients, centred) -> None:
    lost = rounded(N, K, gradients, centred)
    R, S = roots(lost)
    optimum, left = torch.linalg.svdvals(R @ lost.error[0] @ S).square(), lost.left()
    assert left.shape == (min(N, K) + 1,) and left[-1] == 0
    for rank in (0, 1, 5, 20):
        assert_optimal(left[rank].sqrt().item(), optimum[rank:].sum().sqrt().item(), lost.error)
        if rank:
            found = lost.correction(rank, torch.float64)
            error = (R @ (lost.error - found.merge())[0] @ S).norm().item()
            assert_optimal(error, left[rank].sqrt().item(), lost.error)
            assert_optimal(lost.loss(found.merge()[0]).squared_error ** 0.5, error, lost.error)


@pytest.mark.parametrize("gradients", [False, True])
@each_size
def test_errors_are_in_the_unit_of_weights_on_a_grid(N: int, K: int, gradients: bool) -> None:
    W, norm = layer(N, K, gradients)
    dense = quantized_dense(W[None], norm, FOUR)
    lost = Lost(W, dense.weight.dequantized(), norm)
    assert lost.left()[0].item() == pytest.approx(dense.loss.squared_error)
    assert_close(corrected_errors(W[None], norm, FOUR), lost.left())
    assert lost.squared_norm == pytest.approx(dense.loss.squared_norm)
    corrected = quantized_corrected(W[None], norm, 5, FOUR)
    assert torch.equal(corrected.weight.values, dense.weight.values)
    assert corrected.loss.squared_error == pytest.approx(lost.left()[5].item())
    assert corrected.loss.relative_error < dense.loss.relative_error


@each_size
def test_without_data_the_numbers_themselves_count(N: int, K: int) -> None:
    W, _ = layer(N, K)
    found = quantized_corrected(W[None], None, 5, FOUR)
    lost = Lost(W, nearest(W, FOUR).dequantized(), None)
    assert_close((lost.error - (found.up @ found.down)[None]).square().sum(), lost.left()[5])
    assert found.loss.squared_error == pytest.approx(lost.left()[5].item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@each_size
def test_full_rank_gives_the_weight_back_and_every_rank_is_better_than_none(N, K, dtype: torch.dtype) -> None:
    lost = rounded(N, K)
    whole = lost.correction(min(N, K), dtype)
    assert whole.up.dtype == whole.down.dtype == dtype
    assert_close(whole.merge(), lost.error.to(dtype))
    left = [lost.loss(lost.correction(rank, dtype).merge()[0]).squared_error for rank in (1, 4, 12)]
    assert lost.left()[0] > left[0] > left[1] > left[2]


@pytest.mark.parametrize("factor_grid", [None, Grid(8), Grid(4, 4)], ids=str)
@each_size
def test_factors_on_a_grid_are_better_than_none(N: int, K: int, factor_grid: Grid | None) -> None:
    W, norm = layer(N, K)
    found, lost = quantized_corrected(W[None], norm, 4, FOUR, factor_grid), rounded(N, K)
    kinds = (Tensor, Tensor) if factor_grid is None else (Quantized, Quantized)
    assert isinstance(found.down, kinds[0]) and isinstance(found.up, kinds[1])
    assert found.loss.squared_error < lost.left()[0]
    if factor_grid is None or factor_grid.bits == 8:
        assert found.loss.squared_error == pytest.approx(lost.left()[4].item(), rel=1e-2)


def test_rounding_again_without_what_the_factors_hold_may_lose_less_and_never_more() -> None:
    errors = {}
    for N, K in SIZES:
        W, norm = layer(N, K)
        times = (0, 1, 4)
        errors[N, K] = [quantized_corrected(W[None], norm, 4, FOUR, again=t).loss.squared_error for t in times]
    assert all(once >= twice >= five for once, twice, five in errors.values())
    assert any(once > five for once, _, five in errors.values())


@each_size
def test_the_shift_is_the_mean_error(N: int, K: int) -> None:
    W, norm = layer(N, K, centred=True)
    found = quantized_corrected(W[None], norm, 4, FOUR)
    error = W - found.weight.dequantized() - found.up @ found.down
    assert_close(found.loss.shift, error @ norm.input_mean[0])


@pytest.mark.parametrize("factor_grid", [None, Grid(8)], ids=str)
@each_size
def test_what_lost_nothing_is_corrected_by_nothing(N: int, K: int, factor_grid: Grid | None) -> None:
    W, norm = layer(N, K)
    W = nearest(W, FOUR).dequantized()
    lost = Lost(W, W, norm)
    assert not lost.left().any() and not lost.correction(3, torch.float32).merge().any()
    found = quantized_corrected(W[None], None, 3, FOUR, factor_grid)
    assert found.loss.squared_error == 0


def test_outputs_do_not_tell_what_rounding_does() -> None:
    W, inputs, _ = seen(24, 40)
    norm = metric(W[None], moments_of(W, inputs, None, of_inputs=False), False)
    with pytest.raises(ValueError, match=r"calibrate\(..., inputs=True\)"):
        Lost(W, 0 * W, norm).left()


def test_an_error_that_is_not_finite_is_refused() -> None:
    lost = Lost(torch.full((4, 4), torch.nan), draw(4, 4), None)
    with pytest.raises(FactorizationError, match="NaN or infinity"):
        lost.left()
    with pytest.raises(FactorizationError, match="NaN or infinity"):
        lost.correction(2, torch.float32)
