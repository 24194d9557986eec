"""The matrix kernels in the emulator, as functions of tensors, and the cases that show each of their edges: of layers
with one pair of factors, of gated ones and of pivoted ones."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from shrank.ops import pivoted_reference, reference
from tests.common.gated_cases import GatedCase
from tests.common.linear_cases import LinearCase
from tests.common.ops import doubled
from tests.common.pivoted_cases import PivotedCase

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
GATED_TILES = ((32, 0), (32, 128), (64, 0), (64, 64), (64, 128), (64, 256), (128, 0), (128, 128), (128, 256))
PIVOTED_TILES = GATED_TILES
BF16, FP16 = torch.bfloat16, torch.float16
PLAIN, GATED, PIVOTED, GATED_PIVOTED = 1, 2, 3, 4  # csrc/select/linear_tile.h


class Pair(NamedTuple):
    """A pair of factors and its bias; of pivoted ones also the pivots' bias and the order of the outputs."""

    down: Tensor
    up: Tensor
    bias: Tensor | None
    pivot_bias: Tensor | None = None
    order: Tensor | None = None

    def z(self, h: Tensor) -> Tensor:
        """The pre-activation, of h."""
        if self.order is not None:
            return pivoted_reference.in_order(h, *self[1:])
        return h @ self.up.T + (0 if self.bias is None else self.bias)


def form_of(arguments: tuple) -> int:
    """Which op these are arguments of."""
    if len(arguments) == 6:
        return PLAIN
    if len(arguments) == 8:
        return PIVOTED
    return GATED if arguments[8] is None and arguments[10] is None else GATED_PIVOTED


class Given(NamedTuple):
    """An op's arguments: one pair of factors, or gate and value."""

    form: int

    x: Tensor
    pairs: list[Pair]
    activation: str
    residual: Tensor | None

    @classmethod
    def of(cls, arguments: tuple) -> Given:
        form = form_of(arguments)
        if form in (GATED, GATED_PIVOTED):
            x, *stored, activation = arguments
            pairs = [Pair(*stored[i * 3 : i * 3 + 3], *stored[6 + i * 2 : 8 + i * 2]) for i in range(2)]
            return cls(form, x, pairs, activation, None)
        x, *stored, activation, residual = arguments
        return cls(form, x, [Pair(*stored)], activation, residual)


def arguments_of(run: object) -> tuple:
    """The op's arguments for a run, of whichever kernels."""
    if run.gate:
        bias = "both" if run.bias else "none"
        sizes = (run.M,), run.K, run.N, run.gate, run.R
        return GatedCase(*sizes, bias, run.activation, run.pivoted or "none").tensors(run.dtype, "cpu")
    kind, bias = (PivotedCase, bias_of(run)) if run.pivoted else (LinearCase, run.bias)
    return kind((run.M,), run.K, run.N, run.R, bias, run.activation, run.residual).tensors(run.dtype, "cpu")


def in_pytorch(arguments: tuple) -> Tensor:
    """The op's y as PyTorch rounds it."""
    of_form = {
        PLAIN: reference.low_rank_linear,
        GATED: reference.low_rank_gated,
        GATED_PIVOTED: reference.low_rank_gated,
        PIVOTED: pivoted_reference.low_rank_pivoted,
    }
    return of_form[form_of(arguments)](*arguments)


def addresses(**tensors: Tensor | None) -> dict[str, int]:
    return {name: tensor.data_ptr() for name, tensor in tensors.items() if tensor is not None}


@dataclass(frozen=True)
class Run:
    """One launch: sizes, end of the layer, tile and grid. From x, or from h, as a tile of max_rank 0 always.

    gate: the rank of the gate; 0 where there is none. pivoted: whether R of the outputs are h.
    """

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
    gate: int = 0
    pivoted: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "from_h", self.from_h or self.max_rank == 0)

    def __str__(self) -> str:
        end = [self.activation] + [name for name in ("bias", "residual", "training") if getattr(self, name)]
        gate = f"gate{self.gate}-" if self.gate else "pivoted-" * self.pivoted
        return (
            f"{self.block_m}x{self.max_rank}{'-from-h' * self.from_h}-M{self.M}-K{self.K}-N{self.N}-{gate}R{self.R}-"
            f"by{self.blocks_n}-{'-'.join(end)}-{str(self.dtype)[6:]}"
        )

    def arguments(self) -> tuple:
        return arguments_of(self)

    def multiply_adds(self) -> int:
        return self.M * (self.K + self.N) * (self.R + self.gate)


def bias_of(run: object) -> str:
    """Of a pivoted run: of all outputs, and where a residual is added, of some."""
    if not run.bias:
        return "none"
    return "both" if not run.residual else "pivots" if run.N % 16 else "others"


@dataclass(frozen=True)
class Outcome:
    """h: of each pair; none where the run leaves none."""

    y: Tensor
    h: list[Tensor]
    problems: list[str]
    counts: object


