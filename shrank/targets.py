"""Which modules can become low-rank, how their weights read as matrices, and how their twins are built.

Adding a layer type means adding one class here and its entry in ADAPTERS.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedTensorMixin
from torch.nn.utils import parametrizations

from .ced import CED, CONVOLUTIONS
from .led import LED, LEDConv1D
from .linalg import Factors, Shape

LOW_RANK = (LED, CED)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Target:
    """One eligible module, seen as the matrix that its low-rank twin approximates."""

    kind: ClassVar[str]
    taps = 1  # positions of a kernel

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def shape(self) -> Shape:
        """The matrix of the module, with the groups that its twin gets unless the rank is too small for them."""
        raise NotImplementedError

    def why_not_grouped(self, shape: Shape) -> str:
        """Why the twin cannot have the groups of this shape; '' if it can."""
        return ""

    def matrices(self, shape: Shape) -> Tensor:
        """The weight as (G, N/G, K/G), one matrix per group of the twin's first stage."""
        raise NotImplementedError

    def twin(self, rank: int, shape: Shape) -> nn.Module:
        """A low-rank module of the same interface, on the meta device: nothing is drawn only to be overwritten."""
        raise NotImplementedError

    def set_factors(self, twin: nn.Module, factors: Factors) -> None:
        """Give the twin these factors and the module's own bias."""
        twin.set_factors(factors.down[0], factors.up[0], self.module.bias)

    def _meta(self) -> dict:
        return {"device": "meta", "dtype": self.module.weight.dtype}


class LinearTarget(Target):
    kind = "Linear"

    def shape(self) -> Shape:
        return Shape(*self.module.weight.shape)

    def matrices(self, shape: Shape) -> Tensor:
        return self.module.weight.detach()[None]

    def twin(self, rank: int, shape: Shape) -> LED:
        return LED(shape.in_features, shape.out_features, rank, self.module.bias is not None, **self._meta())


class HFConv1DTarget(Target):
    """transformers' Conv1D: a linear layer whose weight is stored transposed, (in, out)."""

    kind = "Conv1D"

    def shape(self) -> Shape:
        return Shape(*self.module.weight.mT.shape)

    def matrices(self, shape: Shape) -> Tensor:
        return self.module.weight.detach().mT[None]

    def twin(self, rank: int, shape: Shape) -> LEDConv1D:
        return LEDConv1D(shape.in_features, shape.out_features, rank, True, **self._meta())


class ConvTarget(Target):
    """Any nn.ConvNd; the matrix has in_channels x kernel columns and falls into one block per group."""

    @property
    def kind(self) -> str:
        return type(self.module).__name__

    @property
    def taps(self) -> int:
        return math.prod(self.module.kernel_size)

    def shape(self) -> Shape:
        conv = self.module
        out_channels, in_channels, *kernel = conv.weight.shape              # in_channels of one group
        return Shape(out_channels, in_channels * conv.groups * math.prod(kernel), conv.groups, down_groups=conv.groups)

    def why_not_grouped(self, shape: Shape) -> str:
        channels, G = (self.module.in_channels, self.module.out_channels), shape.down_groups
        if channels[0] % G:
            return f"{G} groups do not divide its {channels[0]} input channels"
        if shape.up_groups > 1 and (channels[1] % G or shape.groups % G):
            return f"{G} groups do not divide its {channels[1]} output channels and {shape.groups} groups"
        return ""

    def matrices(self, shape: Shape) -> Tensor:
        weight, G = self.module.weight.detach().flatten(1), shape.down_groups
        if shape.groups != G:
            weight = torch.block_diag(*weight.unflatten(0, (shape.groups, -1)))  # (N, K), zero across dense groups
            if shape.up_blocks == 1:                                        # column blocks, every output in each
                return weight.unflatten(1, (G, -1)).transpose(0, 1)
            weight = weight.unflatten(0, (G, -1)).unflatten(2, (G, -1))     # the diagonal blocks
            return weight.diagonal(dim1=0, dim2=2).movedim(-1, 0)
        return weight.unflatten(0, (G, -1))

    def twin(self, rank: int, shape: Shape) -> CED:
        conv = self.module
        twin = CED(conv.in_channels, conv.out_channels, rank, conv.kernel_size, conv.stride, conv.padding,
                   conv.dilation, conv.groups, shape.up_groups > 1, conv.padding_mode, conv.bias is not None,
                   **self._meta())
        return twin.to(memory_format=memory_format(conv.weight))

    def set_factors(self, twin: CED, factors: Factors) -> None:
        up = factors.up
        if twin.up_groups == twin.down_groups:
            up = up.flatten(0, 1)                                           # (out, rank/G)
        elif up.shape[0] * up.shape[1] == twin.out_channels:
            up = torch.block_diag(*up)                                      # (out, rank), zero across groups
        else:
            up = up.transpose(0, 1).flatten(1)                              # column blocks: (out, rank)
        down, up = factors.down.flatten(0, 1).reshape(twin.down.shape), up.reshape(twin.up.shape)
        layout = {"memory_format": memory_format(self.module.weight)}
        twin.set_factors(down.contiguous(**layout), up.contiguous(**layout), self.module.bias)


ADAPTERS: dict[type, type[Target]] = {nn.Linear: LinearTarget, **{c: ConvTarget for c in CONVOLUTIONS.values()}}


