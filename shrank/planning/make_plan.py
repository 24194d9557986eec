"""From a model and a rank rule or a budget to a plan; reads, never writes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from numbers import Real
from typing import TYPE_CHECKING

from torch import Tensor, nn

from ..calibration.metric_source import LayerStatistics, metric_of
from ..linalg import FactorizationError, Shape, energy_curve, spectrum, squared_errors
from ..model.adapters import LOW_RANK, is_lazy, target
from ..model.surgery import Site, count, is_unit, walk
from ..util.parallel import in_parallel, workers_for
from ..util.progress import track
from .budget import Budget, SmallestGoodEnough
from .costs import PricedLayer
from .options import PlanOptions, StaysDense, at_or_below, check_eligible, fit, options_of
from .plan import LayerPlan, RankPlan
from .rank import Fraction, Layer, Rank, RankRule, as_rule
from .spending import Candidate, Paid, TradeOff, spend

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .keywords import PlanKeywords

_PARAMETERS = ("model", "rank", "calibration")


def make_plan(
    model: nn.Module,
    rank: Rank | Budget,
    *,
    calibration: LayerStatistics | None = None,
    **options: Unpack[PlanKeywords],
) -> RankPlan:
    """Decide the rank of every layer of a model, which is not changed.

    Args:
        model: The dense model.
        rank: An int; a float in (0, 1); a rule such as Energy(0.9); a dict of glob pattern -> rule; a function
            (fqn, module) -> rank | None; or a Budget for all layers together. With a calibration a float is the share
            of all weights that a Budget keeps; Fraction gives every layer the same share of its own.
        calibration: What `calibrate` found of the model. Errors are then those of the layers' outputs on that data,
            weighted by what they do to its loss.
        **options: The fields of PlanOptions.

    Returns:
        The plan, with the reason for each layer that stays dense.

    Raises:
        TypeError: An option does not exist, or `rank` is none of the above.
        ValueError: A rule or an option is out of its range, or the budget is less than the least possible.
    """
    return plan_with(model, rank, calibration, options_of("make_plan", options, _PARAMETERS))


def plan_with(
    model: nn.Module, rank: Rank | Budget, calibration: LayerStatistics | None, options: PlanOptions
) -> RankPlan:
    """As `make_plan`."""
    rule = rank if isinstance(rank, Budget) else as_rule(rank)
    if isinstance(rule, Budget) and isinstance(rule.goal, SmallestGoodEnough):
        raise ValueError(
            "a Budget(eval_fn=) is spent by trying compressed models, which a plan alone does not make: "
            "call auto_fact(model, budget, deepcopy=True) and take its shrank_plan"
        )
    if calibration is not None and isinstance(rank, Real):
        rule = Budget(keep_params=rule.keep) if isinstance(rule, Fraction) else rule
    sites = sites_of(model, options)
    counted: set[int] = set()
    spectra = {site.fqn: cache(partial(_spectrum, site, calibration)) for site in sites}
    drafts = [_draft(site, counted) for site in sites]
    allowed = None if options.submodules is None else at_or_below(options.submodules, model)
    trade_off = TradeOff()
    if isinstance(rule, Budget):
        layers, trade_off = _planned_by_budget(sites, drafts, rule, options, allowed, calibration, spectra)
    else:
        layers = [
            _plan_layer(site, draft, rule, options, allowed, spectra[site.fqn])
            for site, draft in zip(track(sites, "planning"), drafts, strict=True)
        ]
        if options.errors:
            layers = _with_errors(layers, {site.fqn: site for site in sites}, spectra, calibration)
    other = count(model.parameters()) - sum(layer.size for layer in layers)
    return RankPlan(tuple(layers), other, trade_off.curve, trade_off.spent)


def sites_of(model: nn.Module, options: PlanOptions) -> list[Site]:
    """The layers that a plan is about."""
    sites = walk(model, inside_low_rank=options.fact_led_unit)
    return [site for site in sites if not (options.fact_led_unit and isinstance(site.module, LOW_RANK))]


def eligible(model: nn.Module, **options: Unpack[PlanKeywords]) -> list[str]:
    """List the layers of a model that may become low-rank.

    Args:
        model: The dense model.
        **options: The fields of PlanOptions.

    Returns:
        Their dotted names, in the model's order: what `calibrate(layers=)` takes.

    Raises:
        TypeError: An option does not exist.
    """
    return eligible_with(model, options_of("eligible", options, ("model",)))


def eligible_with(model: nn.Module, options: PlanOptions) -> list[str]:
    """As `eligible`."""
    allowed, names = None if options.submodules is None else at_or_below(options.submodules, model), []
    for site in sites_of(model, options):
        try:
            check_eligible(site, options, allowed)
        except StaysDense:
            continue
        names.append(site.fqn)
    return names


def _draft(site: Site, counted: set[int]) -> LayerPlan:
    """What is to be said of a layer whatever becomes of it."""
    adapter = target(site.module)
    shape = adapter.shape() if adapter and not is_lazy(site.module.weight) else None
    kind = adapter.kind if adapter else type(site.module).__name__
    return LayerPlan(site.fqn, kind, _size(site, counted), shape)


def _plan_layer(
    site: Site,
    draft: LayerPlan,
    rule: RankRule,
    options: PlanOptions,
    allowed: set[int] | None,
    spectrum_of: Callable[[], Tensor],
) -> LayerPlan:
    try:
        check_eligible(site, options, allowed)
        shape = replace(draft.shape, pivoted=options.pivot is True and draft.shape.groups == 1)
        rank, shape = fit(rule(Layer(site.fqn, site.module, shape, spectrum_of)), target(site.module), options)
    except (StaysDense, FactorizationError) as reason:
        return replace(draft, reason=str(reason))
    return replace(draft, rank=rank, shape=shape, reason=f"break-even rank {shape.break_even_rank}")


def _planned_by_budget(
    sites: list[Site],
    drafts: list[LayerPlan],
    budget: Budget,
    options: PlanOptions,
    allowed: set[int] | None,
    calibration: LayerStatistics | None,
    spectra: dict[str, Callable[[], Tensor]],
) -> tuple[list[LayerPlan], TradeOff]:
    """Overridden layers by their rules, all other eligible ones by the budget."""
    layers: dict[str, LayerPlan] = {draft.fqn: draft for draft in drafts}
    undecided: list[tuple[Site, LayerPlan]] = []
    fixed: list[Paid] = []
    for site, draft in zip(sites, drafts, strict=True):
        try:
            check_eligible(site, options, allowed)
        except StaysDense as reason:
            layers[site.fqn] = replace(draft, reason=str(reason))
            continue
        if (rule := budget.rule_for(site.fqn)) is not None:
            layers[site.fqn] = _plan_layer(site, draft, rule, options, allowed, spectra[site.fqn])
            fixed.append(Paid(layers[site.fqn], _priced(site, calibration)))
        elif calibration is not None and site.fqn not in calibration:
            layers[site.fqn] = replace(draft, reason="it saw no data in the calibration")
        else:
            undecided.append((site, draft))
    workers = workers_for(site.module.weight for site, _ in undecided)

    def candidate(undecided: tuple[Site, LayerPlan]) -> Candidate | LayerPlan:
        site, draft = undecided
        try:
            return Candidate(site, draft, _priced(site, calibration), spectra[site.fqn]().square())
        except FactorizationError as reason:
            return replace(draft, reason=str(reason))

    results = list(track(in_parallel(candidate, undecided, workers), "spectra", total=len(undecided)))
    layers |= {x.fqn: x for x in results if isinstance(x, LayerPlan)}
    planned, trade_off = spend(
        budget,
        [x for x in results if isinstance(x, Candidate)],
        fixed,
        options,
        weighted=calibration is not None and calibration.has_gradients,
    )
    return list((layers | {layer.fqn: layer for layer in planned}).values()), trade_off


def _priced(site: Site, calibration: LayerStatistics | None) -> PricedLayer:
    """The layer as budgets price it; one that saw nothing in the calibration never runs."""
    tokens = None if calibration is None else calibration.tokens(site.fqn) if site.fqn in calibration else 0
    return PricedLayer(site.fqn, tokens, target(site.module).takes_vectors)


def _with_errors(
    layers: list[LayerPlan],
    sites: dict[str, Site],
    spectra: dict[str, Callable[[], Tensor]],
    calibration: LayerStatistics | None,
) -> list[LayerPlan]:
    """The layers with the error to expect at their ranks, or dense where their weights have no spectrum."""

    def with_error(layer: LayerPlan) -> LayerPlan:
        if layer.rank is None:
            return layer
        shape = layer.shape
        try:
            own_groups = shape.down_groups == shape.groups
            singular = spectra[layer.fqn]() if own_groups else _spectrum(sites[layer.fqn], calibration, shape)
        except FactorizationError as reason:
            return replace(layer, rank=None, reason=str(reason))
        kept = energy_curve(singular)[layer.rank // shape.down_groups].item()
        return replace(layer, error=math.sqrt(max(0.0, 1.0 - kept)))

    workers = workers_for(sites[layer.fqn].module.weight for layer in layers if layer.rank is not None)
    return list(track(in_parallel(with_error, layers, workers), "errors", total=len(layers)))


def _spectrum(site: Site, calibration: LayerStatistics | None, shape: Shape | None = None) -> Tensor:
    """Singular values of the weight, or in the norm of the calibration."""
    adapter = target(site.module)
    matrices = adapter.matrices(shape or adapter.shape())
    metric = metric_of(calibration, site, matrices)
    return spectrum(matrices) if metric is None else squared_errors(matrices, metric).sqrt()


def _size(site: Site, counted: set[int]) -> int:
    """Numbers in the matrices that the module owns, with those of its factors or parametrizations; shared ones count
    where they come first."""
    own = [
        p
        for p in site.module.parameters(recurse=is_unit(site.module))
        if not is_lazy(p) and p.dim() >= 2 and id(p) not in counted
    ]
    counted.update(map(id, own))
    return count(own)
