"""Problems for the linear op: sizes where kernels go wrong, and tensors for them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shrank.ops.reference import ACTIVATIONS


@dataclass(frozen=True)
class LinearCase:
    """A problem of the linear op: x (*batch, K), down (R, K), up (N, R)."""

    batch: tuple[int, ...]
    K: int
    N: int
    R: int
    bias: bool = True
    activation: str = "none"
    residual: bool = False

    def __str__(self) -> str:
        ends = [self.activation] * (self.activation != "none") + ["bias"] * self.bias + ["residual"] * self.residual
        return "-".join(["x".join(map(str, (*self.batch, self.K))), f"R{self.R}", f"N{self.N}", *ends])

    @property
    def output(self) -> tuple[int, ...]:
        """The shape of y."""
        return *self.batch, self.N

    @property
    def kept(self) -> list[tuple[int, ...]]:
        """The shape of h."""
        return [(*self.batch, self.R)]

    def is_laid_out(self, output: Tensor, x: Tensor) -> bool:
        """Whether y or h is laid out as the op promises for x."""
        return output.is_contiguous()

    def other_inputs(self, device: str) -> list[Tensor]:
        """x of other numbers of tokens."""
        return [torch.randn(M, self.K, device=device) for M in (2, 5, 17)]

    def residual_for(self, x: Tensor) -> Tensor | None:
        """A residual for one of other_inputs."""
        return x.new_ones(*x.shape[:-1], self.N)

    def tensors(self, dtype: torch.dtype, device: str, requires_grad: bool = False) -> tuple:
        """The op's arguments, scaled so that outputs have about unit variance."""
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int, scale: float = 1.0) -> Tensor:
            values = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
            return values.to(device, dtype).requires_grad_(requires_grad)

        return (
            draw(*self.batch, self.K),
            draw(self.R, self.K, scale=max(self.K, 1) ** -0.5),
            draw(self.N, self.R, scale=max(self.R, 1) ** -0.5),
            draw(self.N) if self.bias else None,
            self.activation,
            draw(*self.batch, self.N) if self.residual else None,
        )


# Every end of the layer, at a size whose rows are whole 16-byte accesses and at one whose rows are not.
ENDS = [
    LinearCase((6,), 32, N, 8, bias, activation, residual)
    for N in (64, 37)
    for activation in ACTIVATIONS
    for bias in (False, True)
    for residual in (False, True)
]
# Shapes that kernels must take or leave: empty, single, odd, one-dimensional, many dimensions, wide.
SHAPES = [
    LinearCase(batch, K, N, R, True, "gelu", True)
    for batch, K, N, R in [
        ((), 32, 64, 8),
        ((0,), 32, 64, 8),
        ((2, 0, 3), 32, 64, 8),
        ((1,), 32, 64, 8),
        ((1,), 1, 1, 1),
        ((5,), 7, 3, 2),
        ((2, 3, 4), 24, 40, 16),
        ((1, 1, 1, 2), 16, 8, 4),
        ((3,), 16, 1032, 8),
        ((300,), 16, 8, 8),
        ((4,), 0, 8, 4),
        ((4,), 16, 0, 4),
        ((4,), 16, 8, 0),
        ((129,), 130, 257, 33),
    ]
]
# Whole 16-byte rows, sizes off every tile: the matrix kernels' own, fused and, beyond rank 256, from h.
MATRICES = [
    LinearCase((130,), 200, 264, 120, True, "silu", True),
    LinearCase((3, 171), 768, 776, 96, True, "gelu_tanh"),
    LinearCase((70,), 520, 520, 320, False, "gelu", True),
    LinearCase((65,), 128, 136, 64),
]
