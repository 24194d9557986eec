"""The names of a plan's layers in the model of transformers that is being loaded, which may be of another class."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import nn

from ..layers.quantized import SCALES, VALUES
from ..layers.seal import DENSE_NAME
from ..layers.two_stage import BASE, UNITS
from ..linalg import Shape
from ..model.adapters import target
from ..planning.narrowed import NarrowedBlock
from ..planning.plan import RankPlan

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def seal_patterns(plan: RankPlan, model: PreTrainedModel) -> set[str]:
    """Patterns of the names of seals, of which there is no need to warn; one for all layers of a stack."""
    names = {name for layer in plan.changed for name in possible_names(layer.fqn, model)}
    return {"^" + re.sub(r"\d+", r"\\d+", re.escape(f"{name}.{DENSE_NAME}")) + "$" for name in names}


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
        fqn = next((name for name in possible_names(layer.fqn, model) if outer(name) in names), layer.fqn)
        if outer(fqn) in names or is_saved_class(model):
            layers.append(replace(layer, fqn=fqn))
    return RankPlan(tuple(layers), narrowed=_blocks_as_loaded(plan, model, {layer.fqn for layer in layers}, names))


def _blocks_as_loaded(plan: RankPlan, model: nn.Module, layers: set[str], names: set[str]) -> tuple[NarrowedBlock, ...]:
    """The blocks in the names of the model being loaded, of those whose layers it has. names: of all its modules."""

    def loaded(fqn: str, known: set[str] = layers) -> str:
        return next((name for name in possible_names(fqn, model) if name in known), fqn)

    blocks = [
        replace(
            block,
            producers=tuple(map(loaded, block.producers)),
            consumer=loaded(block.consumer),
            carriers=tuple(loaded(fqn, names) for fqn in block.carriers),
        )
        for block in plan.narrower
    ]
    return tuple(block for block in blocks if layers.issuperset(block.layers))


def resized_layers(plan: RankPlan, model: nn.Module) -> set[str]:
    """Planned layers that the model being loaded has in another size: a head for other labels, or for more words."""
    modules = dict(model.named_modules())
    layers = [
        (layer, target(modules[layer.fqn])) for layer in plan.changed if layer.fqn in modules and not layer.narrowed
    ]
    return {
        layer.fqn
        for layer, found in layers
        if found is not None and found.kind == layer.kind and _size(found.shape()) != _size(layer.shape)
    }


def _size(shape: Shape) -> tuple[int, int]:
    return shape.out_features, shape.in_features


def outer(name: str) -> str:
    """The layer of the dense model to which a name of what it became belongs; of any other name, the name."""
    packed = name.removesuffix(f".{DENSE_NAME}{VALUES}").removesuffix(f".{DENSE_NAME}{SCALES}")
    return re.split(rf"(?:^|\.)(?:{'|'.join((*UNITS, BASE))})(?:\.|$)", packed)[0]
