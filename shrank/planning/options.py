"""Which layers of a model may change, and which ranks fit them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Literal

from torch import nn

from ..linalg import Grid, Shape
from ..model.adapters import Target, with_groups
from ..model.survey import Site
from ..util.names import checks_keywords, unknown_keyword

Selector = str | Iterable[str] | Callable[[nn.Module, str], bool]


@checks_keywords
@dataclass(frozen=True)
class PlanOptions:
    """Which layers may change and how ranks are fitted: the further keywords of `auto_fact`, `make_plan`, `eligible`.

    Args:
        groups_out: The second stage of a grouped convolution is grouped too.
        skip_high_groups: Leave a grouped convolution dense if its groups exceed the rank; False gives it
            min(rank, groups) groups.
        submodules: Modules at or below which layers may change.
        fact_led_unit: Open low-rank layers and factorise their stages again. Deprecated: `merge` and a smaller rank
            give less error at the same size.
        include: Layers that may change: glob patterns of dotted names, or (module, fqn) -> bool.
        exclude: Layers that may not, likewise.
        round_to: Ranks become multiples of it. By default of 8 where a budget chooses among at least 128 ranks, which
            kernels reward.
        min_rank: The smallest rank of any layer.
        max_rank: The largest rank of any layer.
        min_features: Layers whose smaller side is below stay dense.
        allow_growth: Permit ranks that store more than the dense layer.
        allow_slower: Permit convolutions that a CPU computes no faster than the dense layer, as allow_growth does too.
        allow_dense: Let a budget keep a layer dense that can be low-rank.
        errors: Compute the expected error of every layer.
        pivot: Store factors in R (K + N - R) numbers. "auto": where a budget pays for it with rank. Of measured times,
            that is where these say so; else in layers that are in eval mode and not on a GPU, for reasons that the page
            on pivoted storage gives.
        bits: 3, 4 or 8, for the weights of all linear layers that may change, dense or factors; without pivots then.
        group_size: Weights with one scale, of which ranks become multiples; None: each row has one.
        narrow: Let a budget take units out of blocks (hidden units of feed-forward blocks, channels between
            convolutions, heads of attention), and fit the matrix behind them again, where that loses less than ranks
            do, or together with ranks. "uniform": like blocks get one width, heads stay, and transformers loads
            feed-forward blocks without shrank. It needs data, and cannot be undone.

    Raises:
        ValueError: A number is below 1, max_rank below min_rank, pivot none of True, False and "auto"; bits none of
            3, 4 and 8, or together with pivot=True; group_size without bits; narrow none of True, False and "uniform".
    """

    groups_out: bool = False
    skip_high_groups: bool = True
    submodules: Iterable[nn.Module] | None = None
    fact_led_unit: bool = False
    include: Selector | None = None
    exclude: Selector | None = None
    round_to: int | None = None
    min_rank: int | None = None
    max_rank: int | None = None
    min_features: int = 16
    allow_growth: bool = False
    allow_slower: bool = False
    allow_dense: bool = True
    errors: bool = True
    pivot: bool | Literal["auto"] = "auto"
    bits: int | None = None
    group_size: int | None = None
    narrow: bool | Literal["uniform"] = False

    def __post_init__(self) -> None:
        if self.bits is None and self.group_size is not None:
            raise ValueError(f"group_size {self.group_size} is that of weights of few bits: give bits=3, 4 or 8")
        if self.grid is not None and self.pivot is True:
            raise ValueError("pivoted factors lose too much in few bits: give pivot=False with bits")
        for name in ("round_to", "min_rank", "max_rank", "min_features"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.pivot not in (True, False, "auto"):
            raise ValueError(f"pivot must be True, False or 'auto', got {self.pivot!r}")
        if self.narrow not in (True, False, "uniform"):
            raise ValueError(f"narrow must be True, False or 'uniform', got {self.narrow!r}")
        if self.max_rank is not None and self.min_rank is not None and self.max_rank < self.min_rank:
            raise ValueError(f"max_rank {self.max_rank} is below min_rank {self.min_rank}")

    @property
    def grid(self) -> Grid | None:
        """That of all weights which may have one; None: none."""
        return None if self.bits is None else Grid(self.bits, self.group_size)

    def for_grid(self) -> PlanOptions:
        """With ranks that the groups divide, and without pivots, where there is a grid."""
        if self.grid is None:
            return self
        multiple = math.lcm(self.round_to or 1, self.group_size or 1)
        return replace(self, pivot=False, round_to=multiple if self.group_size else self.round_to)


# What a caller may take for an option, and what gives it.
_ELSEWHERE = {
    name: f"calibrate=shrank.batches(data, {name}=)"
    for name in ("tokenizer", "mask", "batch_size", "max_length", "forward")
}
_OF_CALIBRATE = ("loss", "cache", "max_memory", "spill", "seed", "inputs", "probe")
_ELSEWHERE |= {name: f"calibrate=shrank.Calibrate(data, {name}=)" for name in _OF_CALIBRATE}


def options_of(function: str, given: Mapping[str, object], others: Iterable[str] = ()) -> PlanOptions:
    """The options that were given to a function by keyword; `others`: further keywords that it takes.

    Raises TypeError on one that there is none of, with the name that may have been meant.
    """
    known = {*PlanOptions.__dataclass_fields__, *others}
    for name in given:
        if name not in known:
            raise unknown_keyword(function, name, known, _ELSEWHERE if "calibrate" in known else None)
    if given.get("fact_led_unit"):
        warnings.warn(
            "fact_led_unit is deprecated: it factorises factors, which loses more than one factorisation of the same "
            "size does. Instead, shrank.merge the model and factorise it once, with a smaller rank",
            DeprecationWarning,
            stacklevel=3,
        )
    return PlanOptions(**given)


class StaysDense(Exception):
    """Ends the planning of one layer; its text is the reason."""


class Eligibility:
    """Which layers of a model the options let change.

    Raises ValueError if one of `submodules` is no part of the model.
    """

    def __init__(self, options: PlanOptions, model: nn.Module) -> None:
        self._options = options
        self._allowed = None if options.submodules is None else _at_or_below(options.submodules, model)

    def why_not(self, site: Site) -> str:
        """The reasons for which this layer cannot or may not change; "" if it may."""
        if reasons := site.why_not():
            return "; ".join(reasons)
        if reason := self.why_not_chosen(site):
            return reason
        shape, options = site.shape, self._options
        smaller = min(shape.out_features, shape.in_features) // shape.groups
        if smaller < options.min_features and not options.allow_growth:
            return f"too small: its smaller side is {smaller}, below min_features={options.min_features}"
        return ""

    def why_not_chosen(self, site: Site) -> str:
        """Which of the options leave this layer out; "" if none does."""
        options = self._options
        if self._allowed is not None and id(site.module) not in self._allowed:
            return "not in submodules"
        if options.include is not None and not selects(options.include, site):
            return "not included"
        if options.exclude is not None and selects(options.exclude, site):
            return "excluded"
        return ""


def fit(rank: int | None, adapter: Target, options: PlanOptions) -> tuple[int, Shape]:
    """The rank that the layer's groups, the options and its cost allow, with the shape of the twin at that rank."""
    shape = adapter.shape()
    if rank is None:
        raise StaysDense("the rule keeps it dense")
    if options.min_rank is not None:
        rank = max(rank, options.min_rank)
    if options.max_rank is not None:
        rank = min(rank, options.max_rank)
    if rank < 1:
        raise StaysDense(f"the rule gives rank {rank} (break-even rank {shape.break_even_rank})")
    shape = grouped(rank, adapter, options)
    rank = _round(min(rank, shape.max_rank), shape, options)
    shape = replace(shape, pivoted=options.pivot is True and can_pivot(shape, rank))
    if shape.low_rank_params(rank) + shape.index_size >= shape.dense_params and not options.allow_growth:
        raise StaysDense(f"rank {rank} saves nothing (break-even rank {shape.break_even_rank})")
    if not is_faster(rank, shape, adapter, options):
        raise StaysDense(
            f"rank {rank} computes as {shape.channels_computed(rank)} of its "
            f"{shape.channels_computed(None)} channels, and a second stage: no faster than dense on a "
            "CPU (allow_slower)"
        )
    return rank, shape


