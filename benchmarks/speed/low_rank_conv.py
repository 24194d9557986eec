"""How one low-rank convolution is measured: the cases, most telling first, and what low_rank_linear.py asks of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

import shrank
from benchmarks.speed.low_rank_linear import Family
from benchmarks.speed.roofline import Work
from shrank.linalg import Shape
from shrank.measuring.explain import explain, parse_conv
from shrank.ops import reference
from shrank.ops.reference import Window, output_sizes

Sizes = tuple[int, ...]


@dataclass(frozen=True)
class Layer:
    """A convolution of a model, batch and image included, and what follows it; padding before and after each dimension.

    rank is about a quarter of the narrower side, or for a depthwise-separable block its channels.
    """

    model: str
    batch: int
    C: int
    N: int
    rank: int
    input: Sizes
    kernel: Sizes
    padding: Sizes
    stride: Sizes = (1, 1)
    groups: int = 1
    activation: str = "none"
    bias: bool = True
    residual: bool = False

    @property
    def window(self) -> Window:
        return Window(list(self.stride), list(self.padding), [1] * len(self.input), self.groups)

    @property
    def shape(self) -> Shape:
        return Shape(self.N, self.C * math.prod(self.kernel), self.groups, self.groups)


@dataclass(frozen=True)
class Case:
    layer: Layer
    dtype: str

    def __str__(self) -> str:
        layer = self.layer
        return f"{layer.model} {layer.activation}, R {layer.rank}, {self.dtype}"


class Inputs(NamedTuple):
    """x (B, C, *in), weight (N, C, *kernel) of the dense layer or None, down, up, bias, residual; channels last."""

    x: Tensor
    weight: Tensor | None
    down: Tensor
    up: Tensor
    bias: Tensor | None
    residual: Tensor | None
    window: Window

    def copy(self, change: Callable[[Tensor], Tensor] = Tensor.clone) -> Inputs:
        return Inputs(*(change(each) if isinstance(each, Tensor) else each for each in self))


def dense(inputs: Inputs, activation: str) -> Tensor:
    """The convolution that a low-rank one replaces; of a depthwise-separable block, the two it is made of."""
    if inputs.weight is None:
        return two_calls(inputs, activation)
    x, window = inputs.x, inputs.window
    x, padding = reference.padded(x, window)
    y = reference.CONVOLUTIONS[x.dim() - 2](x, inputs.weight, inputs.bias, window.stride, padding, window.dilation)
    y = reference.ACTIVATIONS[activation](y)
    return y if inputs.residual is None else y + inputs.residual


def two_calls(inputs: Inputs, activation: str) -> Tensor:
    """What people write: two convolutions, the activation and the residual after them."""
    x, _, down, up, bias, residual, window = inputs
    return reference.low_rank_conv(x, down, up, bias, window, activation, residual)


def native(inputs: Inputs, activation: str) -> Tensor:
    x, _, down, up, bias, residual, window = inputs
    return shrank.low_rank_conv(x, down, up, bias, *window, activation, residual, backend="native")


def draw(case: Case, device: str) -> Inputs:
    """Random tensors, scaled so that outputs have about unit variance."""
    layer, dtype = case.layer, getattr(torch, case.dtype)

    def normal(*shape: int, fan_in: int = 1) -> Tensor:
        values = torch.randn(shape[0], *shape[2:], *shape[1:2], device=device).mul_(fan_in**-0.5).to(dtype)
        return values.movedim(-1, 1) if len(shape) > 2 else values

    d, K = len(layer.input), layer.C // layer.groups * math.prod(layer.kernel)
    x, down = (
        normal(layer.batch, layer.C, *layer.input),
        normal(layer.rank, layer.C // layer.groups, *layer.kernel, fan_in=K),
    )
    weight = normal(layer.N, layer.C, *layer.kernel, fan_in=K) if layer.groups == 1 else None
    out = output_sizes(x, down, layer.window)
    return Inputs(
        x,
        weight,
        down,
        normal(layer.N, layer.rank, *(1,) * d, fan_in=layer.rank),
        normal(layer.N) if layer.bias else None,
        normal(layer.batch, layer.N, *out) if layer.residual else None,
        layer.window,
    )


def work(case: Case, dense: bool = False) -> Work:
    """As one fused kernel: x read once, y written once."""
    layer = case.layer
    x = torch.empty(layer.batch, layer.C, *layer.input, device="meta")
    down = torch.empty(layer.rank, layer.C // layer.groups, *layer.kernel, device="meta")
    pixels = layer.batch * math.prod(output_sizes(x, down, layer.window))
    rank = None if dense and layer.groups == 1 else layer.rank
    moved = (
        x.numel()
        + pixels * layer.N * (2 if layer.residual else 1)
        + layer.shape.params(rank)
        + (layer.N if layer.bias else 0)
    )
    return Work(pixels * layer.shape.flops(rank), getattr(torch, case.dtype).itemsize * moved)


def describe(case: Case) -> dict[str, object]:
    layer = case.layer
    return {
        "model": layer.model,
        "batch": layer.batch,
        "C": layer.C,
        "N": layer.N,
        "R": layer.rank,
        "input": layer.input,
        "kernel": layer.kernel,
        "stride": layer.stride,
        "padding": layer.padding,
        "groups": layer.groups,
        "dtype": case.dtype,
        "activation": layer.activation,
        "bias": layer.bias,
        "residual": layer.residual,
    }


def explained(case: Case, gpu: str | None) -> dict:
    layer = case.layer
    size, kernel, stride = ("x".join(map(str, each)) for each in (layer.input, layer.kernel, layer.stride))
    padding = "x".join(f"{begin}:{end}" for begin, end in layer.window.pads())
    conv = parse_conv(
        f"{layer.batch},{layer.C},{size},{kernel},{layer.N},{layer.rank}", stride, padding, "1", layer.groups
    )
    return explain(conv, case.dtype, gpu, layer.activation, layer.bias, layer.residual)


CONV = Family(draw, dense, two_calls, native, work, describe, explained)

# The rows of docs/csrc/predicted.md, then stems and other dimensions; a depthwise-separable block has its channels as
# rank. Each plain and with a GELU.
LAYERS = [
    Layer("ResNet 56x56", 32, 64, 64, 16, (56, 56), (3, 3), (1, 1)),
    Layer("ResNet 28x28", 32, 128, 128, 32, (28, 28), (3, 3), (1, 1)),
    Layer("ResNet 14x14", 32, 256, 256, 64, (14, 14), (3, 3), (1, 1)),
    Layer("ResNet 7x7", 32, 512, 512, 128, (7, 7), (3, 3), (1, 1)),
    Layer("UNet 64x64", 8, 320, 320, 80, (64, 64), (3, 3), (1, 1)),
    Layer("image 128x128", 8, 128, 128, 32, (128, 128), (3, 3), (1, 1)),
    Layer("MobileNet 112x112", 32, 32, 64, 32, (112, 112), (3, 3), (1, 1), groups=32),
    Layer("MobileNet 56x56", 32, 128, 128, 128, (56, 56), (3, 3), (1, 1), groups=128),
    Layer("MobileNet 28x28", 32, 256, 256, 256, (28, 28), (3, 3), (1, 1), groups=256),
    Layer("ConvNeXt 56x56", 32, 96, 384, 96, (56, 56), (7, 7), (3, 3), groups=96),
    Layer("Mamba 2048", 8, 1536, 80, 1536, (2048,), (4,), (3, 0), (1,), groups=1536),
    Layer("ResNet 1x1", 32, 64, 256, 16, (56, 56), (1, 1), (0, 0)),
    Layer("ResNet stem", 32, 3, 64, 24, (224, 224), (7, 7), (3, 3), (2, 2)),
    Layer("CREPE 64x1", 64, 128, 128, 56, (127, 1), (64, 1), (31, 32, 0, 0)),
    Layer("Whisper stem", 8, 80, 384, 40, (3000,), (3,), (1,), (1,)),
    Layer("VideoMAE tubes", 2, 3, 768, 256, (16, 224, 224), (2, 16, 16), (0, 0, 0), (2, 16, 16)),
]


def grid(dtype: str) -> list[Case]:
    return [Case(replace(layer, activation=activation), dtype) for activation in ("none", "gelu") for layer in LAYERS]


def cpu_subset(dtype: str = "float32") -> list[Case]:
    """What a CPU does in half a minute: fewer images."""
    return [Case(replace(LAYERS[i], batch=1), dtype) for i in (0, 2, 7)]


def tiny(dtype: str = "float32") -> list[Case]:
    """Two cases that any machine does at once."""
    return [
        Case(Layer("tiny", 2, 8, 16, 8, (6, 5), (3, 3), (1, 1), activation="gelu"), "float32"),
        Case(Layer("tiny depthwise", 1, 16, 8, 16, (9,), (4,), (3, 0), (1,), groups=16), "float32"),
    ]
