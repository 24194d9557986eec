"""Blocks made narrower as planned: units eliminated, and the matrix behind them fitted again."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from ..calibration.metric_source import MetricSource, OfKept, columns_of
from ..linalg import FactorizationError, Kept, Refit, eliminate, refit
from ..model import surgery
from ..model.carriers import narrowed_carrier, narrowed_state_of, units_carried
from ..model.survey import Site, Survey
from ..model.unit_blocks import kept_of, narrowed_consumer, narrowed_producer, note_narrowed
from ..planning.narrowed import NarrowedBlock, narrowed_shape
from ..planning.plan import LayerPlan, RankPlan, narrowed_layer
from ..util.parallel import dealt, in_parallel, workers_for
from ..util.processes import current
from ..util.progress import track


@dataclass(frozen=True)
class BlockJob:
    """A block to narrow, the sites of its layers, the consumer last, and what carries its units between them."""

    block: NarrowedBlock
    sites: tuple[Site, ...]
    carriers: tuple[nn.Module, ...] = ()

    @property
    def consumer(self) -> Site:
        return self.sites[-1]

    @property
    def modules(self) -> dict[str, nn.Module]:
        """All that changes, by name."""
        layers = {site.fqn: site.module for site in self.sites}
        return layers | dict(zip(self.block.carriers, self.carriers, strict=True))


# Of one block: the units that stay, and the fit on them; or why there is none.
Fitted = tuple[Tensor, Refit] | str


def block_jobs(survey: Survey, plan: RankPlan, loading: bool = False) -> tuple[list[BlockJob], list[str]]:
    """The blocks that the plan narrows and the model has as they were; and what does not fit the model.

    loading: blocks that are as narrow as planned are left as they are.
    """
    sites, jobs, problems = {site.fqn: site for site in survey.sites(inside_low_rank=True)}, [], []
    modules = dict(survey.model.named_modules()) if any(block.carriers for block in plan.narrower) else {}
    for block in plan.narrower:
        found = tuple(sites[fqn] for fqn in block.layers if fqn in sites)
        missing = [fqn for fqn in block.layers if fqn not in sites]
        if missing := missing + [fqn for fqn in block.carriers if fqn not in modules]:
            problems.append(f"{block.name!r}: the model has no layer {', '.join(missing)}")
            continue
        carriers = tuple(modules[fqn] for fqn in block.carriers)
        narrow_already = loading and all(_is_narrow(block, plan[site.fqn], site) for site in found)
        units = block.width if narrow_already else block.units
        misfits = () if narrow_already else (_misfit(block, plan[s.fqn], s, loading) for s in found)
        carried = map(partial(_carrier_misfit, units), block.carriers, carriers)
        if problem := next(filter(None, (*misfits, *carried)), ""):
            problems.append(f"{block.name!r}: {problem}")
        elif not narrow_already:
            jobs.append(BlockJob(block, found, carriers))
    return jobs, problems


def _carrier_misfit(units: int, fqn: str, module: nn.Module) -> str:
    """What keeps a module from being what carries so many units; '' if nothing does."""
    found = units_carried(module)
    return "" if found == units else f"{fqn} has numbers for {found or 'no'} units here, and the plan for {units}"


def _is_narrow(block: NarrowedBlock, layer: LayerPlan, site: Site) -> bool:
    shape = site.module.shape if layer.rank is not None and site.shape is None else site.shape
    return shape is not None and narrowed_shape(block, site.fqn, shape) == replace(shape, pivoted=False)


def _misfit(block: NarrowedBlock, layer: LayerPlan, site: Site, loading: bool) -> str:
    """What keeps a layer from getting the sizes planned; '' if nothing does."""
    adapter = site.adapter
    if adapter is None or site.shape.groups > 1 or (not loading and site.why_not()):
        return f"{site.fqn} cannot change: {'; '.join(site.why_not()) or 'it is in groups'}"
    if adapter.kind != layer.kind:
        return f"{site.fqn} is a {adapter.kind} here and a {layer.kind} in the plan"
    shape, now = site.shape, replace(block, width=None)
    if narrowed_shape(now, site.fqn, shape) != shape:
        return f"{site.fqn} is {shape} here, and the plan is of {block.units} units"
    wanted = narrowed_shape(block, site.fqn, shape)
    if wanted != replace(layer.shape, pivoted=False):
        return f"{site.fqn} would be {wanted} here and is {layer.shape} in the plan"
    return ""


def narrow(
    jobs: list[BlockJob], calibration: MetricSource | None, plan: RankPlan, workers: int | None = None
) -> tuple[RankPlan, MetricSource | None]:
    """Narrow these blocks in place; the plan with the errors found, and what is known of their layers now. ValueError
    without data, which they are fitted on."""
    if jobs and calibration is None:
        raise ValueError(
            f"{jobs[0].block.name!r} is to be narrowed, which takes the data that the plan was made with: "
            "give calibrate="
        )
    kept: dict[str, Kept] = {}
    for job, fitted in track(_fitted(jobs, calibration, workers), "narrowing", total=len(jobs)):
        if isinstance(fitted, str):
            warnings.warn(f"{job.block.name} keeps its units: {fitted}", stacklevel=4)
            done = replace(job.block.with_width(None, fitted), able=False)
        else:
            units, found = fitted
            _put_in_place(job, units, found.matrix, found.shift)
            kept |= kept_of(job.block, units)
            done = replace(job.block, error=found.output_error)
        plan = _with_block(plan, done)
    return plan, OfKept(calibration, kept) if kept else calibration


def _fitted(
    jobs: list[BlockJob], calibration: MetricSource | None, workers: int | None
) -> Iterator[tuple[BlockJob, Fitted]]:
    def fit(job: BlockJob) -> Fitted:
        try:
            columns = columns_of(calibration, job.consumer)
            if columns is None:
                return "the calibration did not observe them one by one: make it with calibrate(..., narrow=True)"
            block, size = job.block, len(columns.data)
            units = block.columns_of(torch.arange(block.units), size)
            kept = eliminate(columns, block.width, units).kept(block.width)
            found = refit(columns, block.columns_left(kept, size))
        except FactorizationError as reason:
            return str(reason)
        # Of the processes one may be on another device than the others.
        shift = None if found.shift is None else found.shift.cpu()
        matrix = found.matrix.to("cpu", job.consumer.module.weight.dtype)
        return kept.cpu(), Refit(matrix, shift, found.output_error)

    workers = workers or workers_for(job.consumer.module.weight for job in jobs)
    if current().size > 1:  # all must keep the same units, to the last bit
        costs = [float(job.block.units) ** 3 for job in jobs]
        yield from zip(jobs, dealt(fit, jobs, costs, workers, "narrowing"), strict=True)
    else:
        yield from zip(jobs, in_parallel(fit, jobs, workers), strict=True)


def _put_in_place(job: BlockJob, kept: Tensor, matrix: Tensor, shift: Tensor | None) -> None:
    """These units, and what was fitted to them."""
    block, modules = job.block, job.modules
    for name in block.producers:
        surgery.reshape(modules[name], narrowed_producer(modules[name], block.outputs_of(name, kept)))
    for name in block.carriers:
        surgery.reshape(modules[name], narrowed_carrier(modules[name], kept))
    surgery.reshape(modules[block.consumer], narrowed_consumer(modules[block.consumer], matrix, shift))
    note_narrowed(block, block.width, modules)


def attach_narrow(jobs: list[BlockJob]) -> None:
    """Give the layers of these blocks their planned sizes, and no values: what loading a checkpoint fills."""
    for job in jobs:
        weight, shape = job.consumer.module.weight, narrowed_shape(job.block, job.block.consumer, job.consumer.shape)
        matrix = torch.empty(shape.out_features, shape.in_features, dtype=weight.dtype, device=weight.device)
        _put_in_place(job, torch.arange(job.block.width), matrix, None)


def narrowed_state(jobs: list[BlockJob]) -> dict[int, dict[str, Tensor]]:
    """What the parameters of these blocks' layers will be, on the meta device, by the ids of the layers."""
    found: dict[int, dict[str, Tensor]] = {}
    for job in jobs:
        for site in job.sites:
            shape, adapter = narrowed_shape(job.block, site.fqn, site.shape), site.adapter
            empty = {"dtype": site.module.weight.dtype, "device": "meta"}
            bias = None if site.module.bias is None else torch.empty(shape.out_features, **empty)
            new = adapter.resized(torch.empty(shape.out_features, shape.in_features, **empty), bias)
            found[id(site.module)] = {name: value for name, value in new.items() if isinstance(value, Tensor)}
        found |= {id(module): narrowed_state_of(module, job.block.width) for module in job.carriers}
    return found


def _with_block(plan: RankPlan, done: NarrowedBlock) -> RankPlan:
    """The plan with what became of one block."""

    def layer(x: LayerPlan) -> LayerPlan:
        if x.fqn not in done.modules:
            return x
        if done.width is None:
            return narrowed_layer(x, done, done.reason)
        return replace(x, error=done.error) if x.fqn == done.consumer else x

    blocks = tuple(done if x.consumer == done.consumer else x for x in plan.narrowed)
    return replace(plan, layers=tuple(map(layer, plan.layers)), narrowed=blocks)


def part_of(plan: RankPlan, names: set[str]) -> RankPlan:
    """These layers of a plan; of a block that is narrowed all, with the one that sees its units."""
    blocks = tuple(block for block in plan.narrower if block.consumer in names)
    narrower = {fqn for block in plan.narrower for fqn in block.modules}
    whole = {fqn for block in blocks for fqn in block.modules}
    layers = tuple(x for x in plan if x.fqn in whole or (x.fqn in names and x.fqn not in narrower))
    return replace(plan, layers=layers, narrowed=blocks)
