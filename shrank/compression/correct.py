"""Corrections for a model that arrives quantized: its layers stay as they are, and factors add what they lost."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import nn

from ..calibration.batches import as_batches
from ..calibration.calibration import Calibration, calibrated
from ..calibration.request import Calibrate
from ..layers.corrected import CorrectedLinear
from ..layers.foreign import dtype_of, sizes_of, tensors_of, weight_of
from ..linalg import FactorizationError, Lost, Shape
from ..model import surgery
from ..model.adapters import LOW_RANK
from ..model.survey import Site, Survey, count
from ..planning.options import Selector, selects
from ..planning.plan import LayerPlan, RankPlan
from ..planning.rank import Rank
from ..util.lines import indented
from ..util.progress import track
from .correction_ranks import Uncorrected, by_rule, by_share, is_share
from .dense_weights import Dense, DenseWeight, DenseWeights


@dataclass(frozen=True)
class _Layer:
    """A linear layer of the quantized model, and the weight that it should have."""

    site: Site
    weight: DenseWeight
    dtype: torch.dtype
    shape: Shape

    def lost(self, calibration: Calibration | None) -> Lost:
        """FactorizationError where it is of no consequence. Its bias stays as it is, and makes up for nothing."""
        rounded = weight_of(self.site.module, self.dtype)
        weight = self.weight.read().to(rounded.device)
        metric = None if calibration is None else calibration.metric(self.site.fqn, weight[None], centred=False)
        return Lost(weight, rounded, metric)


@torch.inference_mode(False)
@torch.no_grad()
def correct(
    model: nn.Module,
    dense: Dense,
    rank: Rank,
    *,
    calibrate: Iterable[object] | Calibrate | Calibration | None = None,
    include: Selector | None = None,
    exclude: Selector | None = None,
) -> nn.Module:
    """Add to every quantized linear layer of a model the factors that give most of its weight back, in place.

    Every layer stays in its `CorrectedLinear` as it is, whichever library quantized it: weight, bias and kernels. The
    factors train.

    Args:
        model: The quantized model.
        dense: The model before, its state dict, or a folder or file of safetensors with its weights.
        rank: An int, for every layer; a float in (0, 1), the share of these layers' weights that all factors together
            hold, spent where they save most error; a rule such as Energy(0.5), the share of the squared error to give
            back; a dict of glob pattern -> rule; or a function (fqn, module) -> rank | None.
        calibrate: Data, as `auto_fact` takes it, or a Calibration of the dense model with `inputs=True`. The factors
            then give back what the layers do to that data; without, the numbers of their weights.
        include: Layers to correct: glob patterns of dotted names, or (module, fqn) -> bool.
        exclude: Layers not to, likewise.

    Returns:
        The model, or the corrected layer if `model` itself is a layer. What was done is in its `shrank_plan`.

    Raises:
        TypeError: `dense` is none of these, or `rank` is no rule.
        ValueError: No layer has a weight there, or one has it in another size. The model is then as it was.

    Source:
        QERA (Zhang et al., ICLR 2025) and EoRA (Liu et al., 2024), which weigh inputs; here gradients count as well.
    """
    survey, drafts, layers = Survey(model), {}, []
    weights = DenseWeights(dense, getattr(model, "base_model_prefix", ""))
    for site in survey.sites():
        if (sizes := sizes_of(site.module)) is None or isinstance(site.module, LOW_RANK):
            continue
        weight, shape = weights.of(site.fqn), Shape(*sizes)
        reason = _why_not(site, weight, include, exclude)
        drafts[site.fqn] = LayerPlan(site.fqn, type(site.module).__name__, shape.dense_params, shape, reason=reason)
        if not reason:
            layers.append(_Layer(site, weight, dtype_of(site.module) or _dtype_of_model(model), shape))
    _check(layers, drafts)
    calibration = _calibration(survey, dense, layers, calibrate)
    ranks = _by_share(rank, layers, calibration) if is_share(rank) else {}
    for layer in track(layers, "correcting"):
        done = _corrected(survey, layer, drafts[layer.site.fqn], ranks.get(layer.site.fqn, rank), calibration)
        drafts[layer.site.fqn] = done
    plan = RankPlan(tuple(drafts.values()))
    plan = replace(plan, other_params=max(0, count(survey.model.parameters()) - plan.params_after))
    if not plan.low_rank:
        warnings.warn(f"no layer was corrected: {plan.why_dense()}", stacklevel=4)
    return surgery.finish(survey, plan)


def _why_not(site: Site, weight: DenseWeight | None, include: Selector | None, exclude: Selector | None) -> str:
    if site.surroundings:
        return "; ".join(site.surroundings)
    if include is not None and not selects(include, site):
        return "not included"
    if exclude is not None and selects(exclude, site):
        return "excluded"
    return "" if weight else "there is no dense weight of its name"


def _check(layers: list[_Layer], drafts: dict[str, LayerPlan]) -> None:
    """ValueError unless there are weights, and of the right sizes."""
    if wrong := [
        f"{x.site.fqn or '(root)'}: {x.weight.shape}, wanted {(x.shape.out_features, x.shape.in_features)}"
        for x in layers
        if x.weight.shape != (x.shape.out_features, x.shape.in_features)
    ]:
        raise ValueError(f"dense weights are of another size than their layers:{indented(wrong)}")
    if not layers:
        found = RankPlan(tuple(drafts.values()))
        raise ValueError(f"there is no layer to correct: {found.why_dense()}")


def _calibration(
    survey: Survey, dense: Dense, layers: list[_Layer], given: Iterable[object] | Calibrate | Calibration | None
) -> Calibration | None:
    """What the dense model's layers see; it is made of the quantized one where only weights are there."""
    if isinstance(given, Calibration):
        names = [layer.site.fqn for layer in layers if layer.site.fqn in given]
        if lacking := [name for name in names if not given.knows_inputs(name)]:
            raise ValueError(f"corrections are fitted to inputs, observed by calibrate(..., inputs=True): {lacking[0]}")
    if given is None or isinstance(given, Calibration):
        return given
    how = given if isinstance(given, Calibrate) else Calibrate(given)
    whole = dense if isinstance(dense, nn.Module) else _in_full(survey.model, layers)
    return calibrated(
        Survey(whole), replace(how, data=as_batches(how.data), inputs=True), [layer.site.fqn for layer in layers]
    )


