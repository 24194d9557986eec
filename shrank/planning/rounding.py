"""What rounding the weights of a layer to a grid adds to its error: measured for some forms, read off these for others
until somebody asks."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ..calibration.metric_source import LayerStatistics, metric_of
from ..linalg import (
    Grid,
    Loss,
    Metric,
    Shape,
    corrected_errors,
    inputs_of,
    nearest,
    on_grids,
    quantized_dense,
    quantized_factors,
)
from ..model.survey import Site
from .forms import Form
from .plan import LayerPlan

_RANKS_MEASURED = 3  # of the reference grid


@dataclass(frozen=True)
class Rounding:
    """Squared errors of one layer.

    Args:
        coarseness: Of every grid, what rounding the weight to the nearest numbers costs: it says how the errors of two
            grids compare, and is cheap.
        reference: The grid that the others were measured with.
        dense: Of the dense weight on it.
        low_rank: (rank, what rounding adds to the error of the rank), ascending.
        corrected: Of the dense weight with a correction, by rank.
    """

    coarseness: dict[Grid, float]
    reference: Grid
    dense: float
    low_rank: tuple[tuple[int, float], ...]
    corrected: tuple[float, ...]

    def estimate(self, form: Form, tail: float) -> float:
        """The squared error to expect of a form; tail: that of its rank alone."""
        if form.storage.corrected:
            return self.corrected[min(form.rank, len(self.corrected) - 1)] * self._relative(form.storage.grid)
        if form.rank is None:
            return self.dense * self._relative(form.storage.grid)
        return tail + _between(self.low_rank, form.rank) * self._relative(form.storage.grid)

    def scaled(self, coarseness: dict[Grid, float]) -> Rounding:
        """That of a layer which is like this one, as far as rounding to the nearest numbers of these grids tells."""
        reference = self.reference if self.reference in coarseness else _reference(coarseness)
        share = coarseness[reference] / (self.coarseness[self.reference] or 1.0)
        return Rounding(
            coarseness,
            reference,
            self.dense * share,
            tuple((rank, added * share) for rank, added in self.low_rank),
            tuple(error * share for error in self.corrected),
        )

    def _relative(self, grid: Grid) -> float:
        reference = self.coarseness[self.reference]
        return self.coarseness[grid] / reference if reference else 1.0


def rounding(
    site: Site, shape: Shape, forms: Sequence[Form], tails: Sequence[float], source: LayerStatistics | None
) -> Rounding | None:
    """Measure as much of a layer as its forms need; None if none is on a grid.

    tails: the squared errors of ranks 0, 1, ... alone. Raises FactorizationError where the layer must stay dense,
    ValueError where a calibration did not observe its inputs.
    """
    rounded = [form for form in forms if form.storage.grid is not None]
    if not rounded:
        return None
    matrices = site.adapter.matrices(shape)
    metric = metric_of(source, site, matrices)
    coarseness = _coarseness(matrices[0], metric, {form.storage.grid for form in rounded})
    reference = _reference(coarseness)
    dense = quantized_dense(matrices, metric, reference)
    corrected: tuple[float, ...] = ()
    if any(form.storage.corrected for form in rounded):
        corrected = tuple(corrected_errors(matrices, metric, reference, dense.weight).tolist())
    low_rank = [(0, 0.0)]
    factors = {form.rank: form.storage.grid for form in rounded if form.rank and not form.storage.corrected}
    for rank in _spread(sorted(factors)):
        measured = quantized_factors(matrices, metric, rank, factors[rank]).loss.squared_error
        added = max(0.0, measured - tails[min(rank, len(tails) - 1)])
        low_rank.append((rank, added * coarseness[reference] / (coarseness[factors[rank]] or 1.0)))
    return Rounding(coarseness, reference, dense.loss.squared_error, tuple(low_rank), corrected)


def rounding_like(
    whole: Rounding, site: Site, shape: Shape, forms: Sequence[Form], source: LayerStatistics | None
) -> Rounding | None:
    """As `rounding`, of a layer that is a part of another, of which it was measured."""
    grids = {form.storage.grid for form in forms if form.storage.grid is not None}
    if not grids:
        return None
    matrices = site.adapter.matrices(shape)
    return whole.scaled(_coarseness(matrices[0], metric_of(source, site, matrices), grids))


def loss(site: Site, form: Form | LayerPlan, source: LayerStatistics | None) -> Loss:
    """That of one form on a grid, with the weights that it will have; raises as `rounding`."""
    matrices = site.adapter.matrices(form.shape)
    return on_grids(matrices, metric_of(source, site, matrices), form.rank, form.storage).loss


def _reference(coarseness: dict[Grid, float]) -> Grid:
    """The grid to measure: the coarsest of 4 bits, if there is one."""
    return min(coarseness, key=lambda grid: (grid.bits != 4, -coarseness[grid]))


def _coarseness(weight: Tensor, metric: Metric | None, grids: set[Grid]) -> dict[Grid, float]:
    """What rounding to the nearest numbers of each grid costs. Groups that divide the rows of both factors divide those
    of the weight."""
    energy = None if metric is None else inputs_of(metric).diagonal()
    found = {}
    for grid in grids:
        lost = (weight - nearest(weight, grid, energy).dequantized()).double().square()
        found[grid] = (lost if energy is None else lost * energy).sum().item()
    return found


def _spread(ranks: Sequence[int]) -> list[int]:
    """A few of these from the first to the last."""
    places = {round(i * (len(ranks) - 1) / (_RANKS_MEASURED - 1)) for i in range(_RANKS_MEASURED)}
    return [ranks[place] for place in sorted(places)] if ranks else []


def _between(points: Sequence[tuple[int, float]], rank: int) -> float:
    """On the line between the two points around this rank, or at the last."""
    place = bisect_left(points, (rank,))
    if place == len(points):
        return points[-1][1]
    (before, low), (after, high) = points[max(place - 1, 0)], points[place]
    return high if after == before else low + (high - low) * (rank - before) / (after - before)
