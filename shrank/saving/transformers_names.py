"""Names of layers as transformers' models have them: with the base model's prefix more or less."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import nn

from ..layers.two_stage import UNITS
from ..planning.narrowed import NarrowedBlock
from ..planning.plan import RankPlan

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def possible_names(fqn: str, model: PreTrainedModel) -> tuple[str, str, str]:
    """A saved layer's name in the model being loaded: the same, or with the base model's prefix more or less."""
    prefix = f"{model.base_model_prefix}." if model.base_model_prefix else ""
    return fqn, prefix + fqn, fqn.removeprefix(prefix)


def is_saved_class(model: PreTrainedModel) -> bool:
    return type(model).__name__ in (model.config.architectures or ())


def as_loaded(plan: RankPlan, model: nn.Module) -> RankPlan:
    """The plan in the names of the model being loaded: a base model may be loaded from a checkpoint of its model with
    a head, and the other way round. Another class than the saved one may lack some of the layers."""
    names = {fqn for fqn, _ in model.named_modules()}
    layers = []
    for layer in plan:
        fqn = next((name for name in possible_names(layer.fqn, model) if outer_layer(name) in names), layer.fqn)
        if outer_layer(fqn) in names or is_saved_class(model):
            layers.append(replace(layer, fqn=fqn))
    return RankPlan(tuple(layers), narrowed=_blocks_as_loaded(plan, model, {layer.fqn for layer in layers}))


def _blocks_as_loaded(plan: RankPlan, model: nn.Module, layers: set[str]) -> tuple[NarrowedBlock, ...]:
    """The blocks in the names of the model being loaded, of those whose layers it has."""

    def loaded(fqn: str) -> str:
        return next((name for name in possible_names(fqn, model) if name in layers), fqn)

    blocks = [
        replace(block, producers=tuple(map(loaded, block.producers)), consumer=loaded(block.consumer))
        for block in plan.narrower
    ]
    return tuple(block for block in blocks if layers.issuperset(block.layers))


def outer_layer(name: str) -> str:
    """The layer of the dense model to which a name belongs: stages of low-rank layers are not in it."""
    return re.split(rf"\.?(?:{'|'.join(UNITS)})\.", name)[0]
