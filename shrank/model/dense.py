"""The way back: the dense module that a low-rank layer stands for."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from ..layers.low_rank import LowRankLayer
from ..layers.plain import why_not_quiet
from ..layers.quantized import plain
from .adapters import adapter_of, target
from .survey import Site


def require_plain(sites: Iterable[Site], what: str) -> None:
    """Raise ValueError, naming layers and causes, unless the parameters of these low-rank layers are all they are."""
    problems = [f"{site.fqn or '(root)'}: {reason}" for site in sites if (reason := why_not_dense(site.module))]
    if problems:
        more = f"\n  and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise ValueError(f"these layers cannot be {what}; nothing was changed:\n  " + "\n  ".join(problems[:10]) + more)


def why_not_dense(layer: LowRankLayer) -> str:
    """What a dense layer made of this one's parameters would lack; '' if nothing."""
    if reason := layer.why_not_plain():
        return reason
    for name, part in layer.parts():
        if reason := why_not_quiet(part):
            return f"its {name} stage {reason}"
    if any(p.is_meta for p in layer.parameters()):
        return "its factors are on the meta device (offloaded or not loaded)"
    return ""


def dense_twin(layer: LowRankLayer) -> nn.Module:
    """The dense module that a low-rank layer stands for, with what its factors make as weight."""
    dense, bias = adapter_of(layer).dense_from(layer), layer.dense_bias()
    dense.weight = nn.Parameter(layer.dense_weight_like(dense))
    if bias is not None:
        dense.bias = nn.Parameter(bias.detach())
    return dense


def plain_twin(linear: nn.Linear) -> nn.Linear:
    """A linear layer with the numbers that the weight of this one, on a grid, stands for."""
    made = target(linear, vouched=True).like()
    made.weight, made.bias = nn.Parameter(plain(linear.weight)), linear.bias
    return made
