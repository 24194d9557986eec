"""Several linear layers of one input, such as query, key and value, in one op: `shrank::low_rank_linear_multi`.

Each layer gets the bits that `low_rank_linear` gives it. On few rows of the input they share their launches. Where
autograd records, each is an op of its own: there are no few rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .law import refusal
from .library import define, library, native_op
from .linear import LINEAR, check_low_rank_linear
from .registration import NO_AUTOCAST, is_recorded, narrowed

NAME = "low_rank_linear_multi"
SCHEMA = "(Tensor x, Tensor[] down, Tensor[] up, Tensor?[] bias) -> Tensor[]"
MOST_TOGETHER = 3  # csrc/select/shrink_expand_tile.h


class Multi(NamedTuple):
    """What a dispatcher asks of an op, for so many layers."""

    layers: int
    name: str = NAME
    relies_on: tuple[str, ...] = (NAME, LINEAR.name)  # the ops whose kernels may run

    @property
    def names(self) -> tuple[str, ...]:
        of_layers = (f"{part}[{i}]" for part in ("down", "up", "bias") for i in range(self.layers))
        return ("x", *of_layers)


def check_low_rank_linear_multi(
    x: Tensor, down: Sequence[Tensor], up: Sequence[Tensor], bias: Sequence[Tensor | None], casts: bool = False
) -> None:
    """Raise RuntimeError on numbers of layers, and on shapes, dtypes and devices of any, that do not fit.

    casts: autocast makes the dtypes alike.
    """
    counts = len(down), len(up), len(bias)
    if len(set(counts)) > 1 or not down:
        of_each = " and ".join((f"{counts[0]}, {counts[1]}", str(counts[2])))
        raise refusal(NAME, f"down, up and bias are {of_each}, wanted one of each for each layer")
    for each in zip(down, up, bias, strict=True):
        check_low_rank_linear(x, *each, "none", None, casts)


def run_together(given: tuple, tokens: int, splits: Sequence[int]) -> list[Tensor]:
    """All layers by the kernels for a few rows, `tokens` of them at a time, K in so many splits of each layer.

    Raises:
        RuntimeError: No native code is loaded, or it cannot run these; the text says why.
    """
    return native_op(f"{NAME}_as")(*given, tokens, list(splits))


def one_by_one(x: Tensor, down: Sequence[Tensor], up: Sequence[Tensor], bias: Sequence[Tensor | None]) -> list[Tensor]:
    """What each layer gives, by its own op."""
    return [LINEAR.overload(x, *each) for each in zip(down, up, bias, strict=True)]


def call(x: Tensor, down: Sequence[Tensor], up: Sequence[Tensor], bias: Sequence[Tensor | None]) -> list[Tensor]:
    """The op; where autograd has nothing to record, past its kernel, as `Op.call`."""
    given = (x, list(down), list(up), list(bias))
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled() or is_recorded((x, *down, *up, *bias)):
        return _overload(*given)
    with torch._C._AutoDispatchBelowAutograd():
        return _overload(*given)


def _autograd(x: Tensor, down: list[Tensor], up: list[Tensor], bias: list[Tensor | None]) -> list[Tensor]:
    if is_recorded((x, *down, *up, *bias)):
        check_low_rank_linear_multi(x, down, up, bias)
        return one_by_one(x, down, up, bias)
    with torch._C._AutoDispatchBelowAutograd():
        return _overload(x, down, up, bias)


def _autocast(x: Tensor, *lists: list[Tensor | None]) -> list[Tensor]:
    dtype = torch.get_autocast_dtype(x.device.type)
    with torch._C._ExcludeDispatchKeyGuard(NO_AUTOCAST):
        return _overload(narrowed(x, dtype), *([narrowed(each, dtype) for each in of_one] for of_one in lists))


def _by_pytorch(x: Tensor, down: list[Tensor], up: list[Tensor], bias: list[Tensor | None]) -> list[Tensor]:
    check_low_rank_linear_multi(x, down, up, bias)
    return [LINEAR.y_of(*LINEAR.packed((x, *each))) for each in zip(down, up, bias, strict=True)]


def _empty(x: Tensor, down: list[Tensor], up: list[Tensor], bias: list[Tensor | None]) -> list[Tensor]:
    check_low_rank_linear_multi(x, down, up, bias)
    return [x.new_empty((*x.shape[:-1], each.size(0))) for each in up]


define(NAME, SCHEMA)
_overload = torch.ops.shrank.low_rank_linear_multi.default
library.impl(NAME, _autograd, "Autograd")
for _key in ("AutocastCPU", "AutocastCUDA"):
    library.impl(NAME, _autocast, _key)
library.impl(NAME, _by_pytorch, "CompositeExplicitAutograd")
torch.library.register_fake(f"shrank::{NAME}", _empty, lib=library)
