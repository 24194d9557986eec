"""The factorisation by its properties: optimal, orthogonal, balanced, deterministic, honest about its error."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from shrank.linalg import FactorizationError, energy_curve, factorize, spectrum
from shrank.linalg.svd import _single_precision_suffices
from tests.common.tolerances import assert_close, assert_optimal

SHAPES = [(1, 24, 24), (1, 40, 16), (1, 16, 40), (3, 12, 20), (2, 20, 12), (1, 1, 7), (1, 7, 1), (1, 96, 384)]


def matrices(shape: tuple[int, int, int], decay: float = 0.0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random matrices whose singular values fall like exp(-decay i)."""
    generator = torch.Generator().manual_seed(math.prod(shape))
    W = torch.randn(shape, dtype=torch.float64, generator=generator)
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    return (U * (S * torch.exp(-decay * torch.arange(S.shape[-1])))[:, None, :] @ Vh).to(dtype)


def optimal_error(W: Tensor, rank: int) -> float:
    return torch.linalg.svdvals(W.double())[:, rank:].square().sum().sqrt().item()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("decay", [0.0, 0.3, 3.0], ids="decay={}".format)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_is_optimal(shape: tuple, decay: float, dtype: torch.dtype) -> None:
    W = matrices(shape, decay, dtype)
    for rank in {1, min(shape[1:]) // 2 or 1, min(shape[1:])}:
        factors = factorize(W, rank)
        assert factors.rank == shape[0] * rank
        error = (factors.up.double() @ factors.down.double() - W.double()).norm().item()
        assert_optimal(error, optimal_error(W, rank), W)
        assert_optimal(factors.tail_error, optimal_error(W, rank), W)
        assert_optimal(factors.relative_error * W.double().norm().item(), optimal_error(W, rank), W)


def test_full_rank_is_exact() -> None:
    for shape in SHAPES:
        W = matrices(shape)
        assert_close(factorize(W, min(shape[1:])).merge(), W)


def test_zero_and_rank_deficient_matrices_are_exact() -> None:
    zero = factorize(torch.zeros(1, 6, 8), 3)
    assert torch.equal(zero.merge(), torch.zeros(1, 6, 8)) and zero.relative_error == 0.0
    W = matrices((1, 20, 4)) @ matrices((1, 4, 30))
    assert_close(factorize(W, 9).merge(), W)


def test_split_is_balanced_and_orthogonal() -> None:
    for shape in [(1, 24, 40), (1, 40, 24)]:
        factors = factorize(matrices(shape, 0.1, torch.float64), 5)
        down, up = factors.down[0], factors.up[0]
        values = spectrum(matrices(shape, 0.1, torch.float64))[0, :5]
        assert_close(down @ down.T, torch.diag(values))
        assert_close(up.T @ up, torch.diag(values))


@pytest.mark.parametrize("shape", [(1, 12, 30), (1, 30, 12)], ids=str)
def test_signs_are_fixed_on_the_smaller_side(shape: tuple) -> None:
    W = matrices(shape, 0.2)
    factors = factorize(W, 4)
    vectors = factors.up if shape[1] < shape[2] else factors.down.mT
    assert (vectors.gather(-2, vectors.abs().argmax(-2, keepdim=True)) > 0).all()
    again = factorize(W.clone(), 4)
    assert torch.equal(factors.down, again.down) and torch.equal(factors.up, again.up)


def test_spectrum_descends_and_matches_the_reference() -> None:
    for shape in SHAPES:
        W = matrices(shape, 0.2)
        values = spectrum(W)
        assert (values.diff(dim=-1) <= 0).all()
        assert_close(values.float(), torch.linalg.svdvals(W.double()).float())


def test_energy_curve_runs_from_zero_to_one() -> None:
    curve = energy_curve(spectrum(matrices((3, 10, 12))))
    assert curve[0] == 0 and curve[-1] == 1 and (curve.diff() >= 0).all()
    assert torch.equal(energy_curve(torch.zeros(1, 4)), torch.ones(5, dtype=torch.float64))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
def test_non_finite_weights_are_refused(bad: float) -> None:
    W = matrices((1, 8, 8))
    W[0, 3, 3] = bad
    for function in (lambda: factorize(W, 2), lambda: spectrum(W)):
        with pytest.raises(FactorizationError, match="NaN or infinity"):
            function()


def test_huge_half_weights_that_do_not_overflow_are_factorised() -> None:
    W = torch.full((1, 8, 8), 60000.0, dtype=torch.float16)
    assert_close(factorize(W, 1).merge(), W)


def test_solver_failure_names_itself(monkeypatch) -> None:
    def fail(*_, **__):
        raise torch.linalg.LinAlgError("no convergence")

    monkeypatch.setattr(torch.linalg, "eigh", fail)
    monkeypatch.setattr(torch.linalg, "svd", fail)
    for dtype in (torch.float32, torch.float64):
        with pytest.raises(FactorizationError, match="did not converge: no convergence"):
            factorize(torch.ones(1, 4, 4, dtype=dtype), 2)


def test_single_precision_is_left_where_it_would_cost_accuracy() -> None:
    flat = torch.linalg.eigvalsh(matrices((1, 96, 384)) @ matrices((1, 96, 384)).mT).flip(-1)
    assert _single_precision_suffices(flat, 48)
    steep = torch.cat([flat[:, :1] * 1e6, flat[:, 1:]], 1)
    assert not _single_precision_suffices(steep, 48)
    assert not _single_precision_suffices(flat, 96)


def test_an_outlier_direction_does_not_spoil_the_rest() -> None:
    """The case that single precision alone would get wrong: one singular value a million times the others."""
    W = matrices((1, 64, 64), dtype=torch.float64)
    W = (W + 1e6 * torch.outer(torch.ones(64).double(), torch.ones(64).double())).float()
    error = (factorize(W, 32).up.double() @ factorize(W, 32).down.double() - W.double()).norm().item()
    assert_optimal(error, optimal_error(W, 32), W)
