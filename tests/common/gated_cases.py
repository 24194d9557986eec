"""Problems for the op of gated layers, and tensors for them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shrank.ops.reference import ACTIVATIONS
from tests.common.pivoted_cases import places


@dataclass(frozen=True)
class GatedCase:
    """A problem of the gated op: x (*batch, K), gate_down (S, K), gate_up (N, S), down (R, K), up (N, R).

    bias: of both, of the gate alone ("gate"), of the value alone ("value"), or of none. pivots: which of them are
    pivoted, likewise; their orders differ.
    """

    batch: tuple[int, ...]
    K: int
    N: int
    S: int
    R: int
    bias: str = "both"
    activation: str = "silu"
    pivots: str = "none"

    def __str__(self) -> str:
        sizes = f"{'x'.join(map(str, (*self.batch, self.K)))}-S{self.S}-R{self.R}-N{self.N}"
        pivots = "" if self.pivots == "none" else f"-pivots of {self.pivots}"
        return f"{sizes}-{self.activation}-{self.bias}{pivots}"

    @property
    def output(self) -> tuple[int, ...]:
        """The shape of y."""
        return *self.batch, self.N

    @property
    def kept(self) -> list[tuple[int, ...]]:
        """The shapes of both h."""
        return [(*self.batch, self.S), (*self.batch, self.R)]

    def is_laid_out(self, output: Tensor, x: Tensor) -> bool:
        """Whether an output is laid out as the op promises for x."""
        return output.is_contiguous()

    def other_inputs(self, device: str) -> list[Tensor]:
        """x of other numbers of tokens."""
        return [torch.randn(M, self.K, device=device) for M in (2, 5, 17)]

    def residual_for(self, x: Tensor) -> None:
        """The op takes none."""

    def tensors(self, dtype: torch.dtype, device: str, requires_grad: bool = False) -> tuple:
        """The op's arguments, scaled so that gate and value have about unit variance."""
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int, scale: float = 1.0) -> Tensor:
            values = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
            return values.to(device, dtype).requires_grad_(requires_grad)

        given, pivots = [draw(*self.batch, self.K)], []
        for rank, name in ((self.S, "gate"), (self.R, "value")):
            has_bias, is_pivoted = (which in ("both", name) for which in (self.bias, self.pivots))
            rows = self.N - rank if is_pivoted else self.N
            given += [
                draw(rank, self.K, scale=max(self.K, 1) ** -0.5),
                draw(rows, rank, scale=max(rank, 1) ** -0.5),
                draw(rows) if has_bias else None,
            ]
            order = places(self.N, rank, "mixed", device) if is_pivoted else None
            pivots += [
                draw(rank) if has_bias and is_pivoted else None,
                order if order is None or name == "value" else order.flip(0),
            ]
        return (*given, *pivots, self.activation)


# Every end, at a size whose rows are whole 16-byte accesses and at one whose rows are not.
ENDS = [
    GatedCase((6,), 32, N, 8, 16, bias, activation)
    for N in (64, 37)
    for activation in ACTIVATIONS
    for bias in ("both", "gate", "value", "none")
]
ENDS += [
    GatedCase((6,), 32, N, 8, 16, bias, activation, pivots)
    for N in (64, 37)
    for activation, bias in zip(ACTIVATIONS, ("both", "gate", "value", "none", "both"), strict=True)
    for pivots in ("gate", "value", "both")
]
SHAPES = [
    GatedCase(batch, K, N, S, R, "both", "gelu")
    for batch, K, N, S, R in [
        ((), 32, 64, 8, 8),
        ((0,), 32, 64, 8, 16),
        ((2, 0, 3), 32, 64, 8, 8),
        ((1,), 32, 64, 16, 8),
        ((1,), 1, 1, 1, 1),
        ((5,), 7, 3, 2, 4),
        ((2, 3, 4), 24, 40, 16, 8),
        ((300,), 16, 8, 8, 8),
        ((4,), 0, 8, 4, 2),
        ((4,), 16, 0, 4, 4),
        ((4,), 16, 8, 0, 4),
        ((4,), 16, 8, 4, 0),
        ((129,), 130, 257, 33, 12),
    ]
]
SHAPES += [
    GatedCase(batch, K, N, S, R, "both", "gelu", pivots)
    for batch, K, N, S, R, pivots in [
        ((), 32, 64, 8, 8, "both"),
        ((0,), 32, 64, 8, 16, "both"),
        ((1,), 1, 1, 1, 1, "both"),
        ((5,), 7, 3, 2, 3, "both"),
        ((5,), 7, 3, 3, 4, "gate"),
        ((2, 3, 4), 24, 40, 16, 40, "both"),
        ((4,), 0, 8, 4, 2, "value"),
        ((4,), 16, 8, 0, 4, "both"),
        ((4,), 16, 8, 4, 0, "both"),
        ((129,), 130, 257, 33, 12, "both"),
    ]
]
# The matrix kernels' own: few rows, fused and, beyond rank 256, from h.
MATRICES = [
    GatedCase((130,), 200, 264, 120, 72),
    GatedCase((3, 171), 768, 776, 96, 96, "none", "gelu_tanh"),
    GatedCase((70,), 520, 520, 320, 40, "gate"),
    GatedCase((5,), 528, 136, 64, 200),
]
MATRICES += [
    GatedCase((130,), 200, 264, 120, 72, pivots="both"),
    GatedCase((70,), 520, 520, 320, 40, "gate", pivots="gate"),
    GatedCase((40,), 128, 136, 136, 64, "value", pivots="both"),
    GatedCase((5,), 528, 264, 64, 200, pivots="both"),
    GatedCase((3,), 528, 136, 72, 40, pivots="value"),
]
