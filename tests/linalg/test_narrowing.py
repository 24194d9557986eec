"""Units removed in a norm: what each costs is what is lost, and the matrix on the others is the best there is."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from shrank.linalg import Columns, FactorizationError, Moments, channel_columns, columns, eliminate, refit
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


def spread(units: int, each: int, strided: bool) -> Tensor:
    """The columns of so many units (units, each): next to each other, or one in every `units`."""
    index = torch.arange(units * each)
    return index.view(each, units).T if strided else index.view(units, each)


@pytest.mark.parametrize("strided", [False, True])
def test_each_step_takes_the_cheapest_unit_of_several_columns(strided: bool) -> None:
    """As fitting anew without every one of them finds it; the errors are what is lost."""
    units, left = spread(10, 4, strided), list(range(10))
    found, G = norm(40), draw(N, N, dtype=torch.float64)
    elimination = eliminate(found, 3, units)
    assert elimination.errors[1:3].isinf().all() and elimination.units == 10
    for removed in elimination.order.tolist():
        costs = {}
        for j in left:
            kept = units[[i for i in left if i != j]].flatten().sort().values
            costs[j] = lost(found, kept, refit(found, kept).matrix, G @ G.T)
        assert min(costs, key=costs.get) == removed
        left.remove(removed)
        assert_close(costs[removed], elimination.errors[len(left)])
    assert elimination.kept(3).tolist() == left


def test_units_of_one_column_are_the_columns() -> None:
    found = norm(30)
    one, other = eliminate(found), eliminate(found, units=torch.arange(30)[:, None])
    assert torch.equal(one.order, other.order) and torch.equal(one.errors, other.errors)


def of_channels(taps: int, positions: int = 400) -> tuple[Tensor, Tensor, Moments]:
    """A kernel of so many taps (N, C taps), the channels that it sees (positions, C), and their moments."""
    channels = draw(positions, 20) @ (torch.eye(20) + 0.3 * draw(20, 20)) + 0.5
    W, G = draw(N, 20 * taps), draw(N, N)
    windows = channels.unfold(0, taps, 1).flatten(1)  # (positions, C taps), the taps of a channel next to each other
    outputs = windows @ W.T
    gradient = G @ G.T
    mean = outputs.mean(0)[None]
    moments = Moments(
        10**9,
        (outputs.T @ outputs / len(outputs))[None],
        mean,
        windows.square().mean(0)[None],
        False,
        gradient[None],
        10**9,
        channels=(channels.T @ channels / positions)[None],
        channel_mean=channels.mean(0)[None],
    )
    return W, channels, moments


@pytest.mark.parametrize("centred", [False, True])
def test_channels_under_a_kernel_of_one_tap_are_inputs(centred: bool) -> None:
    W, _, moments = of_channels(1)
    found = channel_columns(W[None], moments, centred)
    of_inputs = replace(moments, data=moments.channels, mean=moments.channel_mean, of_inputs=True)
    wanted = columns(W[None], of_inputs, centred)
    assert_close(found.goal, wanted.goal)
    # The floor of what a dead input counts for is of other energies.
    assert_close(found.data.float(), wanted.data.float())
    assert (found.worth - wanted.worth).norm() < 0.02 * wanted.worth.norm()
    assert (found.mean is None) == (not centred)


@pytest.mark.parametrize("taps", [1, 3])
@pytest.mark.parametrize("centred", [False, True])
def test_a_kernel_behind_fewer_channels(taps: int, centred: bool) -> None:
    """Without all channels it loses all of its outputs. Without those that others give it loses nothing, nor their
    mean."""
    W, channels, moments = of_channels(taps)
    found = channel_columns(W[None], moments, centred)
    assert found.goal.shape == (N * taps, 20)
    mean = moments.mean[0].double()
    outputs = moments.data[0].double() - (mean[:, None] * mean if centred else 0)
    plain = 0.97 * moments.gradient[0] + 0.03 * moments.gradient[0].diagonal().mean() * torch.eye(N)
    assert_close(eliminate(found).errors[0].float(), (plain.double() * outputs).sum().float())
    channels = channels.double()
    channels[:, 7] = channels[:, 5] - 2 * channels[:, 11]
    channels[:, 3] = 0
    exact = channels.T @ channels / len(channels) + 1e-9 * torch.eye(20)
    found = replace(found, data=exact, mean=channels.mean(0) if centred else None)
    kept = eliminate(found, 18).kept(18)
    fitted = refit(found, kept)
    assert 3 not in kept and fitted.matrix.shape == (N, 18 * taps)
    seen, left = (x.unfold(0, taps, 1).flatten(1) for x in (channels, channels[:, kept]))
    assert_close((left @ fitted.matrix.T).float(), (seen @ W.double().T).float())
    assert fitted.shift is None or fitted.shift.norm() < 1e-4 * W.norm()
