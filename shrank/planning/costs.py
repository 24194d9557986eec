"""What layers cost at a rank, in the unit of a budget: weights, arithmetic or time."""

from __future__ import annotations

from dataclasses import dataclass

from ..linalg import AS_IT_IS, Shape, Storage
from .grids import Grids
from .latency import LatencyTable


@dataclass(frozen=True)
class PricedLayer:
    """What a cost may depend on beside the rank and the shape of a layer.

    tokens: those it saw in the calibration, of a convolution the positions of its output; None without a calibration.
    per_token: whether it runs once for each token, which convolutions do not. itemsize: bytes of a weight now.
    """

    fqn: str
    tokens: int | None
    per_token: bool
    itemsize: int = 2


@dataclass(frozen=True)
class Params:
    """Numbers that are stored; those of an index count too."""

    keep: float

    def of(self, layer: PricedLayer, rank: int | None, shape: Shape, storage: Storage = AS_IT_IS) -> float:
        return shape.stored_params(rank, storage) + (shape.index_size if rank is not None else 0)


@dataclass(frozen=True)
class Bytes:
    """Bytes on disk, and what may be done to have fewer."""

    keep: float
    grids: Grids

    def of(self, layer: PricedLayer, rank: int | None, shape: Shape, storage: Storage = AS_IT_IS) -> float:
        return shape.bytes(rank, storage, layer.itemsize)


@dataclass(frozen=True)
class Flops:
    """Floating-point operations on the calibration data; without a calibration all linear layers see as many tokens."""

    keep: float

    def of(self, layer: PricedLayer, rank: int | None, shape: Shape, storage: Storage = AS_IT_IS) -> float:
        if layer.tokens is None and not layer.per_token:
            raise ValueError(f"{layer.fqn}: keep_flops needs a calibration, which tells how often a kernel is applied")
        extra = shape.flops(None) if storage.corrected else 0
        return (shape.flops(rank) + extra) * (1 if layer.tokens is None else layer.tokens)


@dataclass(frozen=True)
class Latency:
    """Seconds that were measured."""

    keep: float
    table: LatencyTable

    def of(self, layer: PricedLayer, rank: int | None, shape: Shape, storage: Storage = AS_IT_IS) -> float:
        return self.table.seconds(layer.fqn, rank, shape.pivoted)


Cost = Params | Bytes | Flops | Latency
