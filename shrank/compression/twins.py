"""The low-rank twins of planned layers: factorised one after another, in threads, or dealt out to processes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from ..calibration.metric_source import MetricSource, metric_of
from ..layers.corrected import CorrectedLinear
from ..layers.quantized import quantized_weight
from ..linalg import (
    AS_IT_IS,
    FactorizationError,
    Factors,
    Metric,
    PivotedFactors,
    Quantized,
    factorize,
    factorize_weighted,
    on_grids,
    pivoted,
)
from ..model.survey import Site
from ..planning.plan import LayerPlan
from ..util.parallel import in_parallel, workers_for
from ..util.processes import current

Job = tuple[Site, LayerPlan]
# What a twin is made of: down, up, with pivots their order, and what a bias must gain, if anything. Of a dense weight
# on a grid, the weight; all that is on a grid has its scales beside it.
Parts = dict[str, Tensor]
_HELD, _SCALES = ("weight", "down", "up"), ".scales"


def twins(
    jobs: list[Job], calibration: MetricSource | None, workers: int | None = None
) -> Iterator[tuple[Site, LayerPlan, nn.Module | None]]:
    """What shall stand in for each layer, in order, with the plan as it came out; None where it cannot be factorised.

    Takes the layers off `jobs`, so that nobody holds one that was replaced.
    """
    if current().size > 1:
        yield from _dealt(jobs, calibration)
        return

    def made(job: Job) -> tuple[Site, LayerPlan, nn.Module | None]:
        layer, parts = _factorised(calibration, job)
        return job[0], layer, _twin(job[0], layer, parts)

    workers = workers or workers_for(site.module.weight for site, _ in jobs)
    jobs.reverse()
    yield from in_parallel(made, iter(lambda: jobs.pop() if jobs else None, None), workers)


def _dealt(jobs: list[Job], calibration: MetricSource | None) -> Iterator[tuple[Site, LayerPlan, nn.Module | None]]:
    """Each layer factorised by one of the processes, which has all of its share before any layer is replaced."""
    here = current()
    owners = here.owners([layer.shape.work for _, layer in jobs])
    own = [job for job, owner in zip(jobs, owners, strict=True) if owner == here.rank]
    workers = workers_for(site.module.weight for site, _ in own)
    done = [(layer.fqn, layer, parts) for layer, parts in in_parallel(partial(_factorised, calibration), own, workers)]
    forms = {fqn: (layer, {n: (tuple(t.shape), t.dtype) for n, t in parts.items()}) for fqn, layer, parts in done}
    all_forms = here.exchange(forms)
    held = {fqn: parts for fqn, _, parts in done}
    own.clear()
    done.clear()
    jobs.reverse()
    for owner in owners:
        site, planned = jobs.pop()
        (layer, form), mine = all_forms[owner][planned.fqn], held.pop(planned.fqn, None)
        device = site.module.weight.device
        parts = {
            name: here.sent(owner, torch.empty(shape, dtype=dtype, device=device) if mine is None else mine[name])
            for name, (shape, dtype) in form.items()
        }
        yield site, layer, _twin(site, layer, parts)


@torch.no_grad()
def _factorised(calibration: MetricSource | None, job: Job) -> tuple[LayerPlan, Parts]:
    """The plan with the error found and the parts of the twin; without any, with the reason."""
    site, layer = job
    matrices = site.adapter.matrices(layer.shape)
    if layer.storage.grid is not None:
        return _on_grid(metric_of(calibration, site, matrices), matrices, layer)
    rank = layer.rank // layer.shape.down_groups
    dtype, pivots = matrices.dtype, layer.shape.pivoted
    try:
        metric = metric_of(calibration, site, matrices)
        # Factors on the way to pivots are not to be rounded twice.
        matrices = matrices.float() if pivots and dtype.itemsize == 2 else matrices
        factors = factorize(matrices, rank) if metric is None else factorize_weighted(matrices, metric, rank)
        stored = pivoted(factors, dtype) if pivots else factors
    except FactorizationError as error:
        return _failed(layer, error), {}
    parts = {"down": stored.down, "up": stored.up, "order": getattr(stored, "order", None), "shift": factors.shift}
    error = math.hypot(factors.relative_error, getattr(stored, "rounding", 0.0))
    return replace(layer, error=error), {n: t.contiguous() for n, t in parts.items() if t is not None}


def _on_grid(metric: Metric | None, matrices: Tensor, layer: LayerPlan) -> tuple[LayerPlan, Parts]:
    """As `_factorised`, of a layer whose weights get few bits."""
    try:
        found = on_grids(matrices, metric, layer.rank, layer.storage)
    except FactorizationError as error:
        return _failed(layer, error), {}
    parts = {}
    for name in _HELD:
        if (each := getattr(found, name, None)) is None:
            continue
        parts |= {name: each.values, name + _SCALES: each.scales} if isinstance(each, Quantized) else {name: each}
    if found.loss.shift is not None:
        parts["shift"] = found.loss.shift
    return replace(layer, error=found.loss.relative_error), parts


def _failed(layer: LayerPlan, error: FactorizationError) -> LayerPlan:
    """Of a layer that stays as it is."""
    return replace(layer, rank=None, error=None, reason=str(error), storage=AS_IT_IS)


@torch.no_grad()
def _twin(site: Site, layer: LayerPlan, parts: Parts) -> nn.Module | None:
    if not parts:
        return None
    bias, order = site.module.bias, parts.get("order")
    if "shift" in parts:
        bias = nn.Parameter((bias + parts["shift"].flatten()).to(bias.dtype), bias.requires_grad)
    if layer.storage.grid is not None:
        return _of_few_bits(site, layer, parts, bias)
    twin, down, up = site.adapter.twin(layer.rank, layer.shape), parts["down"], parts["up"]
    twin.take(Factors(down, up, 0.0, 1.0) if order is None else PivotedFactors(down, up, order, 1.0), bias)
    return twin


def _of_few_bits(site: Site, layer: LayerPlan, parts: Parts, bias: nn.Parameter | None) -> nn.Module:
    """The dense layer again, corrected or not, or its twin, with weights of torchao."""
    storage, weights = layer.storage, {}
    for name, grid in (("weight", storage.grid), ("down", storage.of_factors), ("up", storage.of_factors)):
        if name + _SCALES in parts:
            held = Quantized(parts[name], parts[name + _SCALES], grid)
            weights[name] = quantized_weight(held, storage.activations)
        elif name in parts:
            weights[name] = nn.Parameter(parts[name])
    if layer.rank is not None and not storage.corrected:
        twin = site.adapter.twin(layer.rank, layer.shape)
        twin.set_factors(weights["down"], weights["up"], bias)
        return twin
    made = site.adapter.like()
    made.weight, made.bias = weights["weight"], bias
    if layer.rank is None:
        return made
    twin = CorrectedLinear(made, layer.rank, device="meta")
    twin.set_factors(weights["down"], weights["up"], None)
    return twin
