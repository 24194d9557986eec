"""The kernels for a few rows in the emulator, as a function of tensors, and the cases that show each of their edges."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from types import ModuleType

import torch

from shrank.ops import reference

from .linear import BF16, FP16, Given, Outcome, addresses, arguments_of

TOKENS = (8, 16)


@dataclass(frozen=True)
class FewRowsRun:
    """A launch of each kernel: sizes, end of the layer, tile and splits of K."""

    tokens: int
    splits: int
    M: int
    K: int
    N: int
    R: int
    bias: bool = False
    activation: str = "none"
    residual: bool = False
    training: bool = False
    dtype: torch.dtype = BF16
    gate: int = 0

    def __str__(self) -> str:
        end = [self.activation] + [name for name in ("bias", "residual", "training") if getattr(self, name)]
        sizes = f"M{self.M}-K{self.K}-N{self.N}-{f'gate{self.gate}-' if self.gate else ''}R{self.R}"
        return f"{self.tokens}x{self.splits}-{sizes}-{'-'.join(end)}-{str(self.dtype)[6:]}"

    def multiply_adds(self) -> int:
        return self.M * (self.K + self.N) * (self.R + self.gate)

    def arguments(self) -> tuple:
        return arguments_of(self)


def emulate(dev: ModuleType, run: FewRowsRun, arguments: tuple, seed: int = 0) -> Outcome:
    given = Given.of(arguments)
    y = torch.full((run.M, run.N), torch.nan, dtype=run.dtype)
    kept = run.training or run.splits == 1
    h = [torch.full((run.M, len(down)), torch.nan, dtype=run.dtype) for down, *_ in given.pairs]
    sums = [torch.full((run.splits, run.M, len(down)), torch.nan) for down, *_ in given.pairs]
    pairs = [
        addresses(**pair._asdict(), h=an_h if kept else None, sums=parts if run.splits > 1 else None)
        | {"R": len(pair.down)}
        for pair, an_h, parts in zip(given.pairs, h, sums, strict=True)
    ]
    result = dev.linear.emulate_few_rows(
        run.tokens,
        run.splits,
        run.M,
        run.K,
        run.N,
        pairs,
        str(run.dtype)[6:],
        given.activation,
        seed=seed,
        **addresses(x=given.x, residual=given.residual, y=y),
    )
    return Outcome(y, h if kept else [], result.problems, result.counts)


def runs() -> list[FewRowsRun]:
    """Every tile in both dtypes; then from a small base all tails of tokens, columns, ranks and batches, all ends."""
    every_tile = [
        FewRowsRun(tokens, splits, tokens + 3, 520, 136, 72, True, "gelu", True, True, dtype)
        for tokens, splits, dtype in product(TOKENS, (1, 2), (BF16, FP16))
    ]
    tokens = [
        FewRowsRun(tile, splits, M, 72, 72, 24, bias=True, residual=True)
        for tile, splits in ((8, 1), (16, 2), (16, 1))
        for M in (1, 2, 7, tile - 1, tile, tile + 1, 2 * tile + 5)
        if M <= 64
    ]
    columns = [  # of a block's 8 warps, none, one or many chunks; one batch, two, and the same again
        FewRowsRun(8, splits, 3, K, 40, 16)
        for splits in (1, 2, 3, 4)
        for K in (8, 32, 40, 248, 256, 264, 1024, 1032, 2056, 4104)
        if splits < 3 or K in (40, 264, 2056)
    ]
    ranks = [
        FewRowsRun(8, splits, 3, 40, 40, R, training=True)
        for R in (8, 16, 24, 32, 40, 120, 128, 136, 256, 264, 520, 2048)
        for splits in (1, 2)
        if splits == 1 or R in (8, 40, 264)
    ]
    outputs = [FewRowsRun(8, 1, 3, 40, N, 40, True, "relu", True) for N in (8, 16, 24, 56, 64, 72, 136, 200)]
    ends = [
        FewRowsRun(16, splits, 11, 72, 72, 40, bias, activation, residual, training)
        for activation, bias, residual in product(reference.ACTIVATIONS, *[(False, True)] * 2)
        for splits, training in ((1, False), (2, True))
    ]
    return every_tile + tokens + columns + ranks + outputs + ends + _gated_runs()


def _gated_runs() -> list[FewRowsRun]:
    """The same edges of gated layers: gate and value of other ranks, either the larger."""
    every_tile = [
        FewRowsRun(tokens, splits, tokens + 3, 520, 136, 72, True, "silu", False, True, dtype, gate=40)
        for tokens, splits, dtype in product(TOKENS, (1, 2), (BF16, FP16))
    ]
    tokens = [FewRowsRun(tile, 2, M, 72, 72, 24, True, gate=16) for tile in TOKENS for M in (1, tile, tile + 1, 37)]
    ranks = [
        FewRowsRun(8, splits, 3, 40, 40, R, training=True, gate=gate)
        for R, gate in [(8, 8), (16, 8), (8, 24), (40, 136), (136, 32), (128, 128), (264, 520), (2048, 8), (8, 2048)]
        for splits in (1, 2)
        if splits == 1 or R + gate < 300
    ]
    outputs = [FewRowsRun(8, 1, 3, 40, N, 40, True, "relu", gate=24) for N in (8, 16, 56, 64, 72, 200)]
    ends = [
        FewRowsRun(16, splits, 11, 72, 72, 40, bias, activation, gate=56)
        for activation, bias in product(reference.ACTIVATIONS, (False, True))
        for splits in (1, 2)
    ]
    return every_tile + tokens + ranks + outputs + ends
