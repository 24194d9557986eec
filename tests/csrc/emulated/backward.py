"""The backward kernel in the emulator, as a function of tensors, and the cases that show each of its edges."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from types import ModuleType

import torch
from torch import Tensor

from shrank.ops import reference
from tests.common.ops import doubled

from .linear import BF16, FP16

TILES = ((64, 0), (64, 64), (64, 96), (64, 128), (64, 256))
ACTIVATIONS = [name for name in reference.ACTIVATIONS if name != "none"]


@dataclass(frozen=True)
class BackwardRun:
    """One launch: sizes, end of the layer, tile and grid."""

    block_m: int
    max_rank: int
    M: int
    N: int
    R: int
    activation: str = "gelu"
    bias: bool = True
    sums: bool = True
    blocks_n: int = 1
    dtype: torch.dtype = BF16

    def __str__(self) -> str:
        end = [self.activation, *(name for name in ("bias", "sums") if getattr(self, name))]
        return (
            f"{self.block_m}x{self.max_rank}-M{self.M}-N{self.N}-R{self.R}-by{self.blocks_n}-{'-'.join(end)}-"
            f"{str(self.dtype)[6:]}"
        )

    def multiply_adds(self) -> int:
        return self.M * self.N * self.R

    def arguments(self) -> tuple:
        """Of expand_backward; z has about unit variance."""
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(self.dtype)

        bias = draw(self.N) if self.bias else None
        return (
            draw(self.M, self.N),
            draw(self.M, self.R),
            draw(self.N, self.R, scale=self.R**-0.5),
            bias,
            self.activation,
            self.sums,
        )


@dataclass(frozen=True)
class Outcome:
    """sums: over all rows, in the order in which the op adds them up."""

    dz: Tensor
    sums: Tensor | None
    problems: list[str]
    counts: object


def emulate(dev: ModuleType, run: BackwardRun, arguments: tuple, seed: int = 0, copies_early: bool = False) -> Outcome:
    grad, h, up, bias, activation, _ = arguments
    grid = dev.select.LinearGrid(
        dev.select.LinearTile(run.block_m, run.max_rank), -(-run.M // run.block_m), run.blocks_n
    )
    dz = torch.full_like(grad, torch.nan)
    sums = torch.full((dev.select.backward_sum_rows(grid), run.N), torch.nan) if run.sums else None
    tensors = {"h": h, "up": up, "bias": bias, "grad": grad, "dz": dz, "sums": sums}
    result = dev.linear.emulate_backward(
        grid,
        run.M,
        run.N,
        run.R,
        str(run.dtype)[6:],
        activation,
        seed=seed,
        copies_early=copies_early,
        **{name: tensor.data_ptr() for name, tensor in tensors.items() if tensor is not None},
    )
    return Outcome(dz, None if sums is None else sums.sum(0), result.problems, result.counts)


def exact(arguments: tuple) -> reference.End:
    """In fp64."""
    return reference.expand_backward(*doubled(arguments))


def runs() -> list[BackwardRun]:
    """Every tile in both dtypes; then from a small base all tails of rows, ranks and columns, all ends."""
    every_tile = [
        BackwardRun(block_m, max_rank, block_m + 3, 264, max(max_rank - 8, 40), blocks_n=2, dtype=dtype)
        for (block_m, max_rank), dtype in product(TILES, (BF16, FP16))
    ]
    rows = [BackwardRun(64, rank, M, 136, 24) for rank in (64, 0) for M in (1, 15, 16, 33, 63, 64, 65, 133)]
    ranks = [BackwardRun(64, rank, 20, 72, R) for rank, R in [(64, 8), (64, 64), (96, 80), (128, 104), (256, 200)]]
    ranks += [BackwardRun(64, 0, 20, 72, R) for R in (8, 64, 72, 136)]
    columns = [
        BackwardRun(64, rank, 33, N, 40, blocks_n=blocks)
        for rank in (64, 0)
        for N, blocks in [(8, 1), (120, 1), (128, 1), (136, 1), (392, 1), (520, 2), (648, 4), (896, 7)]
    ]
    ends = [
        BackwardRun(64, 64, 37, 72, 40, activation, bias, sums, dtype=dtype)
        for activation, bias, sums in product(ACTIVATIONS, (False, True), (False, True))
        for dtype in (BF16, FP16)
    ]
    return every_tile + rows + ranks + columns + ends
