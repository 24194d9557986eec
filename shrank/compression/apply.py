"""Carrying out a plan, reading one off a model, and going back to dense."""

from __future__ import annotations

import logging
import warnings
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..calibration.calibration import Calibration
from ..calibration.metric_source import MetricSource
from ..calibration.sameness import agree_on
from ..layers.packed import PackedLinear
from ..layers.quantized import is_quantized, storage_of, torchao_tensors
from ..linalg import AS_IT_IS
from ..model import surgery
from ..model.adapters import LOW_RANK, target, with_groups
from ..model.dense import dense_twin, plain_twin, require_plain
from ..model.on_grid import why_not_on_grid
from ..model.survey import Site, Survey, count
from ..planning.plan import LayerPlan, RankPlan
from ..util.processes import current
from ..util.progress import track
from .empty_twin import empty_twin
from .twins import twins

_log = logging.getLogger("shrank")


@torch.inference_mode(False)  # its results must stay trainable wherever it is called
@torch.no_grad()
def apply(model: nn.Module, plan: RankPlan, calibration: MetricSource | None = None) -> nn.Module:
    """Replace the planned layers in place, initialised from their weights.

    A layer whose factorisation fails stays dense, with a warning.

    Args:
        model: The model that the plan is of.
        plan: What to do.
        calibration: What `calibrate` found of this model. The factors are then those that keep the layers' outputs best
            on that data, and biases make up for the mean error.

    Returns:
        The root of the model. The plan that was carried out, with the errors found, is its `shrank_plan`.

    Raises:
        ValueError: The plan does not fit the model, which is then as it was.
    """
    survey = Survey(model)
    return surgery.finish(survey, carry_out(survey, plan, calibration))


@torch.inference_mode(False)
@torch.no_grad()
def carry_out(
    survey: Survey, plan: RankPlan, calibration: MetricSource | None = None, workers: int | None = None
) -> RankPlan:
    """Replace the planned layers, so many at a time; the plan with the errors found. `surgery.finish` must follow;
    ValueError as `apply` raises it."""
    done = {layer.fqn: layer for layer in plan}
    jobs = resolve(survey, plan)
    _require_inputs(jobs, calibration)
    agree_on(survey.model)
    current().agree("the plan", plan.to_dict())
    for site, layer, twin in track(twins(jobs, calibration, workers), "factorising", total=len(jobs)):
        done[layer.fqn] = layer
        if twin is None:
            warnings.warn(f"{layer.fqn} stays dense: {layer.reason}", stacklevel=3)
        else:
            surgery.replace(survey, site, twin)
    done = replace(plan, layers=tuple(done.values()))
    _log.info("%s", done.summary)
    return done


def attach_empty(model: nn.Module, plan: RankPlan) -> nn.Module:
    """Replace the planned layers by twins whose weights are not set: what loading a checkpoint fills, and `unpack` ends
    where there are weights on a grid.

    Layers that are low-rank already, as planned, stay. Raises ValueError, before anything is changed, if the plan does
    not fit the model.
    """
    survey = Survey(model)
    for site, twin in _empty_twins(survey, plan):
        surgery.replace(survey, site, twin.to_empty(device=site.module.weight.device))
    return surgery.finish(survey, plan)


def unpack(model: nn.Module) -> nn.Module:
    """The model, whose weights on a grid were read by now, with linear layers that compute; ValueError, which names the
    layer, on values or scales that no weight has."""
    survey = Survey(model)
    for site in survey.sites(inside_low_rank=True):
        if isinstance(site.module, PackedLinear):
            try:
                made = site.module.made()
            except ValueError as error:
                raise ValueError(f"{site.fqn or '(root)'}.weight: {error}") from error
            surgery.put_in_place(survey, site, made)
    return survey.model


def expected_state(model: nn.Module, plan: RankPlan) -> dict[str, Tensor]:
    """What `model.state_dict()` would hold after `attach_empty`, the factors on the meta device; raises ValueError as
    that does."""
    twins = {id(site.module): twin for site, twin in _empty_twins(Survey(model), plan)}
    paths = {path: twins[id(m)] for path, m in model.named_modules(remove_duplicate=False) if id(m) in twins}
    expected = {name: value for name, value in model.state_dict().items() if name.rpartition(".")[0] not in paths}
    for path, twin in paths.items():
        prefix = f"{path}." if path else ""
        expected |= {prefix + name: value for name, value in twin.state_dict().items()}
    return expected


def describe(model: nn.Module) -> RankPlan:
    """Read the plan off a model that its low-rank layers amount to, however they came about.

    Args:
        model: Any model.

    Returns:
        A plan of its low-rank layers, and of the linear layers that shrank put on a grid, alone.
    """
    sites = Survey(model).sites(inside_low_rank=True)
    plan = RankPlan(
        tuple(_describe_layer(site) for site in sites if isinstance(site.module, LOW_RANK) or _is_ours(site))
    )
    return replace(plan, other_params=count(model.parameters()) - plan.params_after)


@torch.inference_mode(False)
@torch.no_grad()
def merge(model: nn.Module) -> nn.Module:
    """Turn every low-rank layer back into the dense layer it stands for, in place, and weights on a grid into plain
    ones.

    Args:
        model: Any model.

    Returns:
        The root of the model.

    Raises:
        ValueError: Another tool made something of a stage that its weight does not tell: LoRA, quantization, pruning,
            sharding, hooks. The model is then as it was.
    """
    survey = Survey(model)
    sites = survey.low_rank()
    require_plain(sites, "merged")
    on_grid = [site for site in survey.sites() if _is_ours(site)]
    for site in reversed(sites):  # innermost first: a stage of a low-rank layer may be low-rank itself
        surgery.replace(survey, site, dense_twin(site.module))
    for site in on_grid:
        surgery.replace(survey, site, plain_twin(site.module))
    return surgery.finish(survey, None)


