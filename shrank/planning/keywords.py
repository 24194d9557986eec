"""The fields of PlanOptions as keywords, for type checkers: a test holds the two together."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, TypedDict

from torch import nn

from .options import Selector


class FittingKeywords(TypedDict, total=False):
    """Those that the ancestors' `auto_fact` does not have as parameters of its own."""

    include: Selector | None
    exclude: Selector | None
    round_to: int | None
    min_rank: int | None
    max_rank: int | None
    min_features: int
    allow_growth: bool
    allow_slower: bool
    allow_dense: bool
    errors: bool
    pivot: bool | Literal["auto"]
    bits: int | None
    group_size: int | None
    narrow: bool | Literal["uniform"]


class PlanKeywords(FittingKeywords, total=False):
    """All of them."""

    groups_out: bool
    skip_high_groups: bool
    submodules: Iterable[nn.Module] | None
    fact_led_unit: bool
