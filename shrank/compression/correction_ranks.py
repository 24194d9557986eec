"""The ranks of corrections: by a rule, or such that all factors together hold a share of the weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from numbers import Integral, Real
from typing import TYPE_CHECKING

from ..linalg import FactorizationError, Lost, Options, Shape, allocate
from ..planning.rank import Layer, Rank, as_rule
from ..util.progress import track

if TYPE_CHECKING:
    from torch import nn

# Ranks that a share is spent on are multiples of it, as kernels have it, where there are enough.
_STEP = 8
_FEWEST_STEPS = 4


class Uncorrected(Exception):
    """Its text is why a layer gets no correction."""


def by_rule(rank: Rank, fqn: str, module: nn.Module, shape: Shape, lost: Lost) -> int:
    """The rank that a rule gives a layer; Uncorrected if it gives it none."""
    asked = Layer(fqn, module, shape, lambda: (-lost.left().diff()).clamp_min(0).sqrt()[None])
    if not lost.error.any():
        raise Uncorrected("it lost nothing")
    found = as_rule(rank)(asked)
    if found is None or found < 1:
        raise Uncorrected(f"the rule gives it rank {found}")
    return min(found, shape.max_rank)


def is_share(rank: Rank) -> bool:
    """Whether a rank is the share of the weights that all factors together hold."""
    return isinstance(rank, Real) and not isinstance(rank, Integral)


def by_share(
    share: float, layers: Mapping[str, tuple[Shape, Callable[[], Lost]]], weighted: bool
) -> dict[str, int | str]:
    """The rank of every layer for which the squared errors add up to least, or why it gets none.

    weighted: errors of different layers add up as they are; else each counts by its share of the layer's outputs.
    Raises ValueError unless the share is in (0, 1).
    """
    if not 0 < share < 1:
        raise ValueError(f"a share of the weights must lie in (0, 1), got {share}; a rank for every layer is an int")
    items, found = {}, {}
    for fqn, (shape, read) in track(layers.items(), "errors", total=len(layers)):
        try:
            lost = read()
            left = lost.left() / (1.0 if weighted else lost.squared_norm or 1.0)
        except FactorizationError as reason:
            found[fqn] = str(reason)
            continue
        step = _STEP if shape.max_rank >= _STEP * _FEWEST_STEPS else 1
        ranks = list(range(0, shape.max_rank + 1, step))
        items[fqn] = ranks, Options([shape.low_rank_params(rank) for rank in ranks], left[ranks].tolist())
    budget = share * sum(shape.dense_params for shape, _ in layers.values())
    bought = allocate([options for _, options in items.values()], budget)
    for (fqn, (ranks, _)), chosen in zip(items.items(), bought.chosen, strict=True):
        found[fqn] = ranks[chosen] or "the budget has better uses than its rank"
    return found
