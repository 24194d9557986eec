"""Factors for what the layers will see: inputs that come from the compressed layers before them.

The blocks of a model are replaced one after another. Before each, the data runs through the dense model and through
the one that is compressed so far, and the layers of the block are fitted to give, from what they see in the second, the
outputs that they have in the first (AA-SVD, 2026; PIFA, Zhao et al., 2025).
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from ..calibration.batches import Batch
from ..calibration.calibration import Calibration
from ..calibration.metric_source import MetricSource
from ..calibration.sharing import Group, observe_calls
from ..calibration.streams import Masking
from ..model.hooks import without_caches
from ..model.surgery import finish
from ..model.survey import Site, Survey
from ..planning.narrowed import NarrowedBlock
from ..planning.plan import LayerPlan, RankPlan
from ..util.processes import current
from ..util.progress import track
from .anchored_moments import AnchoredMetrics, observed
from .anchored_options import SHARE, Anchored
from .apply import carry_out
from .narrow import block_jobs, part_of
from .refine import noted, trainable_sites
from .resolve import resolve
from .side_by_side import SideBySide

# With fewer tokens than this for each input, what is fitted is their noise.
_TOKENS_PER_INPUT = 10


def apply_anchored(
    model: nn.Module, plan: RankPlan, batches: list[Batch], calibration: Calibration, how: Anchored | float = SHARE
) -> nn.Module:
    """Carry out a plan block by block, each fitted at the inputs that the compressed blocks before it give.

    Holds a copy of the model meanwhile, and what one block is called with in all of the data.

    Args:
        model: The model that the plan is of, changed in place.
        plan: What to do.
        batches: The data, from `shrank.batches`.
        calibration: What `calibrate` found of the model.
        how: The share of the dense model's outputs in what the layers are fitted to, in (0, 1], or all options.

    Returns:
        The root of the model. The plan that was carried out, with the errors found, is its `shrank_plan`.

    Raises:
        ValueError: The share is out of its range, there is only one batch to train on, or the plan does not fit the
            model, which is then as it was.
    """
    survey, how = Survey(model), how if isinstance(how, Anchored) else Anchored(float(how))
    return finish(survey, carry_out_anchored(survey, plan, batches, calibration, how))


def carry_out_anchored(
    survey: Survey, plan: RankPlan, batches: list[Batch], calibration: Calibration, how: Anchored
) -> RankPlan:
    """As `apply_anchored`; the plan with the errors found. `finish` must follow."""
    if how.steps and len(batches) < 2:
        raise ValueError(f"steps={how.steps}: {len(batches)} batch cannot be trained on and held out: give more")
    jobs = [site for site, _ in resolve(survey, plan)] + [job.consumer for job in block_jobs(survey, plan)[0]]
    wanted = {site.fqn for site in jobs} & set(calibration)
    sites = [site for site in survey.sites(inside_low_rank=True) if site.fqn in wanted]
    warn_of_few_tokens(plan, calibration, sites)
    current().agree("the options of anchored", how)
    run = _BlockByBlock(survey, plan, calibration, batches, how)
    with torch.inference_mode(False), torch.no_grad(), without_caches(run.both.dense, survey.model):
        return run.all_of_it(sites)


class _BlockByBlock:
    """A plan on its way through a model."""

    def __init__(
        self, survey: Survey, plan: RankPlan, calibration: Calibration, batches: list[Batch], how: Anchored
    ) -> None:
        self.survey, self.plan, self.calibration, self.how = survey, plan, calibration, how
        self.both = SideBySide(survey, batches)
        self.done: dict[str, LayerPlan] = {}
        self.narrowed: dict[str, NarrowedBlock] = {}  # by the layer behind its units

    def all_of_it(self, sites: list[Site]) -> RankPlan:
        """sites: of the layers to be anchored."""
        both = self.both
        masking = Masking(both.dense, {site.fqn: both.dense.get_submodule(site.fqn) for site in sites})
        there = [replace(site, module=masking.modules[site.fqn]) for site in sites]
        seen = observe_calls(both.dense, there, both.batches, masking, around=both.links.observed)
        by_name = {site.fqn: site for site in sites}
        stages = _stages(both.blocks, [[by_name[name] for name in names] for names in seen.shared])
        anchored = {site.fqn for stage in stages for sharing in stage for site in sharing}
        self._carry_out({layer.fqn for layer in self.plan} - anchored, self.calibration)
        reasons = {}
        for stage in track(stages, "compressing block by block"):
            block, tied = self._fit(stage, masking, seen.calls)
            if self.how.steps and (reason := self._refine(block, tied)):
                reasons[block] = reason
            both.changed(None if tied else block)
        if reasons:
            told = "; ".join(f"{block}: {reason}" for block, reason in reasons.items())
            warnings.warn(f"fitted, but not trained further: {told}", stacklevel=5)
        return replace(
            self.plan,
            layers=tuple(self.done[layer.fqn] for layer in self.plan),
            narrowed=tuple(self.narrowed.get(block.consumer, block) for block in self.plan.narrowed),
        )

    def _fit(self, stage: list[list[Site]], masking: Masking, calls: dict[str, list[int]]) -> tuple[str, str]:
        """Fit the layers of a stage; the block, and why it cannot be run by itself, "" if it can."""
        both, block = self.both, self.both.blocks[stage[0][0].fqn]
        groups = [group for sharing in stage for group in groups_in(sharing, self.calibration)]
        names = {site.fqn for group in groups for site in group.sites}
        if strangers := [name for name in names if both.blocks[name] != block]:
            reason = f"{strangers[0]} is fitted together with it"
        else:
            reason = both.why_not_alone(block)
        runner = Batch.call if reason else partial(both.run, block)
        found = observed(self.survey.model, masking, groups, both.batches, calls, self.how.share, runner)
        self._carry_out(names, AnchoredMetrics(self.calibration, found))
        return block, reason

    def _refine(self, block: str, reason: str) -> str:
        """Train a block, unless there is a reason not to; why not, "" if it was."""
        names = {name for name, own in self.both.blocks.items() if own == block and name in self.done}
        sites = trainable_sites(self.survey, self.both.dense, block, names)
        if not sites:
            return ""
        found = reason or self.both.refined(block, sites, self.how)
        self.done |= {site.fqn: noted(self.done[site.fqn], block, found) for site in sites}
        return found if isinstance(found, str) else ""

    def _carry_out(self, names: set[str], calibration: MetricSource) -> None:
        done = carry_out(self.survey, part_of(self.plan, names), calibration)
        self.done |= {layer.fqn: layer for layer in done}
        self.narrowed |= {block.consumer: block for block in done.narrowed}


def carried_out(
    survey: Survey, plan: RankPlan, names: set[str], calibration: MetricSource | None, workers: int | None = None
) -> dict[str, LayerPlan]:
    """What became of these layers of the plan, which were replaced, so many at a time."""
    return {layer.fqn: layer for layer in carry_out(survey, part_of(plan, names), calibration, workers)}


def _stages(blocks: dict[str, str], shared: list[list[Site]]) -> list[list[list[Site]]]:
    """The layers in the order of execution, those of one block together: also where layers of later blocks share an
    input, as those of a decoder that look at the encoder. blocks: of all layers."""
    last = {blocks[sharing[0].fqn]: number for number, sharing in enumerate(shared)}
    stages: list[tuple[str, list[list[Site]]]] = []
    later: dict[str, list[list[Site]]] = {}
    for number, sharing in enumerate(shared):
        block, parts = blocks[sharing[0].fqn], {}
        if not stages or stages[-1][0] != block:
            stages.append((block, later.pop(block, [])))
        for site in sharing:
            own = blocks[site.fqn]
            parts.setdefault(own if last.get(own, 0) > number else block, []).append(site)
        stages[-1][1].append(parts.pop(block))
        for own, part in parts.items():
            later.setdefault(own, []).append(part)
    return [stage for _, stage in stages]


def groups_in(sharing: list[Site], calibration: Calibration) -> list[Group]:
    """Layers of one input, observed on the side on which the calibration observed them."""
    by_inputs = tuple(site for site in sharing if calibration.of_inputs(site.fqn))
    return [Group(by_inputs, True)] * bool(by_inputs) + [Group((s,), False) for s in sharing if s not in by_inputs]


def warn_of_few_tokens(plan: RankPlan, calibration: Calibration, sites: list[Site]) -> None:
    few = [
        f"{site.fqn} ({calibration.tokens(site.fqn)} for {inputs} inputs)"
        for site in sites
        if calibration.tokens(site.fqn) < _TOKENS_PER_INPUT * (inputs := plan[site.fqn].shape.in_features)
    ]
    if few:
        warnings.warn(
            f"{len(few)} layers saw fewer than {_TOKENS_PER_INPUT} tokens for each of their inputs, such as "
            f"{few[0]}: anchored factors may fit their noise",
            stacklevel=5,
        )