def target(module: nn.Module) -> Target | None:
    """The adapter of a module whose class is supported, else None; subclasses are not."""
    adapter = HFConv1DTarget if _is_hf_conv1d(type(module)) else ADAPTERS.get(type(module))
    return adapter and adapter(module)


def with_groups(shape: Shape, rank: int, groups_out: bool) -> Shape:
    """The shape of a grouped twin at this rank: min(rank, groups) groups, in both stages if `groups_out`."""
    groups = min(rank, shape.groups)
    return replace(shape, down_groups=groups, up_groups=groups if groups_out else 1)


def why_not(module: nn.Module) -> list[str]:
    """Every reason for which this module, taken alone, cannot be replaced; [] means it can."""
    if isinstance(module, LOW_RANK):
        return ["already low-rank"]
    weight = getattr(module, "weight", None)
    if is_lazy(weight):
        return ["its weight is not initialized yet"]
    if target(module) is None:
        return [_why_not_type(module)]
    if type(weight) is not nn.Parameter or "weight" not in module._parameters:
        return [f"its weight is a {type(weight).__name__}, not a plain parameter (weight_norm, pruning, quantization)"]
    reasons = []
    if weight.is_meta:
        reasons.append("its weight is on the meta device (offloaded or not loaded)")
    elif weight.dtype not in _DTYPES:
        reasons.append(f"its weight is {weight.dtype}")
    extra = [n for n, _ in module.named_parameters() if n not in ("weight", "bias")]
    if extra := extra + [n for n, _ in module.named_buffers()]:
        reasons.append(f"it carries extra state: {', '.join(extra)}")
    # weight_norm leaves one of torch behind when its parametrization goes; it only renames entries of old checkpoints.
    loading = [h for h in module._load_state_dict_pre_hooks.values() if h.hook.__module__ != parametrizations.__name__]
    if module._state_dict_hooks or loading:
        reasons.append("it has state-dict hooks, made for a dense weight")
    if "forward" in vars(module) and not hasattr(module, "_hf_hook"):
        reasons.append("its forward was patched on the instance")
    return reasons or _why_not_shape(target(module).shape())


def _why_not_type(module: nn.Module) -> str:
    kind = type(module)
    if nn.utils.parametrize.is_parametrized(module):
        return f"its {', '.join(module.parametrizations)} is parametrized"
    base = next((c for c in kind.__mro__ if c in ADAPTERS or _is_hf_conv1d(c)), None)
    if base is not None:
        return f"{kind.__name__} is a subclass of {base.__name__}"
    # Quantized layers are namesakes of the dense ones.
    namesake = f" of {kind.__module__}" if kind.__name__ in {c.__name__ for c in ADAPTERS} else ""
    return f"{kind.__name__}{namesake} is not a supported layer type"


def _why_not_shape(shape: Shape) -> list[str]:
    if shape.groups > 1 and shape.max_rank == shape.groups:
        return [f"depthwise: each of its {shape.groups} groups already has rank 1"]
    return [] if shape.dense_params else ["it is empty"]


def is_lazy(parameter: object) -> bool:
    """Whether a parameter gets its shape at the first forward."""
    return isinstance(parameter, UninitializedTensorMixin)


def dense_twin(layer: LED | CED) -> nn.Module:
    """The dense module that a low-rank layer stands for, with the product of its factors as weight."""
    bias, weight = layer.bias, layer.dense_weight().detach()
    meta = {"device": "meta", "dtype": weight.dtype}
    if isinstance(layer, LEDConv1D):
        from transformers.pytorch_utils import Conv1D

        dense = Conv1D(layer.nf, layer.nx)
    elif isinstance(layer, LED):
        dense = nn.Linear(layer.in_features, layer.out_features, bias is not None, **meta)
    else:
        groups, weight = _dense_groups(layer, weight)
        dense = CONVOLUTIONS[len(layer.kernel_size)](
            layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding, layer.dilation,
            groups, bias is not None, layer.padding_mode, **meta)
        weight = weight.contiguous(memory_format=memory_format(layer.down))
    dense.weight = nn.Parameter(weight)
    if bias is not None:
        dense.bias = nn.Parameter(bias.detach())
    return dense


def _dense_groups(layer: CED, weight: Tensor) -> tuple[int, Tensor]:
    """The groups of the merged convolution and its kernel: grouped where nothing crosses the first stage's groups."""
    G = layer.down_groups
    if layer.up_groups == G or layer.out_channels % G:
        return layer.groups, weight
    blocks = weight.unflatten(0, (G, -1)).unflatten(2, (G, -1))             # (G, out/G, G, in/G, *kernel)
    own = blocks.diagonal(dim1=0, dim2=2).movedim(-1, 0)
    if torch.count_nonzero(blocks) != torch.count_nonzero(own):
        return layer.groups, weight
    return G, own.flatten(0, 1).contiguous()


def memory_format(weight: Tensor) -> torch.memory_format:
    """channels_last where the tensor is stored so and not contiguous as well, else contiguous."""
    wanted = {4: torch.channels_last, 5: torch.channels_last_3d}.get(weight.dim())
    unlike = wanted and not weight.is_contiguous() and weight.is_contiguous(memory_format=wanted)
    return wanted if unlike else torch.contiguous_format


def _is_hf_conv1d(kind: type) -> bool:
    # By name: a model that has such a layer imported it, so shrank need not import transformers to recognise it.
    return kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.")
