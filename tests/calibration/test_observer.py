"""Sums of outer products: what is added, what is taken, and in which order."""

from __future__ import annotations

import pytest
import torch

from shrank.calibration.moment import Moment
from tests.common.models import draw
from tests.common.tolerances import assert_close


def test_the_mean_may_be_asked_for_again_and_ends_the_sum() -> None:
    rows, moment = draw(2, 30, 4), Moment(2, 4, torch.device("cpu"))
    moment.add(rows[:, :10])
    moment.add(rows[:, 10:])
    mean = moment.take_mean()
    assert_close(mean, (rows.mT @ rows / 30).float())
    assert moment.take_mean() is mean and bool(moment.is_finite())
    with pytest.raises(RuntimeError, match="nothing can be added"):
        moment.add(rows)


def test_nothing_added_is_zero_and_not_finite_is_noticed() -> None:
    assert torch.equal(Moment(1, 3, torch.device("cpu")).take_mean(), torch.zeros(1, 3, 3))
    moment = Moment(1, 3, torch.device("cpu"))
    moment.add(torch.tensor([[[1.0, float("nan"), 2.0]]]))
    assert not moment.is_finite()
    moment.take_mean()
    assert not moment.is_finite()