def emulate(dev: ModuleType, run: Run, arguments: tuple, seed: int = 0, copies_early: bool = False) -> Outcome:
    given = Given.of(arguments)
    h = [
        given.x @ down.T if run.from_h else torch.full((run.M, len(down)), torch.nan, dtype=run.dtype)
        for down, *_ in given.pairs
    ]
    y = torch.full((run.M, run.N), torch.nan, dtype=run.dtype)
    pairs = [
        addresses(**pair._replace(down=None)._asdict(), h=an_h if run.from_h or run.training else None)
        | (addresses(down=pair.down) if not run.from_h else {})
        | {"R": len(pair.down)}
        for pair, an_h in zip(given.pairs, h, strict=True)
    ]
    tile = dev.select.LinearTile(run.block_m, run.max_rank, given.form)
    result = dev.linear.emulate(
        dev.select.LinearGrid(tile, -(-run.M // run.block_m), run.blocks_n),
        run.M,
        run.K,
        run.N,
        pairs,
        str(run.dtype)[6:],
        given.activation,
        seed=seed,
        copies_early=copies_early,
        **addresses(x=None if run.from_h else given.x, residual=given.residual, y=y),
    )
    return Outcome(y, h if run.from_h or run.training else [], result.problems, result.counts)


def exact(arguments: tuple, h: list[Tensor] | None = None) -> tuple[Tensor, ...]:
    """y and h in fp64; from h, if they are given."""
    _, x, pairs, activation, residual = Given.of(doubled(arguments))
    h = [x @ down.T for down, *_ in pairs] if h is None else [each.double() for each in h]
    z, *value = [pair.z(an_h) for an_h, pair in zip(h, pairs, strict=True)]
    y = reference.ACTIVATIONS[activation](z)
    return (y * value[0] if value else y + (0 if residual is None else residual)), *h


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
    of_forms = _gated_runs() + _pivoted_runs()
    holding = [replace(run, from_h=True) for run in every_tile + steps_of_up + rows + ranks if run.max_rank]
    return (
        every_tile + steps_of_down + steps_of_up + rows + ranks + columns + ends + expanding_ends + holding + of_forms
    )


def _gated_runs() -> list[Run]:
    """The same edges of gated layers, whose tiles have 64 columns: gate and value of other ranks, either the larger."""
    every_tile = [
        Run(block_m, max_rank, block_m + 3, 136, 136, R, True, "silu", False, True, 2, dtype, gate=gate)
        for (block_m, max_rank), dtype in product(GATED_TILES, (BF16, FP16))
        for R, gate in [(max(max_rank - 8, 40), 24)] + [(16, max_rank or 72)] * (dtype == BF16)
    ]
    steps_of_down = [Run(64, 64, 33, 64 * steps - 8 * (steps % 3), 64, 32, gate=40) for steps in range(1, 10)]
    steps_of_up = [
        Run(64, max_rank, 17, 72, 64 * tiles - 8 * (tiles % 2), R, blocks_n=blocks, gate=gate)
        for max_rank, R, gate in [(128, 104, 56), (0, 56, 136)]
        for tiles, blocks in [(1, 1), (2, 1), (3, 1), (5, 1), (5, 2), (6, 4), (7, 7)]
    ]
    rows = [
        Run(block_m, max_rank, M, 72, 72, 24, bias=True, gate=40)
        for block_m, max_rank in [(32, 128), (64, 64), (64, 256), (128, 0)]
        for M in (1, 15, block_m - 1, block_m, block_m + 1, 2 * block_m + 5)
    ]
    ranks = [
        Run(64, max_rank, 20, 72, 72, R, training=max_rank > 0, gate=gate)
        for max_rank, R, gate in [
            (64, 8, 64),
            (64, 56, 8),
            (128, 72, 128),
            (128, 128, 64),
            (256, 136, 200),
            (256, 256, 8),
            (0, 8, 72),
            (0, 200, 64),
            (0, 128, 128),
        ]
    ]
    ends = [
        Run(64, max_rank, 37, 72, 72, 40, bias, activation, False, training, dtype=dtype, gate=24)
        for activation, bias, training in product(reference.ACTIVATIONS, *[(False, True)] * 2)
        for max_rank, dtype in [(64, BF16), (64, FP16), (0, BF16)]
        if not (training and max_rank == 0)
    ]
    made = every_tile + steps_of_down + steps_of_up + rows + ranks + ends
    return made + [replace(run, from_h=True) for run in every_tile + steps_of_up + ranks if run.max_rank]


def _pivoted_runs() -> list[Run]:
    """The same edges of pivoted layers; up has no rows, few, or rows of more than a panel; pivots in any panel of h."""
    every_tile = [
        Run(block_m, max_rank, block_m + 3, 136, 264, R, True, "gelu", True, True, 2, dtype, pivoted=True)
        for (block_m, max_rank), dtype in product(PIVOTED_TILES, (BF16, FP16))
        for R in (max(max_rank - 8, 40), 16)
    ]
    steps_of_up = [
        Run(64, max_rank, 17, 72, 128 * tiles - 8 * (tiles % 2), R, blocks_n=blocks, pivoted=True)
        for max_rank, R in [(64, 56), (128, 104), (0, 56), (0, 72)]
        for tiles, blocks in [(1, 1), (2, 1), (3, 1), (4, 1), (5, 1), (5, 2), (6, 4), (7, 7)]
    ]
    rows = [
        Run(block_m, max_rank, M, 72, 136, 24, bias=True, pivoted=True)
        for block_m, max_rank in [(32, 128), (64, 64), (128, 128), (64, 0), (128, 0)]
        for M in (1, 15, block_m - 1, block_m, block_m + 1, 2 * block_m + 5)
    ]
    ranks = [
        Run(64, max_rank, 20, 72, N, R, True, training=max_rank > 0, pivoted=True)
        for max_rank, R in [(64, 8), (64, 64), (128, 72), (128, 128), (256, 200), (256, 256), (0, 8), (0, 64), (0, 200)]
        for N in (R, R + 8, R + 72)
    ]
    ends = [
        Run(64, max_rank, 37, 72, 72, 40, bias, activation, residual, training, dtype=dtype, pivoted=True)
        for activation, bias, residual in product(reference.ACTIVATIONS, *[(False, True)] * 2)
        for max_rank, dtype, training in [(64, BF16, False), (64, FP16, True), (0, BF16, False)]
    ]
    made = every_tile + steps_of_up + rows + ranks + ends
    return made + [replace(run, from_h=True) for run in every_tile + steps_of_up + rows + ranks if run.max_rank]