def _is_ours(site: Site) -> bool:
    """Whether it is a linear layer with a weight on a grid, and not a stage of a low-rank layer."""
    return not site.inside and is_quantized(site.module._parameters.get("weight"))


def _describe_layer(site: Site) -> LayerPlan:
    layer = site.module
    if isinstance(layer, LOW_RANK):
        shape = layer.shape
        return LayerPlan(site.fqn, layer.kind, shape.dense_params, shape, layer.rank, storage=layer.storage)
    found = target(layer, vouched=True)
    return LayerPlan(site.fqn, found.kind, found.shape().dense_params, found.shape(), storage=storage_of(layer))


def _empty_twins(survey: Survey, plan: RankPlan) -> list[tuple[Site, nn.Module]]:
    """The sites of the planned layers and a twin on the meta device for each, whose stages may be low-rank in turn."""
    twins = []
    for site, layer in resolve(survey, plan.outermost, loading=True):
        if layer.rank is None:
            twins.append((site, PackedLinear(site.module, layer.storage.grid, layer.storage.activations)))
            continue
        twin = Survey(empty_twin(site, layer))
        for inner_site, inner_twin in _empty_twins(twin, plan.inside(layer.fqn)):
            surgery.replace(twin, inner_site, inner_twin)
        twins.append((site, twin.model))
    return twins


def resolve(survey: Survey, plan: RankPlan, loading: bool = False) -> list[tuple[Site, LayerPlan]]:
    """The sites of the planned layers; ValueError lists everything about the plan that does not fit the model."""
    sites = {site.fqn: site for site in survey.sites(inside_low_rank=True)}
    jobs, problems = [], []
    if has_grids(plan):
        torchao_tensors()
    for layer in plan.changed:
        site = sites.get(layer.fqn)
        if site is None:
            problems.append(f"{layer.fqn!r}: the model has no such layer")
        elif loading and isinstance(site.module, LOW_RANK) and _same_structure(_describe_layer(site), layer):
            continue
        elif problem := _misfit(site, layer, loading) or _why_not_stored(site, layer, plan):
            problems.append(f"{layer.fqn!r}: {problem}")
        else:
            jobs.append((site, layer))
    if problems:
        raise ValueError(f"the plan does not fit the model:{indented(problems)}")
    return jobs


def indented(problems: list[str]) -> str:
    """The problems, a line each, for the end of a message; of many, the first ten and how many more there are."""
    more = [f"and {len(problems) - 10} more"] if len(problems) > 10 else []
    return "".join(f"\n  {line}" for line in [*problems[:10], *more])


def has_grids(plan: RankPlan) -> bool:
    return any(layer.storage.grid for layer in plan)


def _require_inputs(jobs: list[tuple[Site, LayerPlan]], calibration: MetricSource | None) -> None:
    """ValueError if weights are to be rounded by a calibration that did not observe what they multiply."""
    if not isinstance(calibration, Calibration):
        return
    on_grid = [layer.fqn for _, layer in jobs if layer.storage.grid and layer.fqn in calibration]
    if lacking := [fqn for fqn in on_grid if not calibration.of_inputs(fqn)]:
        raise ValueError(
            f"the calibration observed outputs, and weights are rounded by their inputs: calibrate(..., inputs=True); "
            f"{', '.join(lacking[:5])}"
        )


def _misfit(site: Site, layer: LayerPlan, loading: bool) -> str:
    """What keeps this layer from being replaced as planned; '' if nothing does."""
    found = target(site.module, vouched=loading)
    if (found is None or not loading) and (reasons := site.why_not()):
        return "; ".join(reasons)
    if found.kind != layer.kind:
        return f"it is a {found.kind} here and a {layer.kind} in the plan"
    if layer.rank is None:
        here = found.shape()
        return "" if here == layer.shape else f"it is {here} here and {layer.shape} in the plan"
    shape = with_groups(found.shape(), layer.rank, layer.shape.up_groups > 1, layer.shape.pivoted)
    if reason := found.why_not_grouped(shape):
        return reason
    if shape != layer.shape:
        return f"it is {shape} here and {layer.shape} in the plan"
    if shape.pivoted and (shape.up_groups != shape.down_groups or layer.rank >= shape.out_features):
        return "pivots need the same groups in both stages and a rank below the outputs"
    if layer.rank > shape.max_rank or layer.rank % shape.down_groups:
        return f"rank {layer.rank} is not a multiple of {shape.down_groups} in 1..{shape.max_rank}"
    return ""


def _why_not_stored(site: Site, layer: LayerPlan, plan: RankPlan) -> str:
    """What keeps the layer from having the few bits that are planned; '' if nothing does, or it has none."""
    if layer.storage.grid is None:
        of_another = "it corrects a weight that another tool quantized, as shrank.correct does beside that"
        return of_another if layer.storage.corrected else ""
    if plan.inside(layer.fqn).layers:
        return "its stages are low-rank themselves: merge it, and factorise it once"
    return why_not_on_grid(target(site.module, vouched=True), layer.shape, layer.rank, layer.storage)


def _same_structure(here: LayerPlan, planned: LayerPlan) -> bool:
    # Weights on a grid are no memory that could be written over.
    plain = here.storage == planned.storage == AS_IT_IS
    return plain and (here.kind, here.shape, here.rank) == (planned.kind, planned.shape, planned.rank)
