"""What the directions of a layer's weight are worth: by the weight alone, or by what a calibration knows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from ..calibration.metric_source import LayerStatistics, metric_of
from ..linalg import Grid, Shape, Storage, on_grids, spectrum, squared_errors
from ..model.survey import Site
from ..util.parallel import workers_for
from .forms import Form
from .rounding import Rounding, rounding, squared_error


class Spectra:
    """Singular values of layers' weights; with a calibration, in its norm."""

    def __init__(self, calibration: LayerStatistics | None) -> None:
        self.calibration = calibration

    def workers(self, weights: Iterable[Tensor]) -> int:
        """How many of the layers that these are the weights of to work on at once."""
        return workers_for(weights)

    def of(self, site: Site, shape: Shape) -> Tensor:
        """(G, m), descending, for the groups that a twin of this shape has; FactorizationError where the layer must
        stay dense."""
        matrices = site.adapter.matrices(shape)
        metric = metric_of(self.calibration, site, matrices)
        return spectrum(matrices) if metric is None else squared_errors(matrices, metric).sqrt()

    def error_on_grid(self, site: Site, rank: int | None, grid: Grid) -> float:
        """The relative error of a layer, or at a rank of its factors, with weights on a grid; FactorizationError as
        above, ValueError where a calibration did not observe the layer's inputs."""
        matrices = site.adapter.matrices(site.shape)
        metric = metric_of(self.calibration, site, matrices)
        return on_grids(matrices, metric, rank, Storage(grid)).loss.relative_error

    def rounding(self, site: Site, shape: Shape, forms: Sequence[Form], tails: Sequence[float]) -> Rounding | None:
        """What rounding does to the forms of a layer; raises as `planning.rounding.rounding` does."""
        return rounding(site, shape, forms, tails, self.calibration)

    def squared_error(self, site: Site, form: Form) -> float:
        """That of a form on a grid, measured."""
        return squared_error(site, form, self.calibration)
