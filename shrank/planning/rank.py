"""Rank rules: from a layer to the rank it gets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from numbers import Integral, Real
from typing import Protocol

import torch
from torch import Tensor, nn

from ..linalg import Shape, energy_curve


@dataclass(frozen=True)
class Layer:
    """What a rule may look at; `spectrum()` is computed only when it is asked for."""

    fqn: str
    module: nn.Module
    shape: Shape
    spectrum: Callable[[], Tensor]


class RankRule(Protocol):
    def __call__(self, layer: Layer) -> int | None:
        """The rank for this layer; None keeps it dense."""


@dataclass(frozen=True)
class Fixed:
    """The same rank for every layer.

    Args:
        rank: At least 1.

    Raises:
        ValueError: The rank is below 1.
    """

    rank: int

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, got {self.rank}")

    def __call__(self, layer: Layer) -> int:
        return self.rank


@dataclass(frozen=True)
class Fraction:
    """A fraction of the layer's break-even rank, so that it keeps about that fraction of its parameters.

    Args:
        keep: The fraction, in (0, 1).

    Raises:
        ValueError: It is not in (0, 1).
    """

    keep: float

    def __post_init__(self) -> None:
        if not 0 < self.keep < 1:
            raise ValueError(f"a fractional rank must lie in (0, 1), got {self.keep}; a whole rank must be an int")

    def __call__(self, layer: Layer) -> int:
        if layer.shape.pivoted:  # what a rank costs depends on it
            return layer.shape.rank_for(self.keep * layer.shape.dense_params)
        return int(self.keep * layer.shape.break_even_rank)


@dataclass(frozen=True)
class Energy:
    """The smallest rank that keeps a share of the squared singular values.

    Args:
        threshold: The share, in (0, 1].

    Raises:
        ValueError: It is not in (0, 1].
    """

    threshold: float

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1:
            raise ValueError(f"an energy threshold must lie in (0, 1], got {self.threshold}")

    def __call__(self, layer: Layer) -> int:
        curve = energy_curve(layer.spectrum())
        # The last entry is 1 by definition; rounding must not push a threshold of 1 beyond the end.
        per_group = int(torch.searchsorted(curve[1:-1], min(self.threshold, curve[-1].item()))) + 1
        return layer.shape.down_groups * per_group


@dataclass(frozen=True)
class ByPattern:
    """The rule of the first glob pattern that matches the fqn; layers that match none stay dense."""

    rules: tuple[tuple[str, RankRule | None], ...]

    def __call__(self, layer: Layer) -> int | None:
        for pattern, rule in self.rules:
            if fnmatchcase(layer.fqn, pattern):
                return None if rule is None else rule(layer)
        return None


@dataclass(frozen=True)
class ByFunction:
    """A user's `(fqn, module) -> rank | None`; the rank may again be an int or a fraction."""

    function: Callable[[str, nn.Module], int | float | None]

    def __call__(self, layer: Layer) -> int | None:
        rank = self.function(layer.fqn, layer.module)
        return None if rank is None else as_rule(rank)(layer)


Rank = (
    int
    | float
    | Fixed
    | Fraction
    | Energy
    | ByPattern
    | ByFunction
    | Mapping[str, object]
    | Callable[[str, nn.Module], int | float | None]
)
"""What stands for a rank rule wherever a caller gives one: see `shrank.auto_fact`."""


def as_rule(rank: object) -> RankRule:
    """The rule that a user's `rank` argument stands for; TypeError or ValueError where it stands for none."""
    if isinstance(rank, Fixed | Fraction | Energy | ByPattern | ByFunction):
        return rank
    if isinstance(rank, bool):
        raise TypeError(f"rank must be an int, a float, a rule, a dict or a function, got the bool {rank}")
    if isinstance(rank, Integral):
        return Fixed(int(rank))
    if isinstance(rank, Real):
        return Fraction(float(rank))
    if isinstance(rank, Mapping):
        return ByPattern(tuple((str(k), None if v is None else as_rule(v)) for k, v in rank.items()))
    if callable(rank):
        return ByFunction(rank)
    raise TypeError(f"rank must be an int, a float, a rule, a dict or a function, got {type(rank).__name__}")
