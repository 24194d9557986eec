"""The matrix kernels in the emulator, as functions of tensors, and the cases that show each of their edges."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from types import ModuleType

import torch
from torch import Tensor

from shrank.ops import reference
from tests.common.linear_cases import LinearCase
from tests.common.ops import doubled

TILES = (
    (32, 64),
    (32, 96),
    (32, 128),
    (32, 192),
    (32, 256),
    (64, 0),
    (64, 64),
    (64, 96),
    (64, 128),
    (64, 192),
    (64, 256),
    (128, 0),
    (128, 64),
    (128, 96),
    (128, 128),
    (128, 192),
    (128, 256),
)
BF16, FP16 = torch.bfloat16, torch.float16


def arguments_of(run: object) -> tuple:
    """The op's arguments for a run, of whichever kernels."""
    case = LinearCase((run.M,), run.K, run.N, run.R, run.bias, run.activation, run.residual)
    return case.tensors(run.dtype, "cpu")


@dataclass(frozen=True)
class Run:
    """One launch: sizes, end of the layer, tile and grid. From x, or from h, as a tile of max_rank 0 always."""

    block_m: int
    max_rank: int
    M: int
    K: int
    N: int
    R: int
    bias: bool = False
    activation: str = "none"
    residual: bool = False
    training: bool = False
    blocks_n: int = 1
    dtype: torch.dtype = BF16
    from_h: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "from_h", self.from_h or self.max_rank == 0)

    def __str__(self) -> str:
        end = [self.activation] + [name for name in ("bias", "residual", "training") if getattr(self, name)]
        return (
            f"{self.block_m}x{self.max_rank}{'-from-h' * self.from_h}-M{self.M}-K{self.K}-N{self.N}-R{self.R}-"
            f"by{self.blocks_n}-{'-'.join(end)}-{str(self.dtype)[6:]}"
        )

    def arguments(self) -> tuple:
        return arguments_of(self)


@dataclass(frozen=True)
class Outcome:
    y: Tensor
    h: Tensor
    problems: list[str]
    counts: object


def emulate(dev: ModuleType, run: Run, arguments: tuple, seed: int = 0, copies_early: bool = False) -> Outcome:
    x, down, up, bias, activation, residual = arguments
    h = x @ down.T if run.from_h else torch.full((run.M, run.R), torch.nan, dtype=run.dtype)
    y = torch.full((run.M, run.N), torch.nan, dtype=run.dtype)
    tensors = {"up": up, "bias": bias, "residual": residual, "y": y}
    if run.from_h:
        tensors |= {"h": h}
    else:
        tensors |= {"x": x, "down": down, "h": h if run.training else None}
    grid = dev.select.LinearGrid(
        dev.select.LinearTile(run.block_m, run.max_rank), -(-run.M // run.block_m), run.blocks_n
    )
    result = dev.linear.emulate(
        grid,
        run.M,
        run.K,
        run.N,
        run.R,
        str(run.dtype)[6:],
        activation,
        seed=seed,
        copies_early=copies_early,
        **{name: tensor.data_ptr() for name, tensor in tensors.items() if tensor is not None},
    )
    return Outcome(y, h, result.problems, result.counts)


def exact(arguments: tuple, h: Tensor | None = None) -> reference.Forward:
    """In fp64; from h, if it is given."""
    x, down, up, bias, activation, residual = doubled(arguments)
    h = x @ down.T if h is None else h.double()
    z = h @ up.T + (0 if bias is None else bias)
    y = reference.ACTIVATIONS[activation](z) + (0 if residual is None else residual)
    return reference.Forward(y, h)


def runs() -> list[Run]:
    """Every tile in both dtypes; then from a small base all counts of steps modulo the stages, all tails, all ends."""
    every_tile = [
        Run(block_m, max_rank, block_m + 3, 136, 264, max(max_rank - 8, 40), True, "gelu", True, True, 2, dtype)
        for (block_m, max_rank), dtype in product(TILES, (BF16, FP16))
    ]
    steps_of_down = [
        Run(block_m, max_rank, 33, 64 * steps - 8 * (steps % 3), 128, 32, dtype=dtype)
        for (block_m, max_rank, stages), dtype in zip(
            [(128, 128, 2), (128, 64, 3), (64, 64, 4)], [FP16, BF16, BF16], strict=True
        )
        for steps in range(1, 2 * stages + 2)
    ]
    steps_of_up = [
        Run(block_m, max_rank, 17, 72, 128 * tiles - 8 * (tiles % 2), R, blocks_n=blocks, dtype=dtype)
        for (block_m, max_rank, R), dtype in zip(
            [(32, 64, 64), (32, 96, 72), (64, 0, 136), (64, 0, 56)], [BF16, FP16, BF16, FP16], strict=True
        )
        for tiles, blocks in [(1, 1), (2, 1), (3, 1), (4, 1), (5, 1), (5, 2), (5, 4), (6, 3), (6, 4), (7, 7)]
    ]
    rows = [
        Run(block_m, max_rank, M, 72, 136, 24, bias=True)
        for block_m, max_rank in [(32, 64), (64, 64), (128, 64), (64, 0), (128, 0)]
        for M in (1, 15, block_m - 1, block_m, block_m + 1, 2 * block_m + 5)
    ]
    ranks = [
        Run(32, max_rank, 20, 72, 72, R, training=True)
        for max_rank, R in [
            (64, 8),
            (64, 16),
            (64, 56),
            (64, 64),
            (96, 80),
            (96, 96),
            (128, 104),
            (192, 136),
            (192, 192),
            (256, 200),
        ]
    ]
    ranks += [Run(64, 0, 20, 8, 72, R, training=True) for R in (8, 24, 64, 128, 192, 264)]
    columns = [
        Run(32, 64, 33, K, N, 40, True, "silu", True)
        for K, N in [(8, 8), (8, 128), (64, 16), (120, 120), (128, 136), (192, 152), (256, 248)]
    ]
    ends = [
        Run(32, max_rank, 37, 72, 72, 40, bias, activation, residual, training, dtype=dtype)
        for activation, bias, residual, training in product(reference.ACTIVATIONS, *[(False, True)] * 3)
        for max_rank, dtype in [(64, BF16), (64, FP16)]
    ]
    expanding_ends = [replace(run, block_m=64, max_rank=0, from_h=True) for run in ends if run.bias != run.residual]
    holding = [replace(run, from_h=True) for run in every_tile + steps_of_up + rows + ranks if run.max_rank]
    return every_tile + steps_of_down + steps_of_up + rows + ranks + columns + ends + expanding_ends + holding