def grouped(rank: int, adapter: Target, options: PlanOptions) -> Shape:
    """The shape of a twin of this rank, with its groups; raises StaysDense where there can be none."""
    shape = adapter.shape()
    if rank < shape.groups and options.skip_high_groups:
        raise StaysDense(f"its {shape.groups} groups exceed the rank {rank} (skip_high_groups)")
    shape = with_groups(shape, rank, options.groups_out)
    if reason := adapter.why_not_grouped(shape):
        raise StaysDense(reason)
    return shape


def can_pivot(shape: Shape, rank: int) -> bool:
    """Whether outputs of the twin can be pivots: those of a group must depend on its own part of the rank alone."""
    return shape.down_groups == shape.up_groups and rank < shape.out_features


def may_pivot(module: nn.Module, options: PlanOptions) -> bool:
    """Whether a budget that knows no times may store a layer with pivots.

    Not on a GPU: from 128 tokens on a pivoted layer takes longer there than a plain one of as many weights, by the
    model of csrc/select (docs/guide/pivoted.md has the figures). In training mode as well: pivoted layers bear rates a
    third as high, and are worth more at those (benchmarks/results/trained_minilm.json).
    """
    return not module.weight.is_cuda if options.pivot == "auto" else options.pivot


# The second stage's pass over the output costs what its arithmetic does not show. Measured with torch 2.13 on 1 and 2
# threads, in both memory formats, 64 to 512 channels of 3x3: a twin that counts 0.83 of the dense arithmetic takes 0.7
# to 1.0 of the time; 0.90 takes 0.9 to 1.0, 0.96 takes 1.0 to 1.1, and more takes up to 1.8.
FASTER_BELOW = 0.85


