"""Linear layers in whatever form: their sizes, their dtype and the matrix that they multiply by."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .quantized import is_quantized, plain

_ROWS = 1024  # of the unit matrix that a layer is given at a time


def sizes_of(layer: nn.Module) -> tuple[int, int] | None:
    """(out_features, in_features) of a layer that has them as numbers; None of any other module."""
    found = getattr(layer, "out_features", None), getattr(layer, "in_features", None)
    return found if all(isinstance(each, int) for each in found) else None


def tensors_of(layer: nn.Module) -> list[Tensor]:
    """What it holds, its weight first."""
    own = getattr(layer, "weight", None)
    return [*([own] if isinstance(own, Tensor) else []), *layer.parameters(), *layer.buffers()]


def dtype_of(layer: nn.Module) -> torch.dtype | None:
    """That of its weight, or of what else it holds in floating point, as scales and a bias; None if it is in none."""
    return next((t.dtype for t in tensors_of(layer) if t.is_floating_point()), None)


def weight_of(layer: nn.Module, dtype: torch.dtype) -> Tensor:
    """The matrix (N, K) that a linear layer multiplies by; in this dtype where only its outputs tell."""
    own = getattr(layer, "weight", None)
    if type(layer) is nn.Linear and (is_quantized(own) or type(own.detach()) is Tensor):
        return plain(own)
    return _by_forward(layer, dtype)


@torch.no_grad()
def _by_forward(layer: nn.Module, dtype: torch.dtype) -> Tensor:
    """Its outputs for the rows of the unit matrix, without those for zero."""
    columns = sizes_of(layer)[1]
    made = {"dtype": dtype, "device": next((t.device for t in tensors_of(layer)), None)}
    shift = layer.forward(torch.zeros(1, columns, **made))
    rows = [
        layer.forward(torch.eye(min(_ROWS, columns - start), columns, **made).roll(start, 1)) - shift
        for start in range(0, columns, _ROWS)
    ]
    return torch.cat(rows).mT.to(dtype).contiguous()
