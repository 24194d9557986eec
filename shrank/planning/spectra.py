"""What the directions of a layer's weight are worth: by the weight alone, or by what a calibration knows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from ..calibration.metric_source import LayerStatistics, metric_of
from ..linalg import Loss, Shape, spectrum, squared_errors
from ..model.survey import Site
from ..util.parallel import workers_for
from .forms import Form
from .plan import LayerPlan
from .rounding import Rounding, loss, rounding, rounding_like


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

    def rounding(self, site: Site, shape: Shape, forms: Sequence[Form], tails: Sequence[float]) -> Rounding | None:
        """What rounding does to the forms of a layer; raises as `planning.rounding.rounding` does."""
        return rounding(site, shape, forms, tails, self.calibration)

    def rounding_like(self, whole: Rounding, site: Site, shape: Shape, forms: Sequence[Form]) -> Rounding | None:
        """What it does to those of a layer that has lost rows or columns, estimated by what it did to the whole."""
        return rounding_like(whole, site, shape, forms, self.calibration)

    def loss(self, site: Site, form: Form | LayerPlan) -> Loss:
        """That of a layer in a form on a grid, measured; raises as `rounding`."""
        return loss(site, form, self.calibration)
