"""Factors in the norm of a calibration: optimal among all factors, with errors that are the cut eigenvalues."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from shrank.linalg import FactorizationError, Metric, Moments, factorize, factorize_weighted, metric, squared_errors
from tests.common.models import draw
from tests.common.tolerances import assert_close, assert_optimal

SIZES = [(24, 40), (40, 24), (32, 32)]
TOKENS = 4000


def seen(N: int, K: int, offset: float = 0.5) -> tuple[Tensor, Tensor, Tensor]:
    """A weight (N, K), inputs (T, K) with correlations and a mean, and gradients (T, N)."""
    W = draw(N, K, dtype=torch.float64)
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(TOKENS, K, generator=generator, dtype=torch.float64) @ draw(K, K, dtype=torch.float64).exp()
    gradients = torch.randn(TOKENS, N, generator=generator, dtype=torch.float64) @ draw(N, N, dtype=torch.float64)
    return W, inputs + offset * inputs.std(), gradients


def moments_of(W: Tensor, inputs: Tensor, gradients: Tensor | None, of_inputs: bool) -> Moments:
    data = inputs if of_inputs else inputs @ W.T
    if gradients is not None and of_inputs and W.shape[0] > W.shape[1]:
        gradients = gradients @ W
    square = lambda rows: (rows.T @ rows / len(rows))[None]  # noqa: E731
    return Moments(
        len(inputs),
        square(data),
        data.mean(0)[None],
        inputs.square().mean(0)[None],
        of_inputs,
        None if gradients is None else square(gradients),
        len(inputs),
    )


def anchored(W: Tensor, inputs: Tensor, wanted: Tensor, gradients: Tensor | None, of_inputs: bool) -> Moments:
    """As moments_of these inputs, where the layer should act as on the wanted ones."""
    data, towards = (inputs, wanted) if of_inputs else (inputs @ W.T, wanted @ W.T)
    return replace(
        moments_of(W, inputs, gradients, of_inputs),
        anchor=(towards.T @ data / len(data))[None],
        anchor_mean=towards.mean(0)[None],
    )


def weighted_error(W: Tensor, approximation: Tensor, norm: Metric) -> float:
    """The error as the metric defines it, from its own two matrices."""
    error, (data, gradient) = W - approximation, (norm.data[0], norm.gradient)
    if norm.on_inputs:  # gradients are known as W^T sees them, so the error in the coordinates of W's columns
        left, inner = torch.linalg.lstsq(W, error).solution, W.T @ W if gradient is None else gradient[0]
    else:  # data are known as W sees them
        left, inner = error @ torch.linalg.pinv(W), torch.eye(len(W)).double() if gradient is None else gradient[0]
    return (left @ data @ left.T * inner).sum().clamp_min(0).sqrt().item()


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("with_gradients", [False, True])
@pytest.mark.parametrize("of_inputs", [False, True])
@pytest.mark.parametrize(("N", "K"), SIZES)
def test_the_error_is_what_was_cut_and_no_other_factors_do_better(N, K, of_inputs, with_gradients, centred) -> None:
    W, inputs, gradients = seen(N, K)
    norm = metric(W[None], moments_of(W, inputs, gradients if with_gradients else None, of_inputs), centred)
    squares = squared_errors(W[None], norm)[0]
    assert (squares[:-1] >= squares[1:]).all()
    for rank in (1, 7, 20):
        found = factorize_weighted(W[None], norm, rank)
        assert_optimal(found.tail_error, squares[rank:].sum().sqrt().item(), W)
        assert_optimal(weighted_error(W, found.merge()[0], norm), found.tail_error, W)
        within = W @ torch.linalg.pinv(W)  # what lies outside the weight's columns is not in this norm
        others = [factorize(W[None], rank).merge()[0]]
        others += [
            within @ (found.up[0] + 0.05 * sign * draw(N, rank, dtype=torch.float64)) @ found.down[0]
            for sign in (1, -1)
        ]
        assert all(weighted_error(W, other, norm) >= found.tail_error * (1 - 1e-9) for other in others)


@pytest.mark.parametrize("of_inputs", [False, True])
@pytest.mark.parametrize(("N", "K"), SIZES)
def test_outputs_lose_less_than_with_plain_svd(N: int, K: int, of_inputs: bool) -> None:
    W, inputs, _ = seen(N, K)
    norm = metric(W[None], moments_of(W, inputs, None, of_inputs), centred=False)
    error = lambda found: (inputs @ (W - found.merge()[0]).T).norm().item()  # noqa: E731
    assert error(factorize_weighted(W[None], norm, 8)) < 0.9 * error(factorize(W[None], 8))


@pytest.mark.parametrize("of_inputs", [False, True])
@pytest.mark.parametrize(("N", "K"), SIZES)
def test_the_bias_takes_up_the_mean_error(N: int, K: int, of_inputs: bool) -> None:
    W, inputs, gradients = seen(N, K, offset=3.0)
    moments = moments_of(W, inputs, gradients, of_inputs)
    plain = factorize_weighted(W[None], metric(W[None], moments, centred=False), 6)
    centred = factorize_weighted(W[None], metric(W[None], moments, centred=True), 6)
    assert plain.shift is None
    assert_close(centred.shift[0], (W - centred.merge()[0]) @ inputs.mean(0))
    without = (inputs @ (W - plain.merge()[0]).T).norm()
    assert (inputs @ (W - centred.merge()[0]).T - centred.shift).norm() < without


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("of_inputs", [False, True])
@pytest.mark.parametrize(("N", "K"), SIZES)
def test_anchored_factors_give_the_wanted_outputs_best_at_the_inputs_there_are(N, K, of_inputs, centred) -> None:
    W, wanted, _ = seen(N, K)
    inputs = wanted @ (torch.eye(K) + 0.3 * draw(K, K) / K**0.5).double().T + 0.5
    noise = torch.randn(inputs.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    inputs = inputs + 0.3 * inputs.std() * noise
    norm = metric(W[None], anchored(W, inputs, wanted, None, of_inputs), centred)
    found = factorize_weighted(W[None], norm, 12)
    energy = inputs.var(0, correction=0) if centred and of_inputs else inputs.square().mean(0)
    share = 0.01  # of the prior, with so many tokens

    def objective(up: Tensor, down: Tensor) -> float:
        error = wanted @ W.T - inputs @ (up @ down).T
        error = error - error.mean(0) if centred else error
        return ((1 - share) * error.square().sum() / TOKENS + share * ((W - up @ down) ** 2 * energy).sum()).item()

    least = objective(found.up[0], found.down[0])
    alone = factorize_weighted(W[None], metric(W[None], moments_of(W, inputs, None, of_inputs), centred), 12)
    assert least < 0.99 * objective(alone.up[0], alone.down[0])
    # Seen by its outputs, a layer is approximated by combinations of its own rows.
    rows = W.T @ torch.linalg.pinv(W.T) if not of_inputs else torch.eye(K).double()
    for sign in (1, -1):
        assert objective(found.up[0] + 0.02 * sign * draw(N, 12), found.down[0]) > least
        assert objective(found.up[0], found.down[0] + 0.02 * sign * draw(12, K).double() @ rows) > least
    if centred:
        assert_close(found.shift[0], (wanted @ W.T - inputs @ found.merge()[0].T).mean(0))


@pytest.mark.parametrize("of_inputs", [False, True])
@pytest.mark.parametrize(("N", "K"), SIZES)
def test_an_anchor_where_everything_is_as_wanted_changes_nothing(N: int, K: int, of_inputs: bool) -> None:
    W, inputs, gradients = seen(N, K)
    found = [
        factorize_weighted(W[None], metric(W[None], moments, centred=True), 9)
        for moments in (moments_of(W, inputs, gradients, of_inputs), anchored(W, inputs, inputs, gradients, of_inputs))
    ]
    assert_close(found[1].merge().float(), found[0].merge())
    assert_close(found[1].shift.float(), found[0].shift)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("N", "K"), SIZES)
def test_full_rank_is_exact_and_up_is_orthonormal(N: int, K: int, dtype: torch.dtype) -> None:
    W, inputs, gradients = seen(N, K)
    W = W.to(dtype)[None]
    norm = metric(W, moments_of(W[0].double(), inputs, gradients, True), centred=False)
    found = factorize_weighted(W, norm, min(N, K))
    assert found.up.dtype == found.down.dtype == dtype
    assert_close(found.merge(), W.double(), baseline=(W.float() @ torch.eye(K)).to(dtype))
    assert_close((found.up.mT.double() @ found.up.double()).to(dtype), torch.eye(min(N, K), dtype=torch.float64)[None])


def test_down_makes_up_for_the_rounding_of_up() -> None:
    W, inputs, _ = seen(64, 96)
    W = W.bfloat16()  # so that only the factors are rounded below
    norm = metric(W[None], moments_of(W.double(), inputs, None, True), centred=False)
    rounded, exact = (factorize_weighted(W[None].to(t), norm, 48) for t in (torch.bfloat16, torch.float64))
    error = lambda up, down: (exact.merge() - up.double() @ down.double()).norm().item()  # noqa: E731
    naive = error(exact.up.bfloat16(), exact.down.bfloat16())
    assert error(rounded.up, rounded.down) < 0.9 * naive


@pytest.mark.parametrize("of_inputs", [False, True])
def test_directions_that_no_data_took_are_kept_by_weight(of_inputs: bool) -> None:
    W, inputs, _ = seen(24, 40)
    inputs[:, 10:] = 0  # rank 10, and 30 dead columns
    norm = metric(W[None], moments_of(W, inputs, None, of_inputs), centred=False)
    found = factorize_weighted(W[None], norm, 16)
    assert_close(inputs @ found.merge()[0].T, inputs @ W.T, baseline=inputs @ W.T + 1e-6 * (inputs @ W.T).norm())
    dead, best = (W - found.merge()[0])[:, 10:], (W - factorize(W[None], 16).merge()[0])[:, 10:]
    assert dead.norm() < 0.9 * W[:, 10:].norm() and best.norm() < dead.norm()


def test_a_singular_moment_is_no_obstacle() -> None:
    W, inputs, gradients = seen(24, 24)
    few = moments_of(W, inputs[:3], gradients[:3], True)  # rank 3 of 24 on both sides
    found = factorize_weighted(W[None], metric(W[None], few, centred=True), 12)
    assert found.up.isfinite().all() and found.down.isfinite().all()


def test_fewer_tokens_are_trusted_less() -> None:
    W, inputs, _ = seen(40, 24)
    diagonal = lambda t: t - t.diagonal(dim1=-2, dim2=-1).diag_embed()  # noqa: E731
    strengths = []
    for tokens in (10, 100, 10_000):
        norm = metric(W[None], moments_of(W, inputs[:tokens], None, True), centred=False)
        full = moments_of(W, inputs[:tokens], None, True).data
        strengths.append((diagonal(norm.data).norm() / diagonal(full).norm()).item())
    assert strengths == sorted(strengths) and 0.69 < strengths[0] < 0.85 and 0.98 < strengths[-1] < 1


def test_groups_are_factorised_one_by_one() -> None:
    parts = [seen(12, 20), tuple(2 * t for t in seen(12, 20))]
    each = [moments_of(W, x, d, False) for W, x, d in parts]
    both = Moments(
        TOKENS,
        *(torch.cat([getattr(m, name) for m in each]) for name in ("data", "mean", "input_energy")),
        of_inputs=False,
    )
    weights = torch.stack([part[0] for part in parts])
    together = factorize_weighted(weights, metric(weights, both, False), 5).merge()
    for matrix, one, W in zip(together, each, weights, strict=True):
        alone = Moments(TOKENS, one.data, one.mean, one.input_energy, False)
        assert_close(matrix, factorize_weighted(W[None], metric(W[None], alone, False), 5).merge()[0])


def test_nan_is_named() -> None:
    W, inputs, _ = seen(24, 40)
    norm = metric(W[None], moments_of(W, inputs, None, True), centred=False)
    W[3, 3] = float("nan")
    with pytest.raises(FactorizationError, match="NaN"):
        factorize_weighted(W[None], norm, 4)
