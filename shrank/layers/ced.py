"""CED: the low-rank twin of a convolution."""

from __future__ import annotations

import math
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..linalg import Factors, PivotedFactors, Shape
from ..ops import reference
from ..ops.conv import window_of
from ..ops.reference import output_sizes
from .batch_norm import folded
from .low_rank import LowRankLayer
from .pivots import Pivots
from .plain import CONVOLUTIONS, is_untouched
from .two_stage import checked_rank, memory_format, merged_bias, ops_for, reset_stages


class CED(LowRankLayer):
    """A convolution of low rank in 1 to 3 dimensions: one into `rank` channels, then a pointwise one.

    x is (batch, in_channels, *spatial) or without a batch, y has `out_channels` channels. The stages are `ced_unit[0]`,
    whose weight is `down` (rank, in_channels / groups, *kernel_size), and `ced_unit[1]`, whose weight is `up`
    (out_channels, rank / groups, 1, ...). Drawn from scratch, the outputs have the variance of nn.Conv's.

    Args:
        in_channels: C, channels of x.
        out_channels: N, channels of y.
        rank: R, at least 1; with pivots below `out_channels`.
        kernel_size: 1, 2 or 3 sizes; how many sets the dimension.
        stride: Of the first stage.
        padding: Of the first stage: numbers, "same" or "valid".
        dilation: Of the first stage.
        groups: Of the dense convolution; the first stage has min(rank, groups).
        groups_out: Whether the second stage has as many groups as the first, else it has one.
        padding_mode: Of the first stage: zeros, reflect, replicate or circular.
        bias: Whether a bias (out_channels,) is added.
        device: Of the parameters.
        dtype: Of the parameters.
        r: The name of `rank` in Greenformer and ShRank; give one of both.
        pivot: As of `LED`, within every group; both stages must have the same groups.

    Raises:
        ValueError: The rank, the kernel or the groups do not fit.
        TypeError: The rank is not given, or given twice.

    Source:
        Winata et al., ICASSP 2020; the convolutional encoder-decoder: Cahyawijaya et al., Greenformer, 2021.
    """

    unit = "ced_unit"
    stage_kinds = tuple(CONVOLUTIONS.values())

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        rank: int | None = None,
        kernel_size: tuple[int, ...] | None = None,
        stride: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] | str = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        groups_out: bool = False,
        padding_mode: str = "zeros",
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        r: int | None = None,
        pivot: bool = False,
    ) -> None:
        super().__init__()
        rank = checked_rank(rank, r, out_channels if pivot else None)
        if not isinstance(kernel_size, tuple | list) or len(kernel_size) not in CONVOLUTIONS:
            raise ValueError(f"kernel_size must be a tuple of 1, 2 or 3 sizes, got {kernel_size!r}")
        convolution = CONVOLUTIONS[len(kernel_size)]
        self.dense_groups = groups
        groups = min(rank, groups)
        up_groups = groups if groups_out else 1
        if pivot and up_groups != groups:
            raise ValueError(f"pivots need the same groups in both stages, got {groups} and {up_groups} (groups_out)")
        made = {"device": device, "dtype": dtype}
        self.ced_unit = nn.Sequential(
            convolution(
                in_channels, rank, tuple(kernel_size), stride, padding, dilation, groups, False, padding_mode, **made
            ),
            convolution(rank, out_channels - rank if pivot else out_channels, 1, groups=up_groups, bias=bias, **made),
        )
        if pivot:
            self.ced_unit.append(Pivots(rank, out_channels, -1 - len(kernel_size), bias, up_groups, **made))
        fan_in = in_channels // groups * math.prod(kernel_size)
        reset_stages(self.ced_unit, fan_in=fan_in, rank=rank // self.up_groups)

    def in_one_op(self, ops: ModuleType, x: Tensor, *end: str | Tensor | None) -> Tensor:
        return self._by(ops, x, *self._all_rows(), *end)

    def _all_rows(self) -> tuple[Tensor, Tensor | None]:
        """The weight and the bias of a second stage that makes all outputs: with pivots, copies of a few weights in
        place of some of all outputs."""
        second = self.stages._modules["1"]
        if not self.pivoted:
            return second.weight, second.bias
        return self.stages[2].all_rows(second.weight), merged_bias(self.stages)

    def _by(self, ops: ModuleType, x: Tensor, up: Tensor, bias: Tensor | None, *end: str | Tensor | None) -> Tensor:
        first, second, *_ = self.stages._modules.values()
        padding = first.padding
        if first.padding_mode != "zeros":
            x, padding = F.pad(x, first._reversed_padding_repeated_twice, first.padding_mode), 0
        return ops.low_rank_conv(
            x, first.weight, up, bias, first.stride, padding, first.dilation, first.groups, second.groups, *end
        )

    def normed(self, norm: nn.Module, x: Tensor, activation: str, residual: Tensor | None = None) -> Tensor:
        """activation(norm(self(x))) + residual, of a batch norm in evaluation: in one op, as `finished`."""
        fits = residual is None or self.takes_residual(x, residual)
        if fits and is_untouched(self) and is_untouched(norm) and (ops := ops_for(self.stages, self.stage_kinds, x)):
            up, bias = self._all_rows()
            statistics = norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps
            return self._by(ops, x, *folded(up, bias, *statistics), activation, residual)
        return reference.finished(norm(self(x)), activation, residual)

    def takes_residual(self, x: Tensor, residual: Tensor) -> bool:
        first = self.stages._modules["0"]
        batched = x if x.dim() == first.weight.dim() else x[None]
        window = window_of(first.weight, first.stride, first.padding, first.dilation, first.groups, 1)
        sizes = (self.out_channels, *output_sizes(batched, first.weight, window))
        return residual.shape == (*x.shape[: x.dim() - len(sizes)], *sizes) and residual.dtype == x.dtype

    @property
    def kind(self) -> str:
        return f"Conv{len(self.kernel_size)}d"

    @property
    def shape(self) -> Shape:
        return Shape(
            self.out_channels,
            self.in_channels * math.prod(self.kernel_size),
            self.dense_groups,
            self.down_groups,
            self.up_groups,
            self.pivoted,
        )

    @property
    def rank(self) -> int:
        return self.built_with(0, "out_channels")

    @property
    def in_channels(self) -> int:
        return self.built_with(0, "in_channels")

    @property
    def out_channels(self) -> int:
        return self.built_with(1, "out_channels") + (self.rank if self.pivoted else 0)

    @property
    def down_groups(self) -> int:
        return self.built_with(0, "groups")

    @property
    def up_groups(self) -> int:
        return self.built_with(1, "groups")

    @property
    def groups(self) -> int:
        """Groups of the equivalent convolution, whose kernel is `weight`: a dense second stage mixes all of them."""
        return self.up_groups

    @property
    def kernel_size(self) -> tuple[int, ...]:
        return self.built_with(0, "kernel_size")

    @property
    def stride(self) -> tuple[int, ...]:
        return self.built_with(0, "stride")

    @property
    def padding(self) -> tuple[int, ...] | str:
        return self.built_with(0, "padding")

    @property
    def dilation(self) -> tuple[int, ...]:
        return self.built_with(0, "dilation")

    @property
    def padding_mode(self) -> str:
        return self.built_with(0, "padding_mode")

    @property
    def transposed(self) -> bool:
        return False

    @property
    def output_padding(self) -> tuple[int, ...]:
        return self.built_with(0, "output_padding")

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return self.out_channels, self.in_channels // self.groups, *self.kernel_size

    def dense_weight(self) -> Tensor:
        """The equivalent kernel, with `groups` groups."""
        G, down, up = self.down_groups, self.down.flatten(1), self.up.flatten(1)
        down = down.unflatten(0, (G, -1))  # (G, rank/G, in/G * kernel)
        if self.up_groups == G:
            kernel = (up.unflatten(0, (G, -1)) @ down).flatten(0, 1)  # (out, in/G * kernel)
        else:
            kernel = torch.einsum("ogr,grk->ogk", up.unflatten(1, (G, -1)), down).flatten(1)
        return self.all_rows(kernel).reshape(self.out_channels, self.in_channels // self.groups, *self.kernel_size)

    def separable_groups(self) -> int:
        """Groups of the dense convolution: those of the first stage where nothing crosses them."""
        G = self.down_groups
        if self.up_groups == G or self.out_channels % G:
            return self.groups
        blocks, own = self._blocks(self.dense_weight().detach())
        return G if torch.count_nonzero(blocks) == torch.count_nonzero(own) else self.groups

    def dense_weight_like(self, dense: nn.Module) -> Tensor:
        weight = self.dense_weight().detach()
        if dense.groups != self.groups:
            weight = self._blocks(weight)[1].flatten(0, 1)
        return weight.contiguous(memory_format=memory_format(self.down))

    def _blocks(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The kernel in blocks of outputs by inputs (G, out/G, G, in/G, *kernel), and those of a group's own."""
        G = self.down_groups
        blocks = weight.unflatten(0, (G, -1)).unflatten(2, (G, -1))
        return blocks, blocks.diagonal(dim1=0, dim2=2).movedim(-1, 0)

    def grouped(self) -> tuple[Tensor, Tensor]:
        G, up = self.down_groups, self.up.flatten(1)
        up = up.unflatten(0, (G, -1)) if self.up_groups == G else up.unflatten(1, (G, -1)).transpose(0, 1)
        return self.down.flatten(1).unflatten(0, (G, -1)), up

    def ungrouped(self, factors: Factors | PivotedFactors) -> tuple[Tensor, Tensor]:
        up = factors.up
        if self.up_groups == self.down_groups:
            up = up.flatten(0, 1)  # (out, rank/G)
        elif up.shape[0] * up.shape[1] == self.out_channels:  # groups of the dense convolution
            up = torch.block_diag(*up)  # (out, rank), zero across groups
        else:  # up is (G, out, rank/G)
            up = up.transpose(0, 1).flatten(1)  # column blocks: (out, rank)
        first, second = self.ced_unit[0].weight, self.ced_unit[1].weight
        layout = {"memory_format": memory_format(first)}
        down = factors.down.flatten(0, 1).reshape(first.shape).contiguous(**layout)
        return down, up.reshape(second.shape).contiguous(**layout)

    def blocks_of(self, weight: Tensor) -> Tensor:
        weight, G = weight.flatten(1), self.down_groups
        if self.up_groups == G:
            return weight.unflatten(0, (G, -1))
        return weight.unflatten(1, (G, -1)).transpose(0, 1)  # column blocks, every output in each

    def extra_repr(self) -> str:
        pivoted = ", pivoted" if self.pivoted else ""
        return f"{self.in_channels}, {self.out_channels}, rank={self.rank}, kernel_size={self.kernel_size}{pivoted}"
