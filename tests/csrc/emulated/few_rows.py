"""The kernels for a few rows in the emulator, as a function of tensors, and the cases that show each of their edges."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from types import ModuleType
from typing import NamedTuple

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
    pivoted: bool | str = False  # of a gated layer "gate", "value" or "both"

    def __str__(self) -> str:
        end = [self.activation] + [name for name in ("bias", "residual", "training") if getattr(self, name)]
        form = f"gate{self.gate}-" * bool(self.gate)
        form += f"pivots of {self.pivoted}-" if self.gate and self.pivoted else "pivoted-" * bool(self.pivoted)
        sizes = f"M{self.M}-K{self.K}-N{self.N}-{form}R{self.R}"
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
        addresses(**pair._asdict(), h=an_h if kept else None, sums=parts if run.splits > 1 else None, y=y)
        | {"R": len(pair.down), "N": run.N, "splits": run.splits}
        for pair, an_h, parts in zip(given.pairs, h, sums, strict=True)
    ]
    result = dev.linear.emulate_few_rows(
        run.tokens,
        run.M,
        run.K,
        pairs,
        1,
        str(run.dtype)[6:],
        given.activation,
        seed=seed,
        **addresses(x=given.x, residual=given.residual),
    )
    return Outcome(y, h if kept else [], result.problems, result.counts)


class Layer(NamedTuple):
    """One of several layers of an input: outputs, rank, splits of K, whether it has a bias, and whether pivots."""

    N: int
    R: int
    splits: int = 1
    bias: bool = True
    pivoted: bool = False


@dataclass(frozen=True)
class MultiRun:
    """A launch of each kernel for several layers of one input."""

    tokens: int
    M: int
    K: int
    layers: tuple[Layer, ...]
    dtype: torch.dtype = BF16

    def __str__(self) -> str:
        layers = "-".join(f"N{n}R{r}by{splits}{'b' * bias}{'p' * pivots}" for n, r, splits, bias, pivots in self.layers)
        return f"{self.tokens}-M{self.M}-K{self.K}-{layers}-{str(self.dtype)[6:]}"

    def multiply_adds(self) -> int:
        return self.M * sum((self.K + layer.N) * layer.R for layer in self.layers)

    def alone(self) -> list[FewRowsRun]:
        """The same layers one by one."""
        return [
            FewRowsRun(
                self.tokens,
                layer.splits,
                self.M,
                self.K,
                layer.N,
                layer.R,
                layer.bias,
                dtype=self.dtype,
                pivoted=layer.pivoted,
            )
            for layer in self.layers
        ]

    def arguments(self) -> list[tuple]:
        """Of low_rank_linear or low_rank_pivoted, for each layer, with one x."""
        given = [run.arguments() for run in self.alone()]
        return [(given[0][0], *each[1:]) for each in given]


def emulate_multi(dev: ModuleType, run: MultiRun, arguments: list[tuple], seed: int = 0) -> list[Outcome]:
    """What each layer gives; the problems and the counts are those of the launches, and stand with every layer."""
    made, kept = [], []
    for layer, given in zip(run.layers, arguments, strict=True):
        y = torch.full((run.M, layer.N), torch.nan, dtype=run.dtype)
        between = (
            torch.full((run.M, layer.R), torch.nan, dtype=run.dtype)
            if layer.splits == 1
            else torch.full((layer.splits, run.M, layer.R), torch.nan)
        )
        name = "h" if layer.splits == 1 else "sums"
        made.append(
            addresses(**Given.of(given).pairs[0]._asdict(), y=y, **{name: between})
            | {"R": layer.R, "N": layer.N, "splits": layer.splits}
        )
        kept.append((y, between))
    x = arguments[0][0]
    dtype = str(run.dtype)[6:]
    result = dev.linear.emulate_few_rows(
        run.tokens, run.M, run.K, made, len(made), dtype, "none", x.data_ptr(), seed=seed
    )
    return [Outcome(y, [], result.problems, result.counts) for y, _ in kept]


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
    every_form = _gated_runs() + _pivoted_runs() + _gated_pivoted_runs()
    return every_tile + tokens + columns + ranks + outputs + ends + every_form


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


def _pivoted_runs() -> list[FewRowsRun]:
    """The same edges of pivoted layers; up has no rows, few, or many; pivots in any chunk of h."""
    every_tile = [
        FewRowsRun(tokens, splits, tokens + 3, 520, 136, 72, True, "gelu", True, True, dtype, pivoted=True)
        for tokens, splits, dtype in product(TOKENS, (1, 2), (BF16, FP16))
    ]
    tokens = [
        FewRowsRun(tile, 2, M, 72, 72, 24, True, pivoted=True) for tile in TOKENS for M in (1, tile, tile + 1, 37)
    ]
    ranks = [
        FewRowsRun(8, splits, 3, 40, N, R, True, training=True, pivoted=True)
        for R in (8, 24, 40, 128, 264)
        for N in (R, R + 8, R + 136)
        for splits in (1, 2)
    ]
    ends = [
        FewRowsRun(16, splits, 11, 72, 72, 40, bias, activation, residual, pivoted=True)
        for activation, bias, residual in product(reference.ACTIVATIONS, *[(False, True)] * 2)
        for splits in (1, 2)
    ]
    return every_tile + tokens + ranks + ends


def _gated_pivoted_runs() -> list[FewRowsRun]:
    """Of gated layers where the gate, the value or both have pivots: up has no rows, few, or many."""
    which = ("gate", "value", "both")
    every_tile = [
        FewRowsRun(tokens, splits, tokens + 3, 520, 136, 72, True, "silu", False, True, dtype, 40, pivoted)
        for tokens, splits, dtype in product(TOKENS, (1, 2), (BF16, FP16))
        for pivoted in which
    ]
    ranks = [
        FewRowsRun(8, splits, 3, 40, N, R, True, training=True, gate=gate, pivoted=pivoted)
        for N, R, gate in [(40, 40, 8), (40, 8, 40), (48, 40, 40), (176, 24, 136), (392, 264, 128)]
        for splits, pivoted in zip((1, 2, 1), which, strict=True)
    ]
    ends = [
        FewRowsRun(16, splits, 11, 72, 72, 40, bias, activation, gate=56, pivoted=pivoted)
        for (activation, bias), (splits, pivoted) in product(
            product(reference.ACTIVATIONS, (False, True)), zip((1, 2, 1), which, strict=True)
        )
        if bias or pivoted == "both"
    ]
    return every_tile + ranks + ends


def multi_runs() -> list[MultiRun]:
    """Two and three layers: every tile in both dtypes, layers of one block and of many, splits that differ, groups."""
    qkv = (Layer(136, 72), Layer(40, 24, 2), Layer(72, 40, 1, False))
    every_tile = [MultiRun(tokens, tokens + 3, 520, qkv, dtype) for tokens, dtype in product(TOKENS, (BF16, FP16))]
    two = [MultiRun(8, M, 264, (Layer(72, 40, 2), Layer(64, 16))) for M in (1, 8, 9)]
    edges = [
        MultiRun(8, 3, 264, (Layer(8, 8), Layer(200, 8), Layer(64, 16))),
        MultiRun(8, 3, 264, (Layer(64, 16), Layer(8, 264), Layer(128, 32, 3))),
        MultiRun(8, 19, 1032, (Layer(72, 8, 4), Layer(72, 24, 1), Layer(72, 16, 2))),
        MultiRun(16, 37, 72, (Layer(264, 136, 1, False), Layer(72, 8, 1, False), Layer(8, 520))),
    ]
    pivots = [
        MultiRun(tokens, tokens + 3, 520, tuple(layer._replace(pivoted=i in which) for i, layer in enumerate(qkv)))
        for tokens in TOKENS
        for which in ((0, 1, 2), (0,), (1,), (2,))
    ] + [
        MultiRun(8, 3, 264, (Layer(72, 72, 2, True, True), Layer(64, 16, 1, False, True)), FP16),
        MultiRun(8, 19, 264, (Layer(8, 8), Layer(200, 136, 1, True, True), Layer(264, 264, 3, False, True))),
    ]
    return every_tile + two + edges + pivots
