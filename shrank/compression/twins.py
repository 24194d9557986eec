"""The low-rank twins of planned layers: factorised one after another, in threads, or dealt out to processes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from ..calibration.metric_source import MetricSource, metric_of
from ..linalg import FactorizationError, Factors, PivotedFactors, factorize, factorize_weighted, pivoted
from ..model.survey import Site
from ..planning.plan import LayerPlan
from ..util.parallel import in_parallel, workers_for
from ..util.processes import current

Job = tuple[Site, LayerPlan]
# What a twin is made of: down, up, with pivots their order, and what a bias must gain, if anything.
Parts = dict[str, Tensor]


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
    matrices, rank = site.adapter.matrices(layer.shape), layer.rank // layer.shape.down_groups
    dtype, pivots = matrices.dtype, layer.shape.pivoted
    try:
        metric = metric_of(calibration, site, matrices)
        # Factors on the way to pivots are not to be rounded twice.
        matrices = matrices.float() if pivots and dtype.itemsize == 2 else matrices
        factors = factorize(matrices, rank) if metric is None else factorize_weighted(matrices, metric, rank)
        stored = pivoted(factors, dtype) if pivots else factors
    except FactorizationError as error:
        return replace(layer, rank=None, error=None, reason=str(error)), {}
    parts = {"down": stored.down, "up": stored.up, "order": getattr(stored, "order", None), "shift": factors.shift}
    error = math.hypot(factors.relative_error, getattr(stored, "rounding", 0.0))
    return replace(layer, error=error), {n: t.contiguous() for n, t in parts.items() if t is not None}


@torch.no_grad()
def _twin(site: Site, layer: LayerPlan, parts: Parts) -> nn.Module | None:
    if not parts:
        return None
    twin, bias, order = site.adapter.twin(layer.rank, layer.shape), site.module.bias, parts.get("order")
    if "shift" in parts:
        bias = nn.Parameter((bias + parts["shift"].flatten()).to(bias.dtype), bias.requires_grad)
    down, up = parts["down"], parts["up"]
    twin.take(Factors(down, up, 0.0, 1.0) if order is None else PivotedFactors(down, up, order, 1.0), bias)
    return twin
