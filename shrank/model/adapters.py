"""Which modules can become low-rank, how their weights read as matrices, and how their twins are built.

Adding a layer type means adding one class here and its entry in ADAPTERS.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedTensorMixin
from torch.nn.utils import parametrizations

from ..layers.ced import CED
from ..layers.led import LED, LEDConv1D
from ..layers.plain import CONVOLUTIONS
from ..layers.two_stage import memory_format
from ..linalg import Shape
from .subclasses import as_subclass, base_of, disagreement, is_trusted

LOW_RANK = (LED, CED)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Target:
    """One eligible module, seen as the matrix that its low-rank twin approximates."""

    kind: ClassVar[str]
    taps = 1  # positions of a kernel
    takes_vectors = True  # its matrix multiplies the input's last dimension as it is

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

    def tokens(self, outputs: Tensor) -> Tensor:
        """The module's inputs, outputs or gradients with the features last, a vector for every token or position."""
        return outputs

    def input_energy(self, inputs: Tensor, chosen: Callable[[Tensor, int], Tensor]) -> Tensor:
        """Mean square (K,) of each column's input, in the tokens that `chosen(inputs, 1)` gives as (1, tokens, K)."""
        return chosen(inputs, 1)[0].square().mean(0)

    def _cast_alike(self, twin: LED | CED) -> LED | CED:
        for number in (0, 1):
            twin.stages[number] = as_subclass(twin.stages[number], self.module)
        return twin

    def _meta(self) -> dict:
        return {"device": "meta", "dtype": self.module.weight.dtype}


class LinearTarget(Target):
    kind = "Linear"

    def shape(self) -> Shape:
        return Shape(*self.module.weight.shape)

    def matrices(self, shape: Shape) -> Tensor:
        return self.module.weight.detach()[None]

    def twin(self, rank: int, shape: Shape) -> LED:
        return self._cast_alike(
            LED(
                shape.in_features,
                shape.out_features,
                rank,
                self.module.bias is not None,
                pivot=shape.pivoted,
                **self._meta(),
            )
        )


class HFConv1DTarget(Target):
    """transformers' Conv1D: a linear layer whose weight is stored transposed, (in, out)."""

    kind = "Conv1D"

    def shape(self) -> Shape:
        return Shape(*self.module.weight.mT.shape)

    def matrices(self, shape: Shape) -> Tensor:
        return self.module.weight.detach().mT[None]

    def twin(self, rank: int, shape: Shape) -> LEDConv1D:
        return LEDConv1D(shape.in_features, shape.out_features, rank, True, pivot=shape.pivoted, **self._meta())


class ConvTarget(Target):
    """Any nn.ConvNd; the matrix has in_channels x kernel columns and falls into one block per group."""

    takes_vectors = False

    @property
    def kind(self) -> str:
        return f"Conv{len(self.module.kernel_size)}d"

    @property
    def taps(self) -> int:
        return math.prod(self.module.kernel_size)

    def shape(self) -> Shape:
        conv = self.module
        out_channels, in_channels, *kernel = conv.weight.shape  # in_channels of one group
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
            if shape.up_blocks == 1:  # column blocks, every output in each
                return weight.unflatten(1, (G, -1)).transpose(0, 1)
            weight = weight.unflatten(0, (G, -1)).unflatten(2, (G, -1))  # the diagonal blocks
            return weight.diagonal(dim1=0, dim2=2).movedim(-1, 0)
        return weight.unflatten(0, (G, -1))

    def twin(self, rank: int, shape: Shape) -> CED:
        conv = self.module
        twin = CED(
            conv.in_channels,
            conv.out_channels,
            rank,
            conv.kernel_size,
            conv.stride,
            conv.padding,
            conv.dilation,
            conv.groups,
            shape.up_groups > 1,
            conv.padding_mode,
            conv.bias is not None,
            pivot=shape.pivoted,
            **self._meta(),
        )
        return self._cast_alike(twin.to(memory_format=memory_format(conv.weight)))

    def tokens(self, outputs: Tensor) -> Tensor:
        return outputs.movedim(-len(self.module.kernel_size) - 1, -1)

    def input_energy(self, inputs: Tensor, chosen: Callable[[Tensor, int], Tensor]) -> Tensor:
        return chosen(inputs, 1)[0].square().mean(0).repeat_interleave(self.taps)  # each tap sees the whole channel


ADAPTERS: dict[type, type[Target]] = {nn.Linear: LinearTarget, **{c: ConvTarget for c in CONVOLUTIONS.values()}}


def target(module: nn.Module, vouched: bool = False) -> Target | None:
    """The adapter of a module whose class is supported, else None. Subclasses are where `treat_as_base` was called for
    them, or if somebody `vouched` for this one, as a plan that was carried out once does."""
    kind = type(module)
    if _is_hf_conv1d(kind):
        return HFConv1DTarget(module)
    base = base_of(kind) if vouched or is_trusted(kind) else kind
    return ADAPTERS[base](module) if base in ADAPTERS else None


def with_groups(shape: Shape, rank: int, groups_out: bool, pivoted: bool = False) -> Shape:
    """The shape of a grouped twin at this rank: min(rank, groups) groups, in both stages if `groups_out`."""
    groups = min(rank, shape.groups)
    return replace(shape, down_groups=groups, up_groups=groups if groups_out else 1, pivoted=pivoted)


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
    if not reasons and type(module) not in ADAPTERS and is_trusted(type(module)) and (reason := disagreement(module)):
        reasons.append(f"treat_as_base does not hold: {reason}")
    return reasons or _why_not_shape(target(module).shape())


def _why_not_type(module: nn.Module) -> str:
    kind = type(module)
    if nn.utils.parametrize.is_parametrized(module):
        return f"its {', '.join(module.parametrizations)} is parametrized"
    # Namesakes are common: quantized layers, other packages' Linear.
    name = kind.__qualname__ if kind.__module__.startswith("torch.nn.") else f"{kind.__module__}.{kind.__qualname__}"
    if (base := base_of(kind)) is not None:
        return (
            f"{name} is a subclass of {base.__name__}: if it only casts or adds up in another order, "
            "shrank.treat_as_base(class) has it checked and taken for its base"
        )
    if any(_is_hf_conv1d(c) for c in kind.__mro__):
        return f"{name} is a subclass of transformers' Conv1D"
    return f"{name} is not a supported layer type"


def _why_not_shape(shape: Shape) -> list[str]:
    if shape.groups > 1 and shape.max_rank == shape.groups:
        return [f"depthwise: each of its {shape.groups} groups already has rank 1"]
    return [] if shape.dense_params else ["it is empty"]


def is_lazy(parameter: object) -> bool:
    """Whether a parameter gets its shape at the first forward."""
    return isinstance(parameter, UninitializedTensorMixin)


def _is_hf_conv1d(kind: type) -> bool:
    # By name: a model that has such a layer imported it, so shrank need not import transformers to recognise it.
    return kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.")
