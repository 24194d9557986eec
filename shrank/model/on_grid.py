"""Why a layer cannot have weights of few bits."""

from __future__ import annotations

from ..layers.quantized import DTYPES
from ..linalg import Shape, Storage
from .adapters import Target


def why_not_on_grid(layer: Target, shape: Shape, rank: int | None, storage: Storage) -> str:
    """Why this layer, or at a rank its factors of this shape, cannot be stored so; '' if it can."""
    if reason := layer.why_not_on_grid(None if storage.corrected else rank):
        return reason
    if (dtype := layer.module.weight.dtype) not in DTYPES:
        return f"torchao has no weights of few bits in {str(dtype).removeprefix('torch.')}"
    if shape.pivoted and rank is not None:
        what = (
            "a correction has no pivots" if storage.corrected else f"{storage.grid} of pivoted factors loses too much"
        )
        return f"{what}: plan it with pivot=False"
    if not shape.fits(rank, storage):
        rows = f"{shape.in_features} inputs" + ("" if rank is None else f" and rank {rank}")
        sizes = dict.fromkeys(g.group_size for g in (storage.grid, storage.factor_grid) if g and g.group_size)
        return f"groups of {' and '.join(map(str, sizes))} do not divide its {rows}"
    return ""
