"""What a low-rank layer is as numbers: its shape, its cost, its two factors."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from .grids import AS_IT_IS, Grid, Storage

# oneDNN computes a convolution in blocks of 16 output channels per group, with AVX2 and with AVX-512: 64 -> 32 channels
# of 3x3 on 32x32 images take 0.76, 0.78 and 0.78 ms at ranks 8, 14 and 16, and 1.34 ms dense (channels_last, batch 8);
# 128 -> 16 channels of 64 taps take 37.3 ms at rank 7 and 37.4 ms dense (torch 2.13, two threads).
CHANNEL_BLOCK = 16


@dataclass(frozen=True)
class Shape:
    """A layer as a matrix: N = out_features rows, K = in_features columns (in_channels x kernel for a convolution).

    `groups` is the block structure of the dense layer; `down_groups` and `up_groups` that of its low-rank twin, whose
    factors are stored in R (K + N - R) numbers and an index of N if `pivoted`.
    Every cost formula of the library is a method of this class. Parameters and FLOPs count weights, not biases, which
    do not change.
    """

    out_features: int
    in_features: int
    groups: int = 1
    down_groups: int = 1
    up_groups: int = 1
    pivoted: bool = False

    def __str__(self) -> str:
        groups = f" in {self.groups} groups" if self.groups > 1 else ""
        twin = f" (twin: {self.down_groups}, {self.up_groups})" if self.down_groups > 1 else ""
        pivots = ", pivoted" if self.pivoted else ""
        return f"{self.out_features}x{self.in_features}{groups}{twin}{pivots}"

    @property
    def dense_params(self) -> int:
        return self.out_features * self.in_features // self.groups

    def low_rank_params(self, rank: int) -> int:
        outputs = self.out_features - (rank if self.pivoted else 0)
        return rank * (self.in_features // self.down_groups) + rank * outputs // self.up_groups

    @property
    def index_size(self) -> int:
        """Numbers, of 4 bytes, that say where the outputs of pivoted factors go."""
        return self.out_features if self.pivoted else 0

    def rank_for(self, params: float) -> int:
        """The largest rank that stores no more than `params` weights."""
        if not self.pivoted:
            return int(params // self.low_rank_params(1))
        columns = self.in_features // self.down_groups * self.up_groups + self.out_features
        rank = int((columns - math.sqrt(max(0.0, columns**2 - 4 * params * self.up_groups))) / 2) + 1
        while rank > 0 and self.low_rank_params(rank) > params:
            rank -= 1
        return min(rank, self.max_rank)

    def params(self, rank: int | None) -> int:
        """Weights stored at this rank; None means dense."""
        return self.dense_params if rank is None else self.low_rank_params(rank)

    def stored_params(self, rank: int | None, storage: Storage = AS_IT_IS) -> int:
        """As `params`; those of a correction are stored beside the dense ones."""
        return self.params(rank) + (self.dense_params if storage.corrected else 0)

    def bytes(self, rank: int | None, storage: Storage = AS_IT_IS, itemsize: int = 2) -> int:
        """On disk, without the bias: whole numbers packed, their scales in 16 bits, `itemsize` bytes for all others.

        ValueError where the groups of a grid do not divide the rows.
        """

        def matrix(rows: int, columns: int, grid: Grid | None) -> int:
            return rows * columns * itemsize if grid is None else grid.bytes(rows, columns)

        dense = matrix(self.out_features, self.in_features // self.groups, storage.grid)
        if rank is None:
            return dense
        outputs, grid = self.out_features - (rank if self.pivoted else 0), storage.of_factors
        down = matrix(rank, self.in_features // self.down_groups, grid)
        factors = down + matrix(outputs, rank // self.up_groups, grid) + 4 * self.index_size
        return factors + (dense if storage.corrected else 0)

    def fits(self, rank: int | None, storage: Storage) -> bool:
        """Whether the groups of all grids divide the rows that they are of."""
        dense, factors = storage.grid if rank is None or storage.corrected else None, storage.of_factors
        if dense is not None and not dense.fits(self.in_features // self.groups):
            return False
        if rank is None or factors is None:
            return True
        return factors.fits(self.in_features // self.down_groups) and factors.fits(rank // self.up_groups)

    def flops(self, rank: int | None) -> int:
        """Floating-point operations for one token (one output position of a convolution)."""
        return 2 * self.params(rank)

    def channels_computed(self, rank: int | None) -> int:
        """Output channels that a CPU computes for a kernel of several taps: those of the twin's first stage, of the
        dense layer for None, in whole blocks per group."""
        groups, channels = (self.groups, self.out_features) if rank is None else (self.down_groups, rank)
        return groups * CHANNEL_BLOCK * math.ceil(channels / groups / CHANNEL_BLOCK)

    def convolution_flops(self, rank: int | None) -> int:
        """As `flops`, for a kernel of several taps on a CPU: the blocks of `channels_computed` count in full."""
        groups = self.groups if rank is None else self.down_groups
        kernel = 2 * self.channels_computed(rank) * (self.in_features // groups)
        outputs = self.out_features - (rank or 0 if self.pivoted else 0)
        return kernel if rank is None else kernel + 2 * rank * outputs // self.up_groups

    def traffic(self, tokens: int, rank: int | None, bias: bool = False, residual: bool = False) -> int:
        """The fewest numbers that a linear layer moves for M tokens: x, the weights, and where there are any bias (N,)
        and residual (M, N) read once, y written once; h (M, R) stays on the chip."""
        ends = tokens * (self.in_features + self.out_features * (2 if residual else 1))
        return ends + self.params(rank) + (self.out_features if bias else 0)

    @property
    def work(self) -> float:
        """Of finding factors of the dense weight, up to a factor: Gram matrices and their eigenvectors."""
        rows, columns = self.out_features / self.groups, self.in_features / self.groups
        return self.groups * min(rows, columns) ** 2 * (rows + columns)

    @property
    def break_even_rank(self) -> int:
        """The largest rank that stores no more than the dense layer."""
        return self.rank_for(self.dense_params - self.index_size)

    @property
    def max_rank(self) -> int:
        """The largest rank that a truncated SVD of the twin's blocks can have; the twin is exact there."""
        return self.down_groups * min(self.out_features // self.up_blocks, self.in_features // self.down_groups)

    @property
    def up_blocks(self) -> int:
        """Into how many row blocks the approximated matrix falls: a group of inputs reaches only its own outputs
        when the dense groups split evenly over the twin's, else every output."""
        return self.down_groups if self.groups % self.down_groups == 0 else 1


@dataclass(frozen=True)
class Factors:
    """A rank-R approximation per group: down (G, R/G, K/G) and up (G, N/G, R/G), with `up @ down` the matrix.

    `tail_error` is the Frobenius norm of what was cut off, `norm` that of the whole matrix, both in the norm that was
    minimised. `shift` (G, N/G): what the bias must gain to keep the mean output. `output_error`: the relative error of
    the outputs, where another norm than theirs was minimised.
    """

    down: Tensor
    up: Tensor
    tail_error: float
    norm: float
    shift: Tensor | None = None
    output_error: float | None = None

    @property
    def relative_error(self) -> float:
        if self.output_error is not None:
            return self.output_error
        return self.tail_error / self.norm if self.norm else 0.0

    @property
    def rank(self) -> int:
        return self.down.shape[0] * self.down.shape[1]

    def merge(self) -> Tensor:
        """The approximated matrices (G, N/G, K/G)."""
        return self.up @ self.down
