"""Moments of a layer that has lost rows or columns: those that the smaller layer would have been observed to have."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from shrank.linalg import Kept, Moments, metric
from tests.common.models import draw
from tests.common.tolerances import assert_close
from tests.linalg.test_weighted import SIZES, moments_of, seen


def of_outputs(moments: Moments, gradients: torch.Tensor) -> Moments:
    """With the gradients as they are at the outputs."""
    return replace(moments, gradient=(gradients.T @ gradients / len(gradients))[None])


def assert_same_norm(one: Moments, other: Moments, W: torch.Tensor) -> None:
    found, wanted = (metric(W[None], each, True, inputs=True) for each in (one, other))
    for name in ("data", "gradient", "mean", "inputs"):
        a, b = getattr(found, name), getattr(wanted, name)
        assert (a is None) == (b is None), name
        if a is not None:
            assert_close(a, b)


@pytest.mark.parametrize(("N", "K"), SIZES)
def test_gradients_at_the_outputs_say_the_same(N: int, K: int) -> None:
    """Where the norm is that of the inputs, too."""
    W, inputs, gradients = seen(N, K)
    moments = moments_of(W, inputs, gradients, of_inputs=True)
    assert_same_norm(of_outputs(moments, gradients), moments, W)


@pytest.mark.parametrize("of_inputs", [True, False])
@pytest.mark.parametrize(("N", "K"), SIZES)
def test_fewer_rows(N: int, K: int, of_inputs: bool) -> None:
    W, inputs, gradients = seen(N, K)
    rows = torch.randperm(N, generator=torch.Generator().manual_seed(0))[: N // 2].sort().values
    whole = of_outputs(moments_of(W, inputs, gradients, of_inputs=of_inputs), gradients)
    part = of_outputs(moments_of(W[rows], inputs, gradients[:, rows], of_inputs=of_inputs), gradients[:, rows])
    assert_same_norm(whole.of(Kept(rows, outputs=N)), part, W[rows])


@pytest.mark.parametrize(("N", "K"), SIZES)
def test_fewer_columns(N: int, K: int) -> None:
    W, inputs, gradients = seen(N, K)
    columns = torch.arange(0, K, 2)
    smaller = draw(N, len(columns), dtype=W.dtype)  # which was fitted
    whole = of_outputs(moments_of(W, inputs, gradients, of_inputs=True), gradients)
    whole = replace(whole, anchor=whole.data + 1, anchor_mean=whole.mean)
    part = of_outputs(moments_of(smaller, inputs[:, columns], gradients, of_inputs=True), gradients)
    assert_same_norm(whole.of(Kept(columns=columns)), part, smaller)


def test_rows_cannot_be_told_apart_at_the_inputs() -> None:
    W, inputs, gradients = seen(12, 8)
    with pytest.raises(ValueError, match="outputs cannot be told apart"):
        moments_of(W, inputs, gradients, of_inputs=True).of(Kept(torch.arange(4), outputs=12))
