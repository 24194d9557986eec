"""Layer types in all their forms: how a dense layer reads as matrices, how its low-rank twin is built, and which dense
layer a twin stands for.

Adding a layer type means adding one class here and registering it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedTensorMixin

from ..layers.ced import CED
from ..layers.led import LED, LEDConv1D
from ..layers.low_rank import LowRankLayer
from ..layers.plain import CONVOLUTIONS
from ..layers.two_stage import memory_format
from ..linalg import Shape
from .subclasses import as_subclass, base_of, is_trusted
from .target import Target

LOW_RANK = LowRankLayer


class LinearTarget(Target):
    kind = "Linear"

    def shape(self) -> Shape:
        return Shape(*self.module.weight.shape)

    def why_not_on_grid(self, rank: int | None) -> str:
        return ""

    def like(self) -> nn.Linear:
        """A layer of the same interface, on the meta device."""
        linear = self.module
        made = nn.Linear(linear.in_features, linear.out_features, linear.bias is not None, **self._meta())
        return as_subclass(made, linear)

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

    def resized(self, matrix: Tensor, bias: Tensor | None) -> dict[str, object]:
        N, K = matrix.shape
        return {**self._parameters(matrix, bias), "in_features": K, "out_features": N}

    @staticmethod
    def dense_from(layer: LED) -> nn.Linear:
        dense = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        return as_subclass(dense, layer[0])


class HFConv1DTarget(Target):
    """transformers' Conv1D: a linear layer whose weight is stored transposed, (in, out)."""

    kind = "Conv1D"

    def shape(self) -> Shape:
        return Shape(*self.module.weight.mT.shape)

    def why_not_on_grid(self, rank: int | None) -> str:
        # It multiplies by its weight transposed, which no tensor of torchao can; its factors are linear layers.
        return super().why_not_on_grid(rank) if rank is None else ""

    def matrices(self, shape: Shape) -> Tensor:
        return self.module.weight.detach().mT[None]

    def twin(self, rank: int, shape: Shape) -> LEDConv1D:
        return LEDConv1D(shape.in_features, shape.out_features, rank, True, pivot=shape.pivoted, **self._meta())

    def resized(self, matrix: Tensor, bias: Tensor | None) -> dict[str, object]:
        N, K = matrix.shape
        return {**self._parameters(matrix.mT, bias), "nx": K, "nf": N}

    @staticmethod
    def dense_from(layer: LEDConv1D) -> nn.Module:
        from transformers.pytorch_utils import Conv1D

        return Conv1D(layer.nf, layer.nx)


class ConvTarget(Target):
    """Any nn.ConvNd; the matrix has in_channels x kernel columns and falls into one block per group."""

    takes_vectors = False

    @property
    def kind(self) -> str:
        return f"Conv{len(self.module.kernel_size)}d"

    @property
    def taps(self) -> int:
        return math.prod(self.module.kernel_size)

    @property
    def pads_with_zeros(self) -> bool:
        padding = self.module.padding
        pads = padding == "same" if isinstance(padding, str) else any(padding)
        return pads and self.module.padding_mode == "zeros"

    @property
    def features(self) -> int:
        return -len(self.module.kernel_size) - 1

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

    def resized(self, matrix: Tensor, bias: Tensor | None) -> dict[str, object]:
        """Of one group alone."""
        weight = matrix.unflatten(1, (-1, *self.module.kernel_size))
        sizes = {"in_channels": weight.shape[1], "out_channels": len(weight)}
        return {**self._parameters(weight, bias), **sizes}

    @staticmethod
    def dense_from(layer: CED) -> nn.Module:
        """Grouped where nothing crosses the groups of the first stage."""
        dense = CONVOLUTIONS[len(layer.kernel_size)](
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size,
            layer.stride,
            layer.padding,
            layer.dilation,
            layer.separable_groups(),
            layer.bias is not None,
            layer.padding_mode,
            device="meta",
        )
        return as_subclass(dense, layer[0])

    def tokens(self, outputs: Tensor) -> Tensor:
        return outputs.movedim(self.features, -1)

    def input_energy(self, inputs: Tensor, chosen: Callable[[Tensor, int], Tensor]) -> Tensor:
        return chosen(inputs, 1)[0].square().mean(0).repeat_interleave(self.taps)  # each tap sees the whole channel


ADAPTERS: dict[type, type[Target]] = {}
_BY_KIND: dict[str, type[Target]] = {}


def register(dense: type, adapter: type[Target], kind: str | None = None) -> None:
    """Make a class of dense layers known, whose adapter calls it `kind`."""
    ADAPTERS[dense] = adapter
    _BY_KIND[kind or adapter.kind] = adapter


register(nn.Linear, LinearTarget)
for _convolution in CONVOLUTIONS.values():
    register(_convolution, ConvTarget, _convolution.__name__)
_BY_KIND[HFConv1DTarget.kind] = HFConv1DTarget  # its class is known by name alone


def target(module: nn.Module, vouched: bool = False) -> Target | None:
    """The adapter of a module whose class is supported, else None. Subclasses are where `treat_as_base` was called for
    them, or if somebody `vouched` for this one, as a plan that was carried out once does."""
    kind = type(module)
    if is_hf_conv1d(kind):
        return HFConv1DTarget(module)
    if kind not in ADAPTERS and (vouched or is_trusted(kind)):
        kind = base_of(kind)
    return ADAPTERS[kind](module) if kind in ADAPTERS else None


def adapter_of(layer: LowRankLayer) -> type[Target]:
    """The adapter that built a low-rank layer; ValueError for a kind that nobody registered."""
    if layer.kind not in _BY_KIND:
        raise ValueError(f"no layer type is called {layer.kind!r}; there are {', '.join(_BY_KIND)}")
    return _BY_KIND[layer.kind]


def with_groups(shape: Shape, rank: int, groups_out: bool, pivoted: bool = False) -> Shape:
    """The shape of a grouped twin at this rank: min(rank, groups) groups, in both stages if `groups_out`."""
    groups = min(rank, shape.groups)
    return replace(shape, down_groups=groups, up_groups=groups if groups_out else 1, pivoted=pivoted)


def is_lazy(parameter: object) -> bool:
    """Whether a parameter gets its shape at the first forward."""
    return isinstance(parameter, UninitializedTensorMixin)


def is_hf_conv1d(kind: type) -> bool:
    # By name: a model that has such a layer imported it, so shrank need not import transformers to recognise it.
    return kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.")
