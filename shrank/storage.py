"""The same low-rank layers in other storage: pivoted ones with plain factors, and back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from . import surgery
from .apply import shape_of
from .dense import dense_twin
from .linalg import Factors, PivotedFactors, pivoted, unpivoted
from .surgery import Site, walk
from .targets import LOW_RANK, target

Stored = Factors | PivotedFactors


def with_plain_factors(model: nn.Module) -> tuple[nn.Module, list[str]]:
    """The model, changed in place, with plain factors in its pivoted layers, and the names of these."""
    return _stored_otherwise(model, lambda site: site.module.pivoted, unpivoted)


def with_pivots(model: nn.Module, names: list[str]) -> nn.Module:
    """The model, changed in place, with pivots in these low-rank layers."""
    return _stored_otherwise(model, lambda site: site.fqn in names, pivoted)[0]


@torch.no_grad()
def _stored_otherwise(model: nn.Module, wanted: Callable[[Site], bool],
                      convert: Callable[[Stored], Stored]) -> tuple[nn.Module, list[str]]:
    sites = [site for site in walk(model) if isinstance(site.module, LOW_RANK) and wanted(site)]
    for site in sites:
        layer, shape, found = site.module, shape_of(site.module), target(dense_twin(site.module))
        down, up = (stage.flatten(1).unflatten(0, (shape.down_groups, -1)) for stage in (layer.down, layer.up))
        factors = convert(PivotedFactors(down, up, layer.order, 1.0) if layer.pivoted else Factors(down, up, 0.0, 1.0))
        twin = found.twin(layer.rank, replace(shape, pivoted=isinstance(factors, PivotedFactors)))
        found.set_factors(twin, factors, layer.bias)
        model = surgery.replace(model, site, twin)
    return model, [site.fqn for site in sites]
