"""Several linear layers of one input, such as query, key and value, in one op: `shrank::low_rank_linear_multi`.

Each layer gets the bits that `low_rank_linear` gives it or, with an order, `low_rank_pivoted`. On few rows of the input
they share their launches. Where autograd records, each is an op of its own: there are no few rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .law import refusal, shape_of
from .library import define, library, native_op
from .linear import LINEAR, check_low_rank_linear
from .pivoted import PIVOTED, check_low_rank_pivoted
from .registration import NO_AUTOCAST, Op, is_recorded, narrowed

NAME = "low_rank_linear_multi"
LISTS = ("down", "up", "bias", "pivot_bias", "order")  # of each layer
SCHEMA = "(Tensor x, Tensor[] down, Tensor[] up, Tensor?[] bias, Tensor?[] pivot_bias, Tensor?[] order) -> Tensor[]"
MOST_TOGETHER = 3  # csrc/select/shrink_expand_tile.h
Tensors = Sequence[Tensor]
Maybe = Sequence[Tensor | None]


class Multi(NamedTuple):
    """What a dispatcher asks of an op, for so many layers."""

    layers: int
    name: str = NAME
    relies_on: tuple[str, ...] = (NAME, LINEAR.name, PIVOTED.name)  # the ops whose kernels may run

    @property
    def names(self) -> tuple[str, ...]:
        return ("x", *(f"{part}[{i}]" for part in LISTS for i in range(self.layers)))


def check_low_rank_linear_multi(
    x: Tensor, down: Tensors, up: Tensors, bias: Maybe, pivot_bias: Maybe, order: Maybe, casts: bool = False
) -> None:
    """Raise RuntimeError on numbers of layers, and on shapes, dtypes and devices of any, that do not fit.

    casts: autocast makes the dtypes alike.
    """
    counts = [len(each) for each in (down, up, bias, pivot_bias, order)]
    if len(set(counts)) > 1 or not down:
        of_each = " and ".join((", ".join(map(str, counts[:-1])), str(counts[-1])))
        raise refusal(NAME, f"{', '.join(LISTS[:-1])} and {LISTS[-1]} are {of_each}, wanted one of each for each layer")
    for i, (*factors, of_pivots, places) in enumerate(zip(down, up, bias, pivot_bias, order, strict=True)):
        if places is not None:
            check_low_rank_pivoted(x, *factors, of_pivots, places, "none", None, casts)
        elif of_pivots is not None:
            raise refusal(NAME, f"pivot_bias[{i}] is {shape_of(of_pivots)}, wanted none without an order")
        else:
            check_low_rank_linear(x, *factors, "none", None, casts)


def run_together(given: tuple, tokens: int, splits: Sequence[int]) -> list[Tensor]:
    """All layers by the kernels for a few rows, `tokens` of them at a time, K in so many splits of each layer.

    Raises:
        RuntimeError: No native code is loaded, or it cannot run these; the text says why.
    """
    return native_op(f"{NAME}_as")(*given, tokens, list(splits))


def alone(x: Tensor, *lists: Maybe) -> list[tuple[Op, tuple]]:
    """Each layer's own op, and its arguments."""
    layers = zip(*lists, strict=True)
    return [
        (LINEAR, (x, *factors)) if order is None else (PIVOTED, (x, *factors, pivot_bias, order))
        for *factors, pivot_bias, order in layers
    ]


def call(x: Tensor, *lists: Maybe) -> list[Tensor]:
    """The op; where autograd has nothing to record, past its kernel, as `Op.call`."""
    given = (x, *map(list, lists))
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled() or _is_recorded(x, lists):
        return _overload(*given)
    with torch._C._AutoDispatchBelowAutograd():
        return _overload(*given)


def _is_recorded(x: Tensor, lists: Sequence[Maybe]) -> bool:
    return is_recorded((x, *(each for of_one in lists for each in of_one)))


def _autograd(x: Tensor, *lists: list[Tensor | None]) -> list[Tensor]:
    if _is_recorded(x, lists):
        check_low_rank_linear_multi(x, *lists)
        return [op.overload(*given) for op, given in alone(x, *lists)]
    with torch._C._AutoDispatchBelowAutograd():
        return _overload(x, *lists)


def _autocast(x: Tensor, *lists: list[Tensor | None]) -> list[Tensor]:
    dtype = torch.get_autocast_dtype(x.device.type)
    with torch._C._ExcludeDispatchKeyGuard(NO_AUTOCAST):
        return _overload(narrowed(x, dtype), *([narrowed(each, dtype) for each in of_one] for of_one in lists))


def _by_pytorch(x: Tensor, *lists: list[Tensor | None]) -> list[Tensor]:
    check_low_rank_linear_multi(x, *lists)
    return [op.y_of(*op.packed(given)) for op, given in alone(x, *lists)]


def _empty(x: Tensor, *lists: list[Tensor | None]) -> list[Tensor]:
    check_low_rank_linear_multi(x, *lists)
    return [op.empty(*op.packed(given)).y for op, given in alone(x, *lists)]


define(NAME, SCHEMA)
_overload = torch.ops.shrank.low_rank_linear_multi.default
library.impl(NAME, _autograd, "Autograd")
for _key in ("AutocastCPU", "AutocastCUDA"):
    library.impl(NAME, _autocast, _key)
library.impl(NAME, _by_pytorch, "CompositeExplicitAutograd")
torch.library.register_fake(f"shrank::{NAME}", _empty, lib=library)
