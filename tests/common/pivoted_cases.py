"""Problems for the op of pivoted storage, and tensors for them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shrank.ops.reference import ACTIVATIONS


@dataclass(frozen=True)
class PivotedCase:
    """A problem of the pivoted op: x (*batch, K), down (R, K), up (N - R, R).

    bias: of all outputs ("both"), of the pivots alone ("pivots"), of the others alone ("others"), or of none.
    order: any permutation ("mixed"), or the pivots are the first outputs ("first") or the last ("last").
    """

    batch: tuple[int, ...]
    K: int
    N: int
    R: int
    bias: str = "both"
    activation: str = "none"
    residual: bool = False
    order: str = "mixed"

    def __str__(self) -> str:
        ends = [self.activation, self.bias, self.order] + ["residual"] * self.residual
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

    def places(self, device: str) -> Tensor:
        """The order."""
        return places(self.N, self.R, self.order, device)

    def tensors(self, dtype: torch.dtype, device: str, requires_grad: bool = False) -> tuple:
        """The op's arguments, scaled so that all outputs have about unit variance."""
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int, scale: float = 1.0) -> Tensor:
            values = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
            return values.to(device, dtype).requires_grad_(requires_grad)

        others = self.N - self.R
        return (
            draw(*self.batch, self.K),
            draw(self.R, self.K, scale=max(self.K, 1) ** -0.5),
            draw(others, self.R, scale=max(self.R, 1) ** -0.5),
            draw(others) if self.bias in ("both", "others") else None,
            draw(self.R) if self.bias in ("both", "pivots") else None,
            self.places(device),
            self.activation,
            draw(*self.batch, self.N) if self.residual else None,
        )


def places(N: int, R: int, order: str, device: str) -> Tensor:
    """For every output, its place among R pivots and then the others."""
    found = {
        "mixed": torch.randperm(N, generator=torch.Generator().manual_seed(0)),
        "first": torch.arange(N),
        "last": torch.arange(N).roll(-R),
    }
    return found[order].to(device, torch.int32)


# Every end, at a size whose rows are whole 16-byte accesses and at one whose rows are not.
ENDS = [
    PivotedCase((6,), 32, N, 8, bias, activation, residual)
    for N in (64, 37)
    for activation in ACTIVATIONS
    for bias in ("both", "pivots", "others", "none")
    for residual in (False, True)
]
# Shapes that kernels must take or leave: empty, single, odd, one-dimensional, many dimensions, wide, all pivots.
SHAPES = [
    PivotedCase(batch, K, N, R, "both", "gelu", True)
    for batch, K, N, R in [
        ((), 32, 64, 8),
        ((0,), 32, 64, 8),
        ((2, 0, 3), 32, 64, 8),
        ((1,), 32, 64, 8),
        ((1,), 1, 1, 1),
        ((5,), 7, 3, 2),
        ((5,), 7, 3, 3),
        ((2, 3, 4), 24, 40, 16),
        ((1, 1, 1, 2), 16, 8, 4),
        ((3,), 16, 1032, 8),
        ((300,), 16, 8, 8),
        ((4,), 0, 8, 4),
        ((4,), 16, 0, 0),
        ((4,), 16, 8, 0),
        ((129,), 130, 257, 33),
        ((3, 5), 24, 40, 12),
    ]
]
# Whole 16-byte rows, sizes off every tile: the matrix kernels' own, fused and, beyond rank 256, from h.
MATRICES = [
    PivotedCase((130,), 200, 264, 120, "both", "silu", True),
    PivotedCase((3, 171), 768, 776, 96, "both", "gelu_tanh", order="last"),
    PivotedCase((70,), 520, 520, 320, "none", "gelu", True),
    PivotedCase((65,), 128, 136, 64, "pivots", order="first"),
    PivotedCase((40,), 128, 136, 136, "pivots", "gelu", True),
    PivotedCase((5,), 528, 264, 64, "both", "silu"),
]
