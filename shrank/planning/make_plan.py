"""From a model and a rank rule or a budget to a plan; reads, never writes."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from numbers import Real
from typing import TYPE_CHECKING

from torch import Tensor, nn

from ..calibration.metric_source import LayerStatistics
from ..calibration.sameness import agree_on
from ..linalg import AS_IT_IS, FactorizationError, Shape, Storage, energy_curve
from ..model.adapters import LOW_RANK, is_lazy
from ..model.on_grid import why_not_on_grid
from ..model.survey import Site, Survey, count, is_unit
from ..util.parallel import dealt
from .block_candidates import Others, require_narrowable
from .budget import Budget, SmallestGoodEnough
from .costs import PricedLayer
from .losses import Candidate
from .narrowed import NarrowedBlock
from .narrowing import spend_on_blocks
from .options import Eligibility, PlanOptions, StaysDense, fit, options_of
from .plan import LayerPlan, RankPlan
from .rank import Fraction, Layer, Rank, RankRule, as_rule
from .spectra import Spectra
from .spending import Paid, TradeOff, spend

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
    return plan_of(Survey(model), rank, Spectra(calibration), options_of("make_plan", options, _PARAMETERS))


def plan_of(survey: Survey, rank: Rank | Budget, spectra: Spectra, options: PlanOptions) -> RankPlan:
    """As `make_plan`, of a model that was looked at before."""
    agree_on(survey.model)
    options = options.for_grid()
    rule = _rule(rank, spectra.calibration, options)
    counted: set[int] = set()
    eligibility = Eligibility(options, survey.model)
    layers = [_Layer(site, _draft(site, counted), eligibility, spectra) for site in _sites(survey, options)]
    trade_off, narrowed = TradeOff(), []
    if options.narrow:
        require_narrowable(spectra.calibration, rule)
    if isinstance(rule, Budget):
        planned, narrowed, trade_off = _by_budget(layers, rule, options, spectra)
    else:
        planned = dealt(lambda layer: _by_rule(layer, rule, options), layers, [x.cost for x in layers], 1, "planning")
    if options.grid is not None:
        planned = [_on_grid(plan, layer, options) for plan, layer in zip(planned, layers, strict=True)]
    if options.errors and (options.grid is not None or not isinstance(rule, Budget)):
        planned = _with_errors(planned, layers, spectra)
    other = count(survey.model.parameters()) - sum(layer.size for layer in planned)
    return RankPlan(tuple(planned), other, trade_off.curve, trade_off.spent, tuple(narrowed))


def _rule(rank: Rank | Budget, calibration: LayerStatistics | None, options: PlanOptions) -> RankRule | Budget:
    rule = rank if isinstance(rank, Budget) else as_rule(rank)
    if isinstance(rule, Budget) and isinstance(rule.goal, SmallestGoodEnough):
        raise ValueError(
            "a Budget(eval_fn=) is spent by trying compressed models, which a plan alone does not make: "
            "call auto_fact(model, budget, deepcopy=True) and take its shrank_plan"
        )
    if isinstance(rule, Budget) and rule.keep_bytes is not None and options.grid is not None:
        raise ValueError("keep_bytes chooses the bits of every layer: give Budget(bits=), not bits=")
    if calibration is not None and isinstance(rank, Real) and isinstance(rule, Fraction):
        return Budget(keep_params=rule.keep)
    return rule


def _sites(survey: Survey, options: PlanOptions) -> list[Site]:
    """The layers that a plan is about."""
    sites = survey.sites(inside_low_rank=options.fact_led_unit)
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
    return eligible_in(Survey(model), options_of("eligible", options, ("model",)))


def eligible_in(survey: Survey, options: PlanOptions) -> list[str]:
    """As `eligible`, of a model that was looked at before."""
    eligibility = Eligibility(options, survey.model)
    return [site.fqn for site in _sites(survey, options) if not eligibility.why_not(site)]


@dataclass(frozen=True)
class _Layer:
    """A layer to plan; `draft`: what is to be said of it whatever becomes of it."""

    site: Site
    draft: LayerPlan
    eligibility: Eligibility
    spectra: Spectra

    @cached_property
    def why_dense(self) -> str:
        """Why nothing about it is to be decided; "" if something is."""
        return self.eligibility.why_not(self.site)

    @cached_property
    def spectrum(self) -> Tensor:
        """Singular values of the weight, or in the norm of the calibration."""
        return self.spectrum_of(self.site.shape)

    def spectrum_of(self, shape: Shape) -> Tensor:
        """Of a twin with other groups than the weight."""
        return self.spectra.of(self.site, shape)

    @property
    def calibration(self) -> LayerStatistics | None:
        return self.spectra.calibration

    @property
    def saw_nothing(self) -> bool:
        return self.calibration is not None and self.site.fqn not in self.calibration

    @property
    def priced(self) -> PricedLayer:
        """As budgets price it; one that saw nothing in the calibration never runs."""
        known = self.calibration
        tokens = None if known is None else 0 if self.saw_nothing else known.tokens(self.site.fqn)
        return PricedLayer(
            self.site.fqn, tokens, self.site.adapter.takes_vectors, self.site.module.weight.element_size()
        )

    @property
    def cost(self) -> float:
        """What its spectrum takes, up to a factor."""
        return 0.0 if self.why_dense else self.site.shape.work

    def stays_dense(self, reason: object) -> LayerPlan:
        return replace(self.draft, reason=str(reason))


def _draft(site: Site, counted: set[int]) -> LayerPlan:
    kind = site.adapter.kind if site.adapter else type(site.module).__name__
    return LayerPlan(site.fqn, kind, _size(site, counted), site.shape)


def _by_rule(layer: _Layer, rule: RankRule, options: PlanOptions) -> LayerPlan:
    if layer.why_dense:
        return layer.stays_dense(layer.why_dense)
    try:
        shape = replace(layer.draft.shape, pivoted=options.pivot is True and layer.draft.shape.groups == 1)
        asked = Layer(layer.site.fqn, layer.site.module, shape, lambda: layer.spectrum)
        rank, shape = fit(rule(asked), layer.site.adapter, options)
    except (StaysDense, FactorizationError) as reason:
        return layer.stays_dense(reason)
    return replace(layer.draft, rank=rank, shape=shape, reason=f"break-even rank {shape.break_even_rank}")


def _on_grid(plan: LayerPlan, layer: _Layer, options: PlanOptions) -> LayerPlan:
    """With the bits of the options, if the layer may change and can have them."""
    if layer.why_dense:
        return plan
    storage = Storage(options.grid)
    if reason := why_not_on_grid(layer.site.adapter, plan.shape, plan.rank, storage):
        return replace(plan, reason=f"{plan.reason}; not in {options.grid}: {reason}")
    return replace(plan, storage=storage)


def _by_budget(
    layers: list[_Layer], budget: Budget, options: PlanOptions, spectra: Spectra
) -> tuple[list[LayerPlan], list[NarrowedBlock], TradeOff]:
    """Overridden layers by their rules, all other eligible ones by the budget."""
    rules = {layer.site.fqn: budget.rule_for(layer.site.fqn) for layer in layers if not layer.why_dense}
    ruled = [layer for layer in layers if rules.get(layer.site.fqn) is not None]
    planned = dealt(lambda x: _by_rule(x, rules[x.site.fqn], options), ruled, [x.cost for x in ruled], 1, "planning")
    fixed = [Paid(plan, layer.priced) for plan, layer in zip(planned, ruled, strict=True)]
    undecided = [layer for layer in layers if not (layer.why_dense or layer.saw_nothing) and layer not in ruled]

    def squares(layer: _Layer) -> Tensor | LayerPlan:
        try:
            return layer.spectrum.square().cpu()
        except FactorizationError as reason:
            return layer.stays_dense(reason)

    workers = spectra.workers(layer.site.module.weight for layer in undecided)
    results = dealt(squares, undecided, [x.cost for x in undecided], workers, "spectra")
    candidates = [
        Candidate(x.site, x.draft, x.priced, found)
        for x, found in zip(undecided, results, strict=True)
        if isinstance(found, Tensor)
    ]
    without_spectrum = [x for x in results if isinstance(x, LayerPlan)]
    decided = {x.fqn: x for x in (*(paid.layer for paid in fixed), *without_spectrum)}
    chosen = {x.site.fqn for x in candidates}
    decided |= {
        layer.site.fqn: layer.stays_dense(layer.why_dense or "it saw no data in the calibration")
        for layer in layers
        if layer.site.fqn not in chosen | decided.keys()
    }
    weighted = spectra.calibration is not None and spectra.calibration.has_gradients
    narrowed: list[NarrowedBlock] = []
    if options.narrow:
        left_out = {x.site.fqn: reason for x in layers if (reason := x.eligibility.why_not_chosen(x.site))}
        planned, narrowed, trade_off = spend_on_blocks(
            budget, candidates, fixed, Others(decided, left_out), options, spectra
        )
    else:
        planned, trade_off = spend(budget, candidates, fixed, options, weighted, spectra)
    decided |= {x.fqn: x for x in planned}
    return [decided[layer.site.fqn] for layer in layers], narrowed, trade_off


def _with_errors(planned: list[LayerPlan], layers: list[_Layer], spectra: Spectra) -> list[LayerPlan]:
    """With the error to expect at their ranks, or dense where their weights have no spectrum."""

    def with_error(both: tuple[LayerPlan, _Layer]) -> LayerPlan:
        plan, layer = both
        if not plan.changes:
            return plan
        shape = plan.shape
        try:
            if plan.storage.grid is not None:
                return replace(plan, error=layer.spectra.loss(layer.site, plan).relative_error)
            singular = layer.spectrum if shape.down_groups == shape.groups else layer.spectrum_of(shape)
        except FactorizationError as reason:
            return replace(plan, rank=None, reason=str(reason), storage=AS_IT_IS)
        kept = energy_curve(singular)[plan.rank // shape.down_groups].item()
        return replace(plan, error=math.sqrt(max(0.0, 1.0 - kept)))

    both = list(zip(planned, layers, strict=True))
    workers = spectra.workers(layer.site.module.weight for plan, layer in both if plan.changes)
    return dealt(with_error, both, [x.cost for x in layers], workers, "errors")


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
