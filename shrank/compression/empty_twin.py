"""What a loader fills: a low-rank layer of which nothing but the form is there."""

from __future__ import annotations

from torch import nn

from ..layers.corrected import CorrectedLinear
from ..layers.packed import PackedLinear
from ..model.adapters import target
from ..model.survey import Site
from ..planning.plan import LayerPlan


def packed_linear(site: Site, layer: LayerPlan) -> PackedLinear:
    """The dense layer in few bits, still to be read."""
    storage, shape = layer.storage, layer.shape
    return PackedLinear(site.module, storage.grid, storage.activations, (shape.out_features, shape.in_features))


def empty_twin(site: Site, layer: LayerPlan) -> nn.Module:
    """A low-rank layer on the meta device; what has a grid is still to be read."""
    storage = layer.storage
    if storage.corrected:
        base = packed_linear(site, layer)
        twin = CorrectedLinear(base, layer.rank, device="meta", dtype=site.module.weight.dtype)
    else:
        twin = target(site.module, vouched=True).twin(layer.rank, layer.shape)
    if storage.of_factors is not None:
        for number in (0, 1):
            twin.stages[number] = PackedLinear(twin.stages[number], storage.of_factors, storage.activations)
    return twin
