"""The front door: calibrate, plan, apply."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from torch import nn

from ..calibration.batches import as_batches
from ..calibration.calibration import Calibration, calibrated
from ..calibration.request import Calibrate
from ..linalg import BudgetTooSmall
from ..model.surgery import finish
from ..model.survey import Survey
from ..planning.budget import Budget, SmallestGoodEnough
from ..planning.make_plan import eligible_in, plan_of
from ..planning.options import PlanOptions, members, options_of
from ..planning.plan import RankPlan
from ..planning.rank import Rank
from ..planning.spectra import Spectra
from ..util.processes import current
from ..util.progress import track
from .anchored import carry_out_anchored
from .anchored_options import Anchored, as_anchored
from .apply import carry_out
from .probe import probed, require_probe
from .resolve import has_grids

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ..planning.keywords import FittingKeywords

_PARAMETERS = ("module", "rank", "deepcopy", "calibrate", "anchored", "stream")
_TRIALS = 7  # halvings of the share kept: to within 1 / 128


@runtime_checkable
class Streamed(Protocol):
    """A model that is not in memory, and is compressed from files into files."""

    def compressed(
        self,
        folder: str | os.PathLike,
        rank: Rank | Budget | RankPlan,
        options: PlanOptions,
        calibrate: Calibrate | None,
        anchored: Anchored | None,
    ) -> nn.Module:
        """The model, compressed into a folder."""


def auto_fact(
    module: nn.Module | Streamed,
    rank: Rank | Budget | RankPlan,
    groups_out: bool = False,
    skip_high_groups: bool = True,
    submodules: Iterable[nn.Module] | None = None,
    deepcopy: bool = False,
    fact_led_unit: bool = False,
    *,
    calibrate: Iterable[object] | Calibrate | Calibration | None = None,
    anchored: Anchored | float | bool = False,
    stream: str | os.PathLike | None = None,
    **options: Unpack[FittingKeywords],
) -> nn.Module:
    """Replace the linear and convolution layers of a model by low-rank twins initialised from their weights.

    Args:
        module: The model, changed in place unless `deepcopy`; or with `stream` a `shrank.Checkpoint`.
        rank: An int, for every layer; a float in (0, 1), the fraction of each layer's break-even rank, or with data the
            share of all weights that a Budget keeps; a rule such as Energy(0.9); a dict of glob pattern -> rule; a
            function (fqn, module) -> rank | None; a Budget for all layers together; or a RankPlan.
        groups_out: Also group the second stage of a grouped convolution.
        skip_high_groups: Leave a grouped convolution dense whose groups exceed the rank; False gives its twin
            min(rank, groups) groups.
        submodules: Modules at or below which layers may change; None for all of the model.
        deepcopy: Leave `module` untouched and change a copy.
        fact_led_unit: Open layers that are low-rank already, and factorise their stages again. Deprecated: `merge` and
            a smaller rank give less error at the same size.
        calibrate: Data, as `shrank.batches` makes it or takes it without further arguments; Calibrate(data, ...), which
            says how; or a Calibration. The twins then keep what the layers do to that data.
        anchored: Compress block by block. Each block is fitted at the inputs that the compressed blocks before it give,
            to a mixture of the outputs there and those of the dense model. A number in (0, 1] is the share of the
            latter; True stands for a quarter. Anchored(steps=...) trains each block after that. Needs the data itself.
        stream: A folder, to compress a `shrank.Checkpoint` into: block by block, from its files into others. Repeated
            after whatever stopped it, the same call goes on where it was.
        **options: The other fields of PlanOptions.

    Returns:
        The model, or the twin if `module` itself is a layer. What was done, and why not more, is in its `shrank_plan`.

    Raises:
        TypeError: An option does not exist, does not go with the others, or `rank` is none of the above.
        ValueError: A rule, an option, the data or the plan does not fit; the model is then as it was.
    """
    fitting = options_of(
        "auto_fact",
        {
            "groups_out": groups_out,
            "skip_high_groups": skip_high_groups,
            "submodules": None if submodules is None else list(submodules),
            "fact_led_unit": fact_led_unit,
            **options,
        },
        _PARAMETERS,
    )
    if isinstance(rank, RankPlan) and fitting != PlanOptions():
        raise TypeError("a RankPlan already says what to do: give it without further options")
    if stream is not None or _is_streamed(module):
        return _streamed(module, stream, rank, replace(fitting, errors=False), _data(calibrate, anchored))
    if deepcopy:
        copied = copy.deepcopy(module)
        fitting = replace(fitting, submodules=_counterparts(module, fitting.submodules, copied))
        module = copied
    data, survey = _data(calibrate, anchored), Survey(module)
    if fitting.grid or _rounds(rank):
        data = data.of_inputs()
    if isinstance(rank, RankPlan):
        needed = {layer.fqn for layer in rank.changed} | {block.consumer for block in rank.narrower}
        plan, (data, survey) = rank, data.seen_by(survey, sorted(needed), bool(rank.narrower))
    else:
        # Errors come with the factors; computing the spectra first would decompose every layer twice.
        fitting = replace(fitting, errors=bool(options.get("errors", False)))
        eligible = [] if data.how is None else eligible_in(survey, fitting)
        data, survey = data.seen_by(survey, eligible, bool(fitting.narrow))
        data = data.probed(survey)
        search = isinstance(rank, Budget) and isinstance(rank.goal, SmallestGoodEnough)
        plan = (_smallest_good_enough if search else _plan)(survey, rank, data, fitting)
    if plan.does_nothing:
        warnings.warn(f"no layer was replaced: {plan.why_dense()}", stacklevel=2)
    return data.applied(survey, plan)


def _rounds(rank: Rank | Budget | RankPlan) -> bool:
    """Whether it may give layers weights of few bits."""
    return has_grids(rank) if isinstance(rank, RankPlan) else isinstance(rank, Budget) and rank.rounds


def _is_streamed(module: nn.Module | Streamed) -> bool:
    return isinstance(module, Streamed) and not isinstance(module, nn.Module)


def _streamed(
    module: nn.Module | Streamed,
    folder: str | os.PathLike | None,
    rank: Rank | Budget | RankPlan,
    options: PlanOptions,
    data: _Data,
) -> nn.Module:
    """What `auto_fact` does of a model that is not in memory."""
    if not _is_streamed(module):
        raise TypeError(f"stream: give shrank.Checkpoint(folder), got a {type(module).__name__}, which is in memory")
    if folder is None:
        raise TypeError(f"a {type(module).__name__} is not in memory: say where to write with stream=folder")
    if current().size > 1:
        raise ValueError(f"stream: one process reads and writes the files, and these are {current().size}")
    if options.grid or _rounds(rank):
        raise ValueError(
            "stream: weights of few bits are made of a model in memory: compress it, then quantize_factors"
        )
    if data.calibration is not None:
        raise TypeError("stream: give calibrate= the data itself; a Calibration is that of a model in memory")
    return module.compressed(folder, rank, options, data.how, data.anchored)


@dataclass(frozen=True)
class _Data:
    """What the caller gave to calibrate on, and what was found."""

    how: Calibrate | None
    calibration: Calibration | None
    anchored: Anchored | None

    def seen_by(self, survey: Survey, layers: list[str], narrow: bool) -> tuple[_Data, Survey]:
        """With the calibration of these layers, and of the units of blocks if they may go, if there is data; and the
        survey of the model as its runs left it: for short texts BigBird puts another module of attention in the place
        of its own, with the same layers in it."""
        if self.how is None:
            return self, survey
        how, before = replace(self.how, narrow=narrow or self.how.narrow), list(survey.model.modules())
        data = replace(self, calibration=calibrated(survey, how, layers))
        return data, survey if before == list(survey.model.modules()) else Survey(survey.model)

    def of_inputs(self) -> _Data:
        """Observing the inputs of linear layers, as rounding of weights needs."""
        return self if self.how is None else replace(self, how=replace(self.how, inputs=True))

    def probed(self, survey: Survey) -> _Data:
        """With errors of layers as large as they were measured to be, if that is wanted."""
        if self.how is not None and self.how.probe:
            self.calibration.scales = probed(survey, self.calibration, self.how)
        return self

    def applied(self, survey: Survey, plan: RankPlan) -> nn.Module:
        """The model after the plan was carried out on it."""
        if self.anchored:
            done = carry_out_anchored(survey, plan, self.how.data, self.calibration, self.anchored)
        else:
            done = carry_out(survey, plan, self.calibration)
        return finish(survey, done)


def _data(given: Iterable[object] | Calibrate | Calibration | None, anchored: Anchored | float | bool) -> _Data:
    wanted = as_anchored(anchored)
    if given is None or isinstance(given, Calibration):
        if wanted:
            raise TypeError("anchored: only together with calibrate=data")
        return _Data(None, given, None)
    how = given if isinstance(given, Calibrate) else Calibrate(given)
    if how.probe:
        require_probe(how)
    return _Data(replace(how, data=as_batches(how.data)), None, wanted)


def _plan(survey: Survey, rank: Rank | Budget, data: _Data, options: PlanOptions) -> RankPlan:
    return plan_of(survey, rank, Spectra(data.calibration), options)


def _smallest_good_enough(survey: Survey, budget: Budget, data: _Data, options: PlanOptions) -> RankPlan:
    """The plan of the smallest share of weights whose model loses at most `tolerated_drop`, found by bisection."""

    def quality(model: nn.Module) -> float:
        figures = current().exchange(float(budget.eval_fn(model)))
        return figures[0]  # where others measure something else, the first one's counts

    wanted = quality(survey.model) - budget.tolerated_drop
    low, high, best, plan = 0.0, 1.0, None, None
    nothing = True
    for _ in track(range(_TRIALS), "bisecting"):
        keep = (low + high) / 2
        try:
            plan = _plan(survey, replace(budget, eval_fn=None, keep_params=keep), data, options)
        except BudgetTooSmall:
            low = keep
            continue
        nothing = nothing and plan.does_nothing
        if not plan.does_nothing and quality(data.applied(Survey(copy.deepcopy(survey.model)), plan)) >= wanted:
            high, best = keep, plan
        else:
            low = keep
    if plan is not None and nothing:
        return plan  # it has the reasons
    if best is None:
        raise ValueError(
            f"no model that keeps less than {high:.3f} of the layers stays within tolerated_drop="
            f"{budget.tolerated_drop:g}; the model is as it was"
        )
    return best


def _counterparts(original: nn.Module, submodules: Iterable[nn.Module] | None, copied: nn.Module):
    """The modules of the copy that stand where `submodules` stand in the original."""
    if submodules is None:
        return None
    wanted = {id(m) for m in members(submodules, original)}
    return [twin for old, twin in zip(original.modules(), copied.modules(), strict=True) if id(old) in wanted]
