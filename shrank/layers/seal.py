"""A seal: what a file holds under the name of a dense weight that it does not have, or has on a grid.

Loaders that do not know low-rank layers look for `layer.weight`, and where they do not find it many leave the weight as
it was drawn, at most with a warning. The seal has a shape that no weight of the layer has, so they fail instead.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
from torch import Tensor

from .quantized import VALUES
from .two_stage import BASE, UNITS

DENSE_NAME = "weight"
_TEXT = b"shrank"
_UNIT = re.compile(rf"(?P<dot>^|\.)(?:{'|'.join((*UNITS, BASE))})\.")


def seal(dense_shape: tuple[int, ...]) -> Tensor:
    """The seal (6 or 7,) of a layer whose dense weight has this shape: a text, which a person may read in the file."""
    # No loader may broadcast it: torch copies one number, or a last dimension, into a whole matrix.
    text = _TEXT if dense_shape[-1] != len(_TEXT) else _TEXT + b"!"
    return torch.tensor(list(text), dtype=torch.uint8)


def is_seal(value: Tensor) -> bool:
    """Whether this is a seal, in whatever dtype a loader has cast it to."""
    if value.is_meta or value.dim() != 1 or len(value) not in (len(_TEXT), len(_TEXT) + 1):
        return False
    return value[: len(_TEXT)].tolist() == list(_TEXT)


def drop_seal(state: dict[str, Tensor], prefix: str, unexpected: list[str]) -> None:
    """Strike the seal of the low-rank layer at `prefix` from the names that loading found no place for."""
    name = prefix + DENSE_NAME
    if name in unexpected and is_seal(state[name]):
        unexpected.remove(name)


def sealed_names(names: Iterable[str]) -> set[str]:
    """The names of the seals that belong to the factors, and to the weights on a grid, among these names."""
    names = list(names)
    factors = {name[: unit.start()] + unit["dot"] + DENSE_NAME for name in names for unit in _UNIT.finditer(name)}
    return factors | {name.removesuffix(VALUES) for name in names if name.endswith(f"{DENSE_NAME}{VALUES}")}
