"""What LED and CED share: a sequence of two stages, the down factor and the up factor with the bias."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def checked_rank(rank: int | None, r: int | None) -> int:
    """The one rank that was given, as `rank` or as the ancestors' `r`."""
    if (rank is None) == (r is None):
        raise TypeError(f"give the rank once, as rank= or as r=; got rank={rank}, r={r}")
    rank = r if rank is None else rank
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    return rank


@torch.no_grad()
def reset_stages(stages: nn.Sequential, fan_in: int, rank: int) -> None:
    """Draw both stages so that the pair has the output variance of PyTorch's own layers, 1/3 for unit inputs.

    nn.Linear and nn.Conv draw U(-1/sqrt(fan_in), 1/sqrt(fan_in)), a variance of 1/(3 fan_in). Here the first stage
    keeps the input's variance (1/fan_in) and the second one divides it by three (1/(3 rank)).
    """
    if stages[0].weight.is_meta:
        return
    nn.init.uniform_(stages[0].weight, -math.sqrt(3 / fan_in), math.sqrt(3 / fan_in))
    nn.init.uniform_(stages[1].weight, -1 / math.sqrt(rank), 1 / math.sqrt(rank))
    if stages[1].bias is not None:
        nn.init.uniform_(stages[1].bias, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))


def set_stages(stages: nn.Sequential, down: Tensor, up: Tensor, bias: Tensor | None) -> None:
    for stage, name, value in ((0, "weight", down), (1, "weight", up), (1, "bias", bias)):
        if (value is None) != (stages[stage]._parameters[name] is None):
            raise ValueError(f"the layer was built {'without' if value is not None else 'with'} a {name}")
        if value is not None:
            if value.shape != (expected := stages[stage]._parameters[name].shape):
                raise ValueError(f"{name} of stage {stage} has shape {tuple(value.shape)}, wanted {tuple(expected)}")
            # A parameter is kept as it is: a bias may be shared with another module.
            setattr(stages[stage], name, value if isinstance(value, nn.Parameter) else nn.Parameter(value))


def is_untouched(stage: nn.Module) -> bool:
    """Whether a module of one of PyTorch's own types does nothing beside its operator: not hooked, not patched."""
    own = stage.__dict__
    return "forward" not in own and not (own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"]
                                         or own["_backward_pre_hooks"])
