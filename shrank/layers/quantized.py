"""Weights on a grid: a tensor of torchao in a module, two arrays of whole numbers and scales in a file.

torchao is asked for only where there is something to put on a grid (`pip install shrank[quant]`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..linalg import AS_IT_IS, Grid, Quantized, Storage

if TYPE_CHECKING:
    from types import ModuleType

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of which torchao has weights
ACTIVATIONS = ("int8",)
# What a weight `NAME` on a grid is called in files.
VALUES, SCALES = ".values", ".scales"


def torchao_tensors() -> ModuleType:
    """The classes of tensors; ImportError that says how to install torchao, where it is not."""
    try:
        from . import torchao_tensors as found
    except ImportError as error:
        raise ImportError(f"weights of few bits need torchao: pip install 'shrank[quant]' ({error})") from error
    return found


def quantized_weight(quantized: Quantized, activations: str | None = None) -> nn.Parameter:
    """A weight (N, K) on a grid as a parameter that `F.linear` takes, which never trains.

    activations: "int8", to round what it multiplies to 8 bits at every call, with a scale for each token; None: not.
    """
    return nn.Parameter(torchao_tensors().made(quantized, activations), requires_grad=False)


def is_quantized(weight: object) -> bool:
    """Whether a weight was made by `quantized_weight`."""
    return getattr(type(weight), "is_of_shrank", False)


def quantized_of(weight: Tensor) -> Quantized:
    """What `quantized_weight` made this of, uncopied."""
    return weight.quantized()


def activations_of(weight: Tensor) -> str | None:
    return weight.activations()


def storage_of(module: nn.Module) -> Storage | None:
    """How the weight of a layer, or below what peft made of it, is stored; None for one that is not on a grid."""
    module = module.get_base_layer() if hasattr(module, "get_base_layer") else module
    weight = module._parameters.get("weight")
    return Storage(quantized_of(weight).grid, activations=activations_of(weight)) if is_quantized(weight) else None


def storage_of_both(stages: Sequence[nn.Module]) -> Storage:
    """How two stages are stored; ValueError if each is in another way."""
    found = [storage_of(stage) for stage in stages[:2]]
    if None in found:
        if found[0] is found[1]:
            return AS_IT_IS
    else:
        # Of a group as long as the row nobody knows whether it was meant as the row.
        columns = [stage.weight.shape[1] for stage in stages[:2]]
        for size in dict.fromkeys(each.grid.group_size for each in found):
            meant = [
                replace(each, grid=replace(each.grid, group_size=size if (each.grid.group_size or n) == size else None))
                for each, n in zip(found, columns, strict=True)
            ]
            if meant[0] == meant[1] and meant[0].grid.group_size == size:
                return meant[0]
    raise ValueError(f"its stages are stored in two ways: {' and '.join(str(each or 'plain') for each in found)}")


def why_not_alike(stages: Sequence[nn.Module]) -> str:
    """What keeps two stages from being stored in one way; '' if nothing does."""
    try:
        storage_of_both(stages)
    except ValueError as error:
        return str(error)
    return ""


def plain(weight: Tensor) -> Tensor:
    """The weight itself, or the numbers (N, K) that one on a grid stands for."""
    return quantized_of(weight).dequantized() if is_quantized(weight) else weight


def packed_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state for a file: every weight on a grid as the two arrays that `packed` gives, in place of the weight; one for
    all its names."""
    found: dict[str, Tensor] = {}
    made: dict[tuple, tuple[Tensor, Tensor]] = {}
    for name, value in state.items():
        if is_quantized(value):
            held = quantized_of(value)
            place = held.values.device, held.values.data_ptr()
            if value.is_meta or place not in made:
                made[place] = packed(held)
            found[name + VALUES], found[name + SCALES] = made[place]
        else:
            found[name] = value
    return found


def packed(quantized: Quantized) -> tuple[Tensor, Tensor]:
    """Values and scales for a file: (N, K) int8, or of fewer bits one after another, lowest first, in uint8 (N, bytes
    of a row); scales (N, groups) in 16 bits, or as they are where no 16 bits hold them."""
    values = quantized.values
    if quantized.grid.bits < 8:
        single = _single_bits(values.view(torch.uint8), quantized.grid.bits).flatten(1)
        eights = nn.functional.pad(single, (0, -single.shape[1] % 8)).unflatten(1, (-1, 8))
        values = (eights << _places(8, values.device)).sum(2, dtype=torch.uint8)
    return values.contiguous(), _in_16_bits(quantized.scales)


def packed_shapes(rows: int, columns: int, grid: Grid) -> tuple[tuple[int, int], tuple[int, int]]:
    """The shapes of what `packed` gives for a weight (rows, columns)."""
    return (rows, -(-columns * grid.bits // 8)), (rows, grid.groups(columns))


def unpacked(values: Tensor, scales: Tensor, columns: int, grid: Grid, dtype: torch.dtype) -> Quantized:
    """What `packed` took, of a weight with so many columns and with scales in `dtype`; ValueError says what is wrong
    with either."""
    if reason := why_not_packed(values, scales, columns, grid):
        raise ValueError(reason)
    if grid.bits < 8:
        single = _single_bits(values, 8).flatten(1)[:, : columns * grid.bits].unflatten(1, (columns, grid.bits))
        values = (single << _places(grid.bits, values.device)).sum(2, dtype=torch.uint8).view(torch.int8)
        values = (values ^ -grid.least) + grid.least  # the sign
    return Quantized(values.contiguous(), scales.to(dtype), grid)


def why_not_packed(values: Tensor, scales: Tensor, columns: int, grid: Grid) -> str:
    """What is wrong with the values and scales of a weight with so many columns; "" if nothing is."""
    wanted = torch.int8 if grid.bits == 8 else torch.uint8
    if values.dtype is not wanted:
        return f"values are {values.dtype}, wanted {wanted}"
    if not scales.is_floating_point():
        return f"scales are {scales.dtype}, wanted floating-point numbers"
    shapes = packed_shapes(len(values) if values.dim() else 0, columns, grid)
    for name, found, shape in zip(("values", "scales"), (values, scales), shapes, strict=True):
        if tuple(found.shape) != shape:
            return f"{name} have the shape {tuple(found.shape)}, wanted {shape} for {grid}"
    if not scales.is_meta and not bool(scales.isfinite().all()):
        return "scales hold NaN or infinity"
    return ""


def _single_bits(values: Tensor, bits: int) -> Tensor:
    """The lowest bits of every byte, one in a byte: (N, K) -> (N, K, bits)."""
    return (values[..., None] >> _places(bits, values.device)) & 1


def _places(bits: int, device: torch.device) -> Tensor:
    return torch.arange(bits, dtype=torch.uint8, device=device)


def _in_16_bits(scales: Tensor) -> Tensor:
    if torch.finfo(scales.dtype).bits == 16:
        return scales.contiguous()
    for dtype in (torch.float16, torch.bfloat16):
        if torch.equal((small := scales.to(dtype)).to(scales.dtype), scales):
            return small.contiguous()
    return scales.contiguous()
