"""A dense weight that is given to a low-rank layer, as the factors that it is the product of."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..linalg import AS_IT_IS, FactorizationError, factorize, pivoted

if TYPE_CHECKING:
    from .low_rank import LowRankLayer


@torch.no_grad()
def assign_weight(layer: LowRankLayer, weight: Tensor) -> None:
    """Give the layer this weight; ValueError where no factors of its rank have it."""
    owner = type(layer).__name__
    if not isinstance(weight, Tensor) or tuple(weight.shape) != layer.weight_shape:
        raise ValueError(
            f"{owner}.weight is {tuple(layer.weight_shape)}, got "
            f"{tuple(weight.shape) if isinstance(weight, Tensor) else type(weight).__name__}"
        )
    if reason := layer.why_not_plain():
        raise RuntimeError(f"{owner}.weight cannot be assigned: {reason}")
    if layer.storage != AS_IT_IS:
        raise RuntimeError(f"{owner}.weight cannot be assigned to factors of {layer.storage}: merge the model first")
    try:
        found = factorize(layer.blocks_of(weight.detach()), layer.rank // layer.shape.down_groups)
    except FactorizationError as error:
        raise ValueError(f"{owner}.weight cannot be assigned: {error}") from error
    # Products that were rounded to the dtype; a weight of another rank is off by tens of percent.
    tolerance = max(8 * torch.finfo(weight.dtype).eps, 1e-4)
    if found.relative_error > tolerance:
        raise ValueError(
            f"{owner}.weight was given a weight that no factors of rank {layer.rank} have (they miss "
            f"{found.relative_error:.2g} of it): merge the model to dense layers first, or use set_factors"
        )
    flags = {name: p.requires_grad for name, p in layer.named_parameters()}
    layer.take(pivoted(found) if layer.pivoted else found, layer.bias)
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(flags[name])
