"""What every layer type tells of itself: the base of the adapters."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from torch import Tensor, nn

from ..layers.ced import CED
from ..layers.led import LED
from ..layers.low_rank import LowRankLayer
from ..layers.two_stage import memory_format
from ..linalg import Shape
from .subclasses import as_subclass


class Target:
    """One eligible module, seen as the matrix that its low-rank twin approximates."""

    kind: ClassVar[str]  # as plans and the twins call it
    taps = 1  # positions of a kernel
    takes_vectors = True  # its matrix multiplies the input's last dimension as it is
    features = -1  # the dimension of its inputs and outputs that holds the features
    pads_with_zeros = False  # whether it sees zeros beside its inputs

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    @property
    def input_channels(self) -> int:
        """Features of its input."""
        return self.shape().in_features // self.taps

    def shape(self) -> Shape:
        """The matrix of the module, with the groups that its twin gets unless the rank is too small for them."""
        raise NotImplementedError

    def why_not_grouped(self, shape: Shape) -> str:
        """Why the twin cannot have the groups of this shape; '' if it can."""
        return ""

    def why_not_on_grid(self, rank: int | None) -> str:
        """Why the layer, or at a rank its factors, cannot have weights of few bits; '' if they can."""
        return f"torchao computes no {self.kind} with weights of few bits"

    def matrices(self, shape: Shape) -> Tensor:
        """The weight as (G, N/G, K/G), one matrix per group of the twin's first stage."""
        raise NotImplementedError

    def twin(self, rank: int, shape: Shape) -> nn.Module:
        """A low-rank module of the same interface, on the meta device: nothing is drawn only to be overwritten."""
        raise NotImplementedError

    @staticmethod
    def dense_from(layer: LowRankLayer) -> nn.Module:
        """The dense module that a twin stands for, its parameters in place of whatever it was built with."""
        raise NotImplementedError

    def resized(self, matrix: Tensor, bias: Tensor | None) -> dict[str, object]:
        """The attributes of the module with a matrix (N, K) of another size, and a bias (N,) if it has one."""
        raise NotImplementedError

    def _parameters(self, weight: Tensor, bias: Tensor | None) -> dict[str, object]:
        own = self.module._parameters
        new = {"weight": weight, "bias": bias}

        def parameter(value: Tensor, old: Tensor) -> nn.Parameter:
            stored = value.to(old.dtype).contiguous(memory_format=memory_format(old))
            return nn.Parameter(stored, old.requires_grad)

        return {
            name: value if value is None else parameter(value, old)
            for name, value in new.items()
            if (old := own.get(name)) is not None
        }

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
