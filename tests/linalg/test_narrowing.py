"""Units removed in a norm: what each costs is what is lost, and the matrix on the others is the best there is."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from shrank.linalg import Columns, FactorizationError, Moments, columns, eliminate, refit
from tests.common.models import draw
from tests.common.tolerances import assert_close

N, K, TOKENS = 12, 150, 1000  # more units than are removed together


def norm(units: int = K, gradients: bool = True) -> Columns:
    mixing = torch.eye(units, dtype=torch.float64) + 0.1 * draw(units, units, dtype=torch.float64)
    inputs = draw(TOKENS, units, dtype=torch.float64) @ mixing
    W, G = draw(N, units, dtype=torch.float64), draw(N, N, dtype=torch.float64)
    weight = G @ G.T if gradients else torch.eye(N, dtype=torch.float64)
    return Columns(inputs.T @ inputs / TOKENS, W.T @ weight @ W, W, None)


def lost(norm: Columns, kept: Tensor, matrix: Tensor, weight: Tensor) -> Tensor:
    error = norm.goal.clone()
    error[:, kept] -= matrix
    return (weight * (error @ norm.data @ error.T)).sum()


@pytest.mark.parametrize("width", [K - 1, K - 40, K // 3, 1])
def test_the_curve_is_what_is_lost(width: int) -> None:
    found = norm()
    G = draw(N, N, dtype=torch.float64)
    kept = eliminate(found).kept(width)
    assert len(kept) == width and torch.equal(kept, kept.unique())
    assert_close(lost(found, kept, refit(found, kept).matrix, G @ G.T), eliminate(found).errors[width])


def test_each_step_takes_the_cheapest_unit() -> None:
    """As inverting anew at every step finds it."""
    found, left = norm(60), list(range(60))
    order = eliminate(found).order.tolist()
    for removed in order[:40]:
        inverse = torch.linalg.inv(found.data[left][:, left])
        onto = found.data[:, left] @ inverse  # what the units left say of all
        costs = (onto.T @ found.worth @ onto).diagonal() / inverse.diagonal()
        assert left[int(costs.argmin())] == removed
        left.remove(removed)


def test_fewer_are_eliminated_where_more_must_stay() -> None:
    found = norm()
    some, all_of_them = eliminate(found, 100), eliminate(found)
    assert torch.equal(some.order, all_of_them.order[: K - 100])
    assert_close(some.errors[100:], all_of_them.errors[100:])
    assert some.errors[1:100].isinf().all() and some.units == K


def test_the_fit_is_better_than_the_columns_themselves() -> None:
    found, weight = norm(), torch.eye(N, dtype=torch.float64)
    kept = eliminate(found).kept(100)
    assert lost(found, kept, refit(found, kept).matrix, weight) < lost(found, kept, found.goal[:, kept], weight)


def test_units_that_others_give_cost_nothing() -> None:
    """Dead ones, and linear combinations: what is left is exact."""
    inputs = draw(TOKENS, 20, dtype=torch.float64)
    inputs[:, 3] = 0
    inputs[:, 7] = inputs[:, 5] - 2 * inputs[:, 11]
    W = draw(N, 20, dtype=torch.float64)
    found = Columns(inputs.T @ inputs / TOKENS + 1e-10 * torch.eye(20, dtype=torch.float64), W.T @ W, W, None)
    kept = eliminate(found).kept(18)
    assert 3 not in kept and len({5, 7, 11} & set(kept.tolist())) == 2
    assert_close((inputs[:, kept] @ refit(found, kept).matrix.T).float(), (inputs @ W.T).float())


@pytest.mark.parametrize("outputs", [12, 60])
@pytest.mark.parametrize("gradients", [False, True])
def test_moments_of_inputs_give_the_norm(outputs: int, gradients: bool) -> None:
    """Gradients of more outputs than inputs are known as the inputs feel them."""
    W, inputs = draw(outputs, 40), draw(TOKENS, 40) + 0.5
    G = draw(outputs, outputs)
    gradient = W.T @ G @ G.T @ W if outputs > 40 else G @ G.T
    moments = Moments(
        10**9,
        (inputs.T @ inputs / TOKENS)[None],
        inputs.mean(0)[None],
        inputs.square().mean(0)[None],
        True,
        gradient[None] if gradients else None,
        10**9,
    )
    found = columns(W[None], moments, centred=True)
    wanted = inputs.double() - inputs.double().mean(0)
    assert_close(found.data.diagonal().float(), wanted.square().mean(0).float())
    plain = W.T @ (0.97 * G @ G.T + 0.03 * G.square().sum() / outputs * torch.eye(outputs)) @ W
    if not gradients:
        assert_close(found.worth.float(), W.T @ W)
    elif outputs <= 40:
        assert_close(found.worth.float(), plain)
    assert columns(W[None], moments, centred=False).mean is None
    kept = eliminate(found).kept(30)
    fitted = refit(found, kept)
    means = W.double() @ found.mean - fitted.matrix @ found.mean[kept]
    assert_close(fitted.shift, means)


def test_what_is_not_finite_or_definite_is_refused() -> None:
    found = norm(20)
    for data in (found.data * torch.nan, -found.data):
        with pytest.raises(FactorizationError):
            eliminate(replace(found, data=data))
        with pytest.raises(FactorizationError):
            refit(replace(found, data=data), torch.arange(5))
