"""Carrying out a plan, reading one off a model, and going back to dense."""

from __future__ import annotations

import logging
import warnings
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..calibration.metric_source import MetricSource
from ..calibration.sameness import agree_on
from ..model import surgery
from ..model.adapters import LOW_RANK, target, with_groups
from ..model.dense import dense_twin, require_plain
from ..model.feed_forward import narrowed_in
from ..model.survey import Site, Survey, count
from ..planning.narrowed import NarrowedBlock, narrowed_shape
from ..planning.plan import LayerPlan, RankPlan
from ..util.processes import current
from ..util.progress import track
from .narrow import attach_narrow, block_jobs, narrow, narrowed_state
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
    jobs = resolve(survey, plan)
    agree_on(survey.model)
    current().agree("the plan", plan.to_dict())
    plan = narrow(block_jobs(survey, plan)[0], calibration, plan, workers)
    done = {layer.fqn: layer for layer in plan}
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
    """Replace the planned layers by twins whose weights are not set: what loading a checkpoint fills.

    Layers that are low-rank already, as planned, stay. Raises ValueError, before anything is changed, if the plan does
    not fit the model.
    """
    survey = Survey(model)
    twins = _empty_twins(survey, plan)
    attach_narrow(block_jobs(survey, plan, loading=True)[0])
    for site, twin in twins:
        surgery.replace(survey, site, twin.to_empty(device=site.module.weight.device))
    return surgery.finish(survey, plan)


def expected_state(model: nn.Module, plan: RankPlan) -> dict[str, Tensor]:
    """What `model.state_dict()` would hold after `attach_empty`, the factors on the meta device; raises ValueError as
    that does."""
    survey = Survey(model)
    states = {id(site.module): twin.state_dict() for site, twin in _empty_twins(survey, plan)}
    states = narrowed_state(block_jobs(survey, plan, loading=True)[0]) | states
    paths = {path: states[id(m)] for path, m in model.named_modules(remove_duplicate=False) if id(m) in states}
    expected = {name: value for name, value in model.state_dict().items() if name.rpartition(".")[0] not in paths}
    for path, state in paths.items():
        prefix = f"{path}." if path else ""
        expected |= {prefix + name: value for name, value in state.items()}
    return expected


def describe(model: nn.Module) -> RankPlan:
    """Read the plan off a model that its low-rank layers amount to, however they came about.

    Args:
        model: Any model.

    Returns:
        A plan of its low-rank layers and of the layers of its narrowed blocks alone.
    """
    survey = Survey(model)
    layers = {site.fqn: _describe_layer(site) for site in survey.low_rank()}
    dense = {site.fqn: site for site in survey.sites()}
    blocks = []
    for block, width in narrowed_in(model):
        if all(fqn in dense for fqn in block.layers):
            blocks.append(replace(NarrowedBlock.of(block), width=width))
            layers |= {fqn: _describe_narrowed(dense[fqn], layers.get(fqn), blocks[-1]) for fqn in block.layers}
    plan = RankPlan(tuple(layers.values()), narrowed=tuple(blocks))
    return replace(plan, other_params=count(model.parameters()) - plan.params_after)


@torch.inference_mode(False)
@torch.no_grad()
def merge(model: nn.Module) -> nn.Module:
    """Turn every low-rank layer back into the dense layer it stands for, in place.

    Args:
        model: Any model.

    Returns:
        The root of the model. Hidden units that a block lost do not come back, of which there is a warning.

    Raises:
        ValueError: Another tool made something of a stage that its weight does not tell: LoRA, quantization, pruning,
            sharding, hooks. The model is then as it was.
    """
    survey = Survey(model)
    sites = survey.low_rank()
    require_plain(sites, "merged")
    if lost := [block.name for block, _ in narrowed_in(survey.model)]:
        warnings.warn(
            f"{len(lost)} feed-forward blocks, such as {lost[0]}, were narrowed and stay so: their units are gone",
            stacklevel=3,
        )
    for site in reversed(sites):  # innermost first: a stage of a low-rank layer may be low-rank itself
        surgery.replace(survey, site, dense_twin(site.module))
    return surgery.finish(survey, None)


