"""A block with fewer units than it has: what its layers would be, and what is known of them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..calibration.metric_source import LayerStatistics, OfKept, columns_of
from ..linalg import Columns, fitted
from ..model.adapters import Target, target
from ..model.surgery import resized
from ..model.survey import Site
from ..model.unit_blocks import UnitBlock, kept_of, narrowed_consumer, narrowed_producer


class Narrower:
    """A block at a width. Its weights are made when they are asked for, and not held.

    Args:
        block: The block as it is.
        sites: Of its layers, by name.
        source: Who knows what they see.
        units: Which of its units stay.
    """

    def __init__(self, block: UnitBlock, sites: Mapping[str, Site], source: LayerStatistics, units: Tensor) -> None:
        self._block, self._sites, self._source, self._units = block, sites, source, units
        self._kept = kept_of(block, units)
        self.statistics = OfKept(source, self._kept)

    @property
    def width(self) -> int:
        return len(self._units)

    def site(self, fqn: str, columns: Columns | None = None) -> Site:
        """A layer as it would be, which no model has; columns: what is known of the units, where somebody has it.

        Raises FactorizationError as fitting the consumer does.
        """
        site, block = self._sites[fqn], self._block
        if fqn == block.consumer:
            columns = columns or columns_of(self._source, site)
            matrix = fitted(columns, block.columns_left(self._units, len(columns.data)))
            attributes = narrowed_consumer(site.module, matrix)
        else:
            attributes = narrowed_producer(site.module, self._kept[fqn].rows)
        return Site(fqn, resized(site.module, attributes))

    def adapter(self, fqn: str) -> Target:
        """The layer as what its type is, with sizes and without weights."""
        site, kept = self._sites[fqn], self._kept[fqn]
        rows = site.shape.out_features if kept.rows is None else len(kept.rows)
        columns = site.shape.in_features if kept.columns is None else len(kept.columns)
        bias = None if site.module.bias is None else torch.empty(rows, device="meta")
        attributes = target(site.module, vouched=True).resized(torch.empty(rows, columns, device="meta"), bias)
        return target(resized(site.module, attributes), vouched=True)