def is_faster(rank: int, shape: Shape, adapter: Target, options: PlanOptions) -> bool:
    """Whether a CPU computes the twin of a convolution faster, or nobody asked."""
    if adapter.taps == 1 or options.allow_slower or options.allow_growth:
        return True
    return shape.convolution_flops(rank) <= FASTER_BELOW * shape.convolution_flops(None)


def _round(rank: int, shape: Shape, options: PlanOptions) -> int:
    """Down to a multiple of the groups and of `round_to`, but at least to the first such multiple."""
    multiple = math.lcm(options.round_to or 1, shape.down_groups)
    largest = min(shape.max_rank, options.max_rank or math.inf)
    if multiple > largest:
        raise StaysDense(f"no multiple of {multiple} is a rank of it (at most {largest})")
    return max(rank // multiple, 1) * multiple


def selects(selector: Selector, site: Site) -> bool:
    """Whether a selector means this layer."""
    if callable(selector):
        return bool(selector(site.module, site.fqn))
    patterns = [selector] if isinstance(selector, str) else selector
    return any(fnmatchcase(site.fqn, pattern) for pattern in patterns)


def _at_or_below(submodules: Iterable[nn.Module], model: nn.Module) -> set[int]:
    """ids of all modules in these submodules; ValueError if one is no part of the model."""
    return {id(m) for submodule in members(submodules, model) for m in submodule.modules()}


def members(submodules: Iterable[nn.Module], model: nn.Module) -> list[nn.Module]:
    """The submodules as a list; ValueError if one is no part of the model."""
    known, submodules = {id(m) for m in model.modules()}, list(submodules)
    if strangers := [type(m).__name__ for m in submodules if id(m) not in known]:
        raise ValueError(f"submodules that are not in the model: {', '.join(strangers)}")
    return submodules
