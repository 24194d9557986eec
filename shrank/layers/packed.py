"""A linear layer on a grid while it is read from a file: its weight as the two arrays that the file has."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..linalg import Grid
from .quantized import packed_shapes, quantized_weight, unpacked


class PackedWeight(nn.Module):
    """values and scales (N, groups) of a weight, as `quantized.packed` gives them."""

    def __init__(self, rows: int, columns: int, grid: Grid, dtype: torch.dtype) -> None:
        super().__init__()
        values, scales = packed_shapes(rows, columns, grid)
        stored = torch.int8 if grid.bits == 8 else torch.uint8
        self.values = nn.Parameter(torch.empty(values, dtype=stored, device="meta"), requires_grad=False)
        self.scales = nn.Parameter(torch.empty(scales, dtype=dtype, device="meta"), requires_grad=False)


class PackedLinear(nn.Module):
    """Stands for a linear layer until its values and scales are there; it cannot run.

    Its state has the names of the file: `weight.values`, `weight.scales` and `bias`. The dtype of the scales is that of
    the layer.

    Args:
        linear: The layer, whose weight may be without data; it is `made` in the end.
        grid: That of its weight.
        activations: As of `quantized_weight`.
        size: (out_features, in_features), where the layer will have others than now by then.
    """

    def __init__(
        self, linear: nn.Linear, grid: Grid, activations: str | None, size: tuple[int, int] | None = None
    ) -> None:
        super().__init__()
        self.grid, self.activations = grid, activations
        self.out_features, self.in_features = size or linear.weight.shape
        vars(self)["linear"] = linear  # its weight is no part of this one's state
        self.weight = PackedWeight(self.out_features, self.in_features, grid, linear.weight.dtype)
        self.bias = bias = linear.bias
        if bias is not None:
            empty = torch.empty(self.out_features, dtype=bias.dtype, device="meta")
            self.bias = nn.Parameter(empty, bias.requires_grad)
        self.train(linear.training)

    def made(self) -> nn.Linear:
        """The layer with what was read; ValueError on values or scales that no weight has."""
        values, scales = self.weight.values.detach(), self.weight.scales.detach()
        weight = unpacked(values, scales, self.in_features, self.grid, scales.dtype)
        self.linear.weight, self.linear.bias = quantized_weight(weight, self.activations), self.bias
        return self.linear.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("a layer of few bits whose weights were not read to the end: loading it failed")
