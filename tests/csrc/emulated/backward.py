"""The backward kernel in the emulator, as a function of tensors, and the cases that show each of its edges."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from types import ModuleType

import torch
from torch import Tensor

from shrank.ops import pivoted_reference, reference
from tests.common.ops import doubled
from tests.common.pivoted_cases import places

from .linear import BF16, FP16, GATED, PIVOTED, PLAIN, addresses

GATED_TILES = ((32, 0), (64, 0), (64, 64), (64, 128), (64, 256))
TILES = ((64, 0), (64, 64), (64, 96), (64, 128), (64, 256))
PIVOTED_TILES = ((64, 0), (64, 64), (64, 128), (64, 256))
ACTIVATIONS = [name for name in reference.ACTIVATIONS if name != "none"]


@dataclass(frozen=True)
class BackwardRun:
    """One launch: sizes, end of the layer, tile and grid.

    gate: the rank of the gate; 0 where there is none. pivoted: whether R of the outputs are h. infinite: in the last
    row, which those beyond it repeat, the gate is infinite.
    """

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
    gate: int = 0
    infinite: bool = False
    pivoted: bool = False

    def __str__(self) -> str:
        end = [self.activation, *(name for name in ("bias", "sums", "infinite") if getattr(self, name))]
        gate = f"gate{self.gate}-" if self.gate else "pivoted-" * self.pivoted
        return (
            f"{self.block_m}x{self.max_rank}-M{self.M}-N{self.N}-{gate}R{self.R}-by{self.blocks_n}-{'-'.join(end)}-"
            f"{str(self.dtype)[6:]}"
        )

    def multiply_adds(self) -> int:
        return self.M * self.N * (self.R + self.gate)

    def arguments(self) -> tuple:
        """Of expand_backward, gated_backward or pivoted_backward; all outputs have about unit variance."""
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(self.dtype)

        ranks = [self.gate, self.R] if self.gate else [self.R]
        given = [draw(self.M, self.N)]
        for rank in ranks:
            others = self.N - rank if self.pivoted else self.N
            given += [draw(self.M, rank), draw(others, rank, scale=rank**-0.5), draw(others) if self.bias else None]
        if self.pivoted:
            given += [draw(self.R) if self.bias else None, places(self.N, self.R, "mixed", "cpu")]
        if self.infinite:
            given[1][-1, 5] = torch.inf
        return (*given, self.activation, *[self.sums] * len(ranks))


@dataclass(frozen=True)
class Outcome:
    """Of each pair. sums: over all rows, in the order in which the op adds them up."""

    dz: list[Tensor]
    sums: list[Tensor]
    problems: list[str]
    counts: object


def emulate(dev: ModuleType, run: BackwardRun, arguments: tuple, seed: int = 0, copies_early: bool = False) -> Outcome:
    grad, *of_pairs = arguments[: -2 if run.gate else -1]
    *of_pairs, activation = of_pairs
    names = ("h", "up", "bias", "pivot_bias", "order")[: 5 if run.pivoted else 3]
    pairs = [dict(zip(names, of_pairs[i : i + len(names)], strict=True)) for i in range(0, len(of_pairs), len(names))]
    form = GATED if run.gate else PIVOTED if run.pivoted else PLAIN
    tile = dev.select.LinearTile(run.block_m, run.max_rank, form)
    grid = dev.select.LinearGrid(tile, -(-run.M // run.block_m), run.blocks_n)
    dz = [torch.full_like(grad, torch.nan) for _ in pairs]
    sums = [torch.full((dev.select.backward_sum_rows(grid), run.N), torch.nan) for _ in pairs]
    result = dev.linear.emulate_backward(
        grid,
        run.M,
        run.N,
        [
            addresses(**pair, dz=a_dz, sums=a_sum if run.sums else None) | {"R": pair["up"].size(1)}
            for pair, a_dz, a_sum in zip(pairs, dz, sums, strict=True)
        ],
        str(run.dtype)[6:],
        activation,
        grad.data_ptr(),
        seed=seed,
        copies_early=copies_early,
    )
    return Outcome(dz, [each.sum(0) for each in sums] if run.sums else [], result.problems, result.counts)


def in_pytorch(arguments: tuple) -> reference.End | reference.GatedEnd:
    if len(arguments) == 8:
        return pivoted_reference.pivoted_backward(*arguments)
    return (reference.expand_backward if len(arguments) == 6 else reference.gated_backward)(*arguments)


def exact(arguments: tuple) -> reference.End | reference.GatedEnd:
    """In fp64."""
    return in_pytorch(doubled(arguments))


def compared(outcome: Outcome, run: BackwardRun, arguments: tuple) -> list[tuple[Tensor, ...]]:
    """What was found, what is right and what PyTorch makes of it, of all numbers that are finite; AssertionError where
    others are not those that must be."""
    wanted, torchs = (
        [each for each in answer if each is not None] for answer in (exact(arguments), in_pytorch(arguments))
    )
    parts = []
    for ours, right, theirs in zip(found_of(outcome, run.dtype), wanted, torchs, strict=True):
        assert torch.equal(ours.isnan(), right.isnan()) and torch.equal(ours.isinf(), right.isinf())
        parts.append(tuple(torch.where(right.isfinite(), each, 0) for each in (ours, right, theirs)))
    return parts


def found_of(outcome: Outcome, dtype: torch.dtype) -> list[Tensor]:
    """As in_pytorch orders them: the gradients, then those of biases, as far as they are wanted."""
    return [*outcome.dz, *(each.to(dtype) for each in outcome.sums)]


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
    return every_tile + rows + ranks + columns + ends + _gated_runs() + _pivoted_runs()


def _gated_runs() -> list[BackwardRun]:
    """The same edges of gated layers, whose tiles have 64 columns: gate and value of other ranks, either the larger."""
    every_tile = [
        BackwardRun(
            block_m, max_rank, block_m + 3, 136, max(max_rank - 8, 40), "silu", blocks_n=2, dtype=dtype, gate=24
        )
        for (block_m, max_rank), dtype in product(GATED_TILES, (BF16, FP16))
    ]
    rows = [BackwardRun(64, rank, M, 72, 24, gate=40) for rank in (64, 256, 0) for M in (1, 16, 33, 64, 65, 133)]
    ranks = [
        BackwardRun(64, rank, 20, 72, R, gate=gate)
        for rank, R, gate in [(64, 8, 64), (128, 104, 8), (256, 200, 256), (0, 8, 72), (0, 136, 64)]
    ]
    columns = [
        BackwardRun(64, rank, 33, N, 40, blocks_n=blocks, gate=16)
        for rank in (64, 0)
        for N, blocks in [(8, 1), (64, 1), (72, 1), (200, 1), (264, 2), (448, 7)]
    ]
    ends = [
        BackwardRun(64, 64, 37, 72, 40, activation, bias, sums, dtype=dtype, gate=32)
        for activation, bias, sums in product(reference.ACTIVATIONS, (False, True), (False, True))
        for dtype in (BF16, FP16)
    ]
    infinite = [
        BackwardRun(64, 64, M, 72, 40, "relu", gate=16, infinite=True) for M in (4, 8, 12, 16, 20, 28, 36, 44, 52, 60)
    ]
    return every_tile + rows + ranks + columns + ends + infinite


def _pivoted_runs() -> list[BackwardRun]:
    """The same edges of pivoted layers; up has no rows, few, or many; pivots in any panel of h."""
    every_tile = [
        BackwardRun(block_m, max_rank, block_m + 3, 264, max(max_rank - 8, 40), blocks_n=2, dtype=dtype, pivoted=True)
        for (block_m, max_rank), dtype in product(PIVOTED_TILES, (BF16, FP16))
    ]
    rows = [BackwardRun(64, rank, M, 136, 24, pivoted=True) for rank in (64, 256, 0) for M in (1, 16, 33, 64, 65, 133)]
    ranks = [
        BackwardRun(64, rank, 20, N, R, pivoted=True)
        for rank, R in [(64, 8), (64, 64), (128, 72), (256, 200), (0, 8), (0, 64), (0, 136)]
        for N in (R, R + 8, R + 136)
    ]
    columns = [
        BackwardRun(64, rank, 33, N, 8, blocks_n=blocks, pivoted=True)
        for rank in (64, 0)
        for N, blocks in [(120, 1), (128, 1), (136, 1), (392, 1), (520, 2), (896, 7)]
    ]
    ends = [
        BackwardRun(64, 64, 37, 72, 40, activation, bias, sums, dtype=dtype, pivoted=True)
        for activation, bias, sums in product(ACTIVATIONS, (False, True), (False, True))
        for dtype in (BF16, FP16)
    ]
    return every_tile + rows + ranks + columns + ends
