"""The convolution kernels in the emulator, as functions of tensors, and the cases that show each of their edges."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import product
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional as F

from shrank.ops import reference

from .linear import BF16, FP16, Outcome

TILES = (
    *(
        ("chunks", block_m, rank)
        for block_m, ranks in ((32, (64, 128, 256)), (64, (32, 64, 96, 128, 256)), (128, (32, 64, 128)))
        for rank in ranks
    ),
    *((gather, 64, rank) for gather in ("analytic", "numbers") for rank in (64, 128, 256)),
    *(
        ("depthwise", *tile)
        for tile in ((128, 128), (64, 256), (128, 256), (32, 512), (64, 512), (64, 1024), (32, 1536))
    ),
)
Sizes = tuple[int, ...]


@dataclass(frozen=True)
class ConvRun:
    """One launch: a tile, a convolution of len(input) dimensions, its end, how many blocks share the columns."""

    tile: tuple[str, int, int]
    input: Sizes
    kernel: Sizes
    C: int
    N: int
    R: int
    batch: int = 2
    stride: Sizes = ()
    begin: Sizes = ()
    end: Sizes | None = None  # as begin
    dilation: Sizes = ()
    groups: int = 1
    up_groups: int = 1
    bias: bool = False
    activation: str = "none"
    residual: bool = False
    training: bool = False
    blocks_n: int = 1
    dtype: torch.dtype = BF16

    def __str__(self) -> str:
        names = {"s": self.stride, "p": self.begin, "q": self.end, "d": self.dilation}
        window = "".join(f"-{name}{'x'.join(map(str, sizes))}" for name, sizes in names.items() if sizes)
        end = [self.activation] + [name for name in ("bias", "residual", "training") if getattr(self, name)]
        return (
            f"{self.tile[0]}{self.tile[1]}x{self.tile[2]}-{self.batch}x{self.C}x{'x'.join(map(str, self.input))}-"
            f"k{'x'.join(map(str, self.kernel))}{window}-R{self.R}-N{self.N}-g{self.groups}.{self.up_groups}-"
            f"by{self.blocks_n}-{'-'.join(end)}-{str(self.dtype)[6:]}"
        )

    def is_possible(self) -> bool:
        """Whether the kernel that the tile names takes such taps: conv_tile.h."""
        most = {"chunks": 120, "depthwise": 256}.get(self.tile[0])
        if most is None:
            return True
        kernel = self.padded(self.kernel, 1)
        coordinates = sum(taps for taps in kernel[:2] if taps > 1) + kernel[2]
        one_segment = self.tile[0] == "depthwise" or self.groups <= self.up_groups
        return one_segment and math.prod(kernel) <= most and coordinates <= 31

    def multiply_adds(self) -> int:
        """About as many as it has."""
        return self.batch * math.prod(self.input) * (math.prod(self.kernel) * self.C + self.N) * self.R

    def padded(self, sizes: Sizes, fill: int) -> Sizes:
        """As select has it: depth, height, width."""
        sizes = sizes or (fill,) * len(self.input)
        return (fill,) * (3 - len(sizes)) + tuple(sizes)

    def problem(self, dev: ModuleType) -> object:
        begin = self.padded(self.begin, 0)
        end = begin if self.end is None else self.padded(self.end, 0)
        return dev.select.ConvProblem(
            self.batch,
            self.C,
            self.N,
            self.R,
            self.padded(self.input, 1),
            self.padded(self.kernel, 1),
            self.padded(self.stride, 1),
            begin,
            end,
            self.padded(self.dilation, 1),
            self.groups,
            self.up_groups,
            str(self.dtype)[6:],
            self.activation,
            self.bias,
            self.residual,
            self.training,
        )

    def arguments(self, dev: ModuleType) -> dict[str, Tensor | None]:
        """Tensors with their channels last: x (batch, D, H, W, C), down (R, D, H, W, C / groups), up (N, R / groups),
        residual (pixels, N); of about unit variance, as are h and y."""
        problem, generator = self.problem(dev), torch.Generator().manual_seed(0)

        def draw(*shape: int, fan_in: int = 1) -> Tensor:
            values = torch.randn(shape, generator=generator, dtype=torch.float64) * fan_in**-0.5
            return values.to(self.dtype)

        K = problem.K
        return {
            "x": draw(self.batch, *self.padded(self.input, 1), self.C),
            "down": draw(self.R, *self.padded(self.kernel, 1), self.C // self.groups, fan_in=K),
            "up": draw(self.N, self.R // self.up_groups, fan_in=self.R // self.up_groups),
            "bias": draw(self.N) if self.bias else None,
            "residual": draw(problem.pixels, self.N) if self.residual else None,
        }


def emulate(
    dev: ModuleType, run: ConvRun, arguments: dict[str, Tensor | None], seed: int = 0, copies_early: bool = False
) -> Outcome:
    problem = run.problem(dev)
    y = torch.full((problem.pixels, run.N), torch.nan, dtype=run.dtype)
    h = torch.full((problem.pixels, run.R), torch.nan, dtype=run.dtype)
    tensors = arguments | {"y": y, "h": h if run.training else None}
    tile = dev.select.ConvTile(*run.tile)
    grid = dev.select.ConvGrid(tile, -(-problem.pixels // tile.block_m), run.blocks_n)
    result = dev.conv.emulate(
        problem,
        grid,
        seed=seed,
        copies_early=copies_early,
        **{name: tensor.data_ptr() for name, tensor in tensors.items() if tensor is not None},
    )
    return Outcome(y, [h], result.problems, result.counts)


def in_pytorch(run: ConvRun, arguments: dict[str, Tensor | None]) -> reference.Forward:
    """What PyTorch computes in the dtype of the arguments, as matrices of pixels."""
    x, down, up = (arguments[name] for name in ("x", "down", "up"))
    begin = run.padded(run.begin, 0)
    end = begin if run.end is None else run.padded(run.end, 0)
    x = F.pad(x.movedim(-1, 1), [each for pair in zip(begin[::-1], end[::-1], strict=True) for each in pair])
    h = F.conv3d(x, down.movedim(-1, 1), None, run.padded(run.stride, 1), 0, run.padded(run.dilation, 1), run.groups)
    z = F.conv3d(h, up[:, :, None, None, None], arguments["bias"], groups=run.up_groups)
    h, z = (t.movedim(1, -1).reshape(-1, t.size(1)) for t in (h, z))
    y = reference.ACTIVATIONS[run.activation](z)
    return reference.Forward(y if arguments["residual"] is None else y + arguments["residual"], h)


def exact(run: ConvRun, arguments: dict[str, Tensor | None]) -> reference.Forward:
    return in_pytorch(run, {name: None if t is None else t.double() for name, t in arguments.items()})


SMALL = ("chunks", 64, 64)
TINY = ("chunks", 32, 64)
ANALYTIC = ("analytic", 64, 64)
BY_NUMBER = ("numbers", 64, 64)
DEPTHWISE = ("depthwise", 64, 256)


def runs() -> list[ConvRun]:
    """Every tile in both dtypes; then from small bases every window, grouping, tail and end."""
    made = [*_every_tile(), *_windows(), *_groups(), *_tails(), *_ends(), *_of_models()]
    return [run for run in made if run.is_possible()]


def _every_tile() -> list[ConvRun]:
    made = []
    for (gather, block_m, rank), dtype in product(TILES, (BF16, FP16)):
        C, R, groups = {
            "chunks": (24, max(rank - 8, 24), 1),
            "analytic": (32, rank - 16, 2),
            "numbers": (5, rank - 8, 1),
            "depthwise": (rank - 40, rank - 40, rank - 40),
        }[gather]
        made.append(
            ConvRun(
                (gather, block_m, rank),
                (9, 7),
                (3, 2),
                C,
                136,
                R,
                1,
                begin=(1, 1),
                groups=groups,
                bias=True,
                activation="gelu",
                residual=True,
                training=True,
                blocks_n=2,
                dtype=dtype,
            )
        )
    return made


def _windows() -> list[ConvRun]:
    """1d, 2d, 3d; strides, dilations, padding on one side, kernels of a point, as large as the image and larger."""
    shapes = [
        dict(input=(70,), kernel=(3,)),
        dict(input=(41,), kernel=(5,), stride=(2,), begin=(2,)),
        dict(input=(130,), kernel=(64,), begin=(31,), end=(32,)),
        dict(input=(90,), kernel=(16,), stride=(7,)),
        dict(input=(30,), kernel=(4,), dilation=(5,), begin=(9,)),
        dict(input=(33,), kernel=(1,)),
        dict(input=(12,), kernel=(12,)),
        dict(input=(6,), kernel=(9,), begin=(4,)),
        dict(input=(9, 11), kernel=(3, 3), begin=(1, 1)),
        dict(input=(14, 9), kernel=(7, 7), stride=(2, 2), begin=(3, 3)),
        dict(input=(8, 10), kernel=(1, 1)),
        dict(input=(8, 10), kernel=(1, 1), stride=(2, 3)),
        dict(input=(9, 8), kernel=(3, 2), stride=(1, 3), begin=(2, 0), end=(0, 1)),
        dict(input=(11, 12), kernel=(3, 3), dilation=(2, 3), begin=(2, 3)),
        dict(input=(40, 1), kernel=(16, 1), begin=(7, 0), end=(8, 0)),
        dict(input=(1, 1), kernel=(3, 3), begin=(1, 1)),
        dict(input=(3, 130), kernel=(2, 3), begin=(0, 1)),
        dict(input=(4, 5, 6), kernel=(2, 3, 3), begin=(0, 1, 1)),
        dict(input=(4, 8, 8), kernel=(2, 4, 4), stride=(2, 4, 4)),
        dict(input=(3, 4, 5), kernel=(3, 1, 1), begin=(1, 0, 0)),
        dict(input=(5, 4, 6), kernel=(2, 2, 2), dilation=(2, 1, 3), stride=(1, 2, 1), begin=(1, 0, 2)),
        dict(input=(2, 3, 4), kernel=(1, 1, 1)),
    ]
    return [
        replace(ConvRun(tile, **shape, C=C, N=N, R=R, groups=groups), dtype=dtype)
        for i, shape in enumerate(shapes)
        for tile, C, N, R, groups, dtype in [
            (TINY, (8, 24, 64, 72)[i % 4], 72, 40, 1, (BF16, FP16)[i % 2]),
            (ANALYTIC, (72, 8, 24, 64)[i % 4], 24, 40, 1, (FP16, BF16)[i % 2]),
            (BY_NUMBER, (1, 3, 12, 5)[i % 4], 24, 16, 1, (FP16, BF16)[i % 2]),
            (DEPTHWISE, 72, 40, 72, 72, (BF16, FP16)[i % 2]),
        ]
    ]


def _groups() -> list[ConvRun]:
    """(groups, up_groups) with each dividing the other; widths of a group off and on every fragment."""
    base = dict(input=(6, 7), kernel=(3, 2), begin=(1, 0))
    by_chunk = [
        ConvRun(tile, **base, C=8 * groups * wide, N=N * up, R=R, groups=groups, up_groups=up, training=True, bias=True)
        for groups, up, R, N, wide, tile in [
            (2, 1, 48, 40, 1, ANALYTIC),
            (4, 1, 64, 40, 3, ANALYTIC),
            (2, 2, 80, 136, 1, TINY),
            (2, 2, 80, 136, 1, ANALYTIC),
            (4, 2, 64, 24, 2, ANALYTIC),
            (8, 1, 64, 40, 1, ANALYTIC),
            (2, 1, 16, 40, 1, ANALYTIC),
            (16, 1, 128, 24, 1, ("analytic", 64, 128)),
            (3, 1, 72, 40, 1, ("analytic", 64, 128)),
            (1, 2, 96, 40, 5, TINY),
            (2, 4, 96, 24, 2, SMALL),
            (2, 4, 96, 24, 2, ANALYTIC),
            (4, 4, 256, 72, 6, SMALL),
            (16, 16, 384, 48, 2, TINY),
            (4, 1, 256, 72, 2, ("analytic", 64, 256)),
            (8, 2, 256, 72, 1, ("analytic", 64, 128)),
        ]
    ]
    by_number = [
        ConvRun(BY_NUMBER, **base, C=groups * wide, N=24 * up, R=R, groups=groups, up_groups=up, bias=True)
        for groups, up, R, wide in [(2, 1, 48, 3), (4, 4, 96, 1), (3, 1, 24, 5), (1, 2, 32, 6), (8, 1, 64, 1)]
    ]
    depthwise = [
        ConvRun(DEPTHWISE, **base, C=R, N=40 * up, R=R, groups=R, up_groups=up, bias=True, training=True)
        for up, R in [(1, 8), (2, 48), (4, 288)]
    ]
    return by_chunk + by_number + depthwise


def _tails() -> list[ConvRun]:
    """Steps of the first pipeline over and under its stages, column tiles and their shares, pixels, ranks."""
    steps = [
        ConvRun(tile, (n,), (taps,), C, 24, 24, 1, dtype=dtype)
        for tile, C, dtype in (
            (TINY, 64, BF16),
            (("chunks", 128, 128), 64, FP16),
            (ANALYTIC, 64, BF16),
            (BY_NUMBER, 32, BF16),
        )
        for n, taps in ((9, 1), (9, 2), (9, 3), (9, 4), (9, 5), (12, 9))
    ]
    tiles = [
        ConvRun(tile, (20,), (3,), C, 128 * n - 8 * (n % 2), C, 1, groups=groups, blocks_n=by)
        for tile, C, groups in ((TINY, 64, 1), (DEPTHWISE, 136, 136))
        for n, by in ((1, 1), (2, 1), (3, 2), (5, 4), (6, 4), (7, 7))
    ]
    pixels = [
        ConvRun(tile, (n + 2,), (3,), C, 72, C, 1, groups=groups, bias=True)
        for tile, C, groups in (
            (TINY, 16, 1),
            (SMALL, 16, 1),
            (ANALYTIC, 16, 1),
            (BY_NUMBER, 8, 1),
            (DEPTHWISE, 16, 16),
            (("depthwise", 128, 256), 16, 16),
            (("chunks", 128, 64), 16, 1),
        )
        for n in (1, tile[1] - 1, tile[1], tile[1] + 1, 2 * tile[1] + 5)
    ]
    ranks = [
        ConvRun(tile, (20,), (3,), 16, 24, R, 1, training=True)
        for tile, R in (
            (TINY, 8),
            (TINY, 16),
            (TINY, 56),
            (TINY, 64),
            (("chunks", 64, 32), 24),
            (("chunks", 64, 96), 80),
            (("chunks", 32, 256), 200),
            (("analytic", 64, 128), 104),
            (("numbers", 64, 128), 104),
        )
    ]
    ranks += [
        ConvRun(("depthwise", *tile), (20,), (3,), R, 24, R, 1, groups=R, training=True)
        for tile, R in (((64, 256), 64), ((64, 256), 72), ((32, 512), 200), ((32, 1536), 640))
    ]
    ranks += [
        ConvRun(("depthwise", *tile), (20,), (3,), tile[1], 24, tile[1], 1, groups=tile[1])  # all that it holds
        for tile in ((128, 128), (64, 256))
    ]
    ranks += [
        ConvRun(tile, (20,), (3,), C, 24, 48, 1, groups=groups)  # runs of 64 channels, and of all
        for C, groups in ((128, 1), (192, 3), (256, 2), (72, 1), (80, 1), (200, 1))
        for tile in ((ANALYTIC,) if groups > 1 else (TINY, ANALYTIC))
    ]
    ranks += [  # the most coordinates, and the most taps, that a list has; windows outside of an axis with one tap
        ConvRun(TINY, (40,), (31,), 8, 24, 24, 1, begin=(15,)),
        ConvRun(TINY, (12, 13), (12, 10), 8, 24, 24, 1, begin=(6, 5)),
        ConvRun(TINY, (3, 2, 6), (1, 2, 3), 8, 24, 24, 1, begin=(1, 1, 2), end=(2, 0, 1)),
        ConvRun(DEPTHWISE, (40,), (31,), 24, 24, 24, 1, begin=(15,), groups=24),
        ConvRun(DEPTHWISE, (9, 8, 5), (8, 8, 4), 16, 24, 16, 1, begin=(1, 0, 2), groups=16),
        ConvRun(DEPTHWISE, (3, 6, 2), (1, 3, 1), 16, 24, 16, 1, begin=(1, 2, 1), end=(2, 1, 0), groups=16),
    ]
    return steps + tiles + pixels + ranks


def _ends() -> list[ConvRun]:
    return [
        ConvRun(
            tile,
            (5, 4),
            (2, 2),
            8,
            40,
            8,
            groups=groups,
            bias=bias,
            activation=activation,
            residual=residual,
            training=training,
        )
        for activation, bias, residual, training in product(reference.ACTIVATIONS, *[(False, True)] * 3)
        for tile, groups in ((TINY, 1), (DEPTHWISE, 8))
        if bias == residual or tile == TINY
    ]


def _of_models() -> list[ConvRun]:
    """The layers of real models, with fewer pixels."""
    return [
        ConvRun(("chunks", 64, 32), (8, 8), (3, 3), 64, 64, 16, begin=(1, 1)),  # ResNet
        ConvRun(BY_NUMBER, (18, 18), (7, 7), 3, 64, 16, 1, (2, 2), (3, 3), bias=True, activation="relu"),  # its stem
        ConvRun(BY_NUMBER, (720, 1), (512, 1), 1, 128, 48, 1, (4, 1), (0, 0), bias=True, activation="relu"),  # CREPE
        ConvRun(ANALYTIC, (100, 1), (64, 1), 128, 128, 56, 1, begin=(31, 0), end=(32, 0), bias=True, activation="relu"),
        ConvRun(BY_NUMBER, (40,), (3,), 80, 384, 40, 1, begin=(1,), bias=True, activation="gelu"),  # Whisper
        ConvRun(("chunks", 64, 96), (41,), (3,), 80, 384, 88, 1, begin=(1,), bias=True, activation="gelu"),
        ConvRun(
            ANALYTIC,
            (33,),
            (128,),
            768,
            768,
            384,
            1,
            begin=(64,),
            groups=16,
            up_groups=16,
            bias=True,
            activation="gelu",
        ),  # wav2vec 2.0
        ConvRun(BY_NUMBER, (4, 32, 32), (2, 16, 16), 3, 96, 48, 1, (2, 16, 16), bias=True),  # VideoMAE's tubes
        ConvRun(
            ("depthwise", 64, 256),
            (9, 9),
            (7, 7),
            96,
            384,
            96,
            1,
            begin=(3, 3),
            groups=96,
            bias=True,
            activation="gelu",
        ),  # ConvNeXt
        ConvRun(
            DEPTHWISE, (30,), (4,), 192, 64, 192, 1, begin=(3,), end=(0,), groups=192, bias=True, activation="silu"
        ),  # Mamba
    ]