def _describe_layer(site: Site) -> LayerPlan:
    layer, shape = site.module, site.module.shape
    return LayerPlan(site.fqn, layer.kind, shape.dense_params, shape, layer.rank)


def _describe_narrowed(site: Site, layer: LayerPlan | None, block: NarrowedBlock) -> LayerPlan:
    if layer is None:
        layer = LayerPlan(site.fqn, site.adapter.kind, 0, site.shape)
    return replace(layer, size=layer.shape.dense_params // block.width * block.units, narrowed=True)


def _empty_twins(survey: Survey, plan: RankPlan) -> list[tuple[Site, nn.Module]]:
    """The sites of the planned layers and a twin on the meta device for each, whose stages may be low-rank in turn."""
    twins = []
    for site, layer in resolve(survey, plan.outermost, loading=True):
        twin = Survey(target(site.module, vouched=True).twin(layer.rank, layer.shape))
        for inner_site, inner_twin in _empty_twins(twin, plan.inside(layer.fqn)):
            surgery.replace(twin, inner_site, inner_twin)
        twins.append((site, twin.model))
    return twins


def resolve(survey: Survey, plan: RankPlan, loading: bool = False) -> list[tuple[Site, LayerPlan]]:
    """The sites of the planned layers; ValueError lists everything about the plan that does not fit the model."""
    sites = {site.fqn: site for site in survey.sites(inside_low_rank=True)}
    jobs, problems = [], []
    blocks = {fqn: block for block in plan.narrower for fqn in block.layers}
    for layer in plan.low_rank:
        site = sites.get(layer.fqn)
        if site is None:
            problems.append(f"{layer.fqn!r}: the model has no such layer")
        elif loading and isinstance(site.module, LOW_RANK) and _same_structure(_describe_layer(site), layer):
            continue
        elif problem := _misfit(site, layer, loading, blocks.get(layer.fqn)):
            problems.append(f"{layer.fqn!r}: {problem}")
        else:
            jobs.append((site, layer))
    problems += block_jobs(survey, plan, loading)[1]
    if problems:
        raise ValueError(f"the plan does not fit the model:{indented(problems)}")
    return jobs


def indented(problems: list[str]) -> str:
    """The problems, a line each, for the end of a message; of many, the first ten and how many more there are."""
    more = [f"and {len(problems) - 10} more"] if len(problems) > 10 else []
    return "".join(f"\n  {line}" for line in [*problems[:10], *more])


def _misfit(site: Site, layer: LayerPlan, loading: bool, block: NarrowedBlock | None) -> str:
    """What keeps this layer from being replaced as planned, in a block that will be narrowed by then if there is one;
    '' if nothing does."""
    found = target(site.module, vouched=loading)
    if (found is None or not loading) and (reasons := site.why_not()):
        return "; ".join(reasons)
    if found.kind != layer.kind:
        return f"it is a {found.kind} here and a {layer.kind} in the plan"
    own = found.shape() if block is None else narrowed_shape(block, layer.fqn, found.shape())
    shape = with_groups(own, layer.rank, layer.shape.up_groups > 1, layer.shape.pivoted)
    if reason := found.why_not_grouped(shape):
        return reason
    if shape != layer.shape:
        return f"it is {shape} here and {layer.shape} in the plan"
    if shape.pivoted and (shape.up_groups != shape.down_groups or layer.rank >= shape.out_features):
        return "pivots need the same groups in both stages and a rank below the outputs"
    if layer.rank > shape.max_rank or layer.rank % shape.down_groups:
        return f"rank {layer.rank} is not a multiple of {shape.down_groups} in 1..{shape.max_rank}"
    return ""


def _same_structure(here: LayerPlan, planned: LayerPlan) -> bool:
    return (here.kind, here.shape, here.rank) == (planned.kind, planned.shape, planned.rank)
