"""What forms on grids lose: estimates that measured forms meet, and others come near to."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from shrank import calibrate
from shrank.linalg import Grid, Shape, Storage
from shrank.model.survey import Survey
from shrank.planning.costs import Bytes, PricedLayer
from shrank.planning.forms import Form, forms
from shrank.planning.grids import Grids
from shrank.planning.options import PlanOptions
from shrank.planning.rounding import Rounding, _between, loss, rounding
from shrank.planning.spectra import Spectra
from tests.common.models import draw, seeded

ALL = Grids((8, 4, 3), (8, 16), (2, 4))
OUT, IN = 48, 32


def site(shape: tuple[int, int] = (OUT, IN), bias: bool = True):
    model = seeded(lambda: nn.Sequential(nn.Linear(shape[1], shape[0], bias=bias), nn.Tanh(), nn.Linear(shape[0], 16)))
    mixing = torch.linspace(0.1, 3, shape[1]) * draw(shape[1], shape[1])
    found = calibrate(model, [draw(400, shape[1]) @ mixing], inputs=True)
    return next(iter(Survey(model).sites())), found


def all_of(own, grids: Grids = ALL, **options) -> list[Form]:
    priced = PricedLayer(own.fqn, None, True)
    return list(forms(priced, own.adapter, own.shape, PlanOptions(**options), Bytes(0.5, grids), True).values())


def tails(own, found) -> list[float]:
    squares = Spectra(found).of(own, own.shape).square().sum(0)
    return [*squares.flip(0).cumsum(0).flip(0).tolist(), 0.0]


def test_every_form_of_few_bits_is_smaller_than_the_layer_and_fits() -> None:
    own, _ = site()
    found = all_of(own)
    for form in found:
        assert form.shape.fits(form.rank, form.storage)
        if form.storage.grid is not None:
            assert form.shape.bytes(form.rank, form.storage) < form.shape.bytes(None)
    assert {form.storage.grid.bits for form in found if form.storage.grid} == {8, 4, 3}
    assert {form.rank for form in found if form.storage.corrected} == {2, 4}
    assert all(form.storage.grid.bits < 8 for form in found if form.storage.corrected)
    assert not any(form.shape.pivoted for form in found if form.storage.grid)


def test_dense_layers_and_grids_can_be_forbidden() -> None:
    own, _ = site()
    assert all(form.rank for form in all_of(own, allow_dense=False))
    assert all(form.storage.grid is None for form in all_of(own, Grids((), (), ())))
    assert not any(form.storage.corrected for form in all_of(own, Grids((4,), (8,), ())))


def test_convolutions_keep_their_dtype() -> None:
    own = next(iter(Survey(nn.Sequential(nn.Conv1d(32, 32, 3))).sites()))
    assert all(form.storage.grid is None for form in all_of(own))


def test_rows_that_no_group_divides_have_one_scale() -> None:
    assert ALL.of(30) == [Grid(8), Grid(4), Grid(3)]
    assert ALL.of(24) == [Grid(8), Grid(4, 8), Grid(3, 8)]
    assert ALL.of(16, 16) == [Grid(8), Grid(4, 8), Grid(4), Grid(3, 8), Grid(3)]


@pytest.mark.parametrize("shape", [(OUT, IN), (IN, OUT), (IN, IN)], ids=str)
@pytest.mark.parametrize("with_data", [True, False])
def test_estimates_are_near_to_what_is_measured(shape: tuple[int, int], with_data: bool) -> None:
    own, found = site(shape)
    source = found if with_data else None
    of_ranks, every = tails(own, source), all_of(own)
    estimates = rounding(own, own.shape, every, of_ranks, source)
    for form in every:
        if form.storage.grid is not None:
            tail = 0.0 if form.rank is None or form.storage.corrected else of_ranks[form.rank]
            measured = loss(own, form, source).squared_error
            assert measured / 2 < estimates.estimate(form, tail) < 2 * measured, form


def test_the_reference_is_measured() -> None:
    own, found = site()
    of_ranks, every = tails(own, found), all_of(own)
    estimates = rounding(own, own.shape, every, of_ranks, found)
    dense = Form(None, own.shape, Storage(estimates.reference))
    assert estimates.reference.bits == 4
    assert estimates.estimate(dense, 0.0) == pytest.approx(loss(own, dense, found).squared_error)
    corrected = Form(2, own.shape, Storage(estimates.reference, True))
    assert estimates.estimate(corrected, 0.0) == pytest.approx(loss(own, corrected, found).squared_error, rel=1e-3)


def test_nothing_is_measured_where_nothing_is_rounded() -> None:
    own, found = site()
    assert rounding(own, own.shape, all_of(own, Grids((), (), ())), tails(own, found), found) is None


def test_a_calibration_that_did_not_observe_inputs_is_refused() -> None:
    own, _ = site((IN, OUT))
    model = nn.Sequential(own.module)
    found = calibrate(model, [draw(400, OUT)])
    own = next(iter(Survey(model).sites()))
    with pytest.raises(ValueError, match=r"calibrate\(\.\.\., inputs=True\)"):
        rounding(own, own.shape, all_of(own), tails(own, found), found)


def test_lines_between_points() -> None:
    points = ((0, 0.0), (4, 8.0), (8, 10.0))
    assert [_between(points, rank) for rank in (0, 1, 4, 6, 8, 99)] == [0.0, 2.0, 8.0, 9.0, 10.0, 10.0]
    assert _between(((0, 0.0),), 5) == 0.0


def test_finer_grids_lose_less_by_as_much_as_they_are_finer() -> None:
    estimates = Rounding({Grid(4, 8): 4.0, Grid(8): 0.5}, Grid(4, 8), 2.0, ((0, 0.0), (4, 1.0)), (2.0, 1.0, 0.5))
    shape = Shape(OUT, IN)
    assert estimates.estimate(Form(None, shape, Storage(Grid(8))), 0.0) == 0.25
    assert estimates.estimate(Form(4, shape, Storage(Grid(8))), 3.0) == 3.125
    assert estimates.estimate(Form(2, shape, Storage(Grid(4, 8), True)), 0.0) == 0.5
