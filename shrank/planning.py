"""From a model and a rank rule to a plan; reads, never writes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cache, partial

from torch import Tensor, nn

from .linalg import FactorizationError, Shape, energy_curve, spectrum
from .parallel import in_parallel, workers_for
from .plan import LayerPlan, RankPlan
from .progress import track
from .rank import Layer, RankRule, as_rule
from .surgery import Site, count, is_unit, walk
from .targets import LOW_RANK, Target, is_lazy, target, why_not, with_groups

Selector = str | Iterable[str] | Callable[[nn.Module, str], bool]


@dataclass(frozen=True)
class PlanOptions:
    """Which layers may change and how ranks are fitted; the keyword options of `auto_fact` and `make_plan`.

    include, exclude: glob patterns over dotted names, or `(module, fqn) -> bool`. submodules: modules at or below which
    layers may change. groups_out, skip_high_groups: see `auto_fact`. fact_led_unit: open low-rank layers and factorise
    their stages again. round_to: ranks become multiples of it. min_rank, max_rank: bounds on every rank.
    min_features: layers whose smaller side is below stay dense. allow_growth: permit ranks that store more than the
    dense layer. allow_slower: permit convolutions that a CPU computes no faster than the dense layer, as allow_growth
    does too. errors: compute the expected error of every layer.
    """

    groups_out: bool = False
    skip_high_groups: bool = True
    submodules: Iterable[nn.Module] | None = None
    fact_led_unit: bool = False
    include: Selector | None = None
    exclude: Selector | None = None
    round_to: int = 1
    min_rank: int | None = None
    max_rank: int | None = None
    min_features: int = 16
    allow_growth: bool = False
    allow_slower: bool = False
    errors: bool = True

    def __post_init__(self) -> None:
        for name in ("round_to", "min_rank", "max_rank", "min_features"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.max_rank is not None and self.min_rank is not None and self.max_rank < self.min_rank:
            raise ValueError(f"max_rank {self.max_rank} is below min_rank {self.min_rank}")


class _StaysDense(Exception):
    """Ends the planning of one layer; its text is the reason."""


def make_plan(model: nn.Module, rank: object, **options: object) -> RankPlan:
    """Decide the rank of every layer of `model`, which is not changed.

    rank: an int, a float in (0, 1), a rule such as Energy(0.9), a dict of glob pattern -> rule, or a function
    (fqn, module) -> rank | None. options: the fields of PlanOptions. Raises TypeError or ValueError on a bad rule.
    """
    rule, options = as_rule(rank), PlanOptions(**options)
    allowed = None if options.submodules is None else _at_or_below(options.submodules, model)
    sites = walk(model, inside_low_rank=options.fact_led_unit)
    if options.fact_led_unit:
        sites = [site for site in sites if not isinstance(site.module, LOW_RANK)]
    counted: set[int] = set()
    spectra = {site.fqn: cache(partial(_spectrum, site.module)) for site in sites}
    layers = [_plan_layer(site, rule, options, allowed, counted, spectra[site.fqn])
              for site in track(sites, "planning")]
    if options.errors:
        layers = _with_errors(layers, {site.fqn: site.module for site in sites}, spectra)
    return RankPlan(tuple(layers), other_params=count(model.parameters()) - sum(layer.size for layer in layers))


def _plan_layer(site: Site, rule: RankRule, options: PlanOptions, allowed: set[int] | None, counted: set[int],
                spectrum_of: Callable[[], Tensor]) -> LayerPlan:
    found = target(site.module)
    shape = found.shape() if found and not is_lazy(site.module.weight) else None
    plan = LayerPlan(site.fqn, found.kind if found else type(site.module).__name__, _size(site, counted), shape)
    try:
        _check_eligible(site, options, allowed)
        rank, shape = _fit(rule(Layer(site.fqn, site.module, shape, spectrum_of)), found, options)
    except (_StaysDense, FactorizationError) as reason:
        return replace(plan, reason=str(reason))
    return replace(plan, rank=rank, shape=shape, reason=f"break-even rank {shape.break_even_rank}")


def _with_errors(layers: list[LayerPlan], modules: dict[str, nn.Module],
                 spectra: dict[str, Callable[[], Tensor]]) -> list[LayerPlan]:
    """The layers with the error to expect at their ranks, or dense where their weights have no spectrum."""

    def with_error(layer: LayerPlan) -> LayerPlan:
        if layer.rank is None:
            return layer
        shape = layer.shape
        try:
            own_groups = shape.down_groups == shape.groups
            singular = spectra[layer.fqn]() if own_groups else _spectrum(modules[layer.fqn], shape)
        except FactorizationError as reason:
            return replace(layer, rank=None, reason=str(reason))
        kept = energy_curve(singular)[layer.rank // shape.down_groups].item()
        return replace(layer, error=math.sqrt(max(0.0, 1.0 - kept)))

    workers = workers_for(modules[layer.fqn].weight for layer in layers if layer.rank is not None)
    return list(track(in_parallel(with_error, layers, workers), "errors", total=len(layers)))


def _spectrum(module: nn.Module, shape: Shape | None = None) -> Tensor:
    found = target(module)
    return spectrum(found.matrices(shape or found.shape()))


def _check_eligible(site: Site, options: PlanOptions, allowed: set[int] | None) -> None:
    if reasons := [*site.why_not, *why_not(site.module)]:
        raise _StaysDense("; ".join(reasons))
    if allowed is not None and id(site.module) not in allowed:
        raise _StaysDense("not in submodules")
    if options.include is not None and not _matches(options.include, site):
        raise _StaysDense("not included")
    if options.exclude is not None and _matches(options.exclude, site):
        raise _StaysDense("excluded")
    shape = target(site.module).shape()
    smaller = min(shape.out_features, shape.in_features) // shape.groups
    if smaller < options.min_features and not options.allow_growth:
        raise _StaysDense(f"too small: its smaller side is {smaller}, below min_features={options.min_features}")


def _fit(rank: int | None, found: Target, options: PlanOptions) -> tuple[int, Shape]:
    """The rank that the layer's groups, the options and its cost allow, with the shape of the twin at that rank."""
    shape = found.shape()
    if rank is None:
        raise _StaysDense("the rule keeps it dense")
    if options.min_rank is not None:
        rank = max(rank, options.min_rank)
    if options.max_rank is not None:
        rank = min(rank, options.max_rank)
    if rank < 1:
        raise _StaysDense(f"the rule gives rank {rank} (break-even rank {shape.break_even_rank})")
    if rank < shape.groups and options.skip_high_groups:
        raise _StaysDense(f"its {shape.groups} groups exceed the rank {rank} (skip_high_groups)")
    shape = with_groups(shape, rank, options.groups_out)
    if reason := found.why_not_grouped(shape):
        raise _StaysDense(reason)
    rank = _round(min(rank, shape.max_rank), shape, options)
    if shape.low_rank_params(rank) >= shape.dense_params and not options.allow_growth:
        raise _StaysDense(f"rank {rank} saves nothing (break-even rank {shape.break_even_rank})")
    if found.taps > 1 and not (options.allow_slower or options.allow_growth):
        _check_faster(rank, shape)
    return rank, shape


