"""Who says in what norm the error of a layer is measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from ..linalg import Columns, Kept, Metric
from ..model.survey import Site
from ..model.unit_blocks import UnitBlock


class MetricSource(Protocol):
    """The norm that each layer's factors are fitted in: a Calibration, or a view of one."""

    def metric(self, fqn: str, matrices: Tensor, centred: bool) -> Metric | None:
        """The norm for the error of one layer.

        Args:
            fqn: The layer's dotted name.
            matrices: Its weight (G, N/G, K/G), one matrix for each group.
            centred: Whether a bias makes up for the mean error, so that only the rest counts.

        Returns:
            The norm; None if nothing is known of the layer: the plain Frobenius norm is then used.

        Raises:
            FactorizationError: The layer must stay dense; the text says why.
        """

    def columns(self, fqn: str, matrices: Tensor, centred: bool) -> Columns | None:
        """The same by the layer's inputs one by one, for narrowing; None if nothing is known of them."""
        return None


class LayerStatistics(MetricSource, Protocol):
    """What a plan asks of a calibration: the norms, and how much data is behind them."""

    @property
    def has_gradients(self) -> bool:
        """Whether errors are weighted by a loss, so that those of different layers add up."""

    def __contains__(self, fqn: str) -> bool:
        """Whether the layer saw data."""

    def tokens(self, fqn: str) -> int:
        """Tokens, or positions of a convolution's output, that the layer saw."""

    @property
    def unit_blocks(self) -> tuple[UnitBlock, ...] | None:
        """The blocks that can be narrowed, and those that look so with the reason; None: not looked for."""
        return None


class OfKept(LayerStatistics):
    """What is known of layers that have lost rows or columns.

    Args:
        source: Who knows the layers as they were.
        kept: What is left of those that lost any, by name.
    """

    def __init__(self, source: LayerStatistics, kept: Mapping[str, Kept]) -> None:
        self._source, self._kept = source, kept

    def metric(self, fqn: str, matrices: Tensor, centred: bool) -> Metric | None:
        if fqn in self._kept:
            return self._source.metric(fqn, matrices, centred, kept=self._kept[fqn])
        return self._source.metric(fqn, matrices, centred)

    def columns(self, fqn: str, matrices: Tensor, centred: bool) -> Columns | None:
        return self._source.columns(fqn, matrices, centred)

    @property
    def has_gradients(self) -> bool:
        return self._source.has_gradients

    def __contains__(self, fqn: str) -> bool:
        return fqn in self._source

    def tokens(self, fqn: str) -> int:
        return self._source.tokens(fqn)


def columns_of(source: MetricSource | None, site: Site) -> Columns | None:
    """The norm for the error of a layer at this site by its inputs one by one; None if nothing is known of them."""
    if source is None:
        return None
    # Where a kernel sees zeros beside the input, a bias makes up for a mean that is not there. Without half of 48
    # random channels of 8x8 images, kernels of 3x3 and 7x7 err by 0.290 and 0.447 with it and by 0.286 and 0.425
    # without; of 32x32 images by as much either way.
    centred = site.module.bias is not None and not site.adapter.pads_with_zeros
    return source.columns(site.fqn, site.adapter.matrices(site.shape), centred)


def metric_of(source: MetricSource | None, site: Site, matrices: Tensor) -> Metric | None:
    """The norm for the error of a layer at this site; None if there is no source or it knows nothing of the layer."""
    return None if source is None else source.metric(site.fqn, matrices, site.module.bias is not None)
