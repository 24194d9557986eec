"""Which layers of a model a plan is of, and whether it fits them."""

from __future__ import annotations

from ..calibration.calibration import Calibration
from ..calibration.metric_source import MetricSource
from ..layers.quantized import torchao_tensors
from ..linalg import AS_IT_IS
from ..model.adapters import LOW_RANK, target, with_groups
from ..model.on_grid import why_not_on_grid
from ..model.survey import Site, Survey
from ..planning.narrowed import NarrowedBlock, narrowed_shape
from ..planning.plan import LayerPlan, RankPlan
from ..util.lines import indented
from .describe import describe_layer
from .narrow import block_jobs


def resolve(survey: Survey, plan: RankPlan, loading: bool = False) -> list[tuple[Site, LayerPlan]]:
    """The sites of the planned layers; ValueError lists everything about the plan that does not fit the model."""
    sites = {site.fqn: site for site in survey.sites(inside_low_rank=True)}
    jobs, problems = [], []
    if has_grids(plan):
        torchao_tensors()
    blocks = {fqn: block for block in plan.narrower for fqn in block.modules}
    for layer in plan.changed:
        site = sites.get(layer.fqn)
        if site is None:
            problems.append(f"{layer.fqn!r}: the model has no such layer")
        elif loading and isinstance(site.module, LOW_RANK) and _same_structure(describe_layer(site), layer):
            continue
        elif problem := _misfit(site, layer, loading, blocks.get(layer.fqn)) or _why_not_stored(site, layer, plan):
            problems.append(f"{layer.fqn!r}: {problem}")
        else:
            jobs.append((site, layer))
    problems += block_jobs(survey, plan, loading)[1]
    if problems:
        raise ValueError(f"the plan does not fit the model:{indented(problems)}")
    return jobs


def has_grids(plan: RankPlan) -> bool:
    return any(layer.storage.grid for layer in plan)


def require_inputs(jobs: list[tuple[Site, LayerPlan]], calibration: MetricSource | None) -> None:
    """ValueError if weights are to be rounded by a calibration that did not observe what they multiply."""
    if not isinstance(calibration, Calibration):
        return
    on_grid = [layer.fqn for _, layer in jobs if layer.storage.grid and layer.fqn in calibration]
    if lacking := [fqn for fqn in on_grid if not calibration.knows_inputs(fqn)]:
        raise ValueError(
            f"the calibration observed outputs, and weights are rounded by their inputs: calibrate(..., inputs=True); "
            f"{', '.join(lacking[:5])}"
        )


def _misfit(site: Site, layer: LayerPlan, loading: bool, block: NarrowedBlock | None) -> str:
    """What keeps this layer from being replaced as planned, in a block that will be narrowed by then if there is one;
    '' if nothing does."""
    found = target(site.module, vouched=loading)
    if (found is None or not loading) and (reasons := site.why_not()):
        return "; ".join(reasons)
    if found.kind != layer.kind:
        return f"it is a {found.kind} here and a {layer.kind} in the plan"
    own = found.shape() if block is None else narrowed_shape(block, layer.fqn, found.shape())
    if layer.rank is None:
        return "" if own == layer.shape else f"it is {own} here and {layer.shape} in the plan"
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
