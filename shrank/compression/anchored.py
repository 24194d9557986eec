"""Factors for what the layers will see: inputs that come from the compressed layers before them.

The blocks of a model are replaced one after another. Before each, the data runs through the dense model and through
the one that is compressed so far, and the layers of the block are fitted to give, from what they see in the second, the
outputs that they have in the first (AA-SVD, 2026; PIFA, Zhao et al., 2025).
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from ..calibration.batches import Batch, bound
from ..calibration.calibration import Calibration
from ..calibration.metric_source import MetricSource
from ..calibration.observer import Observed, add_up
from ..calibration.sharing import Group, observe_calls
from ..calibration.streams import Masking
from ..linalg import Columns, Metric, Moments
from ..model.blocks import blocks_of
from ..model.hooks import hooked, in_eval_mode, input_of
from ..model.surgery import finish
from ..model.survey import Site, Survey
from ..planning.plan import LayerPlan, RankPlan
from ..util.processes import current
from ..util.progress import track
from .apply import carry_out
from .narrow import block_jobs, part_of
from .resolve import resolve

# all-MiniLM-L6-v2 at keep 0.6 with 3524 tokens: a cosine of 0.926 without; of 0.932, 0.924 and 0.837 with shares of
# 0.25, 0.5 and 1. With 15215 tokens: 0.940 without; 0.944, 0.946, 0.942 and 0.922 with 0.1, 0.25, 0.5 and 0.75.
SHARE = 0.25
# With fewer tokens than this for each input, what is fitted is their noise.
_TOKENS_PER_INPUT = 10


def apply_anchored(
    model: nn.Module, plan: RankPlan, batches: list[Batch], calibration: Calibration, share: float = SHARE
) -> nn.Module:
    """Carry out a plan block by block, each fitted at the inputs that the compressed blocks before it give.

    Holds a copy of the model meanwhile.

    Args:
        model: The model that the plan is of, changed in place.
        plan: What to do.
        batches: The data, from `shrank.batches`; it runs twice for each block.
        calibration: What `calibrate` found of the model.
        share: Of the dense model's outputs in what the layers are fitted to, in (0, 1]; the rest are those of the dense
            layers at the new inputs.

    Returns:
        The root of the model. The plan that was carried out, with the errors found, is its `shrank_plan`.

    Raises:
        ValueError: The share is out of its range, or the plan does not fit the model, which is then as it was.
    """
    survey = Survey(model)
    return finish(survey, carry_out_anchored(survey, plan, batches, calibration, share))


def carry_out_anchored(
    survey: Survey, plan: RankPlan, batches: list[Batch], calibration: Calibration, share: float
) -> RankPlan:
    """As `apply_anchored`; the plan with the errors found. `finish` must follow."""
    require_share(share)
    jobs = [site for site, _ in resolve(survey, plan)] + [job.consumer for job in block_jobs(survey, plan)[0]]
    wanted = {site.fqn for site in jobs} & set(calibration)
    sites = [site for site in survey.sites(inside_low_rank=True) if site.fqn in wanted]
    warn_of_few_tokens(plan, calibration, sites)
    dense = copy.deepcopy(survey.model)
    batches = bound(batches, dense)
    masking = Masking(dense, {site.fqn: dense.get_submodule(site.fqn) for site in sites})
    with torch.no_grad():
        there = [replace(site, module=masking.modules[site.fqn]) for site in sites]
        seen = observe_calls(dense, there, batches, masking)
    by_name = {site.fqn: site for site in sites}
    stages = _stages(survey.model, [[by_name[name] for name in names] for names in seen.shared])
    anchored = {site.fqn for stage in stages for sharing in stage for site in sharing}
    parts = [carry_out(survey, part_of(plan, {layer.fqn for layer in plan} - anchored), calibration)]
    for stage in track(stages, "compressing block by block"):
        groups = [group for sharing in stage for group in groups_in(sharing, calibration)]
        found = anchored_at(calibration, survey.model, masking, groups, batches, seen.calls, share)
        names = {site.fqn for group in groups for site in group.sites}
        parts.append(carry_out(survey, part_of(plan, names), found))
    done = {layer.fqn: layer for part in parts for layer in part}
    blocks = {block.consumer: block for part in parts for block in part.narrowed}
    return replace(
        plan,
        layers=tuple(done[layer.fqn] for layer in plan),
        narrowed=tuple(blocks.get(block.consumer, block) for block in plan.narrowed),
    )


def require_share(share: float) -> None:
    if not 0 < share <= 1:
        raise ValueError(f"anchored must lie in (0, 1], got {share}")


class _Anchored(MetricSource):
    """A calibration, of whose layers those of one block see something else now."""

    def __init__(self, calibration: Calibration, moments: dict[str, Moments]) -> None:
        self._calibration, self._moments = calibration, moments

    def metric(self, fqn: str, matrices: Tensor, centred: bool) -> Metric | None:
        return self._calibration.metric(fqn, matrices, centred, self._moments.get(fqn))

    def columns(self, fqn: str, matrices: Tensor, centred: bool) -> Columns | None:
        return self._calibration.columns(fqn, matrices, centred, self._moments.get(fqn))


def anchored_at(
    calibration: Calibration,
    model: nn.Module,
    masking: Masking,
    groups: list[Group],
    batches: list[Batch],
    calls: dict[str, list[int]],
    share: float,
) -> MetricSource:
    """The norms of a calibration, of the layers in these groups at what they see in a model that is compressed before
    them; masking: of the dense model, calls: of every layer, by batch."""
    return _Anchored(calibration, _observed(model, masking, groups, batches, calls, share))


class _Pair:
    """Layers of one input in the model that is compressed so far, where they are still dense, beside what they see in
    the dense model."""

    def __init__(self, group: Group, share: float) -> None:
        self.here = Observed(group.sites[0], None, group.of_inputs, gradients=False)
        self.names, self.share = [site.fqn for site in group.sites], share
        self.expected: list[Tensor] = []  # what they see in the dense model, call by call of one batch
        self.alike, self.anchor, self.sum = True, self.here.moment(group.of_inputs), None

    def note(self, masking: Masking, module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
        mask = masking.call(self.here.site.fqn)
        self.expected.append(self.here.rows_of(input_of(args, kwargs), output, mask))

    def see(self, masking: Masking, module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
        x, mask = input_of(args, kwargs), masking.call(self.here.site.fqn)
        rows = self.here.rows_of(x, output, mask)
        wanted = self.expected.pop(0) if self.expected else None
        if wanted is None or wanted.shape != rows.shape:
            self.alike = False  # as where a router sends it other tokens than in the dense model
            return
        if not rows.shape[1]:
            return
        wanted = torch.lerp(rows, wanted, self.share)
        self.here.observe(x, output, mask)
        self.anchor.add(rows, wanted)
        total = wanted.sum(1).double()
        self.sum = total if self.sum is None else self.sum + total

    def add_up(self) -> None:
        """As of its moments, which were added up already."""
        if self.anchor.rows:
            none = self.anchor.take_mean().sum(-1).double().zero_()
            self.sum = current().summed(none if self.sum is None else self.sum)

    def moments(self) -> Moments:
        return replace(self.here.moments(0), anchor=self.anchor.take_mean(), anchor_mean=self.sum / self.anchor.rows)


def _add_up(pairs: list[_Pair]) -> None:
    """Make what the `current` processes saw, each of a share of the data, one."""
    here = current()
    for pair, *alike in zip(pairs, *here.exchange([pair.alike for pair in pairs]), strict=True):
        pair.alike = all(alike)
    alike = [pair for pair in pairs if pair.alike]
    add_up((pair.here for pair in alike), (pair.anchor for pair in alike))
    for pair in alike if here.size > 1 else ():
        pair.add_up()


class _Enough(Exception):
    """Ends a run in which nothing is left to see."""


@torch.no_grad()
def _observed(
    model: nn.Module,
    masking: Masking,
    groups: list[Group],
    batches: list[Batch],
    calls: dict[str, list[int]],
    share: float,
) -> dict[str, Moments]:
    """The moments of the layers of a stage, by name; not of those whose calls in the two models do not correspond.

    masking: of the dense model. calls: of every layer, by batch.
    """
    pairs, here = [_Pair(group, share) for group in groups], current()
    # Where the data decides how often a layer runs, it may run more often behind compressed layers: look to the end.
    steady = len(batches) > 1 and all(len(set(calls[pair.here.site.fqn])) == 1 for pair in pairs)
    with in_eval_mode(model, masking.model):
        for number, batch in here.share(enumerate(batches)):
            if enough := sum(calls[pair.here.site.fqn][number] for pair in pairs):
                for where, look, end in (
                    (masking.model, _Pair.note, enough),
                    (model, _Pair.see, enough if steady else None),
                ):
                    masking.begin(batch)
                    _run(where, batch, {p.here.site.fqn: partial(look, p, masking) for p in pairs}, end)
                for pair in pairs:
                    pair.alike &= not pair.expected
                    pair.expected.clear()
    _add_up(pairs)
    if unlike := [name for pair in pairs for name in pair.names if not (pair.alike and pair.anchor.rows)]:
        warnings.warn(f"not anchored, as the dense model calls them otherwise: {', '.join(unlike)}", stacklevel=5)
    return {name: pair.moments() for pair in pairs for name in pair.names if name not in unlike}


def _run(model: nn.Module, batch: Batch, hooks: dict[str, Callable], enough: int | None) -> None:
    """Run a model until these hooks, by the names of layers, were called `enough` times, None: to its end."""
    calls = 0

    def counted(hook: Callable, *seen: object) -> None:
        nonlocal calls
        hook(*seen)
        calls += 1
        if calls == enough:
            raise _Enough

    with suppress(_Enough), hooked((model.get_submodule(fqn), partial(counted, h)) for fqn, h in hooks.items()):
        batch.call(model)


def carried_out(
    survey: Survey, plan: RankPlan, names: set[str], calibration: MetricSource | None, workers: int | None = None
) -> dict[str, LayerPlan]:
    """What became of these layers of the plan, which were replaced, so many at a time."""
    return {layer.fqn: layer for layer in carry_out(survey, part_of(plan, names), calibration, workers)}


def _stages(model: nn.Module, shared: list[list[Site]]) -> list[list[list[Site]]]:
    """The layers in the order of execution, those of one block together: also where layers of later blocks share an
    input, as those of a decoder that look at the encoder."""
    blocks = blocks_of(model)
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