# The second stage's pass over the output costs what its arithmetic does not show. Measured with torch 2.13 on 1 and 2
# threads, in both memory formats, 64 to 512 channels of 3x3: a twin that counts 0.83 of the dense arithmetic takes 0.7
# to 1.0 of the time; 0.90 takes 0.9 to 1.0, 0.96 takes 1.0 to 1.1, and more takes up to 1.8.
FASTER_BELOW = 0.85


def _check_faster(rank: int, shape: Shape) -> None:
    if shape.convolution_flops(rank) > FASTER_BELOW * shape.convolution_flops(None):
        raise _StaysDense(f"rank {rank} computes as {shape.channels_computed(rank)} of its "
                          f"{shape.channels_computed(None)} channels, and a second stage: no faster than dense on a "
                          "CPU (allow_slower)")


def _round(rank: int, shape: Shape, options: PlanOptions) -> int:
    """Down to a multiple of the groups and of `round_to`, but at least to the first such multiple."""
    multiple, largest = math.lcm(options.round_to, shape.down_groups), min(shape.max_rank, options.max_rank or math.inf)
    if multiple > largest:
        raise _StaysDense(f"no multiple of {multiple} is a rank of it (at most {largest})")
    return max(rank // multiple, 1) * multiple


def _matches(selector: Selector, site: Site) -> bool:
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


def _size(site: Site, counted: set[int]) -> int:
    """Numbers in the matrices that the module owns, with those of its factors or parametrizations; shared ones count
    where they come first."""
    own = [p for p in site.module.parameters(recurse=is_unit(site.module))
           if not is_lazy(p) and p.dim() >= 2 and id(p) not in counted]
    counted.update(map(id, own))
    return count(own)
