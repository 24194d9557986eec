"""Modules between the layers of a block that have numbers for every unit and meet no two of them: batch norms, PReLU,
depthwise convolutions."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..layers.two_stage import memory_format
from .adapters import target

_BATCH_NORMS = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d
# What they call the number of their units.
_SIZES = ("num_features", "num_parameters", "in_channels", "out_channels", "groups")


def units_carried(module: nn.Module) -> int | None:
    """How many units a module has numbers for; None for one that is no carrier."""
    if isinstance(module, _BATCH_NORMS):
        return module.num_features
    if isinstance(module, nn.PReLU):
        return module.num_parameters if module.num_parameters > 1 else None
    adapter = target(module, vouched=True)
    if adapter is None or adapter.takes_vectors or type(module._parameters.get("weight")) is not nn.Parameter:
        return None
    shape = adapter.shape()
    is_depthwise = shape.groups == shape.out_features == module.in_channels > 1
    return shape.groups if is_depthwise else None


def is_shared(module: nn.Module) -> bool:
    """Whether a module learns a few numbers that may be the same for all units, as a norm over each head has them."""
    own = list(module._parameters.values())
    return not module._modules and any(p is not None for p in own) and all(p is None or p.dim() <= 1 for p in own)


def narrowed_carrier(module: nn.Module, kept: Tensor) -> dict[str, object]:
    """The attributes of a carrier with some of its units."""
    units = units_carried(module)

    def narrowed(value: Tensor) -> Tensor:
        some = value.detach()[kept.to(value.device)].contiguous(memory_format=memory_format(value))
        return nn.Parameter(some, value.requires_grad) if isinstance(value, nn.Parameter) else some

    values = {**module._parameters, **module._buffers}
    own = {name: value for name, value in values.items() if value is not None and value.dim() and len(value) == units}
    sizes = {name: len(kept) for name in _SIZES if vars(module).get(name) == units}
    return {name: narrowed(value) for name, value in own.items()} | sizes


def narrowed_state_of(module: nn.Module, width: int) -> dict[str, Tensor]:
    """What `state_dict()` of a carrier will hold at this width; what changes on the meta device."""
    state, new = module.state_dict(), narrowed_carrier(module, torch.arange(width))
    return {name: new[name].detach().to("meta") if name in new else value for name, value in state.items()}
