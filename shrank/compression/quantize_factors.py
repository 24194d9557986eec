"""Low-rank models in fewer bits: the factors that are there, rounded to a grid."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import nn

from ..calibration.batches import as_batches
from ..calibration.calibration import Calibration, calibrated
from ..calibration.request import Calibrate
from ..layers.low_rank import LowRankLayer
from ..layers.quantized import quantized_weight, torchao_tensors
from ..layers.two_stage import merged_bias
from ..linalg import AS_IT_IS, FactorizationError, Grid, Metric, Storage, metric, quantized_factors
from ..model import surgery
from ..model.adapters import LOW_RANK, Target, adapter_of, is_lazy, target
from ..model.dense import why_not_dense
from ..model.on_grid import why_not_on_grid
from ..model.storage import plain_factors_of
from ..model.survey import Site, Survey, count, is_unit
from ..planning.options import Eligibility, PlanOptions, Selector
from ..planning.plan import LayerPlan, RankPlan
from ..util.progress import track
from .apply import carry_out


@torch.inference_mode(False)
def quantize_factors(
    model: nn.Module,
    bits: int = 8,
    group_size: int | None = None,
    *,
    calibrate: Iterable[object] | Calibrate | None = None,
    activations: str | None = None,
    dense: bool = False,
    include: Selector | None = None,
    exclude: Selector | None = None,
) -> nn.Module:
    """Round the factors of low-rank linear layers to few bits, in place, with torchao's tensors as their weights.

    With data, by GPTQ: the down factor by the second moment of its inputs, the up factor fitted again to what became of
    it, for the outputs that the layer had. Without, each weight to the nearest number, and the up factor fitted as
    well. Pivoted layers get plain factors first. The weights never train.

    Args:
        model: A model with low-rank layers.
        bits: 3, 4 or 8, of a weight.
        group_size: Weights of a row with one scale; None: each row has one.
        calibrate: Data, as `shrank.batches` makes it or takes it without further arguments, or Calibrate(data, ...).
        activations: "int8": round what the weights multiply too, at every call and for each token; None: do not.
        dense: Round the weights of dense linear layers as well.
        include: Layers to round: glob patterns of dotted names, or (module, fqn) -> bool.
        exclude: Layers to leave, likewise.

    Returns:
        The root of the model. What was done, and why not more, is in its `shrank_plan`.

    Raises:
        ImportError: torchao is not installed.
        ValueError: bits, group_size or the data do not fit; the model is then as it was.

    Source:
        Frantar et al., ICLR 2023 (GPTQ).
    """
    storage = Storage(Grid(bits, group_size), activations=activations)
    torchao_tensors()
    survey = Survey(model)
    options = PlanOptions(include=include, exclude=exclude, min_features=1)
    eligibility = Eligibility(options, model)
    drafts = [_draft(site, storage, eligibility, dense) for site in survey.sites()]
    chosen = [draft for draft in drafts if not draft.why_not]
    found = _calibrated(survey, calibrate, chosen)
    done = {draft.site.fqn: replace(draft.plan, reason=draft.why_not) for draft in drafts}
    for draft in track([x for x in chosen if x.is_low_rank], "quantizing"):
        done[draft.site.fqn] = _quantize(survey, draft, found)
    layers = tuple(draft.plan for draft in chosen if not draft.is_low_rank)
    done |= {layer.fqn: layer for layer in carry_out(survey, RankPlan(layers), found)} if layers else {}
    plan = RankPlan(tuple(done.values()), 0)
    plan = replace(plan, other_params=count(survey.model.parameters()) - plan.params_after)
    if not chosen:
        warnings.warn(f"no weight was rounded: {_reasons(plan)}", stacklevel=2)
    return surgery.finish(survey, plan)


@dataclass(frozen=True)
class _Draft:
    """A layer, as it is to be stored; or why it is not."""

    site: Site
    plan: LayerPlan
    why_not: str

    @property
    def is_low_rank(self) -> bool:
        return self.plan.rank is not None

    @property
    def observed(self) -> str:
        """The name of the module whose inputs are those of the layer."""
        if not self.is_low_rank:
            return self.site.fqn
        return f"{self.site.fqn}.{self.site.module.unit}.0".lstrip(".")


def _draft(site: Site, storage: Storage, eligibility: Eligibility, dense: bool) -> _Draft:
    layer = site.module
    if not isinstance(layer, LOW_RANK):
        kind = site.adapter.kind if site.adapter else type(layer).__name__
        size = count(p for p in layer.parameters(recurse=is_unit(layer)) if not is_lazy(p) and p.dim() >= 2)
        reason = eligibility.why_not(site) if dense else "dense: give dense=True to round it too"
        reason = reason or why_not_on_grid(site.adapter, site.shape, None, storage)
        return _Draft(site, LayerPlan(site.fqn, kind, size, site.shape, storage=_unless(reason, storage)), reason)
    shape, stored = replace(layer.shape, pivoted=False), storage
    reason = why_not_dense(layer)
    if not reason and layer.storage != AS_IT_IS:
        reason = f"its factors are {layer.storage} already"
    reason = reason or eligibility.why_not_chosen(site) or why_not_on_grid(_as_dense(layer), shape, layer.rank, storage)
    if reason:
        shape, stored = layer.shape, AS_IT_IS if why_not_dense(layer) else layer.storage
    plan = LayerPlan(site.fqn, layer.kind, layer.shape.dense_params, shape, layer.rank, storage=stored)
    return _Draft(site, plan, reason)


def _unless(reason: str, storage: Storage) -> Storage:
    return AS_IT_IS if reason else storage


def _as_dense(layer: LowRankLayer) -> Target:
    """The dense layer that a low-rank one stands for, without data."""
    return target(adapter_of(layer).dense_from(layer).to(layer.stages[0].weight.dtype), vouched=True)


def _calibrated(survey: Survey, given: object, chosen: list[_Draft]) -> Calibration | None:
    if given is None:
        return None
    how = given if isinstance(given, Calibrate) else Calibrate(given)
    how = replace(how, data=as_batches(how.data), loss="none", inputs=True)
    return calibrated(survey, how, [draft.observed for draft in chosen])


@torch.no_grad()
def _quantize(survey: Survey, draft: _Draft, found: Calibration | None) -> LayerPlan:
    """Put the layer with rounded factors into its place; the plan with the error."""
    site, layer = draft.site, draft.site.module
    factors = plain_factors_of(layer)
    matrices, bias = factors.merge(), merged_bias(layer.stages)
    try:
        known = _metric(found, draft, matrices, bias is not None)
        made = quantized_factors(matrices, known, layer.rank, draft.plan.storage.grid, factors)
    except FactorizationError as error:
        return replace(draft.plan, storage=AS_IT_IS, shape=layer.shape, reason=str(error))
    if made.loss.shift is not None:
        bias = nn.Parameter((bias + made.loss.shift).to(bias.dtype), bias.requires_grad)
    twin = _as_dense(layer).twin(layer.rank, draft.plan.shape)
    down, up = (quantized_weight(each, draft.plan.storage.activations) for each in (made.down, made.up))
    twin.set_factors(down, up, bias)
    surgery.replace(survey, site, twin)
    return replace(draft.plan, error=made.loss.relative_error)


def _metric(found: Calibration | None, draft: _Draft, matrices: torch.Tensor, centred: bool) -> Metric | None:
    if found is None or draft.observed not in found:
        return None
    return metric(matrices, found[draft.observed].to(matrices.device), centred, inputs=True)


def _reasons(plan: RankPlan) -> str:
    return "; ".join(dict.fromkeys(layer.reason for layer in plan if layer.reason)) or "no layer owns a weight matrix"
