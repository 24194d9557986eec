"""Carrying out a plan, making room for one that is loaded, and going back to dense."""

from __future__ import annotations

import logging
import warnings
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..calibration.metric_source import MetricSource
from ..calibration.sameness import agree_on
from ..layers.packed import PackedLinear
from ..model import surgery
from ..model.dense import dense_twin, plain_twin, require_plain
from ..model.survey import Site, Survey
from ..model.unit_blocks import narrowed_in
from ..planning.plan import RankPlan
from ..util.processes import current
from ..util.progress import track
from .describe import is_ours
from .empty_twin import empty_twin, packed_linear
from .narrow import attach_narrow, block_jobs, narrow, narrowed_state
from .resolve import require_inputs, resolve
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
    require_inputs(jobs, calibration)
    agree_on(survey.model)
    current().agree("the plan", plan.to_dict())
    plan, calibration = narrow(block_jobs(survey, plan)[0], calibration, plan, workers)
    done = {layer.fqn: layer for layer in plan}
    jobs = [(site, done[layer.fqn]) for site, layer in jobs if done[layer.fqn].changes]  # a block may keep its units
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
    twins = _empty_twins(survey, plan)
    attach_narrow(block_jobs(survey, plan, loading=True)[0])
    for site, twin in twins:
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
    survey = Survey(model)
    states = {id(site.module): twin.state_dict() for site, twin in _empty_twins(survey, plan)}
    states = narrowed_state(block_jobs(survey, plan, loading=True)[0]) | states
    paths = {path: states[id(m)] for path, m in model.named_modules(remove_duplicate=False) if id(m) in states}
    expected = {name: value for name, value in model.state_dict().items() if name.rpartition(".")[0] not in paths}
    for path, state in paths.items():
        prefix = f"{path}." if path else ""
        expected |= {prefix + name: value for name, value in state.items()}
    return expected


@torch.inference_mode(False)
@torch.no_grad()
def merge(model: nn.Module) -> nn.Module:
    """Turn every low-rank layer back into the dense layer it stands for, in place, and weights on a grid into plain
    ones.

    Args:
        model: Any model.

    Returns:
        The root of the model. Units that a block lost do not come back, of which there is a warning.

    Raises:
        ValueError: Another tool made something of a stage that its weight does not tell: LoRA, quantization, pruning,
            sharding, hooks. The model is then as it was.
    """
    survey = Survey(model)
    sites = survey.low_rank()
    require_plain(sites, "merged")
    on_grid = [site for site in survey.sites() if is_ours(site)]
    if lost := [block.name for block, _ in narrowed_in(survey.model)]:
        warnings.warn(
            f"{len(lost)} blocks, such as {lost[0]}, were narrowed and stay so: their units are gone",
            stacklevel=3,
        )
    for site in reversed(sites):  # innermost first: a stage of a low-rank layer may be low-rank itself
        surgery.replace(survey, site, dense_twin(site.module))
    for site in on_grid:
        surgery.replace(survey, site, plain_twin(site.module))
    return surgery.finish(survey, None)


def _empty_twins(survey: Survey, plan: RankPlan) -> list[tuple[Site, nn.Module]]:
    """The sites of the planned layers and a twin on the meta device for each, whose stages may be low-rank in turn."""
    twins = []
    for site, layer in resolve(survey, plan.outermost, loading=True):
        if layer.rank is None:
            twins.append((site, packed_linear(site, layer)))
            continue
        twin = Survey(empty_twin(site, layer))
        for inner_site, inner_twin in _empty_twins(twin, plan.inside(layer.fqn)):
            surgery.replace(twin, inner_site, inner_twin)
        twins.append((site, twin.model))
    return twins
