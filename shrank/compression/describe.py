"""The plan that a model amounts to."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from ..layers.quantized import is_quantized, storage_of
from ..model.adapters import LOW_RANK, target
from ..model.survey import Site, Survey, count
from ..model.unit_blocks import narrowed_in
from ..planning.narrowed import NarrowedBlock
from ..planning.plan import LayerPlan, RankPlan


def describe(model: nn.Module) -> RankPlan:
    """Read the plan off a model that its low-rank layers amount to, however they came about.

    Args:
        model: Any model.

    Returns:
        A plan of its low-rank layers, of the linear layers that shrank put on a grid and of the layers of its narrowed
        blocks alone.
    """
    survey = Survey(model)
    sites = {site.fqn: site for site in survey.sites(inside_low_rank=True)}
    layers = {
        fqn: describe_layer(site) for fqn, site in sites.items() if isinstance(site.module, LOW_RANK) or is_ours(site)
    }
    blocks = []
    for block, width in narrowed_in(model):
        if all(fqn in sites for fqn in block.layers):
            blocks.append(replace(NarrowedBlock.of(block), width=width))
            own = [fqn for fqn in block.modules if fqn in sites]
            layers |= {fqn: _describe_narrowed(sites[fqn], layers.get(fqn), blocks[-1]) for fqn in own}
    plan = RankPlan(tuple(layers.values()), narrowed=tuple(blocks))
    return replace(plan, other_params=max(0, count(model.parameters()) - plan.params_after))


def is_ours(site: Site) -> bool:
    """Whether it is a linear layer with a weight on a grid, and not a stage of a low-rank layer."""
    return not site.inside and is_quantized(site.module._parameters.get("weight"))


def describe_layer(site: Site) -> LayerPlan:
    layer = site.module
    if isinstance(layer, LOW_RANK):
        shape = layer.shape
        return LayerPlan(site.fqn, layer.kind, shape.dense_params, shape, layer.rank, storage=layer.storage)
    found = target(layer, vouched=True)
    return LayerPlan(site.fqn, found.kind, found.shape().dense_params, found.shape(), storage=storage_of(layer))


def _describe_narrowed(site: Site, layer: LayerPlan | None, block: NarrowedBlock) -> LayerPlan:
    if layer is None:
        layer = LayerPlan(site.fqn, site.adapter.kind, 0, site.shape)
    return replace(layer, size=layer.shape.dense_params // block.width * block.units, narrowed=True)
