"""The way back: the dense module that a low-rank layer stands for."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..layers.ced import CED
from ..layers.led import LED, LEDConv1D
from ..layers.plain import CONVOLUTIONS, why_not_quiet
from ..layers.two_stage import memory_format, merged_bias
from .subclasses import as_subclass
from .surgery import Site


def require_plain(sites: Iterable[Site], what: str) -> None:
    """Raise ValueError, naming layers and causes, unless the parameters of these low-rank layers are all they are."""
    problems = [f"{site.fqn or '(root)'}: {reason}" for site in sites if (reason := why_not_dense(site.module))]
    if problems:
        more = f"\n  and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise ValueError(f"these layers cannot be {what}; nothing was changed:\n  " + "\n  ".join(problems[:10]) + more)


def why_not_dense(layer: LED | CED) -> str:
    """What a dense layer made of this one's parameters would lack; '' if nothing."""
    if reason := layer.why_not_plain():
        return reason
    for name, stage in zip(("down", "up", "pivots"), layer.stages, strict=False):
        if reason := why_not_quiet(stage):
            return f"its {name} stage {reason}"
    if any(p.is_meta for p in layer.parameters()):
        return "its factors are on the meta device (offloaded or not loaded)"
    return ""


def dense_twin(layer: LED | CED) -> nn.Module:
    """The dense module that a low-rank layer stands for, with the product of its factors as weight."""
    bias, weight = merged_bias(layer.stages), layer.dense_weight().detach()
    meta = {"device": "meta", "dtype": weight.dtype}
    if isinstance(layer, LEDConv1D):
        from transformers.pytorch_utils import Conv1D

        dense = Conv1D(layer.nf, layer.nx)
    elif isinstance(layer, LED):
        dense = nn.Linear(layer.in_features, layer.out_features, bias is not None, **meta)
    else:
        groups, weight = _dense_groups(layer, weight)
        dense = CONVOLUTIONS[len(layer.kernel_size)](
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size,
            layer.stride,
            layer.padding,
            layer.dilation,
            groups,
            bias is not None,
            layer.padding_mode,
            **meta,
        )
        weight = weight.contiguous(memory_format=memory_format(layer.down))
    dense.weight = nn.Parameter(weight)
    if bias is not None:
        dense.bias = nn.Parameter(bias.detach())
    return as_subclass(dense, layer[0])


def _dense_groups(layer: CED, weight: Tensor) -> tuple[int, Tensor]:
    """The groups of the merged convolution and its kernel: grouped where nothing crosses the first stage's groups."""
    G = layer.down_groups
    if layer.up_groups == G or layer.out_channels % G:
        return layer.groups, weight
    blocks = weight.unflatten(0, (G, -1)).unflatten(2, (G, -1))  # (G, out/G, G, in/G, *kernel)
    own = blocks.diagonal(dim1=0, dim2=2).movedim(-1, 0)
    if torch.count_nonzero(blocks) != torch.count_nonzero(own):
        return layer.groups, weight
    return G, own.flatten(0, 1).contiguous()