def _in_full(model: nn.Module, layers: list[_Layer]) -> nn.Module:
    """A copy with the same tensors, but for the dense weights of these layers."""
    memo = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    for layer in layers:
        old, made = layer.site.module, nn.Linear(layer.shape.in_features, layer.shape.out_features, device="meta")
        made.weight = nn.Parameter(layer.weight.read().to(tensors_of(old)[0].device, layer.dtype))
        made.bias = getattr(old, "bias", None)
        memo[id(old)] = made.train(old.training)
    return copy.deepcopy(model, memo)


def _by_share(share: float, layers: list[_Layer], calibration: Calibration | None) -> dict[str, int | str]:
    weighted = calibration is not None and calibration.has_gradients
    return by_share(share, {x.site.fqn: (x.shape, lambda x=x: x.lost(calibration)) for x in layers}, weighted)


def _corrected(
    survey: Survey, layer: _Layer, draft: LayerPlan, rank: Rank | str, calibration: Calibration | None
) -> LayerPlan:
    """The plan of a layer that was corrected, or why it was not."""
    if isinstance(rank, str):
        return replace(draft, reason=rank)
    module = layer.site.module
    try:
        lost = layer.lost(calibration)
        rank = by_rule(rank, layer.site.fqn, module, layer.shape, lost)
        factors = lost.correction(rank, layer.dtype)
    except (Uncorrected, FactorizationError) as reason:
        return replace(draft, reason=str(reason))
    twin = CorrectedLinear(module, rank, dtype=layer.dtype)
    twin.take(factors, None)
    surgery.wrap(survey, layer.site, twin)
    return replace(draft, rank=rank, error=lost.loss(factors.merge()[0]).relative_error, storage=twin.storage)


def _dtype_of_model(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.get_default_dtype())


@torch.no_grad()
def uncorrect(model: nn.Module) -> nn.Module:
    """Take the corrections off, in place: every layer is again the one that was corrected.

    Args:
        model: Any model.

    Returns:
        The root of the model.
    """
    survey = Survey(model)
    for site in survey.low_rank():
        if isinstance(site.module, CorrectedLinear):
            surgery.unwrap(survey, site, site.module.base)
    return surgery.finish(survey, None)
