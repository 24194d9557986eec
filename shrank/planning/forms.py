"""What a layer can become: its ranks, the shapes of the twins, and how their weights are stored."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from ..linalg import AS_IT_IS, Grid, Shape, Storage
from ..model.adapters import Target
from .costs import Bytes, Cost, Latency, PricedLayer
from .grids import Grids
from .options import PlanOptions, StaysDense, can_pivot, grouped, is_faster

# What tells the forms of one layer apart.
Key = tuple[int | None, Storage]
_OF_CORRECTIONS = Grid(8)  # that of their factors: as good as 16 bits, and half of their bytes


@dataclass(frozen=True)
class Form:
    """One rank for a layer, with the shape of the twin, None: dense; and how the weights are stored."""

    rank: int | None
    shape: Shape
    storage: Storage = AS_IT_IS

    @property
    def key(self) -> Key:
        return self.rank, self.storage


def forms(
    layer: PricedLayer, adapter: Target, shape: Shape, options: PlanOptions, cost: Cost | None, pivots: bool
) -> dict[Key, Form]:
    """Every form that the layer could have; dense as it is where it may be or can be nothing else.

    cost: what a budget counts, if there is one. Measured times decide where factors are pivoted, else whether they may
    be; bytes bring few bits.
    """
    as_it_is = Form(None, shape)
    found = [as_it_is] if options.allow_dense else []
    times = cost if isinstance(cost, Latency) and options.pivot == "auto" else None
    found += _low_rank(layer, adapter, shape, options, times, pivots)
    if isinstance(cost, Bytes):
        found += _on_grids(adapter, shape, options, cost.grids)
    return {form.key: form for form in found or [as_it_is]}


def _low_rank(
    layer: PricedLayer, adapter: Target, shape: Shape, options: PlanOptions, times: Latency | None, pivots: bool
) -> Iterator[Form]:
    pivots = times is not None or pivots
    for rank in _ranks(shape, options, 8 if shape.max_rank >= 128 else 1):
        try:
            twin = grouped(rank, adapter, options)
        except StaysDense:
            continue
        pivoted = replace(twin, pivoted=pivots and can_pivot(twin, rank))
        if times is not None:
            is_less = times.of(layer, rank, pivoted) < times.of(layer, rank, twin)
        else:  # below a certain rank the index costs more than the pivots save
            is_less = pivoted.low_rank_params(rank) + pivoted.index_size < twin.low_rank_params(rank)
        twin = pivoted if is_less else twin
        grows = twin.low_rank_params(rank) + twin.index_size >= twin.dense_params
        if not grows and is_faster(rank, twin, adapter, options):
            yield Form(rank, twin)


def _on_grids(adapter: Target, shape: Shape, options: PlanOptions, grids: Grids) -> Iterator[Form]:
    """The dense weight on a grid, with and without a correction, and plain factors on one where they are smaller."""
    if not adapter.why_not_on_grid(None):
        for grid in grids.of(shape.in_features, shape.in_features):
            if options.allow_dense:
                yield Form(None, shape, Storage(grid))
            corrected = Storage(grid, True, _OF_CORRECTIONS)
            for rank in grids.correction_ranks if grid.bits < 8 else ():
                if rank <= shape.max_rank and shape.bytes(rank, corrected) < shape.bytes(None):
                    yield Form(rank, shape, corrected)
    for rank in _ranks(shape, options, min(grids.group_sizes, default=1)):
        if adapter.why_not_on_grid(rank):
            continue
        for grid in grids.of(math.gcd(shape.in_features, rank)):
            if shape.bytes(rank, Storage(grid)) < shape.bytes(None, Storage(grid)):
                yield Form(rank, shape, Storage(grid))


def _ranks(shape: Shape, options: PlanOptions, step: int) -> Iterator[int]:
    """Ranks that the options allow, multiples of what they say or of this."""
    multiple = math.lcm(options.round_to or step, shape.groups)
    largest = min(shape.max_rank, options.max_rank or math.inf)
    for rank in range(multiple, int(largest) + 1, multiple):
        if rank >= (options.min_rank or 1):
            yield rank
