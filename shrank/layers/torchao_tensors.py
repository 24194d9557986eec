"""Tensors of torchao for weights on a grid, as they are but for what `to` makes of them.

Whole rows of 8 bits are an `Int8Tensor`: it multiplies by the whole numbers and then by the scales, in half the time in
eager mode that multiplying the weights out first takes, and Inductor has a kernel for it (2048 x 2048, bfloat16, one
row of x, on a CPU: 0.6 of the dense layer's time). In float16 such products overflow. All else is an
`IntxUnpackedToInt8Tensor`, which multiplies the weights out.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchao.quantization import Int8Tensor, IntxUnpackedToInt8Tensor, PerRow
from torchao.quantization.quantize_.workflows.int8.int8_tensor import QuantizeTensorToInt8Kwargs
from torchao.quantization.quantize_.workflows.intx.intx_unpacked_to_int8_tensor import (
    IntxUnpackedToInt8TensorActivationQuantization as _PerToken,
)

from ..linalg import Grid, Quantized

_TYPES = {3: torch.int3, 4: torch.int4, 8: torch.int8}
_BITS = {dtype: bits for bits, dtype in _TYPES.items()}


class RowsOfInt8(Int8Tensor):
    """An `Int8Tensor` with one scale for each row."""

    is_of_shrank = True

    def quantized(self) -> Quantized:
        return Quantized(self.qdata, self.scale, Grid(8))

    def activations(self) -> str | None:
        return None if self.act_quant_kwargs is None else "int8"


class GroupsOfInts(IntxUnpackedToInt8Tensor):
    """An `IntxUnpackedToInt8Tensor` with one scale for each group of a row, or for the row, and no zero point."""

    is_of_shrank = True

    def quantized(self) -> Quantized:
        columns = self.block_size[1]
        grid = Grid(_BITS[self.target_dtype], None if columns == self.shape[1] else columns)
        return Quantized(self.qdata, self.scale, grid)

    def activations(self) -> str | None:
        return None if self.activation_quantization is None else "int8"

    def to(self, *args: object, **kwargs: object) -> Tensor:
        return torch.Tensor.to(self, *args, **kwargs)  # torchao's makes its own class


def made(quantized: Quantized, activations: str | None) -> Tensor:
    """The tensor that stands for a matrix on a grid; its dtype is that of the scales."""
    values, scales, grid = quantized.values, quantized.scales, quantized.grid
    columns = grid.group_size or values.shape[1]
    if grid.bits == 8 and columns == values.shape[1] and (activations or scales.dtype is not torch.float16):
        rounding = QuantizeTensorToInt8Kwargs(granularity=PerRow()) if activations else None
        return RowsOfInt8(values, scales, [1, columns], scales.dtype, act_quant_kwargs=rounding)
    zero = torch.zeros_like(scales, dtype=torch.int8)
    rounding = _PerToken.INT8_ASYM_PER_TOKEN if activations else None
    return GroupsOfInts(values, scales, zero, _TYPES[grid.bits], (1, columns), scales.dtype, rounding)


def _converted(func: object, types: object, args: tuple, kwargs: dict) -> Tensor:
    """`to`, with the dtype of the scales, which torchao leaves as it was."""
    weight = args[0]
    to = weight._get_to_kwargs(*args[1:], **(kwargs or {}))
    device, dtype, non_blocking = to["device"], to["dtype"], to["non_blocking"]
    if not dtype.is_floating_point:
        raise TypeError(f"a weight on a grid cannot become {dtype}")
    held = weight.quantized()
    values = held.values.to(device, non_blocking=non_blocking)
    scales = held.scales.to(device, dtype, non_blocking=non_blocking)
    return made(Quantized(values, scales, held.grid), weight.activations())


for _kind in (RowsOfInt8, GroupsOfInts):
    _kind.implements(torch.ops.aten._to_copy.default)(_converted)
torch.serialization.add_safe_globals([RowsOfInt8, GroupsOfInts])
