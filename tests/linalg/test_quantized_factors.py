"""Weights and factors on a grid in the norm of a calibration: the error told, and that nothing simpler has less."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from shrank.linalg import (
    FactorizationError,
    Grid,
    Metric,
    Quantized,
    factorize,
    factorize_weighted,
    metric,
    nearest,
    quantized_dense,
    quantized_factors,
)
from tests.common.models import draw
from tests.common.tolerances import assert_close
from tests.linalg.test_weighted import moments_of, seen

SIZES = [(24, 40), (40, 24), (32, 32)]
GRIDS = [Grid(4, 8), Grid(4), Grid(8), Grid(8, 8)]
each_grid = pytest.mark.parametrize("grid", GRIDS, ids=str)
each_size = pytest.mark.parametrize(("N", "K"), SIZES)
RANK = 16


def numbers(held: Quantized) -> Tensor:
    return held.dequantized().double()


def norm_of(W: Tensor, inputs: Tensor, gradients: Tensor | None = None, centred: bool = False) -> Metric:
    return metric(W[None], moments_of(W, inputs, gradients, of_inputs=True), centred)


def of_outputs(error: Tensor, norm: Metric) -> float:
    return (error @ norm.inputs[0] * error).sum().item()


@each_size
def test_the_metric_knows_the_inputs_whatever_side_is_smaller(N: int, K: int) -> None:
    W, inputs, _ = seen(N, K)
    norm = norm_of(W, inputs)
    assert norm.inputs.shape == (1, K, K)
    assert_close(norm.inputs[0] if norm.on_inputs else W @ norm.inputs[0] @ W.T, norm.data[0])
    assert metric(W[None], moments_of(W, inputs, None, of_inputs=False), False).inputs is None


@each_grid
@each_size
def test_the_error_is_that_of_the_outputs(N: int, K: int, grid: Grid) -> None:
    W, inputs, _ = seen(N, K)
    norm = norm_of(W, inputs)
    dense, factors = quantized_dense(W[None], norm, grid), quantized_factors(W[None], norm, RANK, grid)
    for loss, merged in (
        (dense.loss, numbers(dense.weight)),
        (factors.loss, numbers(factors.up) @ numbers(factors.down)),
    ):
        wanted = of_outputs(W - merged, norm)
        assert loss.squared_error == pytest.approx(wanted)
        assert loss.squared_norm == pytest.approx(of_outputs(W, norm))
        assert loss.relative_error == pytest.approx((wanted / loss.squared_norm) ** 0.5)


@each_size
def test_gradients_weight_the_error(N: int, K: int) -> None:
    W, inputs, gradients = seen(N, K)
    norm = norm_of(W, inputs, gradients)
    found = quantized_factors(W[None], norm, RANK, Grid(8))
    plain = factorize_weighted(W[None], norm, RANK)
    # Rounding to 8 bits adds little to the error that was cut, and nothing to the norm.
    assert plain.tail_error**2 < found.loss.squared_error < 1.2 * plain.tail_error**2
    assert found.loss.squared_norm == pytest.approx(plain.norm**2)
    assert found.loss.relative_error == pytest.approx(plain.output_error, rel=0.2)
    if N <= K:
        error = W - numbers(found.up) @ numbers(found.down)
        weighted = norm.gradient[0] @ error @ norm.inputs[0]
        assert found.loss.squared_error == pytest.approx((weighted * error).sum().item())


def test_gradients_without_a_preference_weight_all_errors_alike() -> None:
    W, inputs, _ = seen(40, 24)
    gradients = 3 * torch.eye(40, dtype=torch.float64) * 40**0.5  # of a moment of 9 I
    norm = norm_of(W, inputs, gradients)
    found = quantized_dense(W[None], norm, Grid(4, 8))
    assert found.loss.squared_error == pytest.approx(9 * of_outputs(W - numbers(found.weight), norm))


@each_grid
@each_size
def test_nothing_simpler_loses_less(N: int, K: int, grid: Grid) -> None:
    W, inputs, _ = seen(N, K)
    norm = norm_of(W, inputs)
    dense = quantized_dense(W[None], norm, grid)
    assert dense.loss.squared_error < 0.8 * of_outputs(W - numbers(nearest(W, grid)), norm)
    plain = factorize_weighted(W[None], norm, RANK)
    found = quantized_factors(W[None], norm, RANK, grid)
    simple = numbers(nearest(plain.up[0], grid)) @ numbers(nearest(plain.down[0], grid))
    assert plain.tail_error**2 < found.loss.squared_error < of_outputs(W - simple, norm)
    assert quantized_factors(W[None], norm, RANK, grid, plain).loss == found.loss


@each_grid
def test_without_data_the_weights_count(grid: Grid) -> None:
    W = draw(24, 40)
    dense, factors = quantized_dense(W[None], None, grid), quantized_factors(W[None], None, RANK, grid)
    assert torch.equal(dense.weight.values, nearest(W, grid).values)
    assert dense.loss.squared_error == pytest.approx((W - dense.weight.dequantized()).square().sum().item(), rel=1e-5)
    plain = factorize(W[None], RANK)
    simple = nearest(plain.up[0], grid).dequantized() @ nearest(plain.down[0], grid).dequantized()
    assert plain.tail_error**2 < factors.loss.squared_error < (W - simple).square().sum().item()


@each_size
def test_the_bias_takes_up_the_mean_error(N: int, K: int) -> None:
    W, inputs, gradients = seen(N, K, offset=3.0)
    found = quantized_factors(W[None], norm_of(W, inputs, gradients, centred=True), RANK, Grid(4, 8))
    assert_close(found.loss.shift, (W - numbers(found.up) @ numbers(found.down)) @ inputs.mean(0))
    dense = quantized_dense(W[None], norm_of(W, inputs, centred=True), Grid(4, 8))
    assert_close(dense.loss.shift, (W - numbers(dense.weight)) @ inputs.mean(0))
    assert quantized_dense(W[None], norm_of(W, inputs), Grid(4, 8)).loss.shift is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_scales_have_the_dtype_of_the_layer(dtype: torch.dtype) -> None:
    W, inputs, _ = seen(24, 40)
    W = (W / 8).to(dtype)
    found = quantized_factors(W[None], norm_of(W.double(), inputs), RANK, Grid(8))
    assert found.down.scales.dtype == found.up.scales.dtype == dtype
    assert quantized_dense(W[None], None, Grid(8)).weight.scales.dtype == dtype


def test_a_metric_that_knows_outputs_only_is_refused() -> None:
    W, inputs, _ = seen(24, 40)
    norm = metric(W[None], moments_of(W, inputs, None, of_inputs=False), False)
    with pytest.raises(ValueError, match=r"its inputs must be observed: calibrate\(\.\.\., inputs=True\)"):
        quantized_factors(W[None], norm, RANK, Grid(8))
    with pytest.raises(ValueError, match="inputs=True"):
        quantized_dense(W[None], norm, Grid(8))


def test_a_weight_that_is_not_finite_is_refused() -> None:
    for made in (lambda W: quantized_dense(W, None, Grid(8)), lambda W: quantized_factors(W, None, 4, Grid(8))):
        with pytest.raises(FactorizationError, match="NaN or infinity"):
            made(torch.full((1, 8, 8), torch.nan))


def test_a_rank_that_the_weight_does_not_have() -> None:
    W = draw(24, 4) @ draw(4, 40)
    found = quantized_factors(W[None], None, 12, Grid(8))
    assert found.loss.relative_error < 0.02
    assert quantized_dense(torch.zeros(1, 8, 8), None, Grid(4)).loss.relative_error == 0
    assert quantized_factors(torch.zeros(1, 8, 8), None, 4, Grid(4)).loss.relative_error == 0
